"""What a notebook's parameters mean: which preset, which runs, where figures and verdicts go.

Notebooks 01 and 02 play runs through a study, all others read them through it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from lib import claims, cost, figures, labels, roundtrip
from lib.claims import Verdict
from lib.cost import Cost
from lib.datasets import Dataset, Item, load_dataset
from lib.errors import UserError
from lib.metrics import Corpus, bleu_statistics
from lib.players import Models, load_models
from lib.presets import Preset, get_preset
from lib.results import Run

OTHER_SEEDS = range(10)  # where finished runs of other seeds are looked for


@dataclass(frozen=True)
class Study:
    """The runs that one set of parameters stands for; nothing is loaded before it is asked for."""

    preset: Preset
    datasets: tuple[str, ...]
    n_sources: int
    n_candidates: int
    seed: int

    @cached_property
    def _models(self) -> Models:
        """The models, loaded when the first run needs them and kept for the others."""
        return load_models(self.preset)

    @cached_property
    def _loaded(self) -> dict[str, Dataset]:
        return {}

    def data(self, dataset: str) -> Dataset:
        """The whole evaluation split, read once."""
        if dataset not in self._loaded:
            self._loaded[dataset] = load_dataset(dataset)
        return self._loaded[dataset]

    def items(self, dataset: str) -> Mapping[str, Item]:
        """The items by id."""
        return self.data(dataset).by_id()

    def scenes(self, dataset: str) -> dict[str, Mapping | None]:
        """True scenes by item id, None where unknown."""
        return {item.id: item.scene for item in self.data(dataset).items}

    def play(self, dataset: str, task: str, engine: str = "local", workers: int = 1) -> Run:
        """Play a run, or go on with one that was cut off."""
        size = (self.n_sources, self.n_candidates, self.seed)
        alone = engine == "local" and workers == 1
        models = (lambda: self._models) if alone else None  # several workers load their own
        return roundtrip.play(self.preset, self.data(dataset), task, *size, engine, workers, models=models)

    def run(self, dataset: str, task: str) -> Run:
        """The finished run; UserError says which notebook makes it."""
        size = (self.n_sources, self.n_candidates, self.seed)
        return roundtrip.find_run(self.preset, self.data(dataset), task, *size)

    def rows(self, dataset: str, task: str) -> pd.DataFrame:
        """The rows of a run, sorted, without sources that have a flagged picture."""
        return claims.prepare(self.run(dataset, task).rows())

    def all_rows(self, task: str) -> dict[str, pd.DataFrame]:
        """dataset -> rows, for every dataset of the study."""
        return {dataset: self.rows(dataset, task) for dataset in self.datasets}

    def rows_by_seed(self, dataset: str, task: str) -> dict[int, pd.DataFrame]:
        """seed -> rows of this run and of finished ones that differ from it in the seed alone (0 to 9)."""
        found = {}
        for seed in sorted({self.seed, *OTHER_SEEDS}):
            with contextlib.suppress(UserError):  # most were never played
                size = (self.n_sources, self.n_candidates, seed)
                found[seed] = roundtrip.find_run(self.preset, self.data(dataset), task, *size)
        return {seed: claims.prepare(run.rows()) for seed, run in found.items()}

    def bleu_counts(self, dataset: str, table: pd.DataFrame, column: str):
        """(N, 10) BLEU counts of a table's captions against the dataset's references."""
        corpus = Corpus.build(self.data(dataset).references, roundtrip.CACHE)
        return bleu_statistics(table["item"].tolist(), table[column].tolist(), corpus)

    def origin(self, notebook: str, *tasks: str) -> figures.Origin:
        """Where a figure's numbers come from."""
        runs = tuple(self.run(dataset, task) for task in tasks for dataset in self.datasets)
        return figures.Origin(self.preset, runs, self.seed, notebook)

    def conclude(self, name: str, verdicts: Sequence[Verdict]) -> str:
        """Write figures/<preset>/<name>.verdict.json; the verdicts as a Markdown list."""
        folder = figures.folder(self.preset)
        claims.write_verdicts(verdicts, folder / f"{name}.verdict.json")
        return "\n".join(f"- {verdict.sentence()}" for verdict in verdicts)


def open_study(
    preset: str, dataset: str = "all", n_sources: int = 0, n_candidates: int = 0, seed: int = 0
) -> Study:
    """Read the common parameters: "all" and 0 stand for the preset's own choice.

    Raises UserError for an unknown preset or a count below 0.
    """
    chosen = get_preset(preset)
    for name, value in (("N_SOURCES", n_sources), ("N_CANDIDATES", n_candidates)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f"{name} = {value!r}: give a whole number, or 0 for the preset's own")
    return Study(
        chosen,
        chosen.datasets if dataset == "all" else (dataset,),
        n_sources or chosen.n_sources,
        n_candidates or chosen.n_candidates,
        seed,
    )


def cost_table(
    runs: Sequence[Run], names: Sequence[str] | None = None, whole: bool = False
) -> pd.DataFrame:
    """What runs cost, one column a run, beside the paper's hours; empty where none was kept.

    names: heads of the columns, the runs' own if None. whole: every network by itself, too.
    """
    heads = [run.name for run in runs] if names is None else names
    costs = [Cost.from_dict(run.cost()) for run in runs]
    return cost.table(dict(zip(heads, costs, strict=True)), whole)


def summarise(rows: pd.DataFrame, score: str) -> dict[str, object]:
    """One line about a run: sizes, variety, similarity and score."""
    sources = rows.groupby("item")
    return {
        "sources": sources.ngroups,
        "candidates": rows.attrs["n_candidates"],
        "flagged by the safety checker": rows.attrs["n_flagged_rows"],
        "sources left out for that": rows.attrs["n_flagged"],
        "distinct captions per source": sources[spoken(rows)].nunique().mean(),
        "words per caption": rows["n_words"].mean(),
        "mean similarity": rows["similarity"].mean(),
        f"mean {labels.metric_label(score)}": rows[score].mean(),
        f"selected {labels.metric_label(score)}": rows.loc[rows["rank"] == 1, score].mean(),
    }


def spoken(rows: pd.DataFrame) -> str:
    """The column of the captioner's words: messages of one task, reconstructions of the other."""
    return "message" if rows["task"].iloc[0] == "image" else "reconstruction"
