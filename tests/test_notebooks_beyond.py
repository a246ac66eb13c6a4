"""Notebooks 09, 10, 11 and 14 on rows with a planted answer, and on data that lack what they compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
from PIL import Image
from test_notebooks_cases import COCO, claims_of, notebook, own_folder, own_texts, text_of, without_scores

from lib.base import stable_seed
from lib.models import Caption, Images
from lib.roundtrip.run import ranked

__all__ = ["notebook"]  # the fixture
N, K = 24, 6
SIZE = {"DATASET": COCO, "N_SOURCES": N, "N_CANDIDATES": K}
FREE = {"EMBED": False, "N_BEAM": 0}  # no model


def written(change: Any = None, effect: float = 0.3) -> None:
    """Planted COCO-like runs of N sources with K candidates; rows are ranked again after the change."""
    planted.write("mini", COCO, N, K, effect=effect, change=change and (lambda rows: ranked(change(rows))))


def verdicts(names: dict[str, Any], words: str) -> list[str]:
    return claims_of(names, words)["verdict"].tolist()


def test_where_similarity_is_the_score_reconstruction_is_the_oracle(notebook) -> None:
    written(lambda rows: rows.assign(similarity=np.tanh(rows["cider"].astype(float) / 4)))
    names = notebook("09", **SIZE, **FREE)
    table = names["table"][names["table"]["score"] == "cider"].set_index("rule")
    assert table.loc["Reconstruction (paper)", "estimate"] == table.loc["Oracle", "estimate"] > 0
    assert names["weights"]["cider"].min() >= 0.5  # the weight goes to what selects well
    assert verdicts(names, "^Reconstruction selects better captions than Log-probability in CIDEr") == ["supported"]
    assert table.loc["Oracle", "images"] == table.loc["CLIPScore", "images"] == 0
    assert table.loc["Reconstruction (paper)", "images"] == K


def test_the_combination_is_fitted_for_each_score(notebook) -> None:
    written(lambda rows: rows.assign(logprob=rows["cider"] - 9.0, sem_f=rows["similarity"].clip(0.0)), effect=0.0)
    names = notebook("09", **SIZE, **FREE)
    assert names["weights"]["cider"].max() < 0.5 < names["weights"]["sem_f"].min()
    of_both = names["table"].query("rule == 'Reconstruction + log-prob.'").set_index("score")["estimate"]
    most = 100 * (names["rows"].groupby(["dataset", "item"])["sem_f"].max().mean() / names["nucleus"]["sem_f"].mean() - 1)
    assert 0.8 * most < of_both["sem_f"] <= most
    assert verdicts(names, "Reconstruction . log-prob.* Log-probability in CIDEr") == ["inconclusive"]  # nothing to add
    assert verdicts(names, "Reconstruction . log-prob.* Log-probability in Semantic") == ["supported"]


def test_agreement_takes_the_caption_most_like_the_others(notebook) -> None:
    said = ["a red owl in the snow", "a red owl in the snow", "a red owl in snow", "two cars", "a blue cat", "a tower"]
    written(lambda rows: rows.assign(message=[said[k] for k in rows["candidate"]]))
    names = notebook("09", **SIZE, **FREE)
    assert set(names["best"](names["rows"]["agreement"])["candidate"]) == {0}


class Drawn:
    """A generator whose image depends on the noise alone, or on the caption alone, and an encoder of pixels."""

    def __init__(self, by: str) -> None:
        self.by = by

    def generate(self, texts: Any, seeds: Any) -> Images:
        keys = seeds if self.by == "noise" else [stable_seed(text) for text in texts]
        return Images.of(np.stack([np.random.default_rng(key).integers(0, 255, (4, 4, 3), np.uint8) for key in keys]))

    def caption(self, images: Any, seeds: Any, decoding: Any) -> list[list[Caption]]:
        return [[Caption("a red ball", -1.0, 3)] for _ in images]

    def embed_texts(self, texts: Any) -> np.ndarray:
        return np.stack([np.random.default_rng(stable_seed(text)).normal(size=8) for text in texts])

    def embed_images(self, images: Any) -> np.ndarray:
        pixels = [np.asarray(Image.fromarray(np.asarray(image)).convert("RGB").resize((4, 4)), float) for image in images]
        return np.stack(pixels).reshape(len(pixels), -1) - 127.0


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch):
    def by(what: str) -> None:
        for name in ("load_captioner", "load_generator", "load_encoder"):
            monkeypatch.setattr(f"lib.models.{name}", lambda settings: Drawn(what))
    return by


def test_noise_that_decides_everything_leaves_no_reliability(notebook, drawn) -> None:
    drawn("noise"), written()
    found = notebook("10", **SIZE, N_SUBSET=N)["reliability"]["estimate"]
    assert found["independent"] < 0.05 and found["shared"] == pytest.approx(0, abs=1e-6)


def test_a_caption_that_decides_everything_needs_one_image(notebook, drawn) -> None:
    drawn("caption"), written()
    names = notebook("10", **SIZE, N_SUBSET=N, REPEATS=2)
    assert names["reliability"]["estimate"].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert names["gain"][1].tolist() == names["gain"][2].tolist()  # averaging equal images changes nothing
    assert set(verdicts(names, "one image tells more of its caption")) == {"supported"}


def test_expected_gain_of_a_random_subset_is_exact(notebook) -> None:
    written()
    names = notebook("11", **SIZE, N_RACE=-1)
    rows = names["rows"].astype({"cider": float}).set_index(["dataset", "item"])
    pairs = [(a, b) for a in range(K) for b in range(a)]
    item = rows.loc[rows.index[0]].set_index("candidate")
    best = [max(pair, key=lambda k: item.loc[k, "similarity"]) for pair in pairs]
    table = names["budgets"]["cider"]["at random"]
    assert table.loc[rows.index[0], 2] == pytest.approx(100 * np.mean([item.loc[k, "cider"] for k in best]))
    assert table[1].to_numpy() == pytest.approx(100 * rows.groupby(level=[0, 1])["cider"].mean().to_numpy())


def test_a_race_whose_previews_are_noise_rarely_ends_with_the_best(notebook, drawn) -> None:
    drawn("noise"), written()
    raced = notebook("11", **SIZE, N_RACE=N)["raced"].set_index("race")
    assert raced.loc["1 of 3 steps, then 1 full", "agreement"] < 0.5
    assert raced.loc["1 of 3 steps, then 1 full", "steps saved (%)"] == pytest.approx(100 * (1 - (K + 3) / (3 * K)))


def test_a_free_score_that_knows_the_answer_makes_a_third_enough(notebook) -> None:
    written(lambda rows: rows.assign(logprob=rows["similarity"] - 9.0, clipscore=-rows["similarity"]), effect=1.0)
    names = notebook("11", **SIZE, N_RACE=-1)
    assert verdicts(names, "2 of 6 images, log-probability, keep 95% of the gain in CIDEr") == ["supported"]
    assert verdicts(names, "2 of 6 images, CLIPScore, keep 95% of the gain in CIDEr") == ["contradicted"]
    assert verdicts(names, "2 of 6 images, at random, keep 95% of the gain in CIDEr") == ["contradicted"]


def test_an_encoder_that_measures_its_own_noise_is_circular(notebook) -> None:
    rng = np.random.default_rng(0)
    written(lambda rows: rows.assign(similarity=rng.random(len(rows)), similarity_second=rng.random(len(rows))))
    names = notebook("14", **SIZE)
    line = names["circularity"].query("task == 'image' and `selected by` == 'ranking'").iloc[0]
    assert line["low"] > 20 and set(verdicts(names, "circularity")) == {"supported"}


def test_equal_encoders_are_not_circular_and_see_the_same(notebook) -> None:
    written(lambda rows: rows.assign(similarity_second=rows["similarity"]))
    names = notebook("14", **SIZE)
    assert names["circularity"]["estimate"].abs().max() == 0
    assert (names["same"] == 1).all()
    assert (names["rho"]["second − ranking"].dropna() == 0).all()


def test_the_encoder_that_tells_left_from_right_is_named(notebook) -> None:
    rng = np.random.default_rng(0)

    def change(rows: pd.DataFrame) -> pd.DataFrame:
        right = rng.random(len(rows)) < 0.5
        return rows.assign(sem_relation_p=right * 1.0, similarity=rng.random(len(rows)),
                           similarity_second=0.5 + 0.3 * right + 0.1 * rng.random(len(rows)))

    planted.write("mini", COCO, 48, K, change=lambda rows: ranked(change(rows)))
    names = notebook("14", DATASET=COCO, N_SOURCES=48, N_CANDIDATES=K)
    assert verdicts(names, "second encoder tells left from right better") == ["supported"]
    assert verdicts(names, "the ranking encoder tells left") == ["inconclusive"]


@pytest.mark.parametrize("make", [own_folder, own_texts])
def test_own_data_say_what_is_missing(notebook, drawn, tmp_path: Path, capsys, make) -> None:
    dataset, reason = make(tmp_path)
    drawn("noise")
    planted.write("mini", dataset, 0, 3, change=without_scores)
    for number, options in (("09", FREE), ("10", {}), ("11", {}), ("13", {"ROUNDS": 2}), ("14", {})):
        names = notebook(number, DATASET=dataset, N_CANDIDATES=3, **options)
        assert reason in capsys.readouterr().out + text_of(names)


@pytest.mark.parametrize(("sources", "again"), [(24, 3), (320, 4)])
def test_as_many_sources_are_generated_again_as_the_run_allows(notebook, drawn, sources, again) -> None:
    """One in 80, but three at least."""
    drawn("noise"), planted.write("mini", COCO, sources, 2)
    assert len(notebook("10", DATASET=COCO, N_SOURCES=sources, N_CANDIDATES=2, REPEATS=2)["chosen"]) == again


def test_two_sources_and_two_candidates_are_insufficient(notebook, drawn) -> None:
    drawn("noise"), planted.write("mini", COCO, 2, 2)
    for number, options in (("09", FREE), ("10", {}), ("11", {}), ("13", {"ROUNDS": 2}), ("14", {})):
        names = notebook(number, DATASET=COCO, N_SOURCES=2, N_CANDIDATES=2, **options)
        assert set(verdicts(names, "")) == {"insufficient data"}
