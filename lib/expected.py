"""The results that a run is expected to have, so that a second machine sees whether it repeats ours.

``data/expected/<preset>.json`` holds averages of runs by the run's name, each with its tolerance.
On the machine that wrote them they repeat exactly. Elsewhere other processor instructions round
differently, now and then a sampled token flips at a near tie, and that candidate becomes another
draw from the same distribution. The tolerance is four standard errors of an average of which a
twentieth of the rows is drawn anew: 4 * s * sqrt(2 * 0.05 / M) for M rows of standard deviation s.
The name of a run holds a hash of weights, data and decoding, so that results of other weights are
never taken for a failure to repeat: they are said to be not comparable.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lib import provenance, results
from lib.errors import UserError
from lib.game import TASKS
from lib.presets import REPO_ROOT
from lib.results import Run, RunKey, safe_part
from lib.roundtrip import plan_run
from lib.study import Study, spoken

FOLDER = REPO_ROOT / "data" / "expected"
_REDRAWN = 0.05
_ERRORS = 4.0
_LEAST = 1e-6  # for an average that does not vary: rounding
_COLUMNS = ("n_words", "logprob", "similarity", "similarity_judge", "cider", "bleu4", "meteor",
            "rouge_l", "spice_spacy", "clip_score", "clip_score_judge", "sem_f")


def place(study: Study) -> Path:
    """The file of a study's preset."""
    return FOLDER / f"{safe_part(study.preset.name)}.json"


# --- what is kept ------------------------------------------------------------------------------


def averages(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """{name: {"value", "tolerance"}} of a run's rows: over all, and over the selected candidates.

    Columns without any value are left out: they are missing here, and may be elsewhere.
    """
    found = {"rows": {"value": len(rows), "tolerance": 0}}
    for name, part in (("all", rows), ("selected", rows[rows["selected"]])):
        for column in _COLUMNS:
            values = part[column].dropna().astype(float)
            if len(values):
                found[f"{column}, {name}"] = {
                    "value": round(float(values.mean()), 9),
                    "tolerance": _tolerance(values),
                }
    return found


def _tolerance(values: pd.Series) -> float:
    """Four standard errors of a mean of which a twentieth of the values is drawn anew."""
    spread = float(values.std(ddof=0))
    return round(_LEAST + _ERRORS * spread * math.sqrt(2 * _REDRAWN / len(values)), 9)


def captions_digest(rows: pd.DataFrame) -> str:
    """A hash of all captions in order: equal only where every token is equal."""
    ordered = rows.sort_values(["item", "candidate"])
    return hashlib.sha256("\n".join(ordered[spoken(rows)]).encode()).hexdigest()


def write(study: Study) -> Path:
    """Keep the averages of a study's finished runs, beside those of other sizes.

    Entries of the same sizes with other weights are replaced. Raises UserError if a run is not
    finished.
    """
    path = place(study)
    kept = _read(path)["runs"] if path.is_file() else {}
    for dataset in study.datasets:
        for task in TASKS:
            run = study.run(dataset, task)
            kept = {name: entry for name, entry in kept.items() if _sizes(name) != _sizes(run.name)}
            rows = run.rows()
            kept[run.name] = {"captions": captions_digest(rows), "averages": averages(rows)}
    results.write_json(path, {
        "about": " ".join((__doc__ or "").split()),
        "made_by": provenance.collect(), "runs": dict(sorted(kept.items())),
    })
    return path


def _sizes(name: str) -> str:
    """The part of a run's name before the hash."""
    return name.rpartition("--")[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["runs"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a file of expected results ({type(error).__name__}): "
                        "restore it from the repository") from error
    return found


# --- comparing ---------------------------------------------------------------------------------


def deviations(rows: pd.DataFrame, entry: Mapping[str, Any]) -> list[str]:
    """The averages that are not as expected, one line each; a score missing here is one too."""
    found, lines = averages(rows), []
    for name, wanted in entry["averages"].items():
        if name not in found:
            lines.append(f"{name}: missing, expected {wanted['value']:.6g}")
            continue
        value = found[name]["value"]
        if not abs(value - wanted["value"]) <= wanted["tolerance"]:
            lines.append(f"{name}: {value:.6g}, expected {wanted['value']:.6g} "
                         f"within {wanted['tolerance']:.2g}")
    return lines


def report(study: Study, demand: bool = False) -> bool:
    """Compare a study's finished runs with the expected results and print what was found.

    Prints nothing where nothing is expected of these sizes; with ``demand`` that is a UserError.
    Returns whether all that was compared is as expected.
    """
    path = place(study)
    known = _read(path)["runs"] if path.is_file() else {}
    if not known and not demand:
        return True
    wrong, compared, equal = [], 0, 0
    for key in _keys(study):
        run = Run(results.runs_root() / key.name)
        if key.name not in known:
            if _sizes(key.name) in map(_sizes, known):
                print(f"  not comparable: {path.name} has {_sizes(key.name)} with other weights, data "
                      "or settings", flush=True)
        elif run.finished:
            rows, entry = run.rows(), known[key.name]
            wrong += [f"  {key.name}: {line}" for line in deviations(rows, entry)]
            compared += 1
            equal += captions_digest(rows) == entry["captions"]
    if demand and not compared:
        raise UserError(f"nothing to compare: {path.name} expects nothing of finished runs of these "
                        "sizes; python -m lib.verify expected --write makes it")
    if compared:
        verdict = f"{len(wrong)} averages are NOT as expected" if wrong else "all as expected"
        print(*wrong, f"  {compared} runs compared with {path.name}: {verdict}; {equal} of them are "
              "equal in every caption", sep="\n", flush=True)
    return not wrong


def _keys(study: Study) -> list[RunKey]:
    """The keys of all runs of a study, played or not."""
    size = (study.n_sources, study.n_candidates, study.seed)
    return [plan_run(study.preset, study.data(dataset), task, *size).key
            for dataset in study.datasets for task in TASKS]
