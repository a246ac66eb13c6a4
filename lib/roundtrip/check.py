"""Do finished rows repeat? A sample is made again and compared; averages are compared with the committed ones, within a
tolerance that README.md explains. After a change that is meant, call `write_expected`."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from lib.base import ROOT, stable_seed, write_atomic
from lib.roundtrip.run import Run, ranked, read_json
from lib.roundtrip.runs import Runs
from lib.roundtrip.steps import Batch, round_trip

SAMPLE = 3  # sources of each run
EXPECTED = ROOT / "data" / "expected"
# What may differ, as another batch sums in another order (in the text task also the image that is captioned)
TOLERANCES = {"similarity": 1e-4, "similarity_second": 1e-4, "similarity_euclidean": 1e-3, "logprob": 1e-2}
PIXELS = 2  # grey levels of 255
FLIPS = 0.01  # share of captions and of sources, one in any case, that a near tie may turn
AVERAGES = ["n_words", "logprob", "similarity", "similarity_second", "cider", "bleu4", "meteor", "rouge_l",
            "spice_spacy", "clip_score", "clip_score_second", "sem_f"]


def verify_runs(runs: Runs) -> bool:
    """Whether a sample of each run's sources, made again as one batch in another order, repeats; prints all checks."""
    holds = True
    for run in runs.runs.values():
        run.rows()  # says that it is not finished before a model is loaded
        rng, items = np.random.default_rng(stable_seed("verify", run.name)), run.dataset.items
        chosen = [items[i] for i in rng.choice(len(items), min(SAMPLE, len(items)), replace=False)]
        table = compare(run, round_trip(run.task, chosen, runs.models, run.preset, run.dataset.name, run.n_candidates,
                                        run.seed))
        print(f"{run.name}: {len(chosen)} sources made again", table.to_string(index=False), sep="\n")
        holds &= bool(table["holds"].all())
    print("all rows repeat within the tolerances" if holds else "NOT all rows repeat", flush=True)
    return holds


def compare(run: Run, again: Batch) -> pd.DataFrame:
    """One row a check (check, found, allowed, holds) of what differs in a batch made again. Where a caption differs, the
    rest of its row is that of another candidate and is not compared."""
    both = again.rows.merge(run.rows(), on=["item", "candidate", "seed"], suffixes=("", "_kept"))
    said, shown = ("message", "reconstruction") if run.task == "image" else ("reconstruction", "message")
    best, kept = (ranked(both.assign(similarity=both[name]))["selected"] for name in ("similarity", "similarity_kept"))
    same, turned, sources = both[said] == both[f"{said}_kept"], both.loc[best != kept, "item"], both["item"].nunique()
    checks = {"rows absent or with another seed": (len(again.rows) - len(both), 0),
              f"captions that differ, of {len(both)}": ((~same).sum(), max(FLIPS * len(both), int(len(both) > 1))),
              f"sources with another best candidate, of {sources}": (turned.nunique(), max(1, FLIPS * sources))}
    for name, tolerance in TOLERANCES.items():
        pair = both.loc[same, [name, f"{name}_kept"]].to_numpy(float).T
        checks[f"{name} off by {tolerance:g}"] = (~np.isclose(*pair, rtol=0, atol=tolerance, equal_nan=True)).sum(), 0
    images = both.loc[same, [shown, f"{shown}_kept"]].drop_duplicates().to_numpy()
    off = [np.abs(again.images[now].astype(int) - np.asarray(run.image(kept), int)).max() for now, kept in images]
    checks[f"images off by {PIXELS} grey levels"] = (np.array(off) > PIXELS).sum(), 0
    table = pd.DataFrame([(name, *check) for name, check in checks.items()], columns=["check", "found", "allowed"])
    return table.assign(holds=table["found"] <= table["allowed"])


def summary(rows: pd.DataFrame) -> dict:
    """What is expected of a run: a digest of its captions, which equals only where every token does, and
    {name: [mean, tolerance]} over all rows and over the selected ones, without what has no value."""
    said, averages = rows["message"].where(rows["task"] == "image", rows["reconstruction"]), {}
    for part, table in (("all", rows), ("selected", rows[rows["selected"]])):
        values = table[AVERAGES].astype(float).dropna(axis=1, how="all")
        tolerance = 1e-6 + 4 * values.std(ddof=0) * np.sqrt(2 * 0.05 / values.count())
        averages |= {f"{name}, {part}": [round(values[name].mean(), 9), round(tolerance[name], 9)] for name in values}
    return {"captions": hashlib.sha256("\n".join(said).encode()).hexdigest(), "averages": averages}


def write_expected(runs: Runs) -> Path:
    """Take the averages of finished runs as expected ones, beside those that the file has of other runs."""
    path = EXPECTED / f"{runs.preset.name}.json"
    known = read_json(path) | {run.name: summary(run.rows()) for run in runs.runs.values()}
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(known.items()))
    write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def compare_expected(runs: Runs) -> str:
    """How finished runs compare with the expected results, in one line; empty where nothing is expected of them."""
    path = EXPECTED / f"{runs.preset.name}.json"
    known, wrong, equal = read_json(path), [], 0
    compared = [run for run in runs.runs.values() if run.name in known and run.finished]
    for run in compared:
        found = summary(run.rows())
        equal += found["captions"] == known[run.name]["captions"]
        for name, (value, tolerance) in known[run.name]["averages"].items():
            now = found["averages"].get(name, [math.nan])[0]
            if not abs(now - value) <= tolerance:
                wrong.append(f"{run.task} {run.dataset.name}: {name} {now:.6g} instead of {value:.6g}")
    verdict = f"{len(wrong)} averages are NOT as expected ({'; '.join(wrong[:3])})" if wrong else "all as expected"
    return f"{len(compared)} runs compared with {path.name}: {verdict}, {equal} equal in every caption" if compared else ""
