"""Do finished rows repeat? A random sample of sources is played again and compared, row by row.

    ./run_all.sh --verify                     # the default run's rows, three sources a run
    python -m lib.verify rows --n 20          # the same for other parameters
    python -m lib.verify expected             # compare a run's averages with the committed ones
    python -m lib.verify expected --write     # commit this machine's averages as the expected ones

The sample is played as one batch, in another order and without its old neighbours, so a result
that depends on its batch shows too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lib import ranking
from lib.errors import UserError
from lib.game import TASKS, Played, Shard, play_shard
from lib.players import Models, load_models
from lib.results import Run
from lib.roundtrip import Plan, plan_run
from lib.seeds import stable_seed
from lib.study import Study, open_study, spoken

SAMPLE = 3  # sources of each run

Picture = Callable[[str], Any]  # opens the picture that a row names


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference or the number found, what is allowed, and why."""

    name: str
    found: float
    allowed: float
    reason: str

    @property
    def holds(self) -> bool:
        """Whether the difference is within what is allowed (NaN is not)."""
        return self.found <= self.allowed

    def __str__(self) -> str:
        verdict = "ok" if self.holds else "DIFFERS"
        return f"{verdict:8}{self.name}: {self.found:.3g} (allowed {self.allowed:.3g}: {self.reason})"


# What may differ and why. Texts and seeds come first: where a text differs, the rest of its row
# is that of another candidate and is not compared.
_ROUNDING = "sums in another order, for the batch is another one"
TOLERANCES: dict[str, tuple[float, str]] = {
    "logprob": (1e-3, _ROUNDING),
    "logprob of a drawn picture": (1e-2, "the captioned picture itself may differ by a grey level"),
    "similarity": (1e-4, _ROUNDING),
    "similarity_euclidean": (1e-3, _ROUNDING),
    "similarity_judge": (1e-4, _ROUNDING),
    "pixels": (2.0, "grey levels of 255, " + _ROUNDING),
}
FLIPS_ALLOWED = 0.01  # share of captions and of sources, and one in any case
_NEAR_TIE = "1 %, at least 1; a token flips where two are tied but for rounding"
_TIED = "1 %, at least 1; after such a flip, or where two candidates are tied but for rounding"


def replay(run: Run, plan: Plan, models: Models, sample: int = SAMPLE) -> list[Check]:
    """Play ``sample`` sources of a finished run again; what was found, compared.

    Deterministic: the sample depends on the run's name and nothing else. Raises UserError if the
    run's rows or pictures cannot be read.
    """
    rng = np.random.default_rng(stable_seed("verify", run.name))
    items = plan.dataset.items
    chosen = rng.choice(len(items), size=min(sample, len(items)), replace=False)
    key = plan.key
    shard = Shard(key.name, key.dataset, key.preset, tuple(items[i] for i in chosen),
                  key.n_candidates, key.seed)
    played = play_shard(shard, TASKS[key.task], models)
    return compare(run, played)


def compare(run: Run, played: Played) -> list[Check]:
    """Compare rows played again with those of the run."""
    return differences(run.rows(), run.image, played.rows.to_pandas(), played.pictures.__getitem__)


def differences(kept: pd.DataFrame, kept_picture: Picture, again: pd.DataFrame,
                again_picture: Picture) -> list[Check]:
    """Compare all rows of ``again`` with the rows of the same sources and candidates in ``kept``.

    kept_picture, again_picture: open a picture by the path that a row gives. Where a caption
    differs, the rest of its row is that of another candidate: such flips are counted, and left
    out of the differences that follow, which are absent where nothing is left to compare.
    """
    both = again.merge(kept, on=["item", "candidate"], suffixes=("", "_kept"),
                       how="left", validate="one_to_one", indicator=True)
    words = spoken(again)
    same = (both[words] == both[f"{words}_kept"]).to_numpy()
    lost = int((both["_merge"] != "both").sum() + (both["seed"] != both["seed_kept"]).sum())
    tops = _top_flips(both)
    checks = [
        Check("rows absent or with another seed", lost, 0, "a seed comes from names alone"),
        _flips("captions that differ", int(np.sum(~same)), len(both), _NEAR_TIE, most=len(both) - 1),
        _flips("sources with another best candidate", sum(tops), len(tops), _TIED),
    ]
    numbers = ("logprob", "similarity", "similarity_euclidean", "similarity_judge") if same.any() else ()
    for name in numbers:
        drawn = name == "logprob" and words == "reconstruction"  # in text reconstruction
        allowed = TOLERANCES["logprob of a drawn picture" if drawn else name]
        checks.append(Check(name, _largest(both[same], name), *allowed))
    # A picture follows its caption in image reconstruction and precedes it in text reconstruction.
    column, shown = ("reconstruction", same) if words == "message" else ("message", slice(None))
    pairs = both.loc[shown, [column, f"{column}_kept"]].dropna().drop_duplicates()
    if len(pairs):
        checks.append(Check("pixels", _pixels(pairs, again_picture, kept_picture), *TOLERANCES["pixels"]))
    return checks


def _flips(name: str, count: int, total: int, reason: str, most: float = np.inf) -> Check:
    """A number of flips, of which a small share is allowed, and no more than ``most``."""
    return Check(f"{name}, of {total}", count, min(max(1.0, FLIPS_ALLOWED * total), most), reason)


def _largest(both: pd.DataFrame, name: str) -> float:
    """The largest difference of a column; NaN where a value is there on one side only."""
    now, kept = both[name].to_numpy(float), both[f"{name}_kept"].to_numpy(float)
    if (np.isnan(now) != np.isnan(kept)).any():
        return float("nan")
    return float(np.nanmax(np.abs(now - kept), initial=0.0))


def _top_flips(both: pd.DataFrame) -> list[bool]:
    """For each source, whether its most similar candidate is another one now."""
    return [ranking.ordinal_ranks(source["similarity"].to_numpy(float)).argmin()
            != ranking.ordinal_ranks(source["similarity_kept"].to_numpy(float)).argmin()
            for _, source in both.groupby("item", sort=False)]


def _pixels(pairs: pd.DataFrame, again_picture: Picture, kept_picture: Picture) -> float:
    """The largest difference of a pixel, in grey levels; infinite for another size."""
    largest = 0.0
    for now, kept in pairs.itertuples(index=False):
        a, b = np.asarray(again_picture(now), int), np.asarray(kept_picture(kept), int)
        largest = max(largest, float(np.abs(a - b).max()) if a.shape == b.shape else np.inf)
    return largest


def fetch_for(study: Study, asked: str) -> None:
    """Fetch what playing again needs; models only where there are rows to compare with.

    asked: the preset's name or path as it was given. Raises UserError in one line.
    """
    from lib import fetch

    def rows_are_there() -> bool:
        try:  # the run that verify_rows begins with; where it is absent, that is said and no model loaded
            return bool(study.run(study.datasets[0], next(iter(TASKS))))
        except UserError:
            return False

    fetch.prepare(fetch.Request(study.preset, asked, study.datasets, study.n_sources, study.seed),
                  rows_are_there)


def verify_rows(study: Study, sample: int = SAMPLE, models: Models | None = None) -> bool:
    """Replay a sample of every run of a study, print what was compared; whether all of it holds."""
    holds, players = True, models
    for dataset in study.datasets:
        for task in TASKS:
            run = study.run(dataset, task)
            plan = plan_run(study.preset, study.data(dataset), task, study.n_sources,
                            study.n_candidates, study.seed)
            players = players or load_models(study.preset)
            checks = replay(run, plan, players, sample)
            print(f"{run.name}: {min(sample, len(plan.dataset))} sources played again", flush=True)
            for check in checks:
                print(f"  {check}", flush=True)
            holds = holds and all(check.holds for check in checks)
    print("all rows repeat within the tolerances" if holds else "NOT all rows repeat", flush=True)
    return holds


# --- the command -------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags; the counts are those of ``run_all.sh``."""
    parser = argparse.ArgumentParser(prog="python -m lib.verify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "expected"))
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--dataset", default="all")
    parser.add_argument("--n", type=int, default=0, help="sources (0: the preset's)")
    parser.add_argument("--candidates", type=int, default=0, help="candidates (0: the preset's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=SAMPLE, help="sources played again (rows)")
    parser.add_argument("--write", action="store_true",
                        help="take this machine's averages as the expected ones (expected)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 (something differs), 2 (bad input)."""
    flags = parse(arguments)
    try:
        study = open_study(flags.preset, flags.dataset, flags.n, flags.candidates, flags.seed)
        if flags.sample < 1:
            raise UserError(f"--sample {flags.sample}: must be a whole number of at least 1")
        if flags.what == "rows":
            fetch_for(study, flags.preset)
            return 0 if verify_rows(study, flags.sample) else 1
        from lib import expected

        if flags.write:
            print(f"wrote {expected.write(study)}")
            return 0
        return 0 if expected.report(study, demand=True) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
