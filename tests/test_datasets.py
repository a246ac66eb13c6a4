"""The readers of annotation files, on hand-made files, the picture book and real COCO captions."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image

from lib import captions, splits
from lib.datasets import KARPATHY_SPLIT, load_captions_json, load_dataset, load_folder, read_split
from lib.errors import UserError
from lib.presets import REPO_ROOT

# Real captions and photographs for trying the readers on; not part of the repository.
SHARED = REPO_ROOT.parent / "shared" / "data" / "coco"


def annotation(**changes):
    """A small file in the COCO captions format, with keys replaced."""
    data = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (1, 2, 3)],
        "annotations": [{"id": 10 * i + j, "image_id": i, "caption": f"thing {i} number {j}"}
                        for i in (1, 2, 3) for j in (0, 1)],
    }
    return {**data, **changes}


def put(tmp_path, data, absent=()):
    """Write an annotation file and its pictures; returns both places."""
    path = tmp_path / "captions.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    for i in (1, 2, 3):
        if i not in absent:
            Image.new("RGB", (8, 8), (i * 50, 0, 0)).save(images / f"{i}.png")
    return path, images


# --- the good cases ----------------------------------------------------------------------------


def test_coco_format(tmp_path):
    dataset = load_captions_json("mine", *put(tmp_path, annotation()))
    assert [item.id for item in dataset.items] == ["1", "2", "3"]
    assert dataset.items[1].references == ("thing 2 number 0", "thing 2 number 1")
    assert dataset.items[2].image().getpixel((0, 0)) == (150, 0, 0)
    assert dataset.items[0].domain is None and dataset.items[0].scene is None
    assert set(dataset.references) == {"1", "2", "3"}


def test_nocaps_format_has_domains_and_scenes(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "open_images_id": "x", "domain": d}
              for i, d in ((1, "in-domain"), (2, "near-domain"), (3, "out-domain"))]
    places = put(tmp_path, annotation(images=images))
    scenes = tmp_path / "scenes.json"
    scenes.write_text(json.dumps({"2": {"setting": "sea"}}))
    dataset = load_captions_json("mine", *places, scenes=scenes)
    assert [item.domain for item in dataset.items] == ["in-domain", "near-domain", "out-domain"]
    assert [item.scene for item in dataset.items] == [None, {"setting": "sea"}, None]


def test_missing_pictures_are_listed_and_keep_their_references(tmp_path):
    dataset = load_captions_json("mine", *put(tmp_path, annotation(), absent=(2,)))
    assert dataset.missing == ("2.png",) and len(dataset) == 2
    assert set(dataset.references) == {"1", "2", "3"}  # document frequencies are the split's


def test_picture_without_captions_is_listed(tmp_path):
    some = [a for a in annotation()["annotations"] if a["image_id"] != 3]
    dataset = load_captions_json("mine", *put(tmp_path, annotation(annotations=some)))
    assert dataset.unreferenced == ("3",) and len(dataset) == 3
    assert "3" not in dataset.references


def test_split_keeps_only_its_ids(tmp_path):
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"ids": [3, "1"]}))
    dataset = load_captions_json("mine", *put(tmp_path, annotation()), keep=read_split(split))
    assert [item.id for item in dataset.items] == ["1", "3"] and set(dataset.references) == {"1", "3"}


def test_the_committed_split_follows_from_the_official_list(tmp_path):
    ids = splits.official_ids()
    # The source's text has one line an id, with a file name of fixed length: its length is known.
    assert len(ids) == 5_000 and sum(39 + len(key) for key in ids) == 224_028
    assert KARPATHY_SPLIT.read_text(encoding="utf-8") == splits.as_text(splits.record(ids))
    drawn = read_split(KARPATHY_SPLIT)
    assert len(drawn) == 2_000 and drawn <= set(ids)
    assert splits.sample(ids[::-1]) == splits.sample(ids) != splits.sample(ids, seed=1)
    assert set(splits.sample(ids, 50)) < set(splits.sample(ids, 100))
    for text, reason in (("1 2 x", "has x"), ("1 2 1", "repeated"), ("# none", "unique")):
        (tmp_path / "ids.txt").write_text(text)
        with pytest.raises(UserError, match=reason):
            splits.official_ids(tmp_path / "ids.txt")


def test_coco_is_the_split_wherever_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("COCO_DIR", str(tmp_path))
    inside, outside = sorted(read_split(KARPATHY_SPLIT), key=int)[:3], ["1", "2"]
    images = [{"id": int(key), "file_name": f"{key}.png"} for key in [*inside, *outside]]
    notes = [{"id": i, "image_id": image["id"], "caption": "a thing"} for i, image in enumerate(images)]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2014.json").write_text(
        json.dumps({"images": images, "annotations": notes}))
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    for key in [inside[0], inside[2], *outside]:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "val2014" / f"{key}.png")
    dataset = load_dataset("coco")
    assert [item.id for item in dataset.items] == [inside[0], inside[2]]
    assert dataset.missing == (f"{inside[1]}.png",) and set(dataset.references) == set(inside)
    assert len(load_dataset("coco-val2014")) == 4


def test_a_draw_depends_on_what_is_listed_not_on_what_is_there(tmp_path):
    path, images = put(tmp_path, annotation())
    drawn = [item.id for item in load_captions_json("mine", path, images).subset(2).items]
    (images / f"{drawn[0]}.png").unlink()
    less = load_captions_json("mine", path, images).subset(2)
    assert [item.id for item in less.items] == drawn[1:] and less.missing == (f"{drawn[0]}.png",)
    assert less.subset(2) == less and not load_captions_json("mine", path, images).subset(3).subset(3).strays
    other = next(i for i in ("1", "2", "3") if i not in drawn)
    (images / f"{drawn[1]}.png").unlink()
    assert (images / f"{other}.png").exists()
    with pytest.raises(UserError, match="none of the 2 pictures drawn with seed 0 is there: put the files"):
        load_captions_json("mine", path, images).subset(2)


@pytest.mark.parametrize("name", ["picturebook-coco", "picturebook-nocaps"])
def test_picture_book_through_the_same_reader(name):
    dataset = load_dataset(name)
    assert len(dataset) >= 500 and not dataset.missing and not dataset.unreferenced
    counts = {len(item.references) for item in dataset.items}
    assert counts == ({5} if name == "picturebook-coco" else {10})
    assert all(item.scene for item in dataset.items)
    assert dataset.items[0].image().size == (64, 64)
    domains = {item.domain for item in dataset.items}
    assert domains == ({None} if name == "picturebook-coco"
                       else {"in-domain", "near-domain", "out-domain"})


def test_subset_is_seeded_nested_and_independent_of_order(tmp_path):
    whole = load_dataset("picturebook-coco")
    small, large = whole.subset(20, seed=3), whole.subset(60, seed=3)
    ids = [item.id for item in large.items]
    assert len(small) == 20 and {i.id for i in small.items} <= set(ids)
    assert ids == [i.id for i in whole.items if i.id in set(ids)]
    assert {i.id for i in whole.subset(20, seed=4).items} != {i.id for i in small.items}
    assert len(small.references) == len(whole)
    data = annotation()
    random.Random(0).shuffle(data["images"])
    shuffled = load_captions_json("mine", *put(tmp_path, data)).subset(2)
    ordered = load_captions_json("mine", *put(tmp_path, annotation())).subset(2)
    assert {i.id for i in shuffled.items} == {i.id for i in ordered.items}
    assert shuffled.fingerprint == ordered.fingerprint


def test_fingerprint_tells_changes(tmp_path):
    before = load_captions_json("mine", *put(tmp_path, annotation())).fingerprint
    data = annotation()
    data["annotations"][0]["caption"] = "another thing"
    assert load_captions_json("mine", *put(tmp_path, data)).fingerprint != before
    path, images = put(tmp_path, annotation())
    Image.new("RGB", (9, 8), "blue").save(images / "1.png", compress_level=0)
    assert load_captions_json("mine", path, images).fingerprint != before


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real COCO files are not beside this checkout")
def test_real_coco():
    entries = captions.read_coco(SHARED / "captions_val2014.json.gz")
    assert len(entries) == 40_504 and sum(len(e.captions) for e in entries) == 202_654
    official = set(splits.official_ids())
    assert len(official) == 5_000 and official <= {entry.id for entry in entries}
    dataset = load_captions_json("photos", SHARED / "captions_photos.json", SHARED / "photos")
    assert len(dataset) == 69 and not dataset.missing
    assert all(item.image().mode == "RGB" for item in dataset.items[:5])


# --- a folder and texts of yours ---------------------------------------------------------------

FOLDER_CAPTIONS = {
    "captions.json": json.dumps({"1.png": ["one", "uno"], "2.png": "two"}),
    "captions.jsonl": '{"file_name": "1.png", "captions": ["one", "uno"]}\n\n'
                      '{"image": "2.png", "text": "two"}\n',
    "captions.csv": "\ufefffile_name,caption\n1.png,one\n1.png,uno\n2.png,two\n",
}


@pytest.mark.parametrize("name", FOLDER_CAPTIONS)
def test_folder_with_captions_in_any_format(tmp_path, name):
    _, images = put(tmp_path, annotation())
    (images / name).write_text(FOLDER_CAPTIONS[name], encoding="utf-8")
    (images / ".hidden.png").write_bytes(b"")
    dataset = load_dataset(f"folder:{images}")
    assert dataset.name == "folder:images"
    assert [(i.id, i.references) for i in dataset.items] == [
        ("1.png", ("one", "uno")), ("2.png", ("two",)), ("3.png", ())]
    assert dataset.unreferenced == ("3.png",)


def test_folder_takes_coco_json_lists_and_subfolders(tmp_path):
    _, images = put(tmp_path, annotation())
    (images / "deep").mkdir()
    Image.new("RGB", (4, 4)).save(images / "deep" / "4.png")
    (images / "captions.json").write_text(json.dumps(annotation()))
    dataset = load_folder(images)
    assert [i.id for i in dataset.items] == ["1.png", "2.png", "3.png", "deep/4.png"]
    assert len(dataset.items[0].references) == 2
    (images / "captions.json").write_text(json.dumps(
        [{"file_name": "deep/4.png", "caption": "four"}, {"file": "gone.png", "caption": "x"}]))
    dataset = load_folder(images)
    assert dataset.items[3].references == ("four",) and dataset.missing == ("gone.png",)


def test_folder_without_captions(tmp_path):
    _, images = put(tmp_path, annotation())
    dataset = load_folder(images)
    assert not dataset.references and len(dataset.unreferenced) == 3


def test_texts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red boat\n\n  two owls \n😀\n", encoding="utf-8")
    dataset = load_dataset(f"texts:{path}")
    assert [(i.id, i.references) for i in dataset.items] == [
        ("000001", ("a red boat",)), ("000003", ("two owls",)), ("000004", ("😀",))]
    with pytest.raises(UserError, match="no picture"):
        dataset.items[0].image()


# --- the bad cases -----------------------------------------------------------------------------


def one(key, **values):
    """An annotation file whose first image or annotation has other values (None removes a key)."""
    data = annotation()
    record = data[key][0]
    record.update(values)
    data[key][0] = {k: v for k, v in record.items() if v is not None}
    return data


BAD = {
    "empty": ("", "is empty"),
    "not json": ("{", "not valid JSON"),
    "a list": ([], "expected an object"),
    "no images": ({"annotations": []}, "'images' is absent"),
    "no annotations key": ({"images": [{"id": 1}]}, "'annotations' is absent"),
    "images empty": (annotation(images=[]), "lists no images"),
    "annotations empty": (annotation(annotations=[]), "no annotations"),
    "images of texts": (annotation(images=["1.png"]), "malformed"),
    "image without id": (one("images", id=None), "'id' is absent"),
    "image without name": (one("images", file_name=None), "'file_name' is absent"),
    "repeated image": (one("images", id=2), "image id 2 is there twice"),
    "repeated annotation": (one("annotations", id=11), "annotation id 11 is there twice"),
    "id is a list": (one("images", id=[1]), "neither a whole number nor a text"),
    "unknown image": (one("annotations", image_id=9), "image_id 9 is not among"),
    "no caption": (one("annotations", caption=None), "'caption' is absent"),
    "blank caption": (one("annotations", caption="  \n"), "caption is empty"),
    "caption is a number": (one("annotations", caption=5), "is not a text"),
    "name leaves": (one("images", file_name="../1.png"), "leaves its folder"),
    "name leaves deeper": (one("images", file_name="a/../../1.png"), "leaves its folder"),
    "name is absolute": (one("images", file_name="/etc/passwd"), "leaves its folder"),
    "name for Windows": (one("images", file_name="..\\1.png"), "leaves its folder"),
    "name with a drive": (one("images", file_name="C:1.png"), "leaves its folder"),
    "name with a null": (one("images", file_name="1\0.png"), "leaves its folder"),
    "name is a number": (one("images", file_name=7), "is not a text"),
    "domain is a number": (one("images", domain=7), "is not a text"),
    "too deep": ("[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_annotations_give_one_line(tmp_path, case):
    data, reason = BAD[case]
    with pytest.raises(UserError, match=reason) as caught:
        load_captions_json("mine", *put(tmp_path, data))
    assert "captions.json" in str(caught.value) and "\n" not in str(caught.value)


def test_other_bad_files(tmp_path):
    path, images = put(tmp_path, annotation())
    with pytest.raises(UserError, match="none of the 3 pictures"):
        load_captions_json("mine", path, tmp_path / "nowhere")
    path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(UserError, match="byte 12 is not UTF-8"):
        load_captions_json("mine", path, images)
    (tmp_path / "cut.json.gz").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(UserError, match=r"cut\.json\.gz cannot be read"):
        captions.read_coco(tmp_path / "cut.json.gz")
    (tmp_path / "scenes.json").write_text("[1]")
    with pytest.raises(UserError, match="scenes by image id"):
        captions.read_scenes(tmp_path / "scenes.json")


@pytest.mark.parametrize(("name", "reason"), [
    ("flickr", "unknown dataset 'flickr'"), ("folder:", "add the path"), (7, "give a name"),
    ("folder:/nowhere/at/all", "does not exist"), ("texts:/nowhere.txt", "does not exist"),
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


@pytest.mark.parametrize("n", [0, -1, 2.5, "3", True])
def test_bad_counts(n):
    with pytest.raises(UserError, match="number of sources"):
        load_dataset("picturebook-coco", n)


@pytest.mark.parametrize(("name", "text", "reason"), [
    ("captions.json", "7", "expected an object or a list"),
    ("captions.json", "{}", "no captions"),
    ("captions.json", '{"1.png": [""]}', "caption is empty"),
    ("captions.json", '{"1.png": 5}', "neither a text nor a list"),
    ("captions.jsonl", '{"file_name": "1.png"}', "line 1: needs file_name and caption"),
    ("captions.jsonl", "{", "line 1 is not valid JSON"),
    ("captions.jsonl", "[]", "expected a record"),
    ("captions.json", '{"1.png": "\\ud83d"}', "not valid JSON .*surrogates"),
    ("captions.json", '{"1.png": ' + "9" * 5000 + "}", "not valid JSON .*digits"),
    ("captions.json", "[" * 100_000, "not valid JSON .*recursion"),
    ("captions.jsonl", '{"file_name": "1.png", "capti' + "o" * 9000 + 'n": "one"}', "line 1: needs .{,400}$"),
    ("captions.json", '{"1.png": "a whole \\ud83e\\udd8a", "../x": ""}', "leaves its folder"),
    ("captions.csv", "name,words\n1.png,one\n", "line 2: needs file_name and caption"),
    ("captions.csv", "file_name,caption\n../1.png,one\n", "leaves its folder"),
])
def test_bad_folder_captions(tmp_path, name, text, reason):
    _, images = put(tmp_path, annotation())
    (images / name).write_text(text)
    with pytest.raises(UserError, match=reason):
        load_folder(images)


def test_bad_folders_and_texts(tmp_path):
    with pytest.raises(UserError, match="has no pictures"):
        load_folder(tmp_path)
    _, images = put(tmp_path, annotation())
    for name, text in FOLDER_CAPTIONS.items():
        (images / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="keep one"):
        load_folder(images)
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(UserError, match="has no text"):
        load_dataset(f"texts:{tmp_path / 'blank.txt'}")
    (tmp_path / "latin.txt").write_bytes("Brücke".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_dataset(f"texts:{tmp_path / 'latin.txt'}")
