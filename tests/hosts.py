"""A server on this machine that plays the hosts of the datasets; nothing leaves the machine."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

from PIL import Image

from lib import download, fetch, model_fetch, weights
from lib.dataset_fetch import SOURCES, Source
from lib.presets import get_preset

NAMES = [f"{number:04x}" for number in range(6)]


def picture(number, size=(24, 16)):
    """A JPEG file of its own colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (40 * number, 90, 200)).save(buffer, format="JPEG")
    return buffer.getvalue()


def listing(names=NAMES, **changes):
    """An annotation file in NoCaps' format."""
    data = {
        "images": [{"id": i, "file_name": f"{name}.jpg", "open_images_id": name, "width": 24, "height": 16,
                    "domain": "in-domain", "coco_url": f"https://elsewhere.example/{name}.jpg"}
                   for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": i, "caption": f"thing {i}"} for i in range(len(names))],
    }
    return json.dumps(data | changes).encode()


class Site(BaseHTTPRequestHandler):
    """Serves files with ranges; may cut one off, or answer with other status codes first."""

    files: ClassVar[dict[str, bytes]] = {}
    cut: ClassVar[dict[str, int]] = {}
    codes: ClassVar[dict[str, list[int]]] = {}
    asked: ClassVar[list[tuple[str, str, str | None]]] = []
    said: ClassVar[list[str]] = []
    said_before: ClassVar[list[int]] = []

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self.said_before.append(len(self.said))
        self.asked.append((self.path, self.headers.get("User-Agent"), self.headers.get("Range")))
        self._answer(body=True)

    def _answer(self, body):
        code = self.codes[self.path].pop(0) if self.codes.get(self.path) else 200
        content = self.files.get(self.path)
        if code == 200 and content is not None:
            asked = self.headers.get("Range")
            content = content[int(asked[6:-1]):] if asked else content
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content[:self.cut.get(self.path, len(content))])
        else:
            self.send_error(404 if code == 200 else code)

    def log_message(self, *arguments):
        """Stay quiet."""


@contextmanager
def serving(tmp_path, monkeypatch):
    """A NoCaps of six pictures on a server of ours, an empty folder for it and an empty lock."""
    fresh = {"files": {}, "cut": {}, "codes": {}, "asked": [], "said": [], "said_before": []}
    handler = type("Handler", (Site,), fresh)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    handler.files |= {"/nocaps.json": listing()} | {
        f"/main/{name}.jpg": picture(i) for i, name in enumerate(NAMES)}
    monkeypatch.setitem(SOURCES, "nocaps", Source(
        url=f"{handler.url}/nocaps.json", size=None, listed=len(NAMES), picture_size=650,
        pictures=(f"{handler.url}/main/{{stem}}.jpg", f"{handler.url}/other/{{file}}"), link="no_url"))
    for module in (weights, model_fetch):
        monkeypatch.setattr(module, "LOCK_FILE", tmp_path / "lock.json")
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.01))
    monkeypatch.setenv("NOCAPS_DIR", str(tmp_path / "nocaps"))
    monkeypatch.setenv("COCO_DIR", str(tmp_path / "coco"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield handler
    server.shutdown()
    server.server_close()


def request(dataset="nocaps", n=4, seed=0, preset="mini"):
    return fetch.Request(get_preset(preset), preset, (dataset,), n, seed)


def fetched(root):
    """The names of the pictures that are there."""
    return sorted(path.stem for path in (root / "nocaps" / "images").glob("*.jpg"))


def as_coco(monkeypatch, site, **changes):
    """Let val2014 come from our server as an archive; returns the annotation file's bytes."""
    content = listing()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations/captions_val2014.json", content)
        archive.writestr("annotations/instances_val2014.json", b"{}")
    site.files["/annotations.zip"] = buffer.getvalue()
    source = dataclasses.replace(
        SOURCES["coco-val2014"], url=f"{site.url}/annotations.zip", listed=len(NAMES),
        sha256=hashlib.sha256(buffer.getvalue()).hexdigest(), md5=hashlib.md5(content).hexdigest(),
        pictures=(f"{site.url}/main/{{file}}",))
    monkeypatch.setitem(SOURCES, "coco-val2014", dataclasses.replace(source, **changes))
    return content
