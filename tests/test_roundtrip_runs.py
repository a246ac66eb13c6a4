"""Which run a set of parameters means, where its figures go, and what notebooks read through ``open_runs``."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib.base import ROOT, UserError
from lib.data import load_dataset
from lib.presets import load_preset
from lib.roundtrip import check, open_runs, plan_run
from lib.roundtrip import run as run_module
from lib.roundtrip.run import weights_of
from tests import planted
from tests.standins import paint, preset, stand_ins

K = 4
WEIGHTS = {"captioner": "sha256:a", "generator": "sha256:b", "encoder": "sha256:c", "second_encoder": "x@1"}


@pytest.fixture()
def folder(tmp_path):
    paint(tmp_path / "images", 6)
    return tmp_path / "images"


def plan(folder, root=None, settings=None, task="image", k=K, seed=0, weights=WEIGHTS):
    return plan_run(settings or preset(), load_dataset(f"folder:{folder}"), task, k, seed, root, weights)


def finish(run):
    return run.execute(models=stand_ins(), progress=False)


def test_the_name_follows_what_changes_rows_and_nothing_else(folder):
    own = plan(folder).name
    assert own.startswith("mini--images--image--n6k4s0--") and own == plan(folder).name
    captioner, generator = preset().captioner, preset().generator
    idle = preset(captioner=captioner.model_copy(update={"batch_size": 3, "revision": "2"}),
                  generator=generator.model_copy(update={"compile": True, "lora_revision": "3"}), n_sources=7)
    assert plan(folder, settings=idle).name == own
    sender = captioner.sender.model_copy(update={"p": 0.8})
    others = [plan(folder, settings=preset(captioner=captioner.model_copy(update={"sender": sender}))),
              plan(folder, settings=preset(similarity="euclidean")), plan(folder, k=5), plan(folder, seed=1),
              plan(folder, weights=WEIGHTS | {"generator": "sha256:lora"})]
    assert len({own, *(run.name for run in others)}) == 6


def test_weights_are_known_by_content(tmp_path):
    shutil.copytree(ROOT / "data" / "models" / "mini" / "captioner", tmp_path / "captioner")
    mini = load_preset("mini")
    own = mini.model_copy(update={"captioner": mini.captioner.model_copy(update={"id": str(tmp_path / "captioner")})})
    assert weights_of(own) == weights_of(mini)
    (tmp_path / "captioner" / "model.safetensors").write_bytes(b"trained again")
    assert weights_of(own) != weights_of(mini)


def test_a_finished_run_is_found_where_weights_are_absent_and_no_other_experiments(folder):
    run, unknown = finish(plan(folder)), WEIGHTS | {"captioner": None}
    assert plan(folder, weights=unknown).folder == run.folder and plan(folder, weights=unknown).finished
    assert not plan(folder, weights=WEIGHTS | {"captioner": "sha256:z"}).finished
    assert not plan(folder, weights=unknown | {"encoder": "sha256:z"}).finished
    assert not plan(folder, settings=preset(similarity="euclidean"), weights=unknown).finished
    assert not plan(folder, weights=unknown, seed=1).finished
    Image.new("RGB", (8, 8), "red").save(folder / "03.png")
    assert not plan(folder, weights=unknown).finished


def test_fewer_candidates_are_read_from_a_run_with_more(folder, tmp_path):
    run, alone = finish(plan(folder)), finish(plan(folder, tmp_path / "alone", k=2))
    some = plan(folder, k=2)
    assert some.folder == run.folder and not plan(folder, k=5).finished
    wanted, found = alone.rows().drop(columns="run"), some.rows().drop(columns="run")
    assert found.equals(wanted) and found["rank"].max() == 2 and found["selected"].sum() == 6
    assert some.execute(models=lambda: pytest.fail("models were loaded"), rescore=True).rows()["candidate"].max() == 1
    assert plan(folder).rows()["candidate"].max() == K - 1


def test_an_unfinished_run_names_its_notebook(folder):
    with pytest.raises(UserError, match="not finished: execute notebooks/01_image_reconstruction.ipynb"):
        plan(folder).rows()


@pytest.fixture(scope="module")
def default():
    return open_runs("mini")


def test_defaults_are_the_presets(default):
    assert default.datasets == load_preset("mini").datasets and not default.skipped
    assert list(default.runs) == [(d, t) for d in default.datasets for t in ("image", "text")]
    sizes = {(len(run.dataset), run.n_candidates, run.seed) for run in default.runs.values()}
    assert sizes == {(load_preset("mini").n_sources, 10, 0)}


def test_reading_rows_does_not_import_torch():
    code = "import sys, lib.figures, lib.roundtrip as r; r.open_runs('mini', n_sources=6); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("given", "reason"), [
    ({"preset": "maxi"}, "unknown preset"), ({"dataset": "cocoa"}, "unknown dataset"),
    ({"n_sources": -1}, "N_SOURCES = -1"), ({"n_candidates": "5"}, "N_CANDIDATES = '5'"),
    ({"seed": 0.5}, "SEED = 0.5")])
def test_bad_parameters_are_one_line(given, reason):
    with pytest.raises(UserError, match=reason):
        open_runs(**{"preset": "mini"} | given)


def test_datasets_by_list_or_with_commas(tmp_path):
    paint(tmp_path / "a, b", 6)
    own = f"folder:{tmp_path / 'a, b'}"
    both = open_runs("mini", f"picturebook-coco, {own}", 6)
    assert both.datasets == open_runs("mini", ["picturebook-coco", own], 6).datasets and len(both.datasets) == 2


def test_what_cannot_be_fed_is_skipped_with_one_line(tmp_path, capsys):
    paint(tmp_path / "bare", 6)
    (tmp_path / "prompts.txt").write_text("a red owl\na blue cat\n")
    runs = open_runs("mini", [f"folder:{tmp_path / 'bare'}", f"texts:{tmp_path / 'prompts.txt'}"])
    (a, b) = runs.datasets
    assert set(runs.runs) == {(a, "image"), (b, "text")} and set(runs.skipped) == {(a, "text"), (b, "image")}
    assert all("\n" not in reason for reason in runs.skipped.values())
    runs.runs[a, "image"].execute(models=stand_ins(), progress=False)
    assert runs.rows("image")["dataset"].unique().tolist() == [a]
    none = open_runs("mini", f"folder:{tmp_path / 'bare'}").rows("text")
    assert none.empty and "similarity" in none
    runs.execute("image")
    told = capsys.readouterr().err
    assert told.count("prompts") >= 1 and "skipped: " in told and told.count("6 images") == 1


def test_an_encoder_that_cannot_compare_is_skipped_and_nothing_to_run_is_an_error(tmp_path):
    (tmp_path / "own.toml").write_text('base = "mini"\nencoder = { id = "facebook/dinov2-base", adapter = "dino" }\n')
    (tmp_path / "prompts.txt").write_text("a red owl\n")
    runs = open_runs(str(tmp_path / "own.toml"), "picturebook-coco", 6)
    assert list(runs.runs) == [("picturebook-coco", "image")]
    assert "reads no texts" in runs.skipped["picturebook-coco", "text"]
    with pytest.raises(UserError, match="nothing can be run: .*reads no texts"):
        open_runs(str(tmp_path / "own.toml"), f"texts:{tmp_path / 'prompts.txt'}")


def test_only_captioned_images_are_sources_of_texts(tmp_path):
    paint(tmp_path / "some", 6)
    (tmp_path / "some" / "captions.json").write_text('{"01.png": ["a green thing"], "03.png": ["a yellow thing"]}')
    runs = open_runs("mini", f"folder:{tmp_path / 'some'}")
    assert [len(run.dataset) for run in runs.runs.values()] == [6, 2]


def test_rows_of_all_datasets_with_equal_names(tmp_path):
    for place in ("one", "two"):
        paint(tmp_path / place / "images", 6)
    runs = open_runs("mini", [f"folder:{tmp_path / place / 'images'}" for place in ("one", "two")], 0, K)
    assert len(set(runs.datasets)) == 2
    for run in runs.runs.values():
        finish(run)
    rows = runs.rows()
    assert rows["dataset"].unique().tolist() == runs.datasets and len(rows) == 12 * K
    row = rows.iloc[-1]
    assert runs.item(row["dataset"], row["item"]).path.parent.parent.name == "two"
    assert runs.image(row).size == (16, 16) and len(runs.baselines()) == 12
    assert set(runs.provenance()["runs"]) == {run.name for run in runs.runs.values()}


def test_sources_with_a_flagged_image_are_left_out_whole():
    def flag(rows):
        first = rows["item"].unique()[:2]
        return rows.assign(flagged=rows["item"].isin(first) & (rows["candidate"] == 3))

    runs = planted.write(dataset="picturebook-coco", n_sources=8, n_candidates=5, change=flag)
    rows = runs.rows("image")
    assert rows["item"].nunique() == 6 == len(runs.baselines())
    assert rows.attrs == {"flagged_sources": 2}
    assert rows.equals(rows.sort_values(["dataset", "item", "candidate"], ignore_index=True))


def test_a_figure_folder_belongs_to_one_parameterisation(default, tmp_path, monkeypatch):
    for place, n in (("a", 6), ("b", 7)):
        paint(tmp_path / place / "images", n)
    (tmp_path / "mini.toml").write_text('base = "mini"\n[captioner.sender]\np = 0.8\n')
    mini, own = load_preset("mini"), default.figures.name
    assert open_runs("mini", list(mini.datasets), mini.n_sources, mini.n_candidates, 0).figures.name == own
    assert own == "mini--all--n500k10s0"
    names = [open_runs(*given).figures.name for given in (
        ("mini", "all", 6), ("mini", "all", 0, 5), ("mini", "all", 0, 0, 1), ("mini", "picturebook-coco"),
        ("mini", f"folder:{tmp_path / 'a' / 'images'}"), ("mini", f"folder:{tmp_path / 'b' / 'images'}"),
        (str(tmp_path / "mini.toml"),))]
    assert len({own, *names}) == 8 and all(name.startswith("mini-") and len(name) < 100 for name in names)
    shutil.copy(*sorted((tmp_path / "a" / "images").glob("*.png"))[:2])
    assert open_runs("mini", f"folder:{tmp_path / 'a' / 'images'}").figures.name not in names
    monkeypatch.setenv("NOCAPS_DIR", str(tmp_path / "a"))  # its annotation file is corrected
    names = []
    for text in ("a red thing", "a blue thing"):
        (tmp_path / "a" / "nocaps_val_4500_captions.json").write_text(json.dumps({
            "images": [{"id": 1, "file_name": "01.png"}], "annotations": [{"image_id": 1, "caption": text}]}))
        names.append(open_runs("mini", "nocaps").figures.name)
    assert names[0] != names[1]
    assert open_runs("mini", n_sources=6).figures.parent == tmp_path / "figures"
    monkeypatch.setenv("COMPENDIUM_FIGURES", "")
    assert open_runs("mini", n_sources=6).figures.parent == ROOT / "figures"


@pytest.fixture()
def done(folder):
    generator = preset().generator.model_copy(update={"noise": "candidate"})  # else equal captions have equal images
    return finish(plan(folder, settings=preset(generator=generator)))


def altered(done, **columns):
    """The check of a batch that was made again and came out otherwise."""
    shard = dataclasses.replace(done.shards()[0])
    batch = shard.make(stand_ins())
    blur = columns.pop("images", lambda pixels: pixels)
    rows = batch.rows.assign(**{name: change(batch.rows[name]) for name, change in columns.items()})
    images = {name: blur(pixels) for name, pixels in batch.images.items()}
    table = check.compare(done, dataclasses.replace(batch, rows=rows, images=images))
    return table.loc[~table["holds"], "check"].tolist()


def test_each_kind_of_difference_is_found(done):
    assert altered(done) == []
    assert altered(done, similarity=lambda s: s + 2e-4) == ["similarity off by 0.0001"]
    assert altered(done, logprob=lambda s: s.where(s.index > 0)) == ["logprob off by 0.01"]
    assert altered(done, images=lambda pixels: pixels ^ 4) == ["images off by 2 grey levels"]
    assert altered(done, seed=lambda s: s + 1) == ["rows absent or with another seed"]
    assert altered(done, message=lambda s: s.where(s.index > 2, "else")) == ["captions that differ, of 24"]
    assert altered(done, message=lambda s: s.where(s.index > 0, "one flip at a near tie")) == []
    assert "sources with another best candidate, of 6" in altered(done, similarity=lambda s: -s)


def test_expected_results_are_met_or_the_deviation_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "EXPECTED", tmp_path)
    runs = planted.write(dataset="picturebook-coco", n_sources=8, n_candidates=5)
    assert check.compare_expected(runs) == ""
    path = check.write_expected(runs)
    assert check.compare_expected(runs) == "2 runs compared with mini.json: all as expected, 2 equal in every caption"
    known = json.loads(path.read_text())
    for entry in known.values():
        value, tolerance = entry["averages"]["similarity, all"]
        entry["averages"]["similarity, all"] = [value + 1.01 * tolerance, tolerance]
    path.write_text(json.dumps(known))
    line = check.compare_expected(runs)
    assert "2 averages are NOT as expected (image picturebook-coco: similarity, all" in line


def test_a_run_of_the_real_models_repeats_and_does_not_depend_on_its_batch(monkeypatch):
    monkeypatch.setattr(run_module.metrics.References, "build", lambda references: references)  # no Java here
    monkeypatch.setattr(run_module.metrics, "score_captions", lambda ids, captions, references: no_scores(len(ids)))
    runs = open_runs("mini", "picturebook-coco", 3, 2)
    for run in runs.runs.values():
        run.execute(models=runs.models, progress=False)
    assert check.verify_runs(runs)
    assert runs.rows()["sem_f"].notna().all() and runs.rows("image")["clipscore"].notna().all()


def no_scores(n):
    """A table of scores without any."""
    table = pd.DataFrame(np.nan, index=range(n), columns=list(run_module.CAPTION_SCORES))
    table.attrs |= {"missing": {"cider": "left out"}, "unscored": {}}
    return table
