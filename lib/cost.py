"""What a run cost: seconds a stage, model passes, FLOP, sources per hour, hours for 4,500 images.

``cost.json`` holds sums over everything that was ever played for the run, in one sitting or many,
by one worker or many. It differs from time to time and is no part of the run's tables.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

# The paper's own cost (5.3): its captions of "NoCaps/COCO" took 4 hours, then the pictures of the
# 45k captions (4,500 NoCaps images, ten captions each) 102 hours, both on one NVIDIA T4.
PAPER_SOURCES = 4500
PAPER_HOURS = {"captions": 4.0, "pictures": 102.0}
PAPER_LABEL = "the paper, NVIDIA T4"
PAPER_NOTE = (
    "The last column is the paper's own account (5.3): 4 hours for the captions and 102 for the "
    "pictures of 4,500 NoCaps images, on one NVIDIA T4. Other hardware and other models, so no "
    "comparison of speed; our hours are this run's, scaled up by the number of sources. TFLOP: "
    "matrix products and convolutions as computed (2 × multiply-add), padding included."
)

# Stages as they are printed, in their order. "baseline": greedy captions, which the paper's hours
# do not hold. "load", "score": before and after the game.
STAGES = {"load": "loading models", "open": "opening sources", "caption": "captions",
          "baseline": "greedy captions beside them", "generate": "pictures", "embed": "embeddings",
          "score": "scores"}


@dataclass
class Cost:
    """Sums of what was spent; kept apart from the rows.

    sources: how many were played. wall: seconds by the clock while they were played, models loaded.
    seconds, flop: by stage, over all workers. passes: what was asked for. network_passes,
    network_flop: by network of a model. uncounted: calls of models whose FLOP nobody counts.
    """

    sources: int = 0
    wall: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)
    passes: Counter[str] = field(default_factory=Counter)
    flop: Counter[str] = field(default_factory=Counter)
    network_passes: Counter[str] = field(default_factory=Counter)
    network_flop: Counter[str] = field(default_factory=Counter)
    uncounted: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def stage(self, name: str, model: Any = None, role: str = "", **passes: int) -> Iterator[None]:
        """Time a block and count the passes made in it; role: what the model is called."""
        meter = getattr(model, "meter", None)
        before = (Counter(meter.passes), Counter(meter.flop)) if meter else None
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start
        self.passes.update(passes)
        if before is not None:
            self._read(name, meter, role, *before)
        elif model is not None:
            self.uncounted[name] += 1

    def _read(self, stage: str, meter: Any, role: str, passes: Counter, flop: Counter) -> None:
        """Add what a meter shows beyond its earlier state."""
        for network, total in meter.passes.items():
            self.network_passes[f"{role}: {network}"] += total - passes[network]
            self.network_flop[f"{role}: {network}"] += meter.flop[network] - flop[network]
            self.flop[stage] += meter.flop[network] - flop[network]

    def add(self, other: Cost) -> None:
        """Add another cost to this one."""
        self.sources += other.sources
        self.wall += other.wall
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))

    def as_dict(self) -> dict[str, Any]:
        """For ``cost.json``: seconds to the millisecond, FLOP as whole numbers, what follows last."""
        sums = {name: dict(sorted(getattr(self, name).items())) for name in _COUNTERS}
        sums["seconds"] = {name: round(s, 3) for name, s in sums["seconds"].items()}
        return {"sources": self.sources, "wall": round(self.wall, 3), **sums, **derived(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cost:
        """Inverse of :meth:`as_dict`; an empty record costs nothing."""
        counters = {name: Counter(data.get(name, {})) for name in _COUNTERS}
        return cls(int(data.get("sources", 0)), float(data.get("wall", 0.0)), **counters)


_COUNTERS = ("seconds", "passes", "flop", "network_passes", "network_flop", "uncounted")


def derived(cost: Cost) -> dict[str, Any]:
    """What follows from the sums; None where it cannot be known.

    ``hours_for_4500``: of playing, by the clock; of one worker for captions and for pictures.
    """
    scale = PAPER_SOURCES / cost.sources / 3600 if cost.sources else None
    hours = {"playing": cost.wall, "captions": cost.seconds["caption"],
             "pictures": cost.seconds["generate"]}
    tflop = sum(cost.flop.values()) / 1e12 if cost.flop and not cost.uncounted else None
    return {
        "tflop": tflop,
        "sources_per_hour": 3600 * cost.sources / cost.wall if cost.wall else None,
        "hours_for_4500": {name: None if scale is None or not seconds else scale * seconds
                           for name, seconds in hours.items()},
        "tflop_for_4500": None if tflop is None or not cost.sources
        else tflop * PAPER_SOURCES / cost.sources,
    }


def line(name: str, cost: Cost) -> str:
    """What a run cost, in one line."""
    known = derived(cost)
    drawn, said = cost.passes["images_generated"], cost.passes["captions"]
    parts = [f"{cost.sources:,} sources", f"{said:,} captions", f"{drawn:,} pictures"]
    parts.append("TFLOP not counted" if known["tflop"] is None else f"{known['tflop']:,.4g} TFLOP")
    if known["sources_per_hour"] is not None:
        hours = known["hours_for_4500"]["playing"]
        parts.append(f"{known['sources_per_hour']:,.4g} sources an hour, so {hours:,.3g} h for "
                     f"{PAPER_SOURCES:,}")
    return f"cost of {name}: {', '.join(parts)}"


def table(costs: Mapping[str, Cost], whole: bool = False) -> pd.DataFrame:
    """Runs as columns, what they cost as rows, the paper's hours beside them; NaN: not known.

    whole: also the passes and TFLOP of every network. No columns where no run kept its cost.
    """
    known = {name: _column(cost, whole) for name, cost in costs.items() if cost.seconds}
    if not known:
        return pd.DataFrame()
    hours = {_hours_label(part): value for part, value in PAPER_HOURS.items()}
    frame = pd.DataFrame({**known, PAPER_LABEL: hours}, dtype=float)
    order = dict.fromkeys(label for column in known.values() for label in column)
    return frame.reindex(list(order))


def _column(cost: Cost, whole: bool) -> dict[str, float | None]:
    """One run's lines."""
    known = derived(cost)
    lines: dict[str, float | None] = {"sources played": cost.sources or None}
    lines |= {f"seconds: {label}": cost.seconds[stage] for stage, label in STAGES.items()
              if stage in cost.seconds}
    lines["seconds: playing, by the clock"] = cost.wall or None
    lines |= {"captions written": cost.passes["captions"],
              "pictures drawn": cost.passes["images_generated"]}
    if whole:
        lines |= {f"passes, {name}": n for name, n in sorted(cost.network_passes.items())}
        lines |= {f"TFLOP, {name}": n / 1e12 for name, n in sorted(cost.network_flop.items())}
    lines |= {f"TFLOP: {label}": cost.flop[stage] / 1e12 for stage, label in STAGES.items()
              if stage in cost.flop and stage not in cost.uncounted}
    lines["TFLOP in all"] = known["tflop"]
    lines["sources per hour"] = known["sources_per_hour"]
    lines |= {_hours_label(part): value for part, value in known["hours_for_4500"].items()}
    return lines


def _hours_label(part: str) -> str:
    return f"hours for {PAPER_SOURCES:,} sources: {part}"


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """The table's numbers as people read them, an en dash where there is none."""
    return table.map(lambda value: "–" if pd.isna(value) else f"{value:,.0f}" if value >= 1000
                     else f"{value:.4g}")
