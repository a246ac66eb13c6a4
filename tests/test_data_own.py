"""A folder of images or a text file of the user's: every form of captions, odd names, what is said about the rest."""

from __future__ import annotations

import json
import os
import unicodedata

import pytest
from PIL import Image

from lib.base import UserError
from lib.data import load_dataset


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
    assert dataset.notes == ("images: 3 images, 3 captions; 1 images without captions, such as 3.png",)
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


def test_without_captions_only_the_image_task_is_fed(folder):
    dataset = load(folder)
    assert not dataset.references and dataset.feeds("image") is None
    assert dataset.feeds("text").startswith("dataset images has no captions, which text reconstruction starts from")
    assert dataset.notes == ("images: 3 images, 0 captions",)


def test_captions_without_any_image(tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"1.png": "one"}))
    dataset = load(tmp_path)
    assert [(i.id, i.path, i.references) for i in dataset.items] == [("1.png", None, ("one",))]
    assert dataset.feeds("text") is None and "has no images" in dataset.feeds("image")


def test_any_form_of_the_path_gives_one_dataset(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COMPENDIUM_CALLER", str(tmp_path))
    found = [load_dataset(f"folder:{place}") for place in
             (folder, f"{folder}/", "my/images", "./my/../my/images/", "~/my/images")]
    assert {(d.name, d.address) for d in found} == {("images", f"folder:{folder}")}
    assert len({tuple(i.id for i in d.subset(2).items) for d in found}) == 1
    monkeypatch.setenv("COMPENDIUM_CALLER", str(folder))
    assert load_dataset("folder:.").name == "images"
    other = tmp_path / "your" / "images"
    other.parent.mkdir()
    folder.rename(other)
    assert load(other).name == "images" and load(other).address == f"folder:{other}"  # equal names, other addresses


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
    for name in ("IMG_1.HEIC", "IMG_2.heic", "drawing.svg", "readme", "notes.txt", "labels.csv", ".hidden.png",
                 ".DS_Store", "photo.txt"):
        (folder / name).write_bytes(b"x")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "captions.json").write_text(json.dumps({"1": "one", "7.png": "seven", "8.png": "eight", "photo": "?"}))
    dataset = load(folder)
    assert [item.id for item in dataset.items] == ["1.png", "2.png", "3.png", "photo.jfif", "photo.jpe"]
    line, = dataset.notes
    for part in ("images: 5 images, 1 captions;", "4 images without captions, such as 2.png, 3.png, photo.jfif and 1",
                 "captions of 3 names fit no image, such as 7.png, 8.png, photo;", "1 broken link", "1 hidden image",
                 "2 .heic (not read as image: convert", "1 .svg (not read", "1 without extension (not read",
                 "2 .txt (no one image has its name)", "1 .csv (not named captions)"):
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


BAD = [
    ("captions.json", "7", "Input should be an object"),
    ("captions.json", "{}", "has no captions: write some or remove"),
    ("captions.json", '{"1.png": 5}', r"\[0\].captions: .*list .given: 5"),
    ("captions.json", '{"1.png": ["one", null]}', r"\[0\].captions.1: .*string"),
    ("captions.json", '{"1.png": "\\ud83d"}', "Invalid JSON"),
    ("captions.json", "[" * 100_000, "Invalid JSON"),
    ("captions.json", '{"../x": "one"}', "leaves its folder"),
    ("captions.jsonl", '{"file_name": "1.png"}', r"line 1.captions: Field required"),
    ("captions.jsonl", '{"file_name": "1.png", "text": "one"}\n{', "line 2: Invalid JSON"),
    ("captions.jsonl", "[]", "line 1: .*object"),
    ("captions.csv", "1.png,a ball\n2.png,two", "line 1 needs one column file_name and one column caption: write"),
    ("captions.csv", "file_name,words\n1.png,one\n", "line 1 needs"),
    ("captions.csv", "file_name,caption,caption\n1.png,one,uno\n", "line 1 needs one column"),
    ("captions.csv", "file_name,caption\n../1.png,one\n", "line 2.file_name: .*leaves its folder"),
    ("captions.csv", "file_name,caption\n1.png,one\n2.png,A ball, orange\n", "line 3 has 3 fields, the header 2"),
    ("captions.csv", "file_name,caption\n1.png\n", "line 2 has 1 fields, the header 2"),
    ("captions.csv", 'file_name,caption\n1.png,"a ball\n2.png,two\n3.png,"three"\n', "line 2: a quote is not closed"),
    ("captions.csv", 'file_name,caption\n1.png,one\n2.png,"two" owls\n', "line 3: a quote is not closed"),
    ("captions.csv", 'file_name,caption\n1.png,"a ball\n' + "x.png,a dog in the park\n" * 9000, "line 2: a quote"),
]


@pytest.mark.parametrize(("name", "text", "reason"), BAD)
def test_bad_captions_give_one_line_with_file_and_row(folder, name, text, reason):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        load(folder)
    assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_quote_inside_a_csv_field_is_a_sign_like_others(folder):
    (folder / "captions.csv").write_text('file_name,caption\n1.png,a 12" bus\n2.png,"a ""small"" boat, red"\n')
    assert read(folder) == {"1.png": ('a 12" bus',), "2.png": ('a "small" boat, red',), "3.png": ()}


def test_captions_without_a_word_are_dropped_and_that_is_said(folder):
    (folder / "captions.json").write_text(json.dumps({"1.png": ["one", ""], "2.png": "...", "3.png": "drei"}))
    assert read(folder) == {"1.png": ("one",), "2.png": (), "3.png": ("drei",)}
    assert load(folder).notes[1] == "images: captions without a word were left out: 1.png, 2.png"


def test_bad_folders(folder, tmp_path):
    (tmp_path / "IMG.heic").write_bytes(b"x")
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"has no images .*\.jfif.*passed over: 1 \.heic \(not read as image: convert"):
        load(tmp_path)
    for name in ("captions.csv", "metadata.csv"):
        (folder / name).write_text("file,text\n1.png,one")
    with pytest.raises(UserError, match="has captions.csv and metadata.csv: keep one captions file"):
        load(folder)
    with pytest.raises(UserError, match="does not exist"):
        load_dataset("folder:s3://bucket/images")


@pytest.mark.parametrize(("name", "shown"), [(b"b\xff.png", r"b\udcff.png"), (b"a\nb.png", r"a\nb.png")])
def test_names_that_no_table_can_hold(folder, name, shown):
    odd = folder / os.fsdecode(name)
    odd.write_bytes((folder / "1.png").read_bytes())
    (folder / "deep" / odd.name).mkdir(parents=True)
    (folder / "deep" / odd.name / "1.png").write_bytes(odd.read_bytes())
    for place in (folder, folder / "deep", folder / "deep" / odd.name):
        with pytest.raises(UserError) as caught:
            load(place)
        assert shown in str(caught.value) and "rename it" in str(caught.value) and "\n" not in str(caught.value)


# --- texts --------------------------------------------------------------------------------------


def test_texts(tmp_path, monkeypatch):
    path = tmp_path / "prompts.v1.txt"
    path.write_bytes("\ufeffa red boat\n\n  two owls \n...\nthree\n".encode())
    monkeypatch.setenv("COMPENDIUM_CALLER", str(tmp_path))
    dataset = load_dataset("texts:prompts.v1.txt")
    assert dataset.name == "prompts.v1" and dataset.address == f"texts:{path}"
    assert [(i.id, i.references) for i in dataset.items] == [
        ("000001", ("a red boat",)), ("000003", ("two owls",)), ("000005", ("three",))]
    assert dataset.notes == ("prompts.v1: 3 texts, no images",
                             "prompts.v1: captions without a word were left out: 000004")
    assert dataset.feeds("text") is None and "prompts.v1 has no images" in dataset.feeds("image")
    with pytest.raises(UserError, match="no image"):
        dataset.items[0].image()
    path.write_text("word " * 10_000)
    assert len(load_dataset(f"texts:{path}").items[0].references[0]) == 49_999


@pytest.mark.parametrize(("raw", "reason"), [(b" \n\n", "has no text"), (b"", "has no text"),
                                             ("Brücke".encode("latin-1"), "in position 2: .* UTF-8")])
def test_bad_texts(tmp_path, raw, reason):
    (tmp_path / "prompts.txt").write_bytes(raw)
    with pytest.raises(UserError, match=reason) as caught:
        load_dataset(f"texts:{tmp_path / 'prompts.txt'}")
    assert "prompts.txt" in str(caught.value)
