"""The paper's two kinds of failure (5.4.3), found by rule from rows and true scenes.

Annotation imperfection: annotators write "bird" for a penguin; the captioner knows better, and a
right caption scores low.  Generation bias: a snowman always comes with a scarf in the generator's
training pictures, so a caption need not mention it, and one that does gains nothing.
Both are counted beside control pictures without the plant: a rule that fires as often there has
found nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lib import labels, ranking
from lib.claims import Verdict, generator, identity
from lib.picturebook.scenes import ACCESSORY_OF, BIASED, FAMILY_OF, Scene
from lib.picturebook.semantics import match, parse

Scenes = Mapping[str, Mapping[str, Any] | None]


def disagreement(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """Add percentiles over all candidates of the run and their difference.

    disagreement is in [-1, 1]: near 1 for a faithful reconstruction from a low-scoring message.
    """
    marked = rows.assign(
        similarity_pct=rows["similarity"].rank(pct=True), score_pct=rows[score].rank(pct=True)
    )
    marked["disagreement"] = marked["similarity_pct"] - marked["score_pct"]
    marked.attrs = rows.attrs
    return marked


def disputed(rows: pd.DataFrame, score: str, n: int = 12) -> pd.DataFrame:
    """The n sources whose selected candidate's similarity exceeds its score most."""
    marked = disagreement(rows, score)
    best = marked[marked["rank"] == 1]
    return best.sort_values(["disagreement", "item"], ascending=[False, True]).head(n)


def with_scenes(rows: pd.DataFrame, scenes: Scenes) -> bool:
    """Whether the true scene of every source is known."""
    return all(scenes.get(item) for item in rows["item"].unique())


def describe(rows: pd.DataFrame, scenes: Scenes, score: str = "cider") -> pd.DataFrame:
    """Rows of the image task with what the true scene says about each caption.

    exact: every thing it names is there, and one by its own name; carrier: the category that can
    carry an accessory; carries: whether it is drawn with it; silent, speaks: the caption names the
    carrier without, with its accessory; biased, family: the plants.
    """
    marked = disagreement(rows, score)
    facts = {item: _carrier(scenes[item]) for item in rows["item"].unique()}
    marked["carrier"] = [facts[item][0] for item in rows["item"]]
    marked["carries"] = [facts[item][1] for item in rows["item"]]
    marked["biased"] = marked["carrier"].isin(BIASED)
    marked["family"] = [scenes[item].get("planted") == "family" for item in rows["item"]]
    pairs = list(zip(rows["item"], rows["message"], strict=True))
    marked["exact"] = [is_exact(text, scenes[item]) for item, text in pairs]
    said = [speech(text, facts[item][0]) for item, text in pairs]
    marked["speaks"] = [word == "speaks" for word in said]
    marked["silent"] = [word == "silent" for word in said]
    return marked


def _carrier(scene: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The first thing of a scene that can carry an accessory, planted kinds first."""
    able = [e for e in scene["entities"] if e["category"] in ACCESSORY_OF]
    able.sort(key=lambda entity: entity["category"] not in BIASED)
    return (able[0]["category"], able[0]["accessory"] is not None) if able else (None, False)


def speech(caption: str, carrier: str | None) -> str:
    """Whether a caption names the carrier and its accessory: absent, silent or speaks."""
    if carrier is None:
        return "absent"
    family = FAMILY_OF[carrier]
    named = [
        mention
        for mention in parse(caption).mentions
        if carrier == mention.category or (mention.category is None and mention.family == family)
    ]
    if not named:
        return "absent"
    return "speaks" if any(mention.accessory for mention in named) else "silent"


def is_exact(caption: str, scene: Mapping[str, Any]) -> bool:
    """All that is named is there, and at least one thing by its own name, not its family's."""
    claims = parse(caption)
    found = match(claims, Scene.from_dict(dict(scene)))
    named = [m.category is not None for m in claims.mentions]
    return bool(found) and all(entity is not None for entity in found) and any(named)


# annotation imperfection


def imperfections(marked: pd.DataFrame) -> pd.DataFrame:
    """One row a source: is its selected caption right by the scene, similar, and scored low?

    failure: exact, similarity in the upper half and score in the lowest quarter of the run.
    """
    best = marked[marked["rank"] == 1].copy()
    low, close = best["score_pct"] <= 0.25, best["similarity_pct"] >= 0.5
    best["failure"] = best["exact"] & close & low
    return best


def imperfection_verdicts(marked: pd.DataFrame, seed: int, score: str = "cider") -> list[Verdict]:
    """5.4.3: right captions score low where annotators use the family word."""
    task, dataset = identity(marked)
    best = imperfections(marked)
    rate = _share_gap(best, "family", seed)
    loss = _mean_gap(best[best["exact"]], score, "family", seed)
    name = labels.metric_label(score)
    return [
        Verdict(
            "annotation imperfection makes right captions score low (5.4.3)",
            task,
            dataset,
            "share of right, similar, low-scored selections, family-word pictures minus others",
            rate,
        ),
        Verdict(
            "a right caption scores lower where the references only name the family (5.4.3)",
            task,
            dataset,
            f"{name} of right selected captions, family-word pictures minus others",
            loss,
            direction=-1,
        ),
    ]


def _draws(table: pd.DataFrame, seed: int, part: str) -> list[np.random.Generator]:
    """One generator for the planted group and one for the controls."""
    names = identity(table) if len(table) else ("", "")
    return [generator(seed, part, *names, group) for group in ("planted", "control")]


def _mean_gap(table: pd.DataFrame, column: str, group: str, seed: int) -> ranking.Estimate:
    """Mean of a column inside the group minus outside, both resampled."""
    inside, numbers = table[group].to_numpy(dtype=bool), table[column].to_numpy(dtype=float)
    one, other = _draws(table, seed, f"{column} {group}")
    means = (
        ranking.bootstrap_mean(numbers[inside], one),
        ranking.bootstrap_mean(numbers[~inside], other),
    )
    return ranking.difference(*means)


def _share_gap(table: pd.DataFrame, group: str, seed: int) -> ranking.Estimate:
    """Share of failures inside the group minus outside."""
    inside, failed = table[group].to_numpy(dtype=bool), table["failure"].to_numpy(dtype=bool)
    one, other = _draws(table, seed, f"failure {group}")
    shares = (ranking.share(failed[inside], one), ranking.share(failed[~inside], other))
    return ranking.difference(*shares)


# generation bias


def silent_similarity(marked: pd.DataFrame) -> pd.DataFrame:
    """Per source with a carrier: mean similarity of its captions that are silent about it."""
    silent = marked[marked["silent"] & marked["carrier"].notna()]
    keys = ["item", "carrier", "carries", "biased", "task", "dataset"]
    return silent.groupby(keys, as_index=False)["similarity"].mean()


def biases(marked: pd.DataFrame) -> pd.DataFrame:
    """One row a source that is drawn with its accessory and has captions of both kinds.

    failure: the selected caption names the carrier but not its accessory, although another does;
    where the generator draws it unasked, silence costs no similarity.
    """
    drawn = marked[marked["carries"] & marked["carrier"].notna()]
    both = drawn.groupby("item")[["silent", "speaks"]].transform("any").all(axis=1)
    best = drawn[(drawn["rank"] == 1) & both].copy()
    best["failure"] = best["silent"]
    return best


def bias_verdicts(marked: pd.DataFrame, seed: int) -> list[Verdict]:
    """5.4.3: what always came along in training is drawn unasked, and misleads the ranking."""
    task, dataset = identity(marked)
    silent, found = silent_similarity(marked), biases(marked)
    gaps = [
        _mean_gap(part, "similarity", "carries", seed + place)
        for place, part in enumerate((silent[silent["biased"]], silent[~silent["biased"]]))
    ]
    return [
        Verdict(
            "the generator adds unasked what always came along in its training (5.4.3)",
            task,
            dataset,
            "similarity of captions silent about the accessory, drawn with it minus without, "
            "planted kinds minus control kinds",
            ranking.difference(*gaps),
        ),
        Verdict(
            "generation bias lets a caption win that omits what is there (5.4.3)",
            task,
            dataset,
            "share of silent selections where another caption speaks, planted minus control kinds",
            _share_gap(found, "biased", seed),
        ),
    ]


# counts for the table under the figure


def counts(marked: pd.DataFrame) -> pd.DataFrame:
    """How often each rule fires, planted beside control: kind, group, sources, failures, share."""
    lines = []
    for kind, table, group in (
        ("annotation imperfection", imperfections(marked), "family"),
        ("generation bias", biases(marked), "biased"),
    ):
        for planted, name in ((True, "planted"), (False, "control")):
            part = table[table[group] == planted]
            n, k = len(part), int(part["failure"].sum())
            low, high = wilson(k, n)
            lines.append((kind, name, n, k, k / n if n else np.nan, low, high))
    columns = ["kind", "group", "sources", "failures", "share", "low", "high"]
    return pd.DataFrame(lines, columns=columns)


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of k in n; (nan, nan) where n is 0.

    It stays sensible at 0 of n, where a bootstrap would claim certainty.
    """
    if n == 0:
        return float("nan"), float("nan")
    share, spread = k / n, z * np.sqrt(k * (n - k) / n**3 + z**2 / (4 * n**2))
    middle, scale = share + z**2 / (2 * n), 1 + z**2 / n
    return max(0.0, float((middle - spread) / scale)), min(1.0, float((middle + spread) / scale))


def examples(found: pd.DataFrame, group: str, n: int) -> list[str]:
    """Items of the n planted failures whose similarity exceeds their score most.

    found: what `imperfections` or `biases` gives; group: "family" or "biased".
    """
    fitting = found[found["failure"] & found[group]]
    order = fitting.sort_values(["disagreement", "item"], ascending=[False, True])
    return order["item"].head(n).tolist()
