"""Round trips: a batch in memory (``steps``), a run on disk (``run``), the runs of a notebook (``runs``).

::

    runs = open_runs("mini")          # what PRESET, DATASET, N_SOURCES, N_CANDIDATES, SEED stand for
    runs.execute("image")             # resumable; writes data/runs/<run>/rows.parquet
    rows = runs.rows("image")         # one row a (source, candidate)
"""

from lib.roundtrip.run import BASELINE_COLUMNS, ROW_COLUMNS, Run, plan_run
from lib.roundtrip.runs import Runs, open_runs
from lib.roundtrip.steps import (
    TASKS,
    Batch,
    candidate_seeds,
    caption_candidates,
    generate_images,
    noise_seeds,
    round_trip,
    similarities,
    source_text,
)

__all__ = ["BASELINE_COLUMNS", "ROW_COLUMNS", "TASKS", "Batch", "Run", "Runs", "candidate_seeds", "caption_candidates",
           "generate_images", "noise_seeds", "open_runs", "plan_run", "round_trip", "similarities", "source_text"]
