"""The round trip with small deterministic models: what a row is, and what it does not depend on."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib.base import UserError, stable_seed
from lib.data import load_dataset
from lib.roundtrip import Run, generate_images, plan_run, round_trip, source_text
from lib.roundtrip import run as run_module
from tests.standins import ColourEncoder, paint, preset, stand_ins

N, K = 13, 5
MINI = preset()
BY_CANDIDATE = preset(generator=MINI.generator.model_copy(update={"noise": "candidate"}))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Images without captions: no Java is started, so these runs take no time."""
    return load_dataset(paint(tmp_path_factory.mktemp("bare") / "images", N))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return load_dataset(paint(tmp_path_factory.mktemp("captioned") / "images", N, captions=True))


@pytest.fixture()
def quick_scores(monkeypatch):
    """Scores that need no Java: every metric is the number of words; METEOR is missing."""

    def score(ids, captions, references):
        words = [float(len(caption.split())) for caption in captions]
        table = pd.DataFrame(dict.fromkeys(run_module.CAPTION_SCORES, words))
        table["meteor"] = np.nan
        table.attrs |= {"missing": {"meteor": "no Java"}, "unscored": {}}
        return table

    monkeypatch.setattr(run_module.metrics, "score_captions", score)
    known = dict.fromkeys(run_module.CAPTION_SCORES) | {"meteor": "no Java"}
    monkeypatch.setattr(run_module.metrics, "available", lambda: known)
    monkeypatch.setattr(run_module.metrics.References, "build", lambda references: references)


def made(dataset, task="image", models=None, settings=MINI, k=K, seed=0):
    return round_trip(task, dataset.items, models or stand_ins(), settings, dataset.name, k, seed)


def executed(dataset, root, task="image", models=None, settings=MINI, k=K, seed=0, **options) -> Run:
    run = plan_run(settings, dataset, task, k, seed, root, shard_size=options.pop("shard_size", 4))
    return run.execute(models=models or stand_ins(), progress=False, **options)


def test_image_reconstruction_by_hand(bare):
    batch, models = made(bare), stand_ins()
    row = batch.rows.iloc[2 * K + 1]
    item = bare.items[2]
    seed = stable_seed(0, "caption", bare.name, item.id, 1)
    caption = models.captioner.caption([item.image()], [[seed]], MINI.captioner.sender)[0][0]
    image = models.generator.generate([caption.text], [stable_seed(0, "noise", bare.name, item.id)]).pixels[0]
    a, b = (models.encoder.embed_images([one])[0].astype(float) for one in (item.image(), image))
    assert (row["item"], row["candidate"], row["seed"], row["message"]) == (item.id, 1, seed, caption.text)
    assert np.array_equal(batch.images[row["reconstruction"]], image)
    assert row["similarity"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert row["similarity_euclidean"] == pytest.approx(np.linalg.norm(a - b))
    assert row["clip_score"] == row["similarity"] and row["clip_score_second"] == row["similarity_second"]
    greedy = models.captioner.caption([item.image()], [[0]], MINI.captioner.receiver)[0][0]
    assert batch.baselines.iloc[2][["item", "kind", "caption"]].tolist() == [item.id, "greedy", greedy.text]


def test_text_reconstruction_by_hand(captioned):
    batch, models = made(captioned, "text"), stand_ins()
    row, item = batch.rows.iloc[K + 2], captioned.items[1]
    text = source_text(item, captioned.name, 0)
    seed = stable_seed(0, "noise", captioned.name, item.id, 2)
    image = models.generator.generate([text], [seed]).pixels[0]
    answer = models.captioner.caption([image], [[0]], MINI.captioner.receiver)[0][0]
    a, b = models.encoder.embed_texts([text, answer.text]).astype(float)
    c, d = (models.encoder.embed_images([one])[0].astype(float) for one in (item.image(), image))
    assert row[["source_text", "reconstruction", "seed"]].tolist() == [text, answer.text, seed]
    assert np.array_equal(batch.images[row["message"]], image)
    assert row["similarity"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert row["clip_score"] == pytest.approx(c @ d / np.linalg.norm(c) / np.linalg.norm(d))
    assert batch.baselines.empty and text in item.references


def test_clipscore_puts_the_presets_prompt_before_captions_and_references(captioned):
    models = stand_ins()
    made(captioned, models=models)
    assert models.encoder.texts and all(text.startswith("a picture of ") for text in models.encoder.texts)
    assert "a picture of a red thing" in models.encoder.texts


def test_shared_noise_draws_each_distinct_caption_once(bare):
    shared, own = stand_ins(), stand_ins()
    rows = made(bare, models=shared).rows
    made(bare, models=own, settings=BY_CANDIDATE)
    assert shared.generator.asked == len(rows.drop_duplicates(["item", "message"])) < N * K == own.generator.asked
    assert (rows.groupby(["item", "message"])["reconstruction"].nunique() == 1).all()


def test_progress_counts_every_row_and_moves_while_nothing_is_finished(bare, tmp_path, monkeypatch, capsys):
    told = []
    generate_images(stand_ins().generator, ["red", "red", "blue"], [1, 1, 1], 1, told.append)
    assert told == [2, 1]
    hurried = SimpleNamespace(sleep=lambda s: time.sleep(s / 100), perf_counter=time.perf_counter)
    monkeypatch.setattr(run_module, "time", hurried)  # of each second only a hundredth
    plan_run(MINI, bare, "image", K, 0, tmp_path).execute(models=stand_ins(pause=0.5))
    lines = capsys.readouterr().err.splitlines()
    assert sum(": 0 of 65," in line for line in lines) > 3 and any(": 65 of 65," in line for line in lines)


@pytest.mark.parametrize("task", ["image", "text"])
def test_rows_do_not_depend_on_the_order_or_the_company(captioned, task):
    whole = made(captioned, task).rows.set_index(["item", "candidate"])
    mixed = list(captioned.items)
    random.Random(3).shuffle(mixed)
    part = made(dataclasses.replace(captioned, items=tuple(mixed[:6])), task, k=3).rows.set_index(["item", "candidate"])
    same = [name for name in part if name not in ("reconstruction", "message")]
    pd.testing.assert_frame_equal(part[same], whole.loc[part.index, same], rtol=1e-6)


def test_flagged_images_give_nulls(captioned):
    rows = made(captioned, models=stand_ins(flag="red"), settings=BY_CANDIDATE).rows
    assert (rows["flagged"] == rows["message"].str.contains("red")).all() and 0 < rows["flagged"].sum() < len(rows)
    scores = rows[["similarity", "similarity_euclidean", "similarity_second", "clip_score", "clipscore"]]
    assert (scores.isna().all(axis=1) == rows["flagged"]).all()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_useless_embeddings_name_the_item(tmp_path, value):
    dataset = load_dataset(paint(tmp_path / "images", 6, odd=4))
    with pytest.raises(UserError, match="candidate 0 of item 04.png: its similarity is not a number"):
        made(dataset, models=dataclasses.replace(stand_ins(), encoder=ColourEncoder(spoilt=value)))


def test_encoders_of_one_kind_or_none(captioned):
    rows = made(captioned, models=dataclasses.replace(stand_ins(), second_encoder=None)).rows
    assert rows["similarity"].notna().all() and rows["similarity_second"].isna().all()
    images_only, texts_only = ColourEncoder(), ColourEncoder()
    images_only.reads_texts, texts_only.reads_images = False, False
    rows = made(captioned, models=dataclasses.replace(stand_ins(), encoder=images_only, second_encoder=texts_only)).rows
    assert rows["similarity"].notna().all() and rows[["clipscore", "similarity_second"]].isna().all(axis=None)
    other = dataclasses.replace(stand_ins(), encoder=texts_only, second_encoder=images_only)
    rows = made(captioned, "text", other).rows
    assert rows["similarity"].notna().all() and rows["clip_score_second"].notna().all()
    assert rows[["clip_score", "similarity_second"]].isna().all(axis=None)
    with pytest.raises(UserError, match="its encoder reads no texts, which text reconstruction compares"):
        made(captioned, "text", dataclasses.replace(stand_ins(), encoder=images_only))


def test_texts_without_images(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red thing\na blue thing\n")
    rows = made(load_dataset(f"texts:{tmp_path / 'prompts.txt'}"), "text").rows
    assert rows["similarity"].notna().all() and rows["clip_score"].isna().all()


@pytest.mark.parametrize("task", ["image", "text"])
def test_a_run_has_ranks_scores_and_a_record(captioned, tmp_path, quick_scores, monkeypatch, task):
    monkeypatch.setenv("SECRET_API_KEY", "hunter2")
    run = executed(captioned, tmp_path, task)
    rows, said = run.rows(), "message" if task == "image" else "reconstruction"
    assert list(rows) == list(run_module.ROW_COLUMNS) and len(rows) == N * K
    best = rows.loc[rows.groupby("item")["similarity"].idxmax()]  # the first among ties
    assert best["selected"].all() and (best["rank"] == 1).all() and rows["selected"].sum() == N
    assert (rows["cider"] == rows[said].str.split().str.len()).all() and rows["meteor"].isna().all()
    assert (run.baselines()["cider"] == 6).all() if task == "image" else run.baselines().empty
    info, cost = run.info(), run.cost()
    assert info["missing_scores"] == {"meteor": "no Java"} and info["counts"]["rows"] == N * K
    assert info["preset"]["captioner"]["sender"]["p"] == 0.9 and "commit" in info["made_by"]
    assert info["identity"] == run.identity
    assert cost["sources"] == N and cost["images"] == rows["reconstruction" if task == "image" else "message"].nunique()
    assert {"caption", "generate", "embed", "score"} <= set(cost["seconds"]) and cost["wall"] > 0
    assert not any(b"hunter2" in path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    assert run.image(rows["reconstruction" if task == "image" else "message"][0]).size == (16, 16)


def test_a_finished_run_needs_no_models_and_is_not_written(bare, tmp_path):
    run = executed(bare, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    run.execute(models=lambda: pytest.fail("models were loaded"))
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}


def test_scores_are_filled_in_where_they_can_be_had_and_made_again_on_demand(
        captioned, tmp_path, quick_scores, monkeypatch):
    run, score = executed(captioned, tmp_path), run_module.metrics.score_captions

    def again(**options):
        return run.execute(models=lambda: pytest.fail("models"), progress=False, **options).rows()[["cider", "meteor"]]

    def later(*arguments):
        table = score(*arguments).assign(meteor=0.5, cider=np.nan)
        table.attrs["missing"] = {"cider": "document frequencies need at least two images"}  # of that nothing changes
        return table

    monkeypatch.setattr(run_module.metrics, "score_captions", later)
    assert again()["meteor"].isna().all()  # still not to be had
    monkeypatch.setattr(run_module.metrics, "available", lambda: dict.fromkeys(run_module.CAPTION_SCORES))
    assert (again()["meteor"] == 0.5).all() and list(run.info()["missing_scores"]) == ["cider"]
    monkeypatch.setattr(run_module.metrics, "score_captions", score)
    assert again()["cider"].isna().all()
    assert (again(rescore=True)["cider"] == 6).all()


def test_a_caption_without_a_score_is_named(captioned, tmp_path, quick_scores, monkeypatch, capsys):
    score = run_module.metrics.score_captions

    def but_one(*arguments):
        table = score(*arguments)
        table.attrs["unscored"] = {3: "image 00.png: no METEOR for a caption of 10,000 words"}
        return table

    monkeypatch.setattr(run_module.metrics, "score_captions", but_one)
    run = executed(captioned, tmp_path)
    assert run.info()["unscored"] == ["image 00.png: no METEOR for a caption of 10,000 words"]
    assert "captions without a score: image 00.png: no METEOR" in capsys.readouterr().err


def test_scores_of_flagged_rows_are_null_and_counted(captioned, tmp_path, quick_scores):
    run = executed(captioned, tmp_path, models=stand_ins(flag="red"), settings=BY_CANDIDATE)
    rows, counts = run.rows(), run.info()["counts"]
    assert rows.loc[rows["flagged"], ["rank", "cider"]].isna().all(axis=None)
    assert rows.loc[~rows["flagged"], ["rank", "cider"]].notna().all(axis=None)
    assert counts["flagged"] == rows["flagged"].sum()
    assert counts["flagged_sources"] == rows.loc[rows["flagged"], "item"].nunique()


def test_euclidean_selection_takes_the_smallest_distance(bare, tmp_path):
    rows = executed(bare, tmp_path, settings=preset(similarity="euclidean")).rows()
    best = rows.loc[rows.groupby("item")["similarity_euclidean"].idxmin()]
    assert best["selected"].all() and (rows["similarity"] == -rows["similarity_euclidean"]).all()


def test_all_unreadable_images_are_named_before_any_model_runs(tmp_path):
    paint(tmp_path / "images", 6)
    for name in ("02.png", "04.png"):
        (tmp_path / "images" / name).write_bytes((tmp_path / "images" / name).read_bytes()[:40])
    with pytest.raises(UserError, match=r"02\.png.*04\.png"):
        executed(load_dataset(f"folder:{tmp_path / 'images'}"), tmp_path / "runs",
                 models=lambda: pytest.fail("models were loaded"))


@pytest.mark.parametrize(("options", "reason"), [
    ({"workers": 0}, "WORKERS = 0"), ({"workers": "two"}, "WORKERS = 'two'"), ({"engine": "slurm"}, "local or ray")])
def test_bad_options(bare, tmp_path, options, reason):
    with pytest.raises(UserError, match=reason):
        executed(bare, tmp_path, **options)


def test_a_folder_for_runs_that_cannot_be_made_is_one_line(bare):
    with pytest.raises(UserError, match="^/proc/runs/.* cannot be made .*: set COMPENDIUM_RUNS to another folder$"):
        executed(bare, Path("/proc/runs"))

