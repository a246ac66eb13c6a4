"""Datasets by name: the picture book, COCO's and NoCaps' files, draws, fingerprints, what feeds which task."""

from __future__ import annotations

import gzip
import hashlib
import json
import random

import pytest
from PIL import Image

from lib.base import ROOT, UserError
from lib.data import load_dataset
from lib.data.captions import read_coco
from lib.data.named import split_ids

SHARED = ROOT.parent / "shared" / "data" / "coco"  # real captions and photographs; not part of the repository


def annotation(**changes):
    """A small file in the COCO captions format, with keys replaced."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (1, 2, 3)],
        "annotations": [{"id": 0, "image_id": i, "caption": f"thing {i} number {j}"}
                        for i in (1, 2, 3) for j in (0, 1)],
    } | changes


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """Writes a coco-val2017 of three images and loads it."""
    monkeypatch.setenv("COCO_DIR", str(tmp_path))
    for folder in ("annotations", "val2017"):
        (tmp_path / folder).mkdir()

    def load(data=None, absent=()):
        text = json.dumps(annotation() if data is None else data) if not isinstance(data, str | bytes) else data
        raw = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "annotations" / "captions_val2017.json").write_bytes(raw)
        for i in (1, 2, 3):
            path = tmp_path / "val2017" / f"{i}.png"
            path.unlink(missing_ok=True)
            if i not in absent:
                Image.new("RGB", (8, 8), (i * 50, 0, 0)).save(path)
        return load_dataset("coco-val2017")

    return load


def ids(dataset):
    return [item.id for item in dataset.items]


# --- the picture book ---------------------------------------------------------------------------


def test_the_picture_book_is_drawn_as_ever():
    """Rows depend on these draws: the digests are those of the first version's ids."""
    for name, digest in (("picturebook-coco", "12ab31fbff6ddbdd"), ("picturebook-nocaps", "a9b6693dd0fe5ffc")):
        drawn = ids(load_dataset(name).subset(120, 0))
        assert hashlib.sha256(" ".join(drawn).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(("name", "count", "domains"), [
    ("picturebook-coco", 5, {None}), ("picturebook-nocaps", 10, {"in-domain", "near-domain", "out-domain"})])
def test_the_picture_book_is_complete(name, count, domains):
    dataset = load_dataset(name)
    assert len(dataset) == 500 and not dataset.absent and dataset.name == dataset.address == name
    assert {len(item.references) for item in dataset.items} == {count}
    assert all(item.scene for item in dataset.items) and {item.domain for item in dataset.items} == domains
    assert dataset.items[0].image().size == (64, 64)
    assert list(dataset.notes) == [f"{name}: 500 images, {500 * count:,} captions"]
    dataset.check_images()


def test_a_draw_is_seeded_nested_and_keeps_the_order():
    whole = load_dataset("picturebook-coco")
    small, large = whole.subset(20, seed=3), whole.subset(60, seed=3)
    assert len(small) == 20 and set(ids(small)) < set(ids(large)) and large.subset(20, seed=3) == small
    assert ids(large) == [key for key in ids(whole) if key in set(ids(large))]
    assert set(ids(whole.subset(20, seed=4))) != set(ids(small))
    assert len(small.references) == 500 and whole.subset(None) is whole and len(whole.subset(9999)) == 500
    for n in (0, -1, 2.5, "3"):
        with pytest.raises(UserError, match="number of sources"):
            whole.subset(n)


# --- COCO and NoCaps ----------------------------------------------------------------------------


def test_coco_format(coco):
    dataset, data = coco(), annotation()
    random.Random(0).shuffle(data["images"])
    assert coco(data).subset(2).fingerprint == dataset.subset(2).fingerprint  # a draw knows no order
    assert ids(dataset) == ["1", "2", "3"]
    assert dataset.items[1].references == ("thing 2 number 0", "thing 2 number 1")
    assert dataset.items[2].image().getpixel((0, 0)) == (150, 0, 0)
    assert dataset.items[0].domain is None and dataset.items[0].scene is None
    assert set(dataset.references) == {"1", "2", "3"} and not dataset.absent
    assert dataset.feeds("image") is None and dataset.feeds("text") is None


def test_a_byte_order_mark_and_captions_with_any_blanks(coco):
    data = annotation()
    data["annotations"][0]["caption"] = " thing\u2028one\u0085 \n"
    assert coco(b"\xef\xbb\xbf" + json.dumps(data).encode()).items[0].references[0] == "thing one"


def test_captions_without_a_word_are_dropped_and_that_is_said(coco):
    data = annotation()
    data["annotations"][0]["caption"] = " \n"
    data["annotations"][2]["caption"] = data["annotations"][3]["caption"] = "...!"
    dataset = coco(data)
    assert [len(item.references) for item in dataset.items] == [1, 0, 2] and set(dataset.references) == {"1", "3"}
    assert "1 images without captions, such as 2" in dataset.notes[0]
    assert dataset.notes[1] == "coco-val2017: captions without a word were left out: 1, 2"


def test_absent_images_are_missing_and_not_replaced(coco):
    drawn = ids(coco().subset(2))
    other = next(key for key in ("1", "2", "3") if key not in drawn)
    dataset = coco(absent=(int(drawn[0]),))
    assert len(dataset) == 2 and dataset.absent == {drawn[0]: f"{drawn[0]}.png"} and len(dataset.references) == 3
    assert "1 listed images are not in" in dataset.notes[0]
    less = dataset.subset(2)
    assert ids(less) == drawn[1:] and list(less.absent) == drawn[:1]
    with pytest.raises(UserError, match="no image drawn with seed 0 is there: fetch them with"):
        coco(absent=tuple(map(int, drawn))).subset(2)
    assert ids(coco(absent=tuple(map(int, drawn)))) == [other]


def test_captions_without_any_image_feed_the_text_task(coco):
    dataset = coco(absent=(1, 2, 3))
    assert len(dataset) == 3 and dataset.feeds("text") is None
    assert "no images, which image reconstruction starts from: fetch them with" in dataset.feeds("image")
    with pytest.raises(UserError, match="no image"):
        dataset.items[0].image()


def test_the_fingerprint_is_that_of_the_content(coco, tmp_path):
    before = coco().fingerprint
    assert coco().fingerprint == before
    path = tmp_path / "val2017" / "1.png"
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "blue.bmp")
    path.write_bytes((tmp_path / "blue.bmp").read_bytes())
    one = load_dataset("coco-val2017").fingerprint
    Image.new("RGB", (8, 8), "lime").save(tmp_path / "lime.bmp")  # as many bytes
    path.write_bytes((tmp_path / "lime.bmp").read_bytes())
    assert len({before, one, load_dataset("coco-val2017").fingerprint}) == 3
    data = annotation()
    data["annotations"][0]["caption"] = "another thing"
    assert coco(data).fingerprint != before
    path.unlink()
    broken = coco()
    path.unlink()
    with pytest.raises(UserError, match=r"1\.png cannot be read"):
        _ = broken.fingerprint


def test_nocaps_has_domains_and_the_folder_may_be_named_in_any_way(tmp_path, monkeypatch):
    places = tmp_path / "nocaps"
    (places / "images").mkdir(parents=True)
    domains = {1: "in-domain", 2: "out-domain"}
    images = [{"id": i, "file_name": f"{i}.png", "domain": domain} for i, domain in domains.items()]
    notes = [{"image_id": 1, "caption": "one"}]
    (places / "nocaps_val_4500_captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    for i in (1, 2):
        Image.new("RGB", (8, 8)).save(places / "images" / f"{i}.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COMPENDIUM_CALLER", str(tmp_path))
    for value in (str(places), "nocaps", "~/nocaps", " nocaps/ "):
        monkeypatch.setenv("NOCAPS_DIR", value)
        assert [item.domain for item in load_dataset("nocaps").items] == ["in-domain", "out-domain"]
    monkeypatch.setenv("NOCAPS_DIR", " ")  # empty means unset
    with pytest.raises(UserError, match=f"{ROOT}/data/nocaps/annotations"):
        load_dataset("nocaps")


def test_coco_is_2000_of_karpathys_test_images(tmp_path, monkeypatch):
    split = split_ids("coco")
    assert len(split) == 2000 and min(map(int, split)) == 359 and sum(map(int, split)) == 580_908_798
    monkeypatch.setenv("COCO_DIR", str(tmp_path))
    inside, outside = sorted(split, key=int)[:3], ["1", "2"]
    images = [{"id": int(key), "file_name": f"{key}.png"} for key in [*inside, *outside]]
    notes = [{"image_id": image["id"], "caption": "a thing"} for image in images]
    (tmp_path / "annotations").mkdir()
    raw = json.dumps({"images": images, "annotations": notes}).encode()
    (tmp_path / "annotations" / "captions_val2014.json.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    for key in [inside[0], inside[2], *outside]:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "val2014" / f"{key}.png")
    dataset = load_dataset("coco")
    assert ids(dataset) == [inside[0], inside[2]] and set(dataset.absent) == {inside[1]}
    assert set(dataset.references) == set(inside) and len(load_dataset("coco-val2014")) == 4
    raw = json.dumps({"images": images[3:], "annotations": notes[3:]}).encode()
    (tmp_path / "annotations" / "captions_val2014.json.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(UserError, match="none of the ids in data/splits/karpathy_test.txt is in it"):
        load_dataset("coco")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real COCO files are not beside this checkout")
def test_real_coco():
    entries = read_coco(SHARED / "captions_val2014.json.gz")
    assert len(entries) == 40_504 and sum(len(entry.captions) for entry in entries) == 202_654
    assert split_ids("coco") <= {entry.id for entry in entries}


# --- bad files ----------------------------------------------------------------------------------


def one(key, **values):
    """An annotation file whose first image or annotation has other values (None removes a key)."""
    data = annotation()
    data[key][0] = {name: value for name, value in (data[key][0] | values).items() if value is not None}
    return data


BAD = {
    "empty": ("", "Invalid JSON"),
    "not json": ("{", "Invalid JSON"),
    "not UTF-8": (b'{"images": "\xff"}', "in position 12: .* save it as text in UTF-8"),
    "too deep": ("[" * 100_000, "Invalid JSON"),
    "half a character": ('{"images": [{"id": "\\ud83d"}]}', "Invalid JSON"),
    "a list": ([], "object"),
    "no images": ({"annotations": []}, "json.images: Field required"),
    "images empty": (annotation(images=[]), "images: List should have at least 1 item"),
    "image without name": (one("images", file_name=None), "images.0.file_name: Field required"),
    "repeated image": (one("images", id=2), "an image id is there twice"),
    "id is a list": (one("images", id=[1]), "images.0.id"),
    "unknown image": (one("annotations", image_id=9), "no image has the image_id 9"),
    "no caption": (one("annotations", caption=None), "annotations.0.caption: Field required"),
    "caption is a number": (one("annotations", caption=5), "annotations.0.caption: .* string .given: 5"),
    "name leaves": (one("images", file_name="../1.png"), "leaves its folder"),
    "name is absolute": (one("images", file_name="/etc/passwd"), "leaves its folder"),
    "name for Windows": (one("images", file_name="..\\1.png"), "leaves its folder"),
    "name with a drive": (one("images", file_name="C:1.png"), "leaves its folder"),
    "name with a null": (one("images", file_name="1\0.png"), "leaves its folder"),
    "name is a number": (one("images", file_name=7), "images.0.file_name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_annotations_give_one_line(coco, case):
    data, reason = BAD[case]
    with pytest.raises(UserError, match=reason) as caught:
        coco(data)
    line = str(caught.value)
    assert "captions_val2017.json" in line and "\n" not in line and len(line) < 500


@pytest.mark.parametrize(("name", "reason"), [
    ("flickr", "unknown dataset 'flickr': choose one of picturebook-coco"), ("folder:", "unknown dataset 'folder:'"),
    ("", "unknown dataset ''"), ("folder:/nowhere/at/all", "does not exist"), ("texts:/nowhere.txt", "does not exist"),
])
def test_bad_names(name, reason):
    with pytest.raises(UserError, match=reason):
        load_dataset(name)


@pytest.mark.parametrize("name", ["coco", "coco-val2014", "coco-val2017", "nocaps"])
def test_absent_data_tells_how_to_get_it(name, monkeypatch, tmp_path):
    monkeypatch.setenv("COCO_DIR", str(tmp_path))
    monkeypatch.setenv("NOCAPS_DIR", str(tmp_path))
    fetch = f"--fetch --preset paper --dataset {name}, or set"
    with pytest.raises(UserError, match=f"dataset {name}: .* is absent: .*{fetch} .*_DIR"):
        load_dataset(name)
