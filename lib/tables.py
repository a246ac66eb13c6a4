"""Table 1: nucleus sampling against the selected candidate, on every score, with intervals.

BLEU of the literature is a corpus score, not the mean of sentence scores, so it is resampled from
counts; CIDEr, CIDEr-D, ROUGE-L and SPICE of a corpus are means over captions.  METEOR's own
aggregate is not a mean: the mean over captions is reported and labelled so.
Axes: S sources, K candidates, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lib import labels, multiplicity, ranking
from lib.claims import Verdict, chosen, generator, grid, has, identity
from lib.metrics import bleu_from_statistics
from lib.ranking import Estimate

BLEU = ("bleu1", "bleu2", "bleu3", "bleu4")
MEANS = ("cider", "cider_d", "meteor", "rouge_l", "spice", "spice_spacy")
IMAGE_SCORES = ("clip_score", "clip_score_judge")
CONTENT = "sem_f"  # what a caption says, whatever its wording; known where the true scene is


@dataclass(frozen=True)
class Systems:
    """Everything Table 1 compares, for the sources of one run.

    rows: prepared rows; index: (S,) selected candidate; bleu: (S, K, 10) counts or None;
    greedy: score -> (S,) values of the greedy caption; greedy_bleu: (S, 10) counts or None.
    """

    rows: pd.DataFrame
    index: np.ndarray
    bleu: np.ndarray | None
    greedy: Mapping[str, np.ndarray]
    greedy_bleu: np.ndarray | None

    def restricted(self, domain: str) -> Systems:
        """The sources of one domain; document frequencies stay those of the whole split."""
        inside = (self.rows["domain"] == domain).to_numpy()
        first = inside.reshape(len(self.index), -1)[:, 0]
        rows = self.rows[inside].reset_index(drop=True)
        rows.attrs = self.rows.attrs
        return replace(
            self,
            rows=rows,
            index=self.index[first],
            bleu=None if self.bleu is None else self.bleu[first],
            greedy={name: values[first] for name, values in self.greedy.items()},
            greedy_bleu=None if self.greedy_bleu is None else self.greedy_bleu[first],
        )


def systems(
    rows: pd.DataFrame,
    bleu: np.ndarray | None = None,
    greedy: pd.DataFrame | None = None,
    greedy_bleu: np.ndarray | None = None,
) -> Systems:
    """Line up rows, BLEU counts and the greedy baseline by source.

    rows: prepared; bleu: (S * K, 10) counts of the rows' messages; greedy: one row an item with
    score columns, in any order; greedy_bleu: (len(greedy), 10) counts.
    """
    items = rows["item"].drop_duplicates().to_numpy()
    by_score, counts = {}, None
    if greedy is not None:
        position = pd.Series(np.arange(len(greedy)), index=greedy["item"].to_numpy())
        order = position.reindex(items).to_numpy(dtype=float)
        known = np.isfinite(order)
        take = np.where(known, order, 0).astype(int)
        for name in (*MEANS, *IMAGE_SCORES, CONTENT):
            if name in greedy:
                values = pd.to_numeric(greedy[name]).to_numpy(dtype=float, na_value=np.nan)
                by_score[name] = np.where(known, values[take], np.nan)
        if greedy_bleu is not None:
            counts = greedy_bleu[take] * known[:, None]
    shaped = None if bleu is None else bleu.reshape(len(items), -1, bleu.shape[-1])
    return Systems(rows, chosen(rows), shaped, by_score, counts)


def _bleu_gain(nucleus: np.ndarray, picked: np.ndarray, weights: np.ndarray) -> tuple:
    """Corpus BLEU of both systems under weights: (S, K, 10), (S, 10), (B, S) -> two (B, 4).

    The nucleus value is the mean over k of the corpus score of the k-th candidates.
    """
    totals = np.tensordot(weights, nucleus, axes=1)  # (B, K, 10)
    return bleu_from_statistics(totals).mean(axis=1), bleu_from_statistics(weights @ picked)


def bleu_rows(systems: Systems, rng: np.random.Generator) -> list[dict]:
    """BLEU-1..4 of Table 1 from counts, with resampled gains."""
    if systems.bleu is None:
        return []
    nucleus = systems.bleu.astype(float)
    picked = ranking.pick(nucleus, systems.index)
    n = len(nucleus)
    once = np.ones((1, n))
    base, ours = (values[0] for values in _bleu_gain(nucleus, picked, once))
    many = _bleu_gain(nucleus, picked, ranking.bootstrap_counts(n, rng))
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = 100 * (many[1] / many[0] - 1)  # (B, 4)
    others = {name: bleu_from_statistics(ranking.pick(nucleus, index).sum(axis=0))
              for name, index in _other_choices(systems).items()}
    greedy = np.full(4, np.nan)
    if systems.greedy_bleu is not None and systems.greedy_bleu.any():
        greedy = bleu_from_statistics(systems.greedy_bleu.sum(axis=0))
    return [
        {
            "metric": name,
            "nucleus": base[i],
            "selected": ours[i],
            "gain": Estimate(100 * (ours[i] / base[i] - 1), samples[:, i], n),
            "greedy": greedy[i],
            **{name: values[i] for name, values in others.items()},
        }
        for i, name in enumerate(BLEU)
    ]


def _other_choices(systems: Systems) -> dict[str, np.ndarray]:
    """(S,) indices of what could be selected instead, for comparison.

    likeliest: the caption that the captioner itself gives the highest log-probability, no game
    needed (left out where there is none); oracle: the highest primary score, the most that
    selection could reach.
    """
    task = identity(systems.rows)[0]
    found = {}
    if task == "image" and has(systems.rows, "logprob"):  # in the other task: the receiver's
        found["likeliest"] = _highest(grid(systems.rows, "logprob"))
    return found | {"oracle": _highest(grid(systems.rows, labels.PRIMARY[task]))}


def _highest(values: np.ndarray) -> np.ndarray:
    """(S, K) -> (S,) place of the highest number of each source, the first where there is none."""
    return np.nan_to_num(values, nan=-np.inf).argmax(axis=1)


def mean_row(systems: Systems, metric: str, rng: np.random.Generator) -> dict:
    """One score whose corpus value is a mean over captions."""
    scores = grid(systems.rows, metric)
    usable = np.isfinite(scores).all(axis=1)
    base = np.where(usable, scores.mean(axis=1), np.nan)
    picked = ranking.pick(scores, systems.index)
    greedy = systems.greedy.get(metric, np.full(len(scores), np.nan))[usable]
    length = None
    if identity(systems.rows)[0] == "image":  # in the other task the words are the receiver's
        words = grid(systems.rows, "n_words")
        length = ranking.length_adjusted_gain(scores, words, systems.index, rng)
    return {
        "metric": metric,
        "nucleus": float(np.mean(base[usable])) if usable.any() else np.nan,
        "selected": float(np.mean(picked[usable])) if usable.any() else np.nan,
        "gain": ranking.paired_gain(base, picked, rng),
        "gain_length": length,
        "greedy": float(np.mean(greedy)) if np.isfinite(greedy).any() else np.nan,
        **{name: float(np.mean(ranking.pick(scores, index)[usable])) if usable.any() else np.nan
           for name, index in _other_choices(systems).items()},
    }


def selection_block(systems: Systems, domain: str, seed: int) -> pd.DataFrame:
    """Table 1 for one dataset and domain: one row a score.

    The primary score keeps its 95 % interval; the others' intervals are widened to match Holm's
    test over them.  Scores are as in the rows (1.0 is 100 in print), gains in percent.
    """
    task, dataset = identity(systems.rows)
    names = [m for m in (MEANS if task == "image" else IMAGE_SCORES) if has(systems.rows, m)]
    part = () if domain == "all" else (domain,)

    def draws(name: str) -> np.random.Generator:
        """The verdict's own draws, so that it and its row of the table give one interval."""
        return generator(seed, "gain", dataset, task, name, *part)

    lines = bleu_rows(systems, draws("bleu")) + [mean_row(systems, name, draws(name)) for name in names]
    p_values = np.array([line["gain"].p_value() for line in lines])
    secondary = np.array([line["metric"] != labels.PRIMARY[task] for line in lines])
    levels = np.full(len(lines), ranking.LEVEL)
    adjusted = p_values.copy()
    levels[secondary] = multiplicity.holm_levels(p_values[secondary])
    adjusted[secondary] = multiplicity.holm(p_values[secondary])
    block = []
    for line, level, p, p_holm in zip(lines, levels, p_values, adjusted, strict=True):
        gain, length = line.pop("gain"), line.pop("gain_length", None)
        low, high = gain.interval(level) if np.isfinite(level) else (np.nan, np.nan)
        bounds = length.interval() if length is not None else (np.nan, np.nan)
        record = {"dataset": dataset, "task": task, "domain": domain, "n": gain.n, **line}
        record |= {"gain": gain.value, "low": low, "high": high, "level": level, "p": p}
        record |= {"p_holm": p_holm, "gain_length": length.value if length else np.nan}
        block.append(record | {"gain_length_low": bounds[0], "gain_length_high": bounds[1]})
    return pd.DataFrame(block)


def selection_table(systems: Systems, seed: int) -> pd.DataFrame:
    """Table 1 of one run: all sources, then each domain where the dataset has domains."""
    domains = sorted(systems.rows["domain"].dropna().unique(), key=_domain_order)
    blocks = [selection_block(systems, "all", seed)]
    if len(domains) > 1:
        blocks += [selection_block(systems.restricted(name), name, seed) for name in domains]
    return pd.concat(blocks, ignore_index=True)


def _domain_order(name: str) -> tuple[int, str]:
    known = list(labels.DOMAINS)
    return (known.index(name) if name in known else len(known), name)


def gain_verdicts(systems: Systems, seed: int) -> list[Verdict]:
    """5.3 and 5.2: the selected message beats the mean candidate; also at equal length."""
    task, dataset = identity(systems.rows)
    metric = labels.PRIMARY[task]
    found = []
    for name in (metric,) if task == "image" else IMAGE_SCORES:
        if has(systems.rows, name):
            line = mean_row(systems, name, generator(seed, "gain", dataset, task, name))
            claim = {"image": "the selected caption beats nucleus sampling (Table 1)"}.get(
                task, "the selected image is better than the mean candidate (5.2)"
            )
            gain = f"gain in {labels.metric_label(name)}"
            found.append(Verdict(claim, task, dataset, gain, line["gain"], unit=" %"))
            if task == "image":
                claim = "it does so at equal caption length, too (3.5)"
                gain += ", length partialled out"
                found.append(Verdict(claim, task, dataset, gain, line["gain_length"], unit=" %"))
    return found


def every_score(block: pd.DataFrame) -> str:
    """"Better on any metrics" (Table 1's caption) for one block of the table: on how many, how surely."""
    dataset, domain = block["dataset"].iloc[0], block["domain"].iloc[0]
    where = labels.short_label(dataset) + ("" if domain == "all" else f", {labels.DOMAINS.get(domain, domain)}")
    higher, sure, lower = (int(found.sum()) for found in (
        block["gain"] > 0, block["low"] > 0, block["high"] < 0))
    return (f"{where}: the selected captions score higher on {higher} of {len(block)} scores; the interval excludes "
            f"zero for {sure} of these gains" + (f", and for {lower} of the losses" if lower else "") + ".")


# what needs no game


def rivals(systems: Systems, seed: int) -> pd.DataFrame:
    """Captions that need no game against the selected ones, by CIDEr and by content.

    One row a rival (greedy decoding, the most probable candidate) and score: rival and selected
    mean, and the rival's lead in percent with its 95 % interval from resampling sources in pairs.
    """
    rows, lines = systems.rows, []
    dataset = identity(rows)[1]
    for score in (name for name in (labels.PRIMARY["image"], CONTENT) if has(rows, name)):
        scores = grid(rows, score)
        picked = ranking.pick(scores, systems.index)
        found = {"greedy": systems.greedy.get(score, np.full(len(scores), np.nan))}
        if (index := _other_choices(systems).get("likeliest")) is not None:
            found["most probable"] = ranking.pick(scores, index)
        for rival, values in found.items():
            lead = ranking.paired_gain(picked, values, generator(seed, "rival", dataset, rival, score))
            both = np.isfinite(picked) & np.isfinite(values)
            if both.any():
                low, high = lead.interval()
                line = {"dataset": dataset, "rival": rival, "score": score, "n": lead.n, "lead": lead.value}
                means = {"rival_mean": float(values[both].mean()), "selected": float(picked[both].mean())}
                lines.append(line | means | {"low": low, "high": high})
    columns = ["dataset", "rival", "score", "rival_mean", "selected", "lead", "low", "high", "n"]
    return pd.DataFrame(lines, columns=columns)


def rival_sentences(table: pd.DataFrame) -> list[str]:
    """What `rivals` found, a sentence for each rival: is it ahead, and in content, too?"""
    said = []
    for (dataset, rival), part in table.groupby(["dataset", "rival"], sort=False):
        ahead = {line["score"]: _side(line["low"], line["high"]) for _, line in part.iterrows()}
        leads = ", ".join(
            f"{labels.metric_label(line['score'])} {signed(line['lead'])} % "
            f"[{signed(line['low'])}, {signed(line['high'])}]" for _, line in part.iterrows()
        )
        wording, content = ahead.get(labels.PRIMARY["image"]), ahead.get(CONTENT)
        if wording != 1:
            meaning = "behind in CIDEr" if wording == -1 else "no lead in CIDEr is decided"
        else:
            meaning = "ahead in CIDEr; " + {
                1: "its captions say more that is true, too",
                0: "that its captions say more that is true is not decided",
                -1: "yet its captions say less that is true",
                None: "what its captions say cannot be judged without true scenes",
            }[content]
        said.append(f"{labels.short_label(dataset)}, {rival} against selected: {leads}: {meaning}.")
    return said


def _side(low: float, high: float) -> int:
    """On which side of zero an interval lies: 1, -1, or 0 where it does not exclude zero."""
    return int(low > 0) - int(high < 0)


# the printed forms


def percent(value: float) -> str:
    """A score times 100 as the paper prints it, an en dash where it is missing."""
    return "–" if pd.isna(value) else f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A gain with its sign, with a true minus."""
    return "–" if pd.isna(value) else f"{value:+.1f}".replace("-", "−")


def paper_layout(block: pd.DataFrame, context: bool = True) -> pd.DataFrame:
    """One block as the paper prints it: a row a system, a column a score, cells as text."""
    interval = [
        "–" if pd.isna(low) else f"{signed(low)} to {signed(high)}"
        for low, high in zip(block["low"], block["high"], strict=True)
    ]
    # Pictures are drawn from other noise, not by nucleus sampling.
    baseline = "Nucleus" if (block["task"] == "image").all() else "Mean candidate"
    lines = {
        baseline: block["nucleus"].map(percent),
        "Selected": block["selected"].map(percent),
        "Gain (%)": block["gain"].map(signed),
        "Interval": interval,
    }
    if context:
        lines["Gain at equal length (%)"] = block["gain_length"].map(signed)
        if "likeliest" in block:
            lines["Most probable"] = block["likeliest"].map(percent)
        lines["Greedy"] = block["greedy"].map(percent)
        lines["Oracle"] = block["oracle"].map(percent)
    columns = [labels.metric_label(name) for name in block["metric"]]
    layout = pd.DataFrame({name: list(values) for name, values in lines.items()}, index=columns).T
    shown = (layout != "–").any(axis=1)
    return layout[shown]


def to_latex(table: pd.DataFrame) -> str:
    """Table 1 in LaTeX (booktabs), a group of lines for each dataset and domain."""
    lines: list[str] = []
    width = 0
    for (dataset, domain), block in table.groupby(["dataset", "domain"], sort=False):
        layout = paper_layout(block, context=domain == "all")
        title = f"{labels.dataset_label(dataset)}, {labels.DOMAINS.get(domain, domain)}"
        width = max(width, layout.shape[1])
        lines += [r"\midrule", rf"\multicolumn{{{layout.shape[1] + 1}}}{{l}}{{\emph{{{title}}}"]
        lines[-1] += rf" ($n = {block['n'].max()}$)}} \\"
        lines.append(" & ".join(["", *layout.columns]) + r" \\")
        for name, cells in layout.iterrows():
            lines.append(" & ".join([str(name), *map(_latex_cell, cells)]) + r" \\")
    head = [rf"\begin{{tabular}}{{l{'r' * width}}}", r"\toprule"]
    body = [line.replace("%", r"\%") for line in lines[1:]]
    return "\n".join([*head, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_cell(cell: str) -> str:
    return cell.replace("−", "$-$").replace("–", "--")


def compared(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Several runs' tables as one, the order kept."""
    return pd.concat(tables, ignore_index=True)
