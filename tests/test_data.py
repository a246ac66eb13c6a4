"""Datasets by name: draws, fingerprints, the files of COCO and NoCaps, and a folder or text file of the user's with
every form of captions, odd names, and what is said about the rest."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import unicodedata

import pytest
from PIL import Image

from lib.base import ROOT, UserError
from lib.data import load_dataset


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


@pytest.mark.parametrize(("name", "count", "domains", "digest"), [
    ("picturebook-coco", 5, {None}, "12ab31fbff6ddbdd"),
    ("picturebook-nocaps", 10, {"in-domain", "near-domain", "out-domain"}, "a9b6693dd0fe5ffc")])
def test_the_picture_book_is_complete_and_drawn_as_ever(name, count, domains, digest):
    """Rows depend on these draws: the digests are those of the first version's ids."""
    dataset = load_dataset(name)
    assert hashlib.sha256(" ".join(ids(dataset.subset(120, 0))).encode()).hexdigest()[:16] == digest
    assert len(dataset) == 500 and not dataset.absent and dataset.name == name
    assert all(item.scene for item in dataset.items) and {item.domain for item in dataset.items} == domains
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


def test_captions_have_single_blanks_and_those_without_a_word_are_dropped_and_that_is_said(coco):
    data = annotation()
    data["annotations"][0]["caption"], data["annotations"][4]["caption"] = " \n", " thing\u2028one\u0085 \n"
    data["annotations"][2]["caption"] = data["annotations"][3]["caption"] = "...!"
    dataset = coco(b"\xef\xbb\xbf" + json.dumps(data).encode())  # a byte-order mark
    assert [len(item.references) for item in dataset.items] == [1, 0, 2] and set(dataset.references) == {"1", "3"}
    assert dataset.references["3"][0] == "thing one"
    assert "images without captions: 1 (2)" in dataset.notes[0]
    assert dataset.notes[1] == "coco-val2017: captions without a word were left out: 1, 2"


def test_absent_images_are_missing_and_not_replaced(coco):
    drawn = ids(coco().subset(2))
    other = next(key for key in ("1", "2", "3") if key not in drawn)
    dataset = coco(absent=(int(drawn[0]),))
    assert len(dataset) == 2 and dataset.absent == {drawn[0]: f"{drawn[0]}.png"} and len(dataset.references) == 3
    assert "listed images that are not in" in dataset.notes[0]
    less = dataset.subset(2)
    assert ids(less) == drawn[1:] and list(less.absent) == drawn[:1]
    with pytest.raises(UserError, match="no image drawn with seed 0 is there: fetch them with"):
        coco(absent=tuple(map(int, drawn))).subset(2)
    assert ids(coco(absent=tuple(map(int, drawn)))) == [other]
    none = coco(absent=(1, 2, 3))
    assert len(none) == 3 and none.feeds("text") is None and "reconstruction starts from: fetch them" in none.feeds("image")


def test_the_fingerprint_is_that_of_the_content(coco, tmp_path):
    before, path = coco().fingerprint, tmp_path / "val2017" / "1.png"
    assert coco().fingerprint == before
    found = {before}
    for colour in ("blue", "lime"):  # as many bytes
        Image.new("RGB", (8, 8), colour).save(path, format="BMP")
        found.add(load_dataset("coco-val2017").fingerprint)
    assert len(found) == 3
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
    lines = (ROOT / "data" / "splits" / "coco.txt").read_text().splitlines()
    split = {key for line in lines if line[0] != "#" for key in line.split()}
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
    with pytest.raises(UserError, match="none of the ids in data/splits/coco.txt is in it"):
        load_dataset("coco")


# --- bad files ----------------------------------------------------------------------------------


def one(key, **values):
    """An annotation file whose first image or annotation has other values (None removes a key)."""
    data = annotation()
    data[key][0] = {name: value for name, value in (data[key][0] | values).items() if value is not None}
    return data


BAD = {
    "not json": ("{", "Invalid JSON"),
    "not UTF-8": (b'{"images": "\xff"}', "in position 12: .* save it as text in UTF-8"),
    "half a character": ('{"images": [{"id": "\\ud83d"}]}', "Invalid JSON"),
    "images empty": (annotation(images=[]), "images: List should have at least 1 item"),
    "image without name": (one("images", file_name=None), "images.0.file_name: Field required"),
    "repeated image": (one("images", id=2), "an image id is there twice"),
    "unknown image": (one("annotations", image_id=9), "no image has the image_id 9"),
    "no caption": (one("annotations", caption=None), "annotations.0.caption: Field required"),
    "caption is a number": (one("annotations", caption=5), "annotations.0.caption: .* string .given: 5"),
    "name leaves": (one("images", file_name="../1.png"), "leaves its folder"),
    "name is absolute": (one("images", file_name="/etc/passwd"), "leaves its folder"),
    "name for Windows": (one("images", file_name="..\\1.png"), "leaves its folder"),
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
    ("folder:/nowhere/at/all", "does not exist"), ("texts:/nowhere.txt", "does not exist")])
def test_bad_names(name, reason):
    with pytest.raises(UserError, match=reason):
        load_dataset(name)


@pytest.mark.parametrize("name", ["coco", "coco-val2014", "coco-val2017", "nocaps"])
def test_absent_data_tells_how_to_get_it(name, monkeypatch, tmp_path):
    monkeypatch.setenv(folder := f"{name.partition('-')[0].upper()}_DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"{name}: .* is absent: .*--fetch --preset paper --dataset {name}, or set {folder}"):
        load_dataset(name)


# --- a folder of the user's ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three images."""
    place = tmp_path / "my" / "images"
    place.mkdir(parents=True)
    for i in (1, 2, 3):
        Image.new("RGB", (8, 8), (i * 50, 0, 0)).save(place / f"{i}.png")
    return place


def load(folder):
    return load_dataset(f"folder:{folder}")


def read(folder):
    return {item.id: item.references for item in load(folder).items}


COCO = {"images": [{"id": 7, "file_name": "1.png"}, {"id": 8, "file_name": "2.png"}],
        "annotations": [{"image_id": 7, "caption": "one"}, {"image_id": 7, "caption": "uno"},
                        {"image_id": 8, "caption": "two"}]}
GOOD = {
    "captions.json": json.dumps({"1.png": ["one", "uno"], "2.png": "two"}),
    "captions.JSON": '[{"file": "1.png", "captions": ["one", "uno"]}, {"filename": "./2.png", "text": "two"}]',
    "Captions.json": json.dumps(COCO),
    "captions.jsonl": '{"file_name": "1.png", "captions": ["one", "uno"]}\r\n\r\n{"image": "2.png", "text": "two"}',
    "metadata.jsonl": '\ufeff{"file_name": "1", "text": "one"}\r{"file_name": "1", "text": "uno"}\r'
                      '{"file_name": "2", "text": "two"}\r',
    "captions.csv": '\ufefffile_name,caption\n1.png ,one\n1.png,"uno"\n\n2.png, "two"\n',
    "metadata.csv": "Caption;License;File_Name\r\none;CC0;1.png\r\nuno;;1.png\r\ntwo;;2.png\r\n",
}


@pytest.mark.parametrize("name", GOOD)
def test_captions_in_any_format(folder, name):
    (folder / name).write_text(GOOD[name], encoding="utf-8", newline="")
    dataset = load(folder)
    assert [(i.id, i.references) for i in dataset.items] == [
        ("1.png", ("one", "uno")), ("2.png", ("two",)), ("3.png", ())]
    assert dataset.notes == ("images: 3 images, 3 captions; images without captions: 1 (3.png)",)
    assert dataset.references == {"1.png": ("one", "uno"), "2.png": ("two",)}
    assert dataset.feeds("image") is None and dataset.feeds("text") is None


def test_captions_in_texts_beside_the_images_and_in_subfolders(folder):
    (folder / "1.txt").write_text("one\nuno\n")
    (folder / "deep").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "deep" / "1.png")
    Image.new("RGB", (4, 4)).save(folder / "deep" / "4.png")
    (folder / "deep" / "metadata.jsonl").write_text('{"file_name": "4.png", "text": "four"}')
    (folder / "captions.csv").write_text("file_name,caption\n1.png,one\n1.png,one\ndeep/1.png,eins\n")
    assert read(folder) == {"1.png": ("one", "one", "uno"), "2.png": (), "3.png": (), "deep/1.png": ("eins",),
                            "deep/4.png": ("four",)}


def test_images_without_captions_and_captions_without_images(folder, tmp_path):
    dataset = load(folder)
    assert not dataset.references and dataset.feeds("image") is None
    assert dataset.feeds("text").startswith("dataset images has no captions, which text reconstruction starts from")
    assert dataset.notes == ("images: 3 images, 0 captions",)
    for path in folder.iterdir():
        path.unlink()
    (tmp_path / "captions.json").write_text(json.dumps({"1.png": "one"}))
    dataset = load(tmp_path)
    assert [(i.id, i.path, i.references) for i in dataset.items] == [("1.png", None, ("one",))]
    assert dataset.feeds("text") is None and "has no images" in dataset.feeds("image")


def test_any_form_of_the_path_gives_one_dataset(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COMPENDIUM_CALLER", str(tmp_path))
    found = [load_dataset(f"folder:{place}") for place in
             (folder, f"{folder}/", "my/images", "./my/../my/images/", "~/my/images")]
    assert {d.name for d in found} == {"images"} and len({d.items for d in found}) == 1
    assert len({tuple(i.id for i in d.subset(2).items) for d in found}) == 1
    monkeypatch.setenv("COMPENDIUM_CALLER", str(folder))
    assert load_dataset("folder:.").name == "images"


def test_names_match_across_unicode_forms_and_without_extension(folder):
    for i, form in enumerate(("NFC", "NFD")):
        Image.new("RGB", (4, 4)).save(folder / unicodedata.normalize(form, f"Brücke{i}.jpg"))
    Image.new("RGB", (4, 4)).save(folder / "1.v2.png")
    known = {unicodedata.normalize("NFD", "Brücke0.jpg"): "a", unicodedata.normalize("NFC", "Brücke1"): "b",
             "2": "c", "1.v2": "d"}
    (folder / "captions.json").write_text(json.dumps(known))
    found = {unicodedata.normalize("NFC", key): texts for key, texts in read(folder).items() if texts}
    assert found == {"Brücke0.jpg": ("a",), "Brücke1.jpg": ("b",), "2.png": ("c",), "1.v2.png": ("d",)}


def test_what_was_matched_and_what_passed_over_is_one_line(folder):
    for name in ("photo.jfif", "photo.jpe"):
        Image.new("RGB", (4, 4)).save(folder / name, format="JPEG")
    for name in ("IMG_1.HEIC", "IMG_2.heic", "drawing.svg", "readme", "readme.md", "notes.txt", "labels.csv", ".hidden.png",
                 ".DS_Store", "photo.txt"):
        (folder / name).write_bytes(b"x")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "captions.json").write_text(json.dumps({"1": "one", "7.png": "seven", "8.png": "eight", "photo": "?"}))
    dataset = load(folder)
    assert [item.id for item in dataset.items] == ["1.png", "2.png", "3.png", "photo.jfif", "photo.jpe"]
    line, = dataset.notes
    for part in ("images: 5 images, 1 captions;", "images without captions: 4 (2.png, 3.png, photo.jfif and 1 more);",
                 "captions whose name fits no image: 3 (7.png, 8.png, photo);", "1 broken link", "1 hidden image",
                 "2 .heic (not read: convert images to JPEG", "1 .svg (not read", "1 without extension (not read",
                 "2 .txt (no one image has its name)", "1 .md (no image)", "1 .csv (not named captions)"):
        assert part in line, part
    assert "\n" not in line


def test_linked_folders_are_read_once(folder, tmp_path):
    real = tmp_path / "elsewhere"
    real.mkdir()
    Image.new("RGB", (4, 4)).save(real / "4.png")
    (real / "back").symlink_to(folder)
    (folder / "train").symlink_to(real)
    (folder / "a-again").symlink_to(folder / "train")
    Image.new("RGB", (4, 4)).save(tmp_path / "5.png")
    (folder / "5.png").symlink_to(tmp_path / "5.png")
    dataset = load(folder)
    assert [item.id for item in dataset.items] == ["1.png", "2.png", "3.png", "5.png", "a-again/4.png"]
    assert "passed over: 2 linked folder that was read already" in dataset.notes[0]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_and_carriage_returns_end_a_line(folder, separator):
    (folder / "captions.jsonl").write_text(json.dumps({"file_name": "1.png", "text": f"one{separator}eins"},
                                                      ensure_ascii=False), encoding="utf-8")
    assert read(folder)["1.png"] == ("one eins",)
    path = folder / "prompts.txt"
    path.write_text(f"a{separator}boat\r\nan owl\rtwo", encoding="utf-8", newline="")
    assert [item.references[0] for item in load_dataset(f"texts:{path}").items] == ["a boat", "an owl", "two"]


BAD_CAPTIONS = [
    ("captions.json", "7", "Input should be an object"),
    ("captions.json", "{}", "has no captions: write some or remove"),
    ("captions.json", '{"1.png": 5}', r"entry 1.captions.0: .*string .given: 5"),
    ("captions.json", "[" * 100_000, "Invalid JSON"),
    ("captions.json", '{"1.png": "one", "1.png": "uno"}', "'1.png' is there twice: give its captions as one list"),
    ("captions.jsonl", '{"file_name": "1.png"}', r"line 1.captions: Field required"),
    ("captions.jsonl", '{"file_name": "1.png", "text": "one"}\n{', "line 2: Invalid JSON"),
    ("captions.csv", "1.png,a ball\n2.png,two", "line 1 needs a column file_name .*one column caption"),
    ("captions.csv", "file_name,caption,caption\n1.png,one,uno\n", "line 1 needs .*one column caption"),
    ("captions.csv", "file_name,caption\n../1.png,one\n", "line 2.file_name: .*leaves its folder"),
    ("captions.csv", "file_name,caption\n1.png,one\n2.png,A ball, orange\n", "line 3 has 3 fields, the header 2"),
    ("captions.csv", 'file_name,caption\n1.png,"a ball\n2.png,two\n3.png,"three"\n', "line 2: a quote is not closed on it"),
    ("captions.csv", 'file_name,caption\n1.png,one\n2.png,"two" owls\n', "line 3: a quote is not closed on it"),
    ("captions.csv", 'file_name,caption\n1.png,"a ball\n' + "x.png,a dog in the park\n" * 9000, "line 2: a quote"),
]


@pytest.mark.parametrize(("name", "text", "reason"), BAD_CAPTIONS)
def test_bad_captions_give_one_line_with_file_and_row(folder, name, text, reason):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        load(folder)
    assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_quote_inside_a_csv_field_is_a_sign_like_others(folder):
    (folder / "captions.csv").write_text('file_name,caption\n1.png,a 12" bus\n2.png,"a ""small"" boat, red"\n')
    assert read(folder) == {"1.png": ('a 12" bus',), "2.png": ('a "small" boat, red',), "3.png": ()}


def test_bad_folders(folder, tmp_path):
    (tmp_path / "IMG.heic").write_bytes(b"x")
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"has no images .*\.jfif.*passed over: 1 \.heic \(not read: convert"):
        load(tmp_path)
    for name in ("captions.csv", "metadata.csv"):
        (folder / name).write_text("file,text\n1.png,one")
    with pytest.raises(UserError, match="has captions.csv and metadata.csv: keep one captions file"):
        load(folder)
    with pytest.raises(UserError, match="does not exist"):
        load_dataset("folder:s3://bucket/images")
    with pytest.raises(UserError, match="captions.csv is a file: give the folder of images, or texts:FILE"):
        load_dataset(f"folder:{folder / 'captions.csv'}")
    with pytest.raises(UserError, match=f"is a folder: give folder:{folder} for its images"):
        load_dataset(f"texts:{folder}")


@pytest.mark.parametrize(("name", "shown"), [(b"b\xff.png", r"b\udcff.png"), (b"a\nb.png", r"a\nb.png")])
def test_names_that_no_table_can_hold(folder, name, shown):
    odd = folder / os.fsdecode(name)
    odd.mkdir()
    (folder / "1.png").rename(odd / "1.png")
    for place in (folder, odd):
        with pytest.raises(UserError) as caught:
            load(place)
        assert shown in str(caught.value) and "rename it" in str(caught.value) and "\n" not in str(caught.value)


# --- texts --------------------------------------------------------------------------------------


def test_texts(tmp_path, monkeypatch):
    path = tmp_path / "prompts.v1.txt"
    path.write_bytes("\ufeffa red boat\n\n  two owls \n...\nthree\n".encode())
    monkeypatch.setenv("COMPENDIUM_CALLER", str(tmp_path))
    dataset = load_dataset("texts:prompts.v1.txt")
    assert dataset.name == "prompts.v1"
    assert [(i.id, i.references) for i in dataset.items] == [
        ("000001", ("a red boat",)), ("000003", ("two owls",)), ("000005", ("three",))]
    assert dataset.notes == ("prompts.v1: 3 texts, no images",
                             "prompts.v1: captions without a word were left out: 000004")
    assert dataset.feeds("text") is None and "prompts.v1 has no images" in dataset.feeds("image")
    path.write_text("word " * 10_000)
    assert len(load_dataset(f"texts:{path}").items[0].references[0]) == 49_999


@pytest.mark.parametrize(("raw", "reason"), [(b" \n\n", "has no text"), (b"", "has no text"),
                                             ("Brücke".encode("latin-1"), "in position 2: .* UTF-8")])
def test_bad_texts(tmp_path, raw, reason):
    (tmp_path / "prompts.txt").write_bytes(raw)
    with pytest.raises(UserError, match=reason) as caught:
        load_dataset(f"texts:{tmp_path / 'prompts.txt'}")
    assert "prompts.txt" in str(caught.value)
