"""Replayed rows and expected averages: equal runs pass, and each kind of difference is found."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from lib import expected, pipeline, results, roundtrip, verify
from lib.datasets import load_dataset
from lib.errors import UserError
from lib.presets import get_preset
from lib.study import Study
from tests.benchmarks import repeatability
from tests.benchmarks.repeatability import Variant
from tests.standins import COLOURS, stand_ins, without_weights

MINI = without_weights(get_preset("mini"))
N, K = 6, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures without captions: no Java is started."""
    folder = tmp_path_factory.mktemp("verify") / "pictures"
    folder.mkdir()
    for i, colour in enumerate(COLOURS.values()):
        noise = np.random.default_rng(i).normal(0, 30, (8, 8, 3))
        pixels = np.clip(np.array(colour) * 0.7 + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def played(folder, tmp_path_factory):
    """A finished run and its plan."""
    root = tmp_path_factory.mktemp("runs")
    roundtrip.play(MINI, f"folder:{folder}", "image", N, K, 0, progress=False, models=stand_ins(),
                   root=root, shard_size=2)
    plan = roundtrip.plan_run(MINI, f"folder:{folder}", "image", N, K, 0, root)
    return plan.run, plan


def failing(checks):
    return [check.name.split(",")[0] for check in checks if not check.holds]


# --- replayed rows -----------------------------------------------------------------------------


def test_rows_repeat(played):
    checks = verify.replay(*played, stand_ins(), sample=4)
    assert failing(checks) == []
    assert all(check.found == 0 for check in checks), "stand-ins repeat exactly"
    assert str(checks[0]).startswith("ok      rows absent or with another seed: 0 ")


class Other:
    """A player whose answers are changed a little."""

    def __init__(self, player, change):
        self.player, self.change = player, change

    def caption(self, *arguments):
        return [[self.change(caption) for caption in row] for row in self.player.caption(*arguments)]

    def generate(self, *arguments):
        return self.change(self.player.generate(*arguments))


@pytest.mark.parametrize(("part", "change", "found"), [
    ("captioner", lambda c: dataclasses.replace(c, logprob=c.logprob + 0.01), ["logprob"]),
    ("captioner", lambda c: dataclasses.replace(c, text="x " + c.text), ["captions that differ"]),
    ("generator", lambda d: dataclasses.replace(d, pixels=255 - d.pixels),
     ["similarity", "similarity_euclidean", "similarity_judge", "pixels"]),
])
def test_each_kind_of_difference_is_found(played, part, change, found):
    models = stand_ins()
    models = dataclasses.replace(models, **{part: Other(getattr(models, part), change)})
    names = failing(verify.replay(*played, models, sample=4))
    assert set(found) <= set(names)
    if found[0] == "logprob":
        assert names == found


def flipped(run, rows: int, top: bool):
    """The rows of a run with other words in so many, and another best candidate of one source."""
    changed = run.rows()
    changed.loc[changed.index[:rows], "message"] += " or so"
    if top:
        last = changed["rank"].iloc[:K].idxmax()
        changed.loc[last, "similarity"] += 1
    return changed


@pytest.mark.parametrize(("rows", "top", "named"), [
    (0, False, []), (1, False, []), (2, False, ["captions that differ"]), (0, True, ["similarity"])])
def test_flips_are_counted_and_one_is_allowed(played, rows, top, named):
    run, _ = played
    checks = verify.differences(flipped(run, rows, top), run.image, run.rows(), run.image)
    assert failing(checks) == named
    assert str(checks[1]).split(" (")[0].endswith(f"captions that differ, of {N * K}: {rows}")
    assert str(checks[2]).split(" (")[0].endswith(f"sources with another best candidate, of {N}: {int(top)}")
    assert checks[2].found == int(top) and checks[-1].found == 0
    only = run.rows().head(1)  # the one flip that is allowed must leave something to compare
    assert failing(verify.differences(only.assign(message="another"), run.image, only, run.image)) \
        == ["captions that differ"]


def test_pictures_of_text_reconstruction_are_compared_whatever_is_read_in_them(folder, tmp_path):
    (folder.parent / "words.txt").write_text("a red thing\na blue thing\n")
    plan = roundtrip.plan_run(MINI, f"texts:{folder.parent / 'words.txt'}", "text", 2, 2, 0, tmp_path)
    again = plan.jobs[0].play(stand_ins())
    kept = again.rows.to_pandas().assign(reconstruction="something else")
    other = {name: 255 - pixels for name, pixels in again.pictures.items()}
    checks = verify.differences(kept, other.__getitem__, again.rows.to_pandas(),
                                again.pictures.__getitem__)
    assert checks[1].found == 4 and checks[-1].found > 100


def test_captions_of_drawn_pictures_are_allowed_more(folder, tmp_path):
    (folder.parent / "few.txt").write_text("a red thing\n")
    plan = roundtrip.plan_run(MINI, f"texts:{folder.parent / 'few.txt'}", "text", 1, 2, 0, tmp_path)
    again = plan.jobs[0].play(stand_ins())
    rows, picture = again.rows.to_pandas(), again.pictures.__getitem__
    for change, named in ((0.005, []), (0.02, ["logprob"])):
        kept = rows.assign(logprob=rows["logprob"] + change)
        assert failing(verify.differences(kept, picture, rows, picture)) == named


def test_lost_rows_are_found(played):
    run, plan = played
    again = plan.jobs[0].play(stand_ins())

    class Half:
        """The run without half of its rows."""

        def rows(self):
            return run.rows().query("candidate != 0")

        def image(self, relative):
            return run.image(relative)

    assert "rows absent or with another seed" in failing(verify.compare(Half(), again))


def test_rows_of_the_real_models_do_not_depend_on_how_they_are_played(tmp_path):
    """The small version of tests/benchmarks/repeatability.py, which has workers and more batches."""
    preset = get_preset("mini")
    dataset = load_dataset("picturebook-nocaps", 2)
    variants = [Variant("ones", batch=1), Variant("cut", batch=7, shard=1, shuffled=True, cut=True)]
    for task in ("image", "text"):
        found = repeatability.repeat(variants, preset, dataset, task, 2, tmp_path)
        assert list(found) == ["ones", "cut"]
        for name, checks in found.items():
            assert failing(checks) == [], (task, name, list(map(str, checks)))
    vectors = repeatability.embeddings(preset, dataset, (1, 7))
    assert len(vectors) == 4 and failing(vectors) == []


# --- expected averages -------------------------------------------------------------------------


@pytest.fixture
def study(played, folder, monkeypatch, tmp_path):
    """A study whose one run is the played one; its expectations are kept apart."""
    run, _ = played
    monkeypatch.setenv("COMPENDIUM_RUNS", str(run.path.parent))
    monkeypatch.setattr(expected, "FOLDER", tmp_path)
    monkeypatch.setattr(expected, "TASKS", ("image",))
    return Study(MINI, (f"folder:{folder}",), N, K, 0)


def test_expected_averages_are_written_and_met(study, capsys):
    with pytest.raises(UserError, match="nothing to compare: mini.json"):
        expected.report(study, demand=True)
    assert expected.report(study) and capsys.readouterr().out == ""
    path = expected.write(study)
    assert expected.report(study)
    assert "1 runs compared with mini.json: all as expected; 1 of them are equal in every caption" \
        in capsys.readouterr().out
    before = path.read_bytes()
    expected.write(study)
    assert path.read_bytes() == before


def test_a_deviation_is_named_and_a_small_one_is_tolerated(study, capsys):
    path = expected.write(study)
    kept = json.loads(path.read_text())
    (entry,) = kept["runs"].values()
    entry["averages"]["similarity, all"]["value"] += entry["averages"]["similarity, all"]["tolerance"] / 2
    path.write_text(json.dumps(kept))
    assert expected.report(study)
    entry["averages"]["logprob, selected"]["value"] += 5
    entry["averages"]["cider, all"] = {"value": 1.0, "tolerance": 0.1}
    path.write_text(json.dumps(kept))
    assert not expected.report(study)
    said = capsys.readouterr().out
    assert "logprob, selected: " in said and "cider, all: missing, expected 1" in said
    assert "2 averages are NOT as expected" in said


def test_each_size_has_expectations_of_its_own(study, folder, capsys):
    """A small run is compared with the small run's averages, not with the default run's."""
    small = dataclasses.replace(study, n_sources=4)
    roundtrip.play(MINI, f"folder:{folder}", "image", 4, K, 0, progress=False, models=stand_ins())
    assert expected.write(study) == expected.write(small)
    assert expected.report(study, demand=True) and expected.report(small, demand=True)
    path = expected.place(study)
    kept = json.loads(path.read_text())
    assert [name.split("--")[-2] for name in kept["runs"]] == ["n4k4s0", "n6k4s0"]
    (few,) = (entry for name, entry in kept["runs"].items() if "n4k4" in name)
    few["averages"]["similarity, all"]["value"] += 1
    path.write_text(json.dumps(kept))
    assert expected.report(study, demand=True) and not expected.report(small, demand=True)
    assert "1 averages are NOT as expected" in capsys.readouterr().out


def test_other_weights_are_not_comparable(study, capsys):
    path = expected.write(study)
    kept = json.loads(path.read_text())
    kept["runs"] = {name[:-8] + "00000000": entry for name, entry in kept["runs"].items()}
    path.write_text(json.dumps(kept))
    assert expected.report(study)
    assert "not comparable: mini.json has mini--folder-pictures--image--n6k4s0" in capsys.readouterr().out
    path.write_text('{"runs": []}')
    with pytest.raises(UserError, match="not a file of expected results"):
        expected.report(study)


def test_tolerance_is_four_standard_errors_of_redrawing_a_twentieth(played):
    rows = played[0].rows()
    kept = expected.averages(rows)["similarity, all"]
    by_hand = 4 * rows["similarity"].std(ddof=0) * np.sqrt(0.1 / len(rows))
    assert kept["tolerance"] == pytest.approx(by_hand + 1e-6, abs=2e-9)


def test_the_committed_file_is_of_the_default_run():
    path = expected.FOLDER / "mini.json"
    if not path.is_file():
        pytest.skip("no expected results are committed yet")
    kept = expected._read(path)["runs"]
    sizes = {expected._sizes(name) for name in kept}
    preset = get_preset("mini")  # CI's small run has entries of its own beside these
    for dataset in preset.datasets:
        for task in ("image", "text"):
            assert any(s.startswith(f"mini--{dataset}--{task}--n") and s.endswith(
                f"k{preset.n_candidates}s{preset.seed}") for s in sizes)
    assert json.dumps(kept).count("NaN") == 0


# --- the commands ------------------------------------------------------------------------------


def test_runs_that_are_not_there_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COMPENDIUM_RUNS", str(tmp_path))
    assert pipeline.main(["--verify", "--n", "2"]) == 2
    assert verify.main(["rows", "--n", "2"]) == 2
    assert verify.main(["expected", "--n", "2", "--candidates", "1"]) == 2
    assert verify.main(["rows", "--sample", "0"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(line.startswith("error: ") for line in errors)
    assert results.runs_root() == tmp_path
