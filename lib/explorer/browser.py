"""Finished runs: sort, filter, click a point to see its round trip."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import ipywidgets as widgets
import pandas as pd

from lib import labels
from lib.datasets import LAYOUTS, Item
from lib.errors import UserError
from lib.explorer import html, runs
from lib.explorer.panels import Runner, button, control, panel
from lib.explorer.play import OWN, dataset, new_game
from lib.explorer.scatter import Scatter
from lib.presets import get_preset
from lib.results import Run

MOST_POINTS = 3000  # more would make the browser slow; the best-ranked candidates come first


class RunsTab:
    """Looks at rows that notebooks 01 and 02 have left; plays nothing."""

    title = "Finished runs"

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.run = control(widgets.Dropdown, "Run", options=[])
        self.again = button("List the runs again", "list the runs that are finished by now")
        self.score = control(widgets.Dropdown, "Score", options=[])
        self.domain = control(widgets.Dropdown, "Domain", options=[runs.ALL])
        self.sort = control(widgets.Dropdown, "Sort by", options=list(runs.SORTS))
        self.low = control(widgets.FloatText, "Similarity from", step=0.05)
        self.high = control(widgets.FloatText, "Similarity to", step=0.05)
        self.score_low = control(widgets.FloatText, "Score from", step=1)
        self.score_high = control(widgets.FloatText, "Score to", step=1)
        self.differ = control(widgets.BoundedFloatText, "Disagreement from", min=0, max=1, step=0.05)
        self.source = control(widgets.Dropdown, "Source", options=[])
        self.scatter = Scatter()
        self.table, self.trip = widgets.HTML(), widgets.HTML()
        self.shown = pd.DataFrame()
        self._quiet = False
        hint = widgets.HTML(html.note(
            "Each point is a candidate, green where the game selected it. Click one, or choose a "
            "source from the list, to see its whole round trip. Disagreement: how far similarity and "
            "score lie apart, each as its rank among all candidates from 0 to 1."))
        half = widgets.Layout(flex="1 1 340px", min_width="0", margin="0 24px 0 0")
        left = widgets.VBox([self.run, self.score, self.domain, self.low, self.high, self.score_low,
                             self.score_high, self.differ, self.sort, self.source, self.again], layout=half)
        right = widgets.VBox([self.scatter], layout=half)
        top = widgets.HBox([left, right], layout=widgets.Layout(flex_flow="row wrap"))
        self.widget = panel(hint, top, self.trip, self.table)
        self._observe()
        runner.guarded(self.list_runs)

    def _observe(self) -> None:
        self.again.on_click(lambda _: self.runner.guarded(self.list_runs))
        self.run.observe(lambda _: self.runner.guarded(self.open_run), "value")
        self.score.observe(lambda _: self._quiet or self.runner.guarded(self.choose_score), "value")
        for one in (self.domain, self.sort, self.low, self.high, self.score_low, self.score_high,
                    self.differ):
            one.observe(lambda _: self._quiet or self.runner.guarded(self.filter), "value")
        self.scatter.observe(lambda change: self.runner.guarded(self.clicked), "chosen")
        self.source.observe(lambda _: self._quiet or self.runner.guarded(self.show_source), "value")

    def list_runs(self) -> None:
        """Offer the finished runs."""
        found = runs.finished_runs()
        self.run.options = [(_title(run), run) for run in found]
        if found:  # a list that was empty chooses nothing of itself
            self.run.index = 0
        else:
            self.table.value = html.note("No run is finished yet: ./run_all.sh plays some.")

    def open_run(self) -> None:
        """Set the filters to what the chosen run has."""
        if self.run.value is None:
            return
        rows = runs.rows_of(self.run.value)
        if rows.empty:
            raise UserError(f"run {self.run.value.name} has no row to show: all were flagged")
        names = runs.scores_of(rows)
        primary = labels.PRIMARY[rows["task"].iloc[0]]
        with self._quietly():
            self.score.options = [(labels.metric_label(name), name) for name in names]
            self.score.value = primary if primary in names else names[0]
            self.domain.options = runs.domains_of(rows)
            self.low.value, self.high.value = _outwards(rows["similarity"])
            self.differ.value = 0.0
        self.choose_score()

    def choose_score(self) -> None:
        """Set the filter of the score to all that it is in this run."""
        if self.run.value is None or self.score.value is None:
            return
        scores = runs.rows_of(self.run.value)[self.score.value].astype(float)
        with self._quietly():
            self.score_low.value, self.score_high.value = _outwards(self.factor * scores.dropna())
        self.filter()

    @property
    def factor(self) -> int:
        """What the chosen score is multiplied by, so that the page has one number for it."""
        return 100 if self.score.value in html.TIMES_100 else 1

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Set several controls before anything follows them."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def filter(self) -> None:
        """Apply the filters: points, list and table follow."""
        if self.run.value is None or self.score.value is None:
            return
        view = runs.View(self.score.value, self.domain.value, self.low.value, self.high.value,
                         self.sort.value, self.score_low.value / self.factor,
                         self.score_high.value / self.factor, self.differ.value)
        shown = runs.points(runs.rows_of(self.run.value), view)
        self.shown = shown.sort_values(["rank", "item"]).head(MOST_POINTS).reset_index(drop=True)
        found = runs.sources(shown, view)
        words = self._words(self.shown)
        name = labels.metric_label(view.score) + " (× 100)" * (self.factor == 100)
        self.scatter.show(self.shown["similarity"], self.factor * self.shown["score"],
                          self.shown["selected"], words, "Similarity of the reconstruction", name)
        self.table.value = html.source_table(found, view.score) if len(found) else html.note(
            "No source lies within these filters: widen them.")
        with self._quietly():
            self.source.options = [(f"{line.item} · {text[:60]}", line.item) for line, text in
                                   zip(found.itertuples(), self._words(found), strict=True)]
            self.source.index = 0 if len(found) else None
        self.show_source()

    @staticmethod
    def _words(rows: pd.DataFrame) -> list[str]:
        if rows.empty:
            return []
        column = "message" if rows["task"].iloc[0] == "image" else "reconstruction"
        return rows[column].astype(str).tolist()

    def clicked(self) -> None:
        """Show the round trip of the point that was clicked."""
        if 0 <= self.scatter.chosen < len(self.shown):
            line = self.shown.iloc[self.scatter.chosen]
            with self._quietly():
                self.source.value = line["item"]
            self.show_trip(line["item"], int(line["candidate"]))

    def show_source(self) -> None:
        """Show the round trip of the source that was chosen from the list."""
        self.trip.value = ""
        if self.source.value is not None:
            self.show_trip(self.source.value, None)

    def show_trip(self, item: str, candidate: int | None) -> None:
        """A source with all its candidates; the one that was clicked has a dashed outline."""
        run = self.run.value
        found = runs.candidates_of(run, item)
        self.trip.value = _source_card(run, item) + html.cards(found, candidate)


def _outwards(values: pd.Series) -> tuple[float, float]:
    """Smallest and largest value with two decimals, rounded so that all values lie within."""
    return math.floor(100 * values.min()) / 100, math.ceil(100 * values.max()) / 100


def _title(run: Run) -> str:
    """How a run is called in the list."""
    parts = run.name.split("--")
    if len(parts) != 5:
        return run.name
    preset, data, task, sizes, _ = parts
    return f"{preset} · {labels.dataset_label(data)} · {labels.TASKS.get(task, task)} · {sizes}"


def _source_card(run: Run, item: str) -> str:
    """The source of a finished run, as far as its dataset is still there."""
    rows = runs.rows_of(run)
    line = rows[rows["item"] == item].iloc[0]
    known: Item | None = dataset(line["dataset"]).by_id().get(item) if line["dataset"] in LAYOUTS else None
    if known is None:
        text = line["source_text"]
        return html.note(f"The game started from: {text}" if isinstance(text, str) else
                         "The source's dataset is not listed here.")
    seed = int(run.info()["seed"])
    game = new_game(known, line["task"], get_preset("mini"), 1, seed, line["dataset"] or OWN)
    return html.source_card(game)
