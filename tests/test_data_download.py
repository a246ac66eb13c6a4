"""Fetching datasets: sizes first, hashes, what is fetched again and what is not, and what cannot be had.

A server on this machine stands for the hosts; nothing leaves the machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from lib.base import UserError
from lib.data import fetch, load_dataset, missing_files
from lib.data.named import NAMED

FILES = [f"{number:04x}" for number in range(6)]


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (40 * number, 90, 200)).save(buffer, format="JPEG")
    return buffer.getvalue()


def listing(names=FILES) -> bytes:
    """An annotation file in NoCaps' format."""
    return json.dumps({
        "images": [{"id": i, "file_name": f"{name}.jpg", "domain": "in-domain"} for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": i, "caption": f"thing {i}"} for i in range(len(names))]}).encode()


class Site(BaseHTTPRequestHandler):
    """Serves ``files``; answers with other status codes first where ``codes`` has some."""

    def do_GET(self):
        self.asked.append(self.path)
        code = self.codes[self.path].pop(0) if self.codes.get(self.path) else 200
        content = self.files.get(self.path)
        if code != 200 or content is None:
            self.send_error(404 if code == 200 else code)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        """Stay quiet."""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A NoCaps of six images and a COCO val2014 of the same on a server of ours, and empty folders for them."""
    handler = type("Handler", (Site,), {"files": {}, "codes": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("annotations/captions_val2014.json", listing())
        packed.writestr("annotations/instances_val2014.json", b"{}")
    handler.files |= {"/nocaps.json": listing(), "/all.zip": archive.getvalue()}
    handler.files |= {f"/main/{name}.jpg": jpeg(i) for i, name in enumerate(FILES)}
    here = {"listed": 6, "size": 900, "image_size": 650,
            "image_urls": [f"{url}/main/{{stem}}.jpg", f"{url}/other/{{file}}"]}
    monkeypatch.setitem(NAMED, "nocaps", NAMED["nocaps"] | here | {"url": f"{url}/nocaps.json"})
    monkeypatch.setitem(NAMED, "coco-val2014", NAMED["coco-val2014"] | here | {
        "url": f"{url}/all.zip", "sha256": hashlib.sha256(archive.getvalue()).hexdigest()})
    monkeypatch.setenv("NOCAPS_DIR", str(tmp_path / "nocaps"))
    monkeypatch.setenv("COCO_DIR", str(tmp_path / "coco"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield handler
    server.shutdown()
    server.server_close()


def here(tmp_path):
    """The names of the images that were fetched."""
    return sorted(path.stem for path in (tmp_path / "nocaps" / "images").glob("*.jpg"))


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_sizes_then_the_drawn_images_then_nothing(site, tmp_path):
    assert missing_files(["nocaps", "picturebook-coco", "folder:x"], 4, 0) == [
        ("captions of nocaps", 900), ("4 images of nocaps", 2600)] and not site.asked
    fetch(["nocaps", "picturebook-coco"], 4, 0)
    assert len(site.asked) == 5
    drawn = [item.path.stem for item in load_dataset("nocaps").subset(4).items]
    assert here(tmp_path) == sorted(drawn) and missing_files(["nocaps"], 4, 0) == []
    fetch(["nocaps"], 4, 0)
    assert len(site.asked) == 5
    assert missing_files(["nocaps"], 100, 0) == [("2 images of nocaps", 1300)]
    fetch(["nocaps"], 100, 0)
    assert here(tmp_path) == FILES and len(site.asked) == 7 and missing_files(["nocaps"], 100, 0) == []
    assert [item.path.stem for item in load_dataset("nocaps").subset(4).items] == drawn  # fetching changes no draw
    assert len(files(tmp_path)) == 7  # nothing temporary is left


def test_coco_comes_out_of_its_archive(site, tmp_path):
    fetch(["coco-val2014"], 2, 0)
    root = tmp_path / "coco"
    assert (root / "annotations" / "captions_val2014.json").read_bytes() == listing()
    assert len(files(root / "val2014")) == 2 and len(files(root)) == 3 and len(load_dataset("coco-val2014")) == 2


def test_the_real_datasets_are_fetched_by_encrypted_urls_and_known_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("COCO_DIR", str(tmp_path))
    for name in ("coco", "coco-val2014", "coco-val2017", "nocaps"):
        assert all(url.startswith("https://") for url in (NAMED[name]["url"], *NAMED[name]["image_urls"]))
    assert missing_files(["coco"], 5000, 0) == [("captions of coco", 252_872_794),
                                                ("2,000 images of coco", 2000 * 164_058)]


def test_images_that_no_server_has_are_told_and_count_as_missing(site, tmp_path, capsys):
    del site.files["/main/0001.jpg"]
    site.files["/main/0002.jpg"] = b"<html>please log in</html>"
    fetch(["nocaps"], 6, 0)
    said = capsys.readouterr().out
    assert "nocaps: 2 of 6 images are at none of their URLs: 0001.jpg (404" in said
    assert "0002.jpg" in said and "not an image" in said
    dataset = load_dataset("nocaps").subset(6)
    assert len(dataset) == 4 and set(dataset.absent.values()) == {"0001.jpg", "0002.jpg"}
    site.files |= {"/other/0001.jpg": jpeg(1), "/main/0002.jpg": jpeg(2)}  # the second URL is tried too
    fetch(["nocaps"], 6, 0)
    assert here(tmp_path) == FILES


def test_a_server_in_trouble_is_asked_again(site, tmp_path):
    site.codes |= {"/main/0003.jpg": [503]}
    fetch(["nocaps"], 6, 0)
    assert here(tmp_path) == FILES


def test_without_a_connection_the_images_that_are_there_are_used(site, monkeypatch, capsys):
    fetch(["nocaps"], 2, 0)
    monkeypatch.setattr("lib.data.named.RETRY", 0)
    monkeypatch.setitem(NAMED, "nocaps", NAMED["nocaps"] | {"image_urls": ["http://127.0.0.1:9/{file}"]})
    fetch(["nocaps"], 4, 0)
    assert "nocaps: not all images are fetched (" in capsys.readouterr().out
    assert len(load_dataset("nocaps").subset(4)) == 2


def test_offline_nothing_is_fetched_and_what_is_here_is_used(site, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch(["nocaps"], 4, 0)
    assert not site.asked and "HF_HUB_OFFLINE is set: nothing is fetched here; on a conn" in capsys.readouterr().out
    with pytest.raises(UserError, match="is absent: fetch them with ./run_all.sh --fetch"):
        load_dataset("nocaps")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fetch(["nocaps"], 2, 0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch(["nocaps"], 4, 0)
    assert len(load_dataset("nocaps").subset(4)) == 2


def test_no_connection_is_one_line_that_says_what_to_do_by_hand(site, monkeypatch):
    monkeypatch.setitem(NAMED, "nocaps", NAMED["nocaps"] | {"url": "http://127.0.0.1:9/nocaps.json"})
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    by_hand = r"put the file of https://nocaps.org/download at \S+/nocaps/annotations/nocaps_val_4500_captions.json"
    with pytest.raises(UserError, match=f"captions of nocaps cannot be fetched .*refused.*{by_hand}") as caught:
        fetch(["nocaps"], 4, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"sha256": "0" * 64}, "hash"), ({"member": "annotations/captions_val2015.json"}, "captions_val2015"),
    ({"listed": 40_504}, "does not list 40,504 images")])
def test_wrong_archives_are_refused_and_leave_nothing(site, tmp_path, monkeypatch, changes, reason):
    monkeypatch.setitem(NAMED, "coco-val2014", NAMED["coco-val2014"] | changes)
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match=f"captions of coco-val2014 cannot be fetched .*{reason}") as caught:
        fetch(["coco-val2014"], 1, 0)
    assert "\n" not in str(caught.value) and not files(tmp_path)


@pytest.mark.parametrize(("content", "reason"), [
    (b"<html>log in</html>", "Invalid JSON"), (listing()[:-20], "Invalid JSON"),
    (listing(FILES[:2]), "does not list 6 images"), (listing(["../../outside"]), "leaves its folder")])
def test_wrong_captions_are_refused_and_leave_nothing(site, tmp_path, content, reason):
    site.files["/nocaps.json"] = content
    with pytest.raises(UserError, match=reason) as caught:
        fetch(["nocaps"], 1, 0)
    assert "\n" not in str(caught.value) and not files(tmp_path)
