"""Round trips: a batch in memory (``steps``), a run on disk (``run``), the runs of a notebook (``runs``); see README.md."""

from lib.roundtrip.run import Run, plan_run
from lib.roundtrip.runs import Runs, open_runs
from lib.roundtrip.steps import Batch, candidate_seeds, generate_images, noise_seeds, round_trip, source_text

__all__ = ["Batch", "Run", "Runs", "candidate_seeds", "generate_images", "noise_seeds", "open_runs", "plan_run",
           "round_trip", "source_text"]
