"""Rows on disk: bytes that repeat, files that are whole or absent, folders that never mix."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lib import results
from lib.errors import UserError
from lib.leases import run_lock
from lib.presets import REPO_ROOT, get_preset
from lib.results import BASELINES, PLAYED, ROWS, DamagedTable, Run, RunKey
from tests.standins import Heard

MINI = get_preset("mini")
KEY = RunKey(MINI, "picturebook-coco", "image", 20, 10, 0, "data", {"captioner": "a"})


def table(n: int = 50, schema=PLAYED):
    """A table of the schema with n made-up rows, every third value missing."""
    rng = np.random.default_rng(n)
    columns = {}
    for field in schema:
        if field.type == "double":
            columns[field.name] = np.where(np.arange(n) % 3 == 0, np.nan, rng.normal(size=n))
        elif field.type == "bool":
            columns[field.name] = np.arange(n) % 2 == 0
        elif field.type in ("int32", "int64"):
            columns[field.name] = np.arange(n)
        else:
            columns[field.name] = [None if i % 3 == 0 else f"text {i}" for i in range(n)]
    return results.to_table(columns, schema)


# --- tables ------------------------------------------------------------------------------------


def test_columns_stand_in_the_agreed_order():
    assert ROWS.names == [
        "run", "task", "dataset", "item", "domain", "candidate", "seed", "message",
        "reconstruction", "source_text", "logprob", "n_words", "flagged", "similarity",
        "similarity_euclidean", "similarity_judge", "rank", "selected", "bleu1", "bleu2", "bleu3",
        "bleu4", "cider", "cider_d", "meteor", "rouge_l", "spice_spacy", "spice", "clipscore",
        "ref_clipscore", "clip_score", "clip_score_judge", "sem_object_p", "sem_object_r",
        "sem_object_f", "sem_colour_p", "sem_colour_r", "sem_colour_f", "sem_relation_p",
        "sem_relation_r", "sem_relation_f", "sem_setting_p", "sem_setting_r", "sem_setting_f",
        "sem_f", "truncated"]
    assert str(ROWS.field("seed").type) == "int64" and str(ROWS.field("flagged").type) == "bool"


@pytest.mark.parametrize("schema", [PLAYED, ROWS, BASELINES])
def test_tables_come_back_and_repeat_their_bytes(tmp_path, schema):
    for name in ("a", "b"):
        results.write_table(tmp_path / name, table(schema=schema), "run1")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert results.read_table(tmp_path / "a", schema, "run1").equals(table(schema=schema))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_nan_is_stored_as_null():
    assert table(9)["similarity"].null_count == 3
    mixed = {**{n: [None] for n in PLAYED.names}, "logprob": [None], "candidate": [1]}
    assert results.to_table(mixed, PLAYED)["logprob"].null_count == 1


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_cut_table_is_damaged(tmp_path, keep):
    path = tmp_path / "shard"
    results.write_table(path, table(), "run1")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(DamagedTable, match="shard"):
        results.read_table(path, PLAYED, "run1")


def test_any_flipped_bit_in_the_values_is_noticed(tmp_path):
    path = tmp_path / "shard"
    results.write_table(path, table(400), "run1")
    data = path.read_bytes()
    for place in np.random.default_rng(0).integers(4, len(data) // 2, 40):
        broken = bytearray(data)
        broken[place] ^= 0x10
        path.write_bytes(broken)
        try:
            assert results.read_table(path, PLAYED, "run1").equals(table(400))
        except (DamagedTable, UserError):
            continue


def test_foreign_tables_are_refused(tmp_path):
    results.write_table(tmp_path / "shard", table(), "run1")
    with pytest.raises(UserError, match="belongs to another run"):
        results.read_table(tmp_path / "shard", PLAYED, "run2")
    with pytest.raises(UserError, match="another schema"):
        results.read_table(tmp_path / "shard", ROWS, "run1")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other")
    with pytest.raises(UserError, match="another schema"):
        results.read_table(tmp_path / "other", PLAYED, None)


# --- atomic files ------------------------------------------------------------------------------


def test_failed_writing_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.json"
    results.write_json(path, {"x": 1})

    def half(temporary):
        temporary.write_bytes(b"{")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        results.write_atomic(path, half)
    assert results.read_json(path) == {"x": 1} and [found.name for found in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_told_in_one_line(tmp_path, code):
    def full(temporary):
        temporary.write_bytes(b"begun")
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=r"no space left .* finished rows are kept"):
        results.write_atomic(tmp_path / "shards" / "0", full)
    assert not any((tmp_path / "shards").iterdir())


FORBIDDEN = """
import os, sys
from pathlib import Path
from lib import results
from lib.errors import UserError
from lib.leases import run_lock
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
for write in (lambda p: results.write_bytes(p / "a", b"x"), lambda p: run_lock(p / "r").__enter__()):
    try:
        write(Path(sys.argv[1]))
    except UserError as error:
        print("told:", error)
"""


def test_folder_without_permission_is_told_in_one_line(tmp_path):
    tmp_path.chmod(0o555)
    # The source goes in as text, because a process without rights may not read this checkout.
    done = subprocess.run([sys.executable, "-c", FORBIDDEN, str(tmp_path)], cwd=REPO_ROOT,
                          capture_output=True, text=True, check=False)
    tmp_path.chmod(0o755)
    lines = [line for line in done.stdout.splitlines() if line.startswith("told:")]
    assert len(lines) == 2 and all("writable" in line for line in lines), done.stderr


def test_json_rejects_nan_and_reads_damaged_as_none(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        results.write_json(tmp_path / "a.json", {"x": float("nan")})
    (tmp_path / "b.json").write_text("{")
    assert results.read_json(tmp_path / "b.json") is None
    assert results.read_json(tmp_path / "c.json") is None
    (tmp_path / "d.json").write_text("[" * 100_000)
    assert results.read_json(tmp_path / "d.json") is None


# --- names, keys, locks ------------------------------------------------------------------------


def test_safe_parts_are_safe_and_distinct():
    names = ["1", "a/b.png", "a-b.png", "A-b.png", "..", "", "x" * 300, "x" * 301, "été", "a b", ".a"]
    parts = [results.safe_part(name) for name in names]
    assert len({part.lower() for part in parts}) == len(names)
    for part in parts:
        assert part and "/" not in part and not part.startswith(".") and len(part) < 80
    assert results.safe_part("000123") == "000123"


def changed(preset, **changes):
    return dataclasses.replace(KEY, preset=dataclasses.replace(preset, **changes))


def test_key_follows_what_changes_rows_and_nothing_else():
    others = [
        dataclasses.replace(KEY, task="text"), dataclasses.replace(KEY, dataset="nocaps"),
        dataclasses.replace(KEY, n_sources=21), dataclasses.replace(KEY, n_candidates=9),
        dataclasses.replace(KEY, seed=1), dataclasses.replace(KEY, data="other"),
        dataclasses.replace(KEY, models={"captioner": "b"}),
        changed(MINI, similarity="euclidean"),
        changed(MINI, generator=dataclasses.replace(MINI.generator, steps=13)),
        changed(MINI, captioner=dataclasses.replace(MINI.captioner, revision="abc")),
    ]
    assert len({key.hash for key in [KEY, *others]}) == len(others) + 1
    same = [changed(MINI, n_sources=7),
            changed(MINI, generator=dataclasses.replace(MINI.generator, batch_size=3))]
    assert {key.hash for key in same} == {KEY.hash}
    assert KEY.name == f"mini--picturebook-coco--image--n20k10s0--{KEY.hash[:8]}"
    odd = dataclasses.replace(KEY, dataset="folder:my pictures/x")
    assert odd.name.startswith("mini--folder-my-pictures-x--image--")


HOLDER = """
import sys
from pathlib import Path
from lib.leases import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
    Path(sys.argv[1], "left").touch()
"""


def test_second_run_waits_and_says_so(tmp_path, monkeypatch, capsys):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=REPO_ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", Heard(lambda: other.stdin.close()))
            with run_lock(tmp_path):
                assert (tmp_path / "left").exists()
            assert f"waiting: process {other.pid}" in sys.stderr.getvalue()
    with run_lock(tmp_path):
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("code", "told"), [
    (errno.ENOSYS, "without locks .Function not implemented.: mount"), (errno.ENOLCK, "without locks"),
    (errno.EACCES, "cannot be written"),
])
def test_a_place_without_locks_is_told_in_one_line(tmp_path, monkeypatch, code, told):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=told), run_lock(tmp_path):
        pytest.fail("held nothing")


def test_image_paths_stay_in_the_run(tmp_path):
    for name in ("../x.png", "/etc/x.png"):
        with pytest.raises(UserError, match="not inside"):
            Run(tmp_path).image(name)


def test_find_names_the_notebook_and_near_misses(tmp_path):
    with pytest.raises(UserError, match=r"does not exist: run notebooks/01_image"):
        results.find(KEY, True, tmp_path)
    text = dataclasses.replace(KEY, task="text")
    (tmp_path / text.name).mkdir()
    with pytest.raises(UserError, match=r"is not finished: run notebooks/02_text"):
        results.find(text, True, tmp_path)
    other = dataclasses.replace(KEY, models={"captioner": "b"})
    results.write_table(tmp_path / other.name / "rows.parquet", table(schema=ROWS), other.hash)
    with pytest.raises(UserError, match=r"one with other weights"):
        results.find(KEY, True, tmp_path)
    # Without the weights there is no telling their hash: results can be read all the same.
    assert results.find(KEY, False, tmp_path).name == other.name
    assert len(results.find(other, True, tmp_path).rows()) == 50


def test_unfinished_and_damaged_runs_are_told(tmp_path):
    with pytest.raises(UserError, match="is absent or damaged"):
        Run(tmp_path).info()
    with pytest.raises(UserError, match="not finished"):
        Run(tmp_path).rows()
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="damaged, remove it"):
        Run(tmp_path).rows()
