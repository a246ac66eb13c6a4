"""Looking around: one source at a time, finished runs, and the page that shows both.

The plain functions are here; ``open_page`` builds the page of notebook 00.
"""

from __future__ import annotations

from typing import Any

from lib.explorer.models import Stopped, mix, models_for, tune
from lib.explorer.play import (
    Candidate,
    Comparison,
    Game,
    Leg,
    compare,
    drift,
    embeddings,
    new_game,
    noise_seeds,
    pick_item,
    play_one,
    ranked,
    selected,
    table,
    try_caption,
    typed,
    uploaded,
)
from lib.explorer.scoring import score

__all__ = [
    "Candidate", "Comparison", "Game", "Leg", "Stopped", "compare", "drift", "embeddings", "mix",
    "models_for", "new_game", "noise_seeds", "open_page", "pick_item", "play_one", "ranked", "score",
    "selected", "table", "try_caption", "tune", "typed", "uploaded",
]


def open_page(
    preset: str = "mini", dataset: str = "all", n_sources: int = 0, n_candidates: int = 0,
    seed: int = 0,
) -> Any:
    """The page as a widget. Widgets load only here.

    "all" and 0 stand for the preset's own datasets, all of their sources, its number of candidates.
    """
    from lib.explorer.page import Page

    return Page(preset, dataset, n_sources, n_candidates, seed).widget
