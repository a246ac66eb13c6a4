"""The game with small deterministic players (tests/standins.py): contract, resume, bad input."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib import encoders, results, roundtrip
from lib.datasets import load_dataset
from lib.errors import UserError
from lib.players import Models, reads
from lib.presets import get_preset
from lib.seeds import stable_seed
from tests.standins import COLOURS, NAMES, Spoilt, stand_ins, without_weights

MINI = without_weights(get_preset("mini"))
BY_CANDIDATE = dataclasses.replace(
    MINI, generator=dataclasses.replace(MINI.generator, noise="candidate"))
N, K = 13, 5


def paint(folder, captions: bool, n: int = N):
    """A folder of n noisy coloured pictures; with captions, two for each."""
    folder.mkdir()
    rng = np.random.default_rng(7)
    known = {}
    for i in range(n):
        base = np.array(COLOURS[NAMES[i % 6]]) * 0.6 + np.array(COLOURS[NAMES[(i + 1) % 6]]) * 0.4
        pixels = np.clip(base + rng.normal(0, 30, (12, 10, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        known[f"{i:02d}.png"] = [f"a {NAMES[i % 6]} thing", f"picture {i} is {NAMES[i % 6]}"]
    if captions:
        (folder / "captions.json").write_text(json.dumps(known))
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A dataset without captions: no Java is started, so these games take no time."""
    return f"folder:{paint(tmp_path_factory.mktemp('bare') / 'pictures', captions=False)}"


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return f"folder:{paint(tmp_path_factory.mktemp('captioned') / 'pictures', captions=True)}"


def play(dataset, root, task="image", models=None, preset=MINI, n=N, k=K, **options):
    options = {"progress": False, "seed": 0, **options}
    return roundtrip.play(preset, dataset, task, n, k, models=models or stand_ins(), root=root, **options)


@pytest.fixture(scope="module")
def uncut(bare, tmp_path_factory):
    """The run that others are compared with."""
    return play(bare, tmp_path_factory.mktemp("uncut"), shard_size=4)


@pytest.fixture(scope="module")
def scored(captioned, tmp_path_factory):
    """Both tasks with captions, thus with scores."""
    root = tmp_path_factory.mktemp("scored")
    return {task: play(captioned, root, task, shard_size=4) for task in ("image", "text")}


def contents(run):
    """The bytes of everything that must repeat."""
    names = ["rows.parquet", "baselines.parquet"]
    pictures = sorted(p for p in (run.path / "images").rglob("*") if p.is_file())
    paths = [run.path / n for n in names] + pictures
    paths += sorted((run.path / "shards").glob("*")) + sorted((run.path / "baselines").glob("*"))
    return {str(p.relative_to(run.path)): p.read_bytes() for p in paths}


# --- the rows ----------------------------------------------------------------------------------


def test_image_rows(scored):
    run, rows = scored["image"], scored["image"].rows()
    assert list(rows.columns) == results.ROWS.names and len(rows) == N * K
    assert (rows["run"] == run.name).all() and (rows["task"] == "image").all()
    assert rows["item"].is_monotonic_increasing
    assert rows["candidate"].tolist() == list(range(K)) * N
    assert rows["seed"][0] == stable_seed(0, "caption", "folder:pictures", "00.png", 0)
    assert rows["source_text"].isna().all() and rows["logprob"].lt(0).all()
    assert (rows["n_words"] == rows["message"].str.split().str.len()).all()
    assert np.allclose(rows["similarity"], rows["clip_score"])
    assert rows[["cider", "bleu1", "meteor", "rouge_l", "clipscore", "ref_clipscore"]].notna().all(None)
    assert rows[["sem_f", "domain"]].isna().all(None)
    for relative in rows["reconstruction"]:
        assert run.image(relative).size == (16, 16)


def test_text_rows(scored, captioned):
    run, rows = scored["text"], scored["text"].rows()
    items = load_dataset(captioned).by_id()
    assert len(rows) == N * K and run.image(rows["message"][0]).size == (16, 16)
    for row in rows.itertuples():
        assert row.source_text in items[row.item].references
    assert len(set(rows["source_text"].str.startswith("a "))) == 2  # either reference is drawn
    assert rows["seed"][1] == stable_seed(0, "noise", "folder:pictures", "00.png", 1)
    assert rows[["clip_score", "clip_score_judge", "cider", "similarity_judge"]].notna().all(None)
    assert rows["clipscore"].isna().all()
    assert (rows["n_words"] == rows["reconstruction"].str.split().str.len()).all()
    assert len(run.baselines()) == 0


@pytest.mark.parametrize("task", ["image", "text"])
def test_the_selected_candidate_is_the_most_similar(scored, task):
    for _, source in scored[task].rows().groupby("item"):
        assert sorted(source["rank"]) == list(range(1, K + 1))
        best = source[source["selected"]]
        assert len(best) == 1 and best["rank"].item() == 1
        assert best["similarity"].item() == source["similarity"].max()
        assert best["candidate"].item() == source["similarity"].to_numpy().argmax()
        assert source.sort_values("rank")["similarity"].is_monotonic_decreasing


def test_baselines_are_greedy_captions_with_scores(scored):
    baselines = scored["image"].baselines()
    assert len(baselines) == N and (baselines["kind"] == "greedy").all()
    assert baselines["caption"].str.startswith("a ").all()
    assert baselines[["cider", "clipscore", "ref_clipscore", "logprob"]].notna().all(None)


def test_equal_captions_have_equal_scores(scored):
    rows = scored["image"].rows()
    for _, same in rows.groupby(["item", "message"]):
        assert same["cider"].nunique() == 1 and same["reconstruction"].nunique() == 1


def test_record_tells_what_was_played(scored, monkeypatch):
    info = scored["image"].info()
    assert info["counts"] == {"rows": N * K, "flagged": 0, "flagged_sources": 0, "truncated_prompts": 0}
    assert info["preset"]["name"] == "mini" and len(info["hash"]) == 64
    assert info["dataset"]["sources"] == N and info["made_by"]["versions"]["numpy"]
    assert set(info["models"]) == {"captioner", "generator", "encoder", "judge"}
    passes = scored["image"].cost()["passes"]
    assert passes["images_asked"] == N * K and passes["captions"] == N * K + N


def test_no_secret_reaches_the_disk(bare, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    run = play(bare, tmp_path, n=2)
    for path in run.path.rglob("*"):
        assert path.is_dir() or b"verysecret" not in path.read_bytes()


def test_scenes_give_semantic_scores(tmp_path):
    rows = play("picturebook-coco", tmp_path, n=3, k=2).rows()
    assert rows["sem_f"].between(0, 1).all() and rows["sem_object_r"].notna().all()


# --- economy -----------------------------------------------------------------------------------


def test_shared_noise_draws_each_distinct_caption_once(bare, tmp_path):
    models = stand_ins()
    rows = play(bare, tmp_path, models=models).rows()
    distinct = len(rows[["item", "message"]].drop_duplicates())
    assert models.generator.asked == distinct < N * K
    assert models.encoder.images == N + distinct
    assert models.captioner.seen == 2 * N  # once to sample, once for the greedy baseline
    assert rows["reconstruction"].nunique() == distinct


def test_noise_of_its_own_draws_every_candidate(bare, tmp_path):
    models = stand_ins()
    rows = play(bare, tmp_path, models=models, preset=BY_CANDIDATE).rows()
    assert models.generator.asked == N * K == rows["reconstruction"].nunique()


def test_finished_run_needs_no_models(uncut, bare):
    again = roundtrip.play(MINI, bare, "image", N, K, 0, models=Models(None, None, None),
                           root=uncut.path.parent, progress=False)
    assert again == uncut


# --- the same rows in any batches, any order, after any cut -------------------------------------


@pytest.mark.parametrize("shard_size", [1, 7, 64])
def test_rows_do_not_depend_on_the_shard_size(uncut, bare, tmp_path, shard_size):
    run = play(bare, tmp_path, shard_size=shard_size)
    assert run.name == uncut.name
    pd.testing.assert_frame_equal(run.rows(), uncut.rows())
    pd.testing.assert_frame_equal(run.baselines(), uncut.baselines())


@pytest.mark.parametrize("task", ["image", "text"])
def test_rows_do_not_depend_on_the_order(scored, captioned, tmp_path, task):
    dataset = load_dataset(captioned)
    items = list(dataset.items)
    random.Random(1).shuffle(items)
    run = play(dataclasses.replace(dataset, items=tuple(items)), tmp_path, task, shard_size=5)
    assert run.name == scored[task].name
    rows = run.rows()
    assert rows["item"].unique().tolist() == [item.id for item in items]
    ordered = rows.sort_values(["item", "candidate"], ignore_index=True)
    pd.testing.assert_frame_equal(ordered, scored[task].rows())


def test_a_subset_has_the_rows_of_the_whole(uncut, bare, tmp_path):
    part = play(bare, tmp_path, n=5, k=3).rows()
    whole = uncut.rows()
    same = whole[whole["item"].isin(part["item"]) & (whole["candidate"] < 3)]
    columns = ["item", "candidate", "seed", "message", "logprob", "similarity"]
    pd.testing.assert_frame_equal(part[columns], same[columns].reset_index(drop=True))


class Interrupted(Exception):
    """Stands for a killed process."""


class Failing:
    """A player that works a number of times and then dies."""

    def __init__(self, player, calls: int) -> None:
        self.player, self.calls = player, calls

    def generate(self, *arguments):
        self.calls -= 1
        if self.calls < 0:
            raise Interrupted
        return self.player.generate(*arguments)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_cut_off_run_goes_on_to_equal_bytes(uncut, bare, tmp_path, calls):
    models = stand_ins()
    broken = dataclasses.replace(models, generator=Failing(models.generator, calls))
    with pytest.raises(Interrupted):
        play(bare, tmp_path, models=broken, shard_size=4)
    kept = len(list(tmp_path.glob("*/shards/*.parquet")))
    assert kept == calls
    whole, rest = stand_ins(), stand_ins()
    run = play(bare, tmp_path, models=rest, shard_size=9)  # the begun run keeps its own size
    assert contents(run) == contents(uncut)
    play(bare, tmp_path / "other", models=whole, shard_size=4)
    assert rest.generator.asked < whole.generator.asked or calls == 0


@pytest.mark.parametrize("name", ["rows.parquet", "shards/00001.parquet", "shards/00003.parquet",
                                  "baselines/00002.parquet", "run.json"])
@pytest.mark.parametrize("keep", [None, 0, 200])
def test_lost_and_damaged_files_are_made_again(uncut, bare, tmp_path, capsys, name, keep):
    run = results.Run(tmp_path / uncut.name)
    shutil.copytree(uncut.path, run.path)
    (run.path / "rows.parquet").unlink()
    path = run.path / name
    if keep is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes((uncut.path / name).read_bytes()[:keep])
    play(bare, tmp_path, shard_size=4)
    assert contents(run) == contents(uncut)
    assert run.info()["counts"]["rows"] == N * K
    reported = "damaged, is played again" in capsys.readouterr().err
    assert reported == (keep is not None and path.parent != run.path)


def test_foreign_shard_is_refused_and_everything_kept(uncut, bare, tmp_path):
    other = play(bare, tmp_path, seed=1, shard_size=4)
    shutil.copytree(uncut.path, tmp_path / uncut.name)
    (tmp_path / uncut.name / "rows.parquet").unlink()
    mixed = tmp_path / uncut.name / "shards" / "00001.parquet"
    shutil.copy(other.path / "shards" / "00001.parquet", mixed)
    with pytest.raises(UserError, match="belongs to another run"):
        play(bare, tmp_path, shard_size=4)
    assert len(list(mixed.parent.glob("*.parquet"))) == 4
    shutil.copy(uncut.path / "rows.parquet", mixed)
    with pytest.raises(UserError, match="another schema"):
        play(bare, tmp_path, shard_size=4)


def test_shard_of_other_sources_is_played_again(uncut, bare, tmp_path, capsys):
    shutil.copytree(uncut.path, tmp_path / uncut.name)
    shards = tmp_path / uncut.name / "shards"
    (shards.parent / "rows.parquet").unlink()
    shutil.copy(shards / "00000.parquet", shards / "00001.parquet")
    run = play(bare, tmp_path, shard_size=4)
    assert "not the expected sources" in capsys.readouterr().err
    assert contents(run) == contents(uncut)


# --- what cannot be measured -------------------------------------------------------------------


@pytest.mark.parametrize("task", ["image", "text"])
def test_flagged_pictures_are_counted_and_left_out(captioned, tmp_path, task):
    run = play(captioned, tmp_path, task, models=stand_ins(flag="red"), k=3, n=7)
    rows = run.rows()
    flagged = rows[rows["flagged"]]
    assert 0 < len(flagged) == run.info()["counts"]["flagged"] < len(rows)
    columns = ["similarity", "similarity_euclidean", "similarity_judge", "rank", *results.SCORES]
    assert flagged[columns].isna().all(None) and not flagged["selected"].any()
    for _, source in rows[~rows["flagged"]].groupby("item"):
        assert sorted(source["rank"]) == list(range(1, len(source) + 1))
        assert source["selected"].sum() == 1


@pytest.mark.parametrize(("value", "problem"), [(np.nan, "not finite"), (0.0, "is zero"),
                                                (np.inf, "not finite")])
@pytest.mark.parametrize("who", ["encoder", "judge"])
def test_useless_embeddings_name_the_item(bare, tmp_path, value, problem, who):
    models = stand_ins()
    models = dataclasses.replace(models, **{who: Spoilt(getattr(models, who), value, (12, 10, 3))})
    with pytest.raises(UserError, match=rf"{who}'s embedding of item 00\.png is.*{problem.split()[-1]}"):
        play(bare, tmp_path, models=models)


def test_encoders_of_one_kind_leave_nulls(captioned, tmp_path):
    models = stand_ins()
    models.judge.reads_texts = False
    models.encoder.reads_texts = False
    rows = play(captioned, tmp_path, models=models, n=3, k=2).rows()
    assert rows["similarity_judge"].notna().all() and rows["clipscore"].isna().all()
    with pytest.raises(UserError, match="its encoder cannot read"):
        play(captioned, tmp_path, "text", models=models, n=3, k=2)


def test_no_judge(bare, tmp_path):
    models = dataclasses.replace(stand_ins(), judge=None)
    rows = play(bare, tmp_path, models=models, preset=dataclasses.replace(MINI, judge=None)).rows()
    assert rows[["similarity_judge", "clip_score_judge"]].isna().all(None)


def test_pictures_without_captions_have_ranks_but_no_caption_scores(uncut):
    rows = uncut.rows()
    assert rows["rank"].notna().all() and rows[["cider", "bleu4", "ref_clipscore"]].isna().all(None)
    assert rows["clipscore"].notna().all()
    assert uncut.info()["missing_scores"]["cider"] == "the dataset has no reference captions"


def test_texts_without_pictures(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red boat\na blue owl\n" + "word " * 10_000 + "\n😀\n", encoding="utf-8")
    run = play(f"texts:{path}", tmp_path, "text", n=4, k=2)
    rows = run.rows()
    assert rows["similarity"].notna().all() and rows["clip_score"].isna().all()
    assert run.info()["counts"]["truncated_prompts"] == 2
    with pytest.raises(UserError, match="has no pictures"):
        play(f"texts:{path}", tmp_path, "image", n=4, k=2)


def test_euclidean_selection_takes_the_smallest_distance(bare, tmp_path):
    preset = dataclasses.replace(MINI, similarity="euclidean")
    rows = play(bare, tmp_path, preset=preset).rows()
    assert np.allclose(rows["similarity"], -rows["similarity_euclidean"])
    assert rows["clip_score"].between(-1, 1).all()
    best = rows[rows["selected"]].set_index("item")["similarity_euclidean"]
    assert np.allclose(best, rows.groupby("item")["similarity_euclidean"].min()[best.index])


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "reason"), [
    ({"n": 0}, "n_sources = 0"), ({"n": -1}, "n_sources = -1"), ({"n": "5"}, "n_sources = '5'"),
    ({"k": 0}, "n_candidates = 0"), ({"k": 2.0}, "n_candidates = 2.0"),
    ({"seed": "x"}, "seed = 'x'"), ({"task": "both"}, "unknown task 'both'"),
    ({"engine": "abacus"}, "abacus"), ({"task": "text"}, "has no captions"),
    ({"shard_size": 0}, "shard_size = 0"),
])
def test_bad_parameters(bare, tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason):
        play(bare, tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_picture_stops_the_run_and_keeps_what_is_done(tmp_path):
    folder = paint(tmp_path / "pictures", captions=False)
    (folder / "09.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"09\.png is not a picture"):
        play(f"folder:{folder}", tmp_path / "runs", shard_size=4)
    assert len(list(tmp_path.glob("runs/*/shards/*.parquet"))) == 2


def test_more_sources_than_there_are_plays_all(bare, tmp_path):
    assert play(bare, tmp_path, n=1000, k=1).name.startswith(f"mini--folder-pictures--image--n{N}k1s0--")


def test_find_run(uncut, bare, tmp_path):
    assert roundtrip.find_run(MINI, bare, "image", N, K, 0, root=uncut.path.parent) == uncut
    with pytest.raises(UserError, match="run notebooks/01_image_reconstruction"):
        roundtrip.find_run(MINI, bare, "image", N, K, 5, root=tmp_path)
    assert set(roundtrip.sources_of(uncut, bare)) == set(uncut.rows()["item"])


def test_scores_are_made_again_when_the_scoring_code_changed(uncut, bare, tmp_path):
    run = results.Run(tmp_path / uncut.name)
    shutil.copytree(uncut.path, run.path)
    rows = results.read_table(run.path / "rows.parquet", results.ROWS, None)
    key = uncut.info()["hash"]

    def old(temporary):
        with results.table_writer(temporary, results.ROWS, key, scores="older code") as writer:
            writer.write_table(rows)

    results.write_atomic(run.path / "rows.parquet", old)
    play(bare, tmp_path, models=Models(None, None, None))
    assert contents(run) == contents(uncut)


@pytest.mark.parametrize(("name", "images", "texts"), [
    ("Clip", True, True), ("Siglip", True, True), ("Dino", True, False), ("Sentence", False, True)])
def test_adapters_tell_what_they_read(name, images, texts):
    adapter = getattr(encoders, name)
    blank = adapter.__new__(adapter)  # no weights: only the class is asked
    assert reads(blank, "images") == images and reads(blank, "texts") == texts
