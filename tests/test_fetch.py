"""Fetching datasets ahead of a run: sizes first, hashes, resume, ways out, and what stays missing.

A server on this machine plays the hosts; nothing leaves the machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from PIL import Image

from lib import captions, dataset_fetch, download, fetch, model_fetch, notebooks, pipeline, weights
from lib.dataset_fetch import SOURCES, Source
from lib.datasets import load_dataset
from lib.errors import UserError
from lib.presets import REPO_ROOT, get_preset

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


@pytest.fixture
def site(tmp_path, monkeypatch):
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


# --- the good way -------------------------------------------------------------------------------


def test_sizes_first_then_the_drawn_pictures_then_nothing(site, tmp_path):
    fetch.fetch_ahead(request(), site.said.append)
    told = next(i for i, line in enumerate(site.said) if line.startswith("  in all about"))
    assert min(site.said_before) > told, "a file was asked for before its size was told"
    assert f"  captions of nocaps: {download.in_words(len(listing()))}" in site.said[:told]
    assert "  4 pictures of nocaps: about 0.1 MB" in site.said[:told]
    drawn = [item.path.stem for item in load_dataset("nocaps", 4, 0).items]
    assert fetched(tmp_path) == sorted(drawn) and len(site.asked) == 5
    assert all(agent and "urllib" not in agent for _, agent, _ in site.asked)
    assert weights.locked_revision(f"{site.url}/nocaps.json") == hashlib.sha256(listing()).hexdigest()

    said = []
    fetch.fetch_ahead(request(), said.append)
    assert len(site.asked) == 5 and len(said) == 1 and said[0].startswith("nothing to fetch")
    fetch.fetch_ahead(request(n=100), said.append)
    assert fetched(tmp_path) == NAMES and len(site.asked) == 7, "only the two others are fetched"
    again = [item.path.stem for item in load_dataset("nocaps", 4, 0).items]
    assert again == drawn, "fetching more changes no draw"
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "nocaps" / ".fetch").exists()


def test_coco_comes_out_of_its_archive(site, tmp_path, monkeypatch):
    content = as_coco(monkeypatch, site)
    fetch.fetch_ahead(request("coco-val2014", n=2), lambda line: None)
    root = tmp_path / "coco"
    assert (root / "annotations" / "captions_val2014.json").read_bytes() == content
    assert len(list((root / "val2014").iterdir())) == 2 and len(list(root.iterdir())) == 2
    assert len(load_dataset("coco-val2014", 2, 0)) == 2


def test_a_folder_of_your_own_needs_no_fetch(site, tmp_path):
    import gzip

    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "images" / "val2014").mkdir(parents=True)
    (root / "annotations" / "captions_val2014.json.gz").write_bytes(gzip.compress(listing()))
    for i, name in enumerate(NAMES):
        (root / "images" / "val2014" / f"{name}.jpg").write_bytes(picture(i))
    fetch.prepare(request("coco-val2014", n=100), lambda: True, site.said.append)
    assert len(load_dataset("coco-val2014")) == 6 and not site.said and not site.asked


def test_addresses_of_the_real_datasets_are_encrypted():
    entry = captions.Entry("1", "COCO_val2014_000000000042.jpg", (), None, (640, 480),
                           {"flickr_url": "http://farm9.staticflickr.com/8186/1_z.jpg",
                            "coco_url": "http://mscoco.org/images/42"})
    bucket = "https://s3.amazonaws.com/images.cocodataset.org/val2014"
    assert dataset_fetch.addresses(entry, SOURCES["coco"]) == [
        f"{bucket}/COCO_val2014_000000000042.jpg", "https://farm9.staticflickr.com/8186/1_z.jpg"]
    nocaps = dataclasses.replace(entry, file_name="0013ea2087020901.jpg",
                                 links={"coco_url": "https://s3.amazonaws.com/nocaps/val/0013ea2087020901.jpg"})
    urls = dataset_fetch.addresses(nocaps, SOURCES["nocaps"])
    assert urls[0] == "https://open-images-dataset.s3.amazonaws.com/validation/0013ea2087020901.jpg"
    assert urls[-1].endswith("/nocaps/val/0013ea2087020901.jpg") and len(urls) == 3
    for link in ("file:///etc/passwd", "ftp://host/x.jpg", "", "/etc/passwd"):
        strange = dataclasses.replace(nocaps, links={"coco_url": link})
        assert dataset_fetch.addresses(strange, SOURCES["nocaps"]) == urls[:2]
    for source in SOURCES.values():
        assert all(url.startswith("https://") for url in (source.url, *source.pictures))


# --- pictures that cannot be had ----------------------------------------------------------------


def test_absent_pictures_are_listed_counted_and_not_asked_again(site, tmp_path):
    fetch.fetch_ahead(request(n=1), lambda line: None)
    drawn = [item.path.stem for item in load_dataset("nocaps", 4, 0).items] + [
        name.removesuffix(".jpg") for name in load_dataset("nocaps", 4, 0).missing]
    gone, page = sorted(set(drawn) - set(fetched(tmp_path)))[:2]
    del site.files[f"/main/{gone}.jpg"]
    site.files[f"/main/{page}.jpg"] = b"<html>please log in</html>"
    fetch.prepare(request(), lambda: False, site.said.append)
    assert any("2 of 3 pictures are at none of their addresses" in line for line in site.said)
    record = json.loads((tmp_path / "nocaps" / "unavailable.json").read_text())
    assert set(record) == {f"{gone}.jpg", f"{page}.jpg"}
    assert "404" in record[f"{gone}.jpg"] and "not a picture" in record[f"{page}.jpg"]
    dataset = load_dataset("nocaps", 4, 0)
    assert len(dataset) == 2 and sorted(dataset.missing) == sorted(record), "missing, not replaced"
    asked, told = len(site.asked), len(site.said)
    fetch.prepare(request(), lambda: False, site.said.append)
    assert len(site.said) == told + 1 and "nocaps: 2 of the drawn pictures are unavailable" in site.said[-1]
    fetch.fetch_ahead(request(), site.said.append)
    assert len(site.asked) == asked
    site.files[f"/main/{gone}.jpg"] = picture(9)
    (tmp_path / "nocaps" / "unavailable.json").unlink()
    site.files[f"/main/{page}.jpg"] = picture(8)
    fetch.fetch_ahead(request(), site.said.append)
    assert len(load_dataset("nocaps", 4, 0)) == 4


def test_the_second_address_is_used(site, tmp_path):
    for i, name in enumerate(NAMES):
        site.files[f"/other/{name}.jpg"] = site.files.pop(f"/main/{name}.jpg")
        if i % 2:  # a page where a picture should be
            site.files[f"/main/{name}.jpg"] = b"<html>moved</html>"
    fetch.fetch_ahead(request(n=6), site.said.append)
    assert fetched(tmp_path) == NAMES and not (tmp_path / "nocaps" / "unavailable.json").exists()


def test_a_foreign_host_must_send_the_listed_size(site):
    entry = captions.Entry("0", "0000.jpg", (), None, (24, 16))
    check = dataset_fetch._check_picture
    check(picture(0, (50, 50)), entry, "https://first.example", foreign=False)
    check(picture(0, (16, 24)), entry, "https://flickr.example", foreign=True)  # turned by its EXIF
    with pytest.raises(UserError, match="50 x 50 pixels, listed are 24 x 16: another picture"):
        check(picture(0, (50, 50)), entry, "https://flickr.example", foreign=True)


def test_a_server_in_trouble_is_asked_again(site, tmp_path):
    site.codes |= {f"/main/{name}.jpg": [503, 500] for name in NAMES}
    site.files["/main/0000.jpg"] = picture(0)
    fetch.fetch_ahead(request(n=6), site.said.append)
    assert fetched(tmp_path) == NAMES


def test_what_was_not_reached_is_fetched_by_the_next_call(site, tmp_path):
    site.codes |= {f"/{place}/{name}.jpg": [503] * 3 for name in NAMES[:2] for place in ("main", "other")}
    with pytest.raises(UserError, match=r"2 of 6 pictures are not fetched .*503.*run again") as caught:
        fetch.fetch_ahead(request(n=6), site.said.append)
    assert "\n" not in str(caught.value) and fetched(tmp_path) == NAMES[2:]
    assert not (tmp_path / "nocaps" / "unavailable.json").exists(), "unreached is not unavailable"
    fetch.fetch_ahead(request(n=6), site.said.append)
    assert fetched(tmp_path) == NAMES


def test_a_portal_before_the_network_is_not_taken_for_the_hosts(site, tmp_path, monkeypatch):
    names = [f"{number:04x}" for number in range(12)]
    site.files = {"/nocaps.json": listing(names)}
    site.files |= {f"/main/{name}.jpg": b"<html>log in</html>" for name in names}
    monkeypatch.setitem(SOURCES, "nocaps", dataclasses.replace(SOURCES["nocaps"], listed=12))
    with pytest.raises(UserError, match="not one of 12 pictures could be had"):
        fetch.fetch_ahead(request(n=12), site.said.append)
    assert not (tmp_path / "nocaps" / "unavailable.json").exists()


# --- damaged and wrong files --------------------------------------------------------------------


def test_interrupted_archive_goes_on_where_it_stopped(site, tmp_path, monkeypatch):
    as_coco(monkeypatch, site)
    other = tmp_path / "coco" / ".fetch" / "annotations_trainval2017.zip.part"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"cut off before")
    site.cut["/annotations.zip"] = 300
    with pytest.raises(UserError, match="cut off after 300 of .*missing|missing.*cut off after 300"):
        fetch.fetch_ahead(request("coco-val2014", n=1), lambda line: None)
    assert (tmp_path / "coco" / ".fetch" / "annotations.zip.part").stat().st_size == 300
    site.cut.clear()
    fetch.fetch_ahead(request("coco-val2014", n=1), lambda line: None)
    ranges = [asked for path, _, asked in site.asked if path == "/annotations.zip"]
    assert ranges == [None, "bytes=300-"] and len(load_dataset("coco-val2014", 1)) == 1
    assert [path.name for path in other.parent.iterdir()] == [other.name], "another's part is kept"


@pytest.mark.parametrize(("changes", "reason"), [
    ({"sha256": "0" * 64}, "has sha256 .* expected 0000"),
    ({"md5": "0" * 32}, "captions_val2014.json has md5 .* expected 0000"),
    ({"member": "annotations/captions_val2015.json"}, "no whole archive with annotations/captions_val2015"),
    ({"listed": 40_504}, "lists 6 pictures, expected 40,504"),
])
def test_wrong_archives_are_refused_and_deleted(site, tmp_path, monkeypatch, changes, reason):
    as_coco(monkeypatch, site, **changes)
    with pytest.raises(UserError, match=reason) as caught:
        dataset_fetch.fetch_annotation("coco-val2014", lambda line: None)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "coco").rglob("*") if path.is_file()]
    assert not weights.LOCK_FILE.exists()


def test_truncated_archive(site, tmp_path, monkeypatch):
    as_coco(monkeypatch, site, sha256=None)
    site.files["/annotations.zip"] = site.files["/annotations.zip"][:200]
    with pytest.raises(UserError, match="no whole archive"):
        dataset_fetch.fetch_annotation("coco-val2014", lambda line: None)
    assert not [path for path in (tmp_path / "coco").rglob("*") if path.is_file()]


@pytest.mark.parametrize(("content", "reason"), [
    (b"<html>log in</html>", "not valid JSON"),
    (listing()[:-20], "not valid JSON"),
    (b"", "is empty"),
    (listing(NAMES[:2]), "lists 2 pictures, expected 6"),
    (listing(["../../outside"]), "leaves its folder"),
    (listing(["/tmp/outside"]), "leaves its folder"),
])
def test_wrong_json_is_refused(site, tmp_path, content, reason):
    site.files["/nocaps.json"] = content
    with pytest.raises(UserError, match=reason) as caught:
        fetch.fetch_ahead(request(n=1), lambda line: None)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "nocaps").rglob("*") if path.is_file()]
    assert not list(tmp_path.rglob("outside.jpg"))


def test_another_file_than_the_locked_one_is_refused(site, tmp_path):
    model_fetch.lock(f"{site.url}/nocaps.json", "0" * 64)
    with pytest.raises(UserError, match="has sha256 .* expected 0000"):
        dataset_fetch.fetch_annotation("nocaps", lambda line: None)


def test_a_folder_that_cannot_be_written(site, tmp_path):
    dataset_fetch.fetch_annotation("nocaps", lambda line: None)
    (tmp_path / "nocaps" / "images").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot be written .*make it writable"):
        fetch.fetch_ahead(request(), lambda line: None)


def test_only_addresses_in_the_network_are_opened(tmp_path):
    (tmp_path / "secret").write_text("secret")
    for call in (download.read, lambda url: download.download(url, tmp_path / "copy")):
        with pytest.raises(UserError, match="not an address in the network"):
            call((tmp_path / "secret").as_uri())
    assert not (tmp_path / "copy").exists()
    guard, asked = download._StaySafe(), download.urllib.request.Request("https://host.example/a")
    with pytest.raises(OSError, match="not encrypted"):
        guard.redirect_request(asked, None, 302, "", {}, "http://host.example/a")


# --- without a network --------------------------------------------------------------------------


def test_offline_is_one_line_and_asks_nobody(site, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for act in (lambda: fetch.fetch_ahead(request(seed=3), site.said.append),
                lambda: fetch.prepare(request(seed=3), lambda: True, site.said.append)):
        with pytest.raises(UserError) as caught:
            act()
        message = str(caught.value)
        for part in ("captions of nocaps (size unknown)", "4 pictures of nocaps (about ", "in all about",
                     "HF_HUB_OFFLINE is set", "./run_all.sh --fetch --preset mini --dataset nocaps --n 4 "
                     "--seed 3", "--preset mini needs nothing"):
            assert part in message
        assert "\n" not in message
    assert not site.asked


def test_no_connection_is_one_line(site, monkeypatch):
    monkeypatch.setitem(SOURCES, "nocaps", dataclasses.replace(
        SOURCES["nocaps"], url="http://127.0.0.1:9/nocaps.json"))
    with pytest.raises(UserError, match="missing: captions of nocaps .*refused.*needs nothing") as caught:
        fetch.prepare(request(), lambda: False, site.said.append)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_with_the_pictures_that_are_there(site, monkeypatch):
    fetch.fetch_ahead(request(n=2), site.said.append)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch.prepare(request(n=4), lambda: False, site.said.append)
    assert "going on with the pictures that are there; missing: 2 pictures of nocaps" in site.said[-1]
    dataset = load_dataset("nocaps", 4, 0)
    assert len(dataset) == 2 and len(dataset.missing) == 2
    with pytest.raises(UserError, match="2 pictures of nocaps .*HF_HUB_OFFLINE is set"):
        fetch.fetch_ahead(request(n=4), site.said.append)


def test_models_are_asked_for_only_where_they_will_run(site, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    fetch.fetch_ahead(request(), site.said.append)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch.prepare(request(preset="fast"), lambda: False, site.said.append)
    with pytest.raises(UserError, match=r"missing: model Salesforce/blip\S+ \(about 1.0 GB\), .*sdxl-turbo"):
        fetch.prepare(request(preset="fast"), lambda: True, site.said.append)
    fetch.prepare(request(), lambda: pytest.fail("mini's models are here"), site.said.append)


def test_the_parser_of_spice_is_offered_where_it_can_run(site, monkeypatch, tmp_path):
    from lib.scoring import spice_official

    monkeypatch.setattr(spice_official, "FOLDER", tmp_path)
    monkeypatch.setattr(spice_official, "URL", f"{site.url}/corenlp.zip")
    site.files["/corenlp.zip"] = b"x" * 2_500_000
    with zipfile.ZipFile(tmp_path / "rhino.jar", "w") as jar:
        jar.writestr("META-INF/services/javax.script.ScriptEngineFactory", "x")
    parts = fetch._spice_parser(site.said.append)
    assert [part.amount for part in parts] == ["2.5 MB"] and not site.said
    for jar in spice_official.JARS:
        (tmp_path / jar).write_bytes(b"jar")
    assert not fetch._spice_parser(site.said.append)
    assert [download.in_words(size) for size in (None, 0, 5, 2_500_000, 10_400_000, 5_500_000_000)] == [
        "size unknown", "0 MB", "0.1 MB", "2.5 MB", "10 MB", "5.5 GB"]


# --- the command --------------------------------------------------------------------------------


def test_mini_needs_nothing_and_loads_no_torch():
    script = ("import sys; from lib import pipeline; status = pipeline.main(['--fetch']); "
              "sys.exit(status or 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nothing to fetch: all that preset mini needs")
    assert len(done.stdout.splitlines()) == 1


def test_a_run_fetches_first(site, tmp_path, monkeypatch, capsys):
    import nbformat

    monkeypatch.setenv("COMPENDIUM_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("COMPENDIUM_RUNS", str(tmp_path / "runs"))
    parameters = 'PRESET = "mini"\nDATASET = "all"\nN_SOURCES = 0\nN_CANDIDATES = 0\nSEED = 0'
    code = ("from lib.datasets import load_dataset\n"
            "print(len(load_dataset(DATASET, N_SOURCES, SEED)), 'sources')")
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(code)]
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={
        "kernelspec": {"name": "python3", "display_name": "Python 3"}}), folder / "01_count.ipynb")
    (folder / "manifest.txt").write_text("01_count\n", encoding="utf-8")
    pipeline.run_all(pipeline.parse(["--dataset", "nocaps", "--n", "3"]), folder)
    out = capsys.readouterr().out
    order = [out.index(part) for part in ("in all about", "fetched: all that was missing", "3 sources")]
    assert order == sorted(order)


def test_finished_runs_need_no_models(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPENDIUM_RUNS", str(tmp_path))
    flags = pipeline.parse(["--n", "2"])
    readers = notebooks.select(notebooks.read_manifest(notebooks.NOTEBOOKS), "03,05")
    players = notebooks.select(notebooks.read_manifest(notebooks.NOTEBOOKS), "01")
    assert pipeline.finished(flags, readers) and not pipeline.finished(flags, players)
