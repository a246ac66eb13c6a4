"""A scatter in which one clicks a point: our own few lines of SVG, nothing from a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anywidget
import traitlets

HERE = Path(__file__).parent


class Scatter(anywidget.AnyWidget):
    """Points with labels; ``chosen`` is the index of the one that was clicked, -1 for none.

    Keyboard: the plot takes the focus, arrow keys go from point to point by x.
    """

    _esm = (HERE / "scatter.js").read_text(encoding="utf-8")

    xs = traitlets.List(traitlets.Float()).tag(sync=True)
    ys = traitlets.List(traitlets.Float()).tag(sync=True)
    marked = traitlets.List(traitlets.Bool()).tag(sync=True)
    texts = traitlets.List(traitlets.Unicode()).tag(sync=True)
    x_label = traitlets.Unicode("").tag(sync=True)
    y_label = traitlets.Unicode("").tag(sync=True)
    chosen = traitlets.Int(-1).tag(sync=True)

    def show(
        self, xs: Sequence[float], ys: Sequence[float], marked: Sequence[bool],
        texts: Sequence[str], x_label: str, y_label: str,
    ) -> None:
        """Replace all points at once; the axes keep their names in words."""
        with self.hold_sync():
            self.chosen = -1
            self.xs, self.ys = list(map(float, xs)), list(map(float, ys))
            self.marked, self.texts = list(map(bool, marked)), list(texts)
            self.x_label, self.y_label = x_label, y_label
