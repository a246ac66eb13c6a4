"""What a study reads: its own runs, and those that differ in the seed alone."""

from __future__ import annotations

import pytest
from PIL import Image

from lib import roundtrip
from lib.errors import UserError
from lib.presets import get_preset
from lib.study import Study
from tests.standins import COLOURS, stand_ins, without_weights

MINI = without_weights(get_preset("mini"))
N, K = 4, 3


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> str:
    """Pictures without captions (no Java is started), played with seeds 0 and 2."""
    monkeypatch.setenv("COMPENDIUM_RUNS", str(tmp_path / "runs"))
    (tmp_path / "pictures").mkdir()
    for name, colour in list(COLOURS.items())[:N]:
        Image.new("RGB", (8, 8), colour).save(tmp_path / "pictures" / f"{name}.png")
    name = f"folder:{tmp_path / 'pictures'}"
    for seed in (0, 2):
        roundtrip.play(MINI, name, "image", N, K, seed, progress=False, models=stand_ins())
    return name


def test_rows_by_seed_are_those_of_the_finished_runs(dataset):
    found = Study(MINI, (dataset,), N, K, 0).rows_by_seed(dataset, "image")
    assert list(found) == [0, 2]
    for rows in found.values():
        assert len(rows) == N * K and rows.attrs["n_candidates"] == K
    assert not (found[0]["seed"].to_numpy() == found[2]["seed"].to_numpy()).any()
    assert list(Study(MINI, (dataset,), N, K, 2).rows_by_seed(dataset, "image")) == [0, 2]
    assert Study(MINI, (dataset,), N, K + 1, 0).rows_by_seed(dataset, "image") == {}, "another size is another run"


def test_a_run_that_was_not_played_names_its_notebook(dataset):
    with pytest.raises(UserError, match="01_image_reconstruction"):
        Study(MINI, (dataset,), N, K, 1).rows(dataset, "image")
