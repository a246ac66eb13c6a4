"""Fetching datasets ahead of a run: sizes first, hashes, resume, ways out, and what stays missing.

A server on this machine plays the hosts; nothing leaves the machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from lib import captions, dataset_fetch, download, fetch, model_fetch, weights
from lib.dataset_fetch import SOURCES
from lib.datasets import load_dataset
from lib.errors import UserError
from tests.hosts import NAMES, as_coco, fetched, listing, picture, request, serving


@pytest.fixture
def site(tmp_path, monkeypatch):
    """See ``hosts.serving``."""
    with serving(tmp_path, monkeypatch) as handler:
        yield handler


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
