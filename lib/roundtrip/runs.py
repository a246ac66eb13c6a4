"""What a notebook's parameters stand for: the runs of a preset, over its datasets, in both tasks."""

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from lib.base import ROOT, UserError, folder_setting
from lib.data import NAMES, Dataset, Item, load_dataset
from lib.models import ADAPTERS, Models, load_models, unknown_words
from lib.presets import PRESETS, Preset, load_preset
from lib.roundtrip.run import BASELINE_COLUMNS, ROW_COLUMNS, Run, plan_run, program, weights_of
from lib.roundtrip.steps import TASKS, safe_part, source_text


@dataclass(frozen=True)
class Runs:
    """The runs of one set of parameters, finished or not: {(dataset, task): run}, and in one line why others are skipped.
    figures: the folder that belongs to these parameters alone; loaded: {dataset: the whole split}."""

    preset: Preset
    runs: dict[tuple[str, str], Run]
    skipped: dict[tuple[str, str], str]
    figures: Path
    n_candidates: int
    seed: int
    loaded: dict[str, Dataset]

    @property
    def datasets(self) -> list[str]:
        """The datasets' names, as in the column ``dataset`` of the rows."""
        return list(self.loaded)

    @property
    def notes(self) -> list[str]:
        """One-line remarks on what was read, and on what the mini models cannot know."""
        read = [note for dataset in self.loaded.values() for note in dataset.notes]
        if self.preset.captioner.id.startswith("data/models/mini") and not all("picturebook" in d for d in self.loaded):
            read.append("the mini models know only the objects of their picture book: see ./run_all.sh --help")
        return read

    @cached_property
    def models(self) -> Models:
        """The preset's models, loaded when first needed and kept."""
        return load_models(self.preset)

    def execute(self, task: str, workers: int = 1, engine: str = "local", rescore: bool = False) -> list[Run]:
        """Execute the task's runs on every dataset that can feed it, or go on with them; the finished runs. One line
        says what each dataset holds, and one what is skipped and why. Arguments as of ``Run.execute``."""
        for note in [*self.notes, *(f"skipped: {reason}" for (_, one), reason in self.skipped.items() if one == task)]:
            print(note, file=sys.stderr, flush=True)
        models = (lambda: self.models) if workers == 1 and engine == "local" else None  # several workers load their own
        for key, run in self.runs.items():
            if key[1] == task:
                if task == "text" and models and not run.finished and (words := self._unknown(run)):
                    print(f"{key[0]}: words that the models do not know: {', '.join(words[:20])}", file=sys.stderr)
                self.runs[key] = run.execute(workers, engine, models, rescore=rescore)
        return [run for (_, one), run in self.runs.items() if one == task]

    def _unknown(self, run: Run) -> list[str]:
        """Words of a run's texts that its generator does not know; published models know all."""
        texts = [source_text(item, run.dataset.name, run.seed) for item in run.dataset.items]
        return list(dict.fromkeys(word for text in texts for word in unknown_words(self.models.generator, text)))

    def rows(self, task: str | None = None) -> pd.DataFrame:
        """The rows of all datasets (of one task or both), by dataset, item and candidate. A source with a flagged image
        is left out whole, so that all comparisons keep the same sources; ``attrs`` has their number as flagged_sources.
        Empty, but with all columns, where the task was skipped."""
        return self._table(task, Run.rows, ROW_COLUMNS)

    def baselines(self) -> pd.DataFrame:
        """The greedy captions of the image task's sources, without the sources that ``rows`` leaves out."""
        return self._table("image", Run.baselines, BASELINE_COLUMNS)

    def _table(self, task: str | None, read: Callable[[Run], pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
        parts, left_out = [], 0
        for (label, one), run in sorted(self.runs.items(), key=lambda pair: TASKS.index(pair[0][1])):
            if task in (None, one):
                rows, table = run.rows(), read(run).assign(dataset=label)
                flagged = rows.loc[rows["flagged"], "item"].unique()
                parts.append(table[~table["item"].isin(flagged)].sort_values("item", kind="stable"))
                left_out += len(flagged)
        table = pd.concat(parts or [pd.DataFrame(columns=list(columns))], ignore_index=True)
        table.attrs["flagged_sources"] = left_out
        return table

    def dataset(self, name: str) -> Dataset:
        """A dataset's whole split, over which document frequencies are counted."""
        return self.loaded[name]

    def item(self, dataset: str, item: str) -> Item:
        """The source of a row."""
        return self.loaded[dataset].by_id()[item]

    def image(self, row: Any) -> Image.Image:
        """The generated image of a row of :meth:`rows` (RGB): its reconstruction, or its candidate in the text task."""
        return self.runs[row["dataset"], row["task"]].image(
            row["reconstruction"] if row["task"] == "image" else row["message"])

    def provenance(self) -> dict[str, Any]:
        """Where results come from: the program now, and by run what made its rows."""
        kept = ("identity", "made_by", "loaded", "counts", "missing_scores", "unscored")
        return {"preset": self.preset.name, "seed": self.seed, "n_candidates": self.n_candidates,
                "program": program(), "skipped": list(self.skipped.values()),
                "runs": {run.name: {key: run.info().get(key) for key in kept}
                         for run in self.runs.values() if run.finished}}


def open_runs(preset: str = "mini", dataset: str | Sequence[str] = "all", n_sources: int = 0, n_candidates: int = 0,
              seed: int = 0) -> Runs:
    """The runs that a notebook's parameters stand for; reads data, loads no model. dataset: "all", a name, several with
    commas, or a list; 0 stands for the preset's own number. A task that a dataset or the encoder cannot feed is skipped.
    Raises UserError for a bad parameter, or if nothing at all can be run."""
    chosen = load_preset(preset)
    for name, value in (("N_SOURCES", n_sources), ("N_CANDIDATES", n_candidates), ("SEED", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or (value < 0 and name != "SEED"):
            raise UserError(f"{name} = {value!r}: give a whole number, or 0 for the preset's own")
    n, *size = (n_sources or chosen.n_sources, n_candidates or chosen.n_candidates, seed or chosen.seed)
    loaded: dict[str, Dataset] = {}
    names = _names(dataset, chosen)
    for one in map(load_dataset, names):
        count = sum(other.name == one.name for other in loaded.values())
        loaded[f"{one.name} ({count + 1})" if count else one.name] = one
    runs, skipped, weights = dict[tuple[str, str], Run](), dict[tuple[str, str], str](), weights_of(chosen)
    for label, whole in loaded.items():
        for task, needed in zip(TASKS, ("path", "references"), strict=True):
            if reason := whole.feeds(task) or _unread(chosen, task):
                skipped[label, task] = reason
            else:
                usable = replace(whole, items=tuple(item for item in whole.items if getattr(item, needed)))
                runs[label, task] = plan_run(chosen, usable.subset(n, size[1]), task, *size, weights=weights)
    if not runs:
        raise UserError(f"nothing can be run: {'; '.join(skipped.values())}")
    figures = folder_setting("COMPENDIUM_FIGURES", ROOT / "figures")
    name = _figure_folder(chosen, names, loaded, runs.values(), f"n{n}k{size[0]}s{size[1]}")
    return Runs(chosen, runs, skipped, figures / name, *size, loaded)


def _names(dataset: str | Sequence[str], preset: Preset) -> list[str]:
    """The datasets' names, each once; a comma in a path separates nothing."""
    if dataset == "all":
        return list(dict.fromkeys(preset.datasets))
    starts = "|".join(re.escape(re.sub("(PATH|FILE)$", "", name)) for name in NAMES)
    return list(dict.fromkeys(re.split(rf"\s*,\s*(?={starts})", dataset) if isinstance(dataset, str) else dataset))


def _unread(preset: Preset, task: str) -> str | None:
    """Why the encoder cannot compare what a task reconstructs; None if it can."""
    adapter, kind = preset.encoder.adapter, "images" if task == "image" else "texts"
    module, _, name = ADAPTERS["encoder"].get(adapter, adapter).partition(":")
    if adapter in ("clip", "siglip") or getattr(getattr(importlib.import_module(module), name), f"reads_{kind}", True):
        return None  # the first two import no torch
    return f"preset {preset.name}: its encoder reads no {kind}, which {task} reconstruction compares"


def _figure_folder(preset: Preset, names: list[str], labels: Iterable[str], runs: Iterable[Run], size: str) -> str:
    """The name of the figure folder; what may change, a preset or data of the user's, has a hash of its content there."""
    own = not ((PRESETS / f"{preset.name}.toml").is_file() and load_preset(preset.name) == preset)
    content = [preset.model_dump_json()] if own else []
    if not all(name.startswith("picturebook") for name in names):
        content += [run.dataset.fingerprint for run in runs]
    data = "all" if names == _names("all", preset) else re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(labels))[:60]
    mark = f"--{hashlib.sha256(' '.join(content).encode()).hexdigest()[:8]}" if content else ""
    return f"{safe_part(preset.name)}--{data}--{size}{mark}"
