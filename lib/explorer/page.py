"""The explorer's page: plain ipywidgets over ``session``; the same in JupyterLab and in Voila."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go

from lib.base import UserError
from lib.data import NAMES
from lib.explorer import session, view
from lib.explorer.session import OWN, Candidate, Trip
from lib.models import unknown_words, weights_fingerprint
from lib.presets import PRESETS, Preset, load_preset

KINDS = ["a dataset", "my image", "my text"]
TASKS = {"image → caption → image": "image", "text → image → caption": "text"}
MOST_CANDIDATES, MOST_POINTS = 50, 3000
EXAMPLES = ["two red owls on a beach", "a small snowman with a red scarf at night", "a blue boat next to a yellow ball"]


class Stopped(Exception):
    """The user pressed Stop."""


def field(kind: type[w.Widget], label: str, **options: Any) -> w.Widget:
    """Return a labelled control that fits a phone."""
    return kind(description=label, style={"description_width": "7.5rem"},
                layout=w.Layout(width="100%", max_width="26rem"), **options)


def button(label: str, tooltip: str, style: str = "") -> w.Button:
    """Return a button as wide as its label."""
    return w.Button(description=label, tooltip=tooltip, button_style=style, layout=w.Layout(width="auto", margin="4px 8px 4px 0"))


def number(label: str, value: float, low: float, high: float, kind: type = float) -> w.Text:
    """Return a field for a number that always shows the number in use: bad input goes back to the last one."""
    box = field(w.Text, label, value=f"{value:g}", continuous_update=False)
    box.number = kind(value)

    def read(_: Any) -> None:
        try:
            given = float(box.value.replace(",", "."))
            box.number = kind(min(max(given, low), high))
        except (ValueError, OverflowError):
            pass
        box.value = f"{box.number:.10g}"

    box.observe(read, "value")
    return box


def fold(title: str, content: w.Widget) -> w.VBox:
    """Return a box that a button shows and hides."""
    content.layout.display = "none"
    toggle = w.ToggleButton(description=f"▸ {title}", layout=w.Layout(width="auto"))

    def turn(change: dict) -> None:
        content.layout.display = "flex" if change["new"] else "none"
        toggle.description = f"{'▾' if change['new'] else '▸'} {title}"

    toggle.observe(turn, "value")
    return w.VBox([toggle, content])


# --- the settings ------------------------------------------------------------------------------


class Settings:
    """Which models take part and how they decode."""

    def __init__(self, preset: Preset, n_candidates: int, seed: int) -> None:
        here, self.absent = _presets()
        self.presets = {**here, preset.name: preset}
        names = list(self.presets)
        self.parts = {part: field(w.Dropdown, part, options=names, value=preset.name)
                      for part in ("captioner", "generator", "encoder")}
        self.strategy = field(w.Dropdown, "decoding", options=["nucleus", "greedy", "beam", "top_k"])
        self.p = number("nucleus p", 0.9, 0.01, 1)
        self.beams = number("beams", 5, 1, 20, int)
        self.steps = number("steps", 50, 1, 200, int)
        self.guidance = number("guidance scale", 7.5, 0, 30)
        self.count = number("candidates", n_candidates, 1, MOST_CANDIDATES, int)
        self.seed = number("seed", seed, 0, 2**31 - 1, int)
        self.parts["captioner"].observe(lambda _: self._follow(), "value")
        self.parts["generator"].observe(lambda _: self._follow(), "value")
        self.strategy.observe(lambda _: self._grey(), "value")
        self._follow()
        hint = f"Not on this machine: {', '.join(self.absent)} (./run_all.sh --fetch --preset NAME)." if self.absent else ""
        self.widget = w.VBox([*self.parts.values(), self.count, self.strategy, self.p, self.beams, self.steps,
                              self.guidance, self.seed, w.HTML(view.message(hint))])

    def _follow(self) -> None:
        """Show the chosen presets' own values."""
        sender = self.presets[self.parts["captioner"].value].captioner.sender
        generator = self.presets[self.parts["generator"].value].generator
        self.strategy.value = sender.strategy
        for box, value in ((self.p, sender.p), (self.beams, sender.beams), (self.steps, generator.steps),
                           (self.guidance, generator.guidance)):
            box.value = f"{value:g}"
        self._grey()

    def _grey(self) -> None:
        """Disable what has no effect."""
        self.p.disabled = self.strategy.value != "nucleus"
        self.beams.disabled = self.strategy.value != "beam"

    def preset(self) -> Preset:
        """The preset that the controls describe."""
        base, drawing, reading = (self.presets[self.parts[part].value] for part in ("encoder", "generator", "captioner"))
        sender = reading.captioner.sender.model_copy(update={
            "strategy": self.strategy.value, "p": self.p.number, "beams": self.beams.number})
        return base.model_copy(update={
            "captioner": reading.captioner.model_copy(update={"sender": sender}),
            "generator": drawing.generator.model_copy(update={"steps": self.steps.number, "guidance": self.guidance.number})})

    def words(self) -> str:
        """The settings in use, in one line."""
        names, sender = {part: box.value for part, box in self.parts.items()}, self.preset().captioner.sender
        how = {"nucleus": f"nucleus p = {sender.p:g}", "beam": f"{sender.beams} beams"}.get(sender.strategy, sender.strategy)
        return (f"captioner {names['captioner']} ({how}), generator {names['generator']} ({self.steps.number} steps, "
                f"guidance scale {self.guidance.number:g}), encoder {names['encoder']}, seed {self.seed.number}")


def _presets() -> tuple[dict[str, Preset], list[str]]:
    """The shipped presets whose weights are here by name, and the names of the others."""
    known = {path.stem: load_preset(path.stem) for path in sorted(PRESETS.glob("*.toml"))}
    here = {name: preset for name, preset in known.items() if all(
        weights_fingerprint(part) for part in (preset.captioner, preset.generator, preset.encoder))}
    return here, [name for name in known if name not in here]


# --- the page ----------------------------------------------------------------------------------


class Page:
    """All parts of the page; ``widget`` is what a cell displays."""

    def __init__(self, preset: Preset, datasets: Sequence[str], n_sources: int, n_candidates: int, seed: int) -> None:
        self.n_sources, self.main = n_sources, Settings(preset, n_candidates, seed)
        self.other = Settings(preset, n_candidates, seed)
        self.kind = w.RadioButtons(options=KINDS, orientation="horizontal", layout=w.Layout(width="auto"))
        here = [name for name in dict.fromkeys([*datasets, *NAMES]) if _is_here(name)]
        self.dataset = field(w.Dropdown, "dataset", options=here)
        self.item = field(w.Dropdown, "source", options=[])
        self.task = field(w.Dropdown, "direction", options=TASKS)
        self.file = w.FileUpload(accept="image/*", description="Choose an image", layout=w.Layout(width="auto"))
        self.captions = field(w.Textarea, "references", rows=2, placeholder="optional: one caption a line")
        self.text = field(w.Text, "text", value=EXAMPLES[0], continuous_update=False)
        self.own = field(w.Text, "your caption", placeholder="describe the source image")
        self.rounds = number("rounds", 5, 1, 30, int)
        self.run, self.stop = button("Run", "run the open tab on this source", "primary"), button("Stop", "keep what is there")
        self.progress = w.FloatProgress(min=0, max=1, layout=w.Layout(width="9rem"))
        self.status, self.card = w.HTML(), w.HTML()
        self.views = [w.HTML() for _ in range(5)]
        self.runs = RunsTab(self)
        self._key: Any = None
        self._stopping, self._thread = threading.Event(), None
        self.widget = self._arrange(len(NAMES) > len(here), n_sources)
        self._observe()

    def _arrange(self, some_absent: bool, n_sources: int) -> w.Widget:
        """Source and Run above, settings folded, results in tabs below."""
        hint = "Other datasets are not on this machine: ./run_all.sh --fetch --dataset NAME." if some_absent else ""
        examples = [button(text, "use this text") for text in EXAMPLES]
        for one in examples:
            one.on_click(lambda b: setattr(self.text, "value", b.description))
        self.boxes = {KINDS[0]: [self.dataset, self.item, w.HTML(view.message(hint))], KINDS[1]: [self.file, self.captions],
                      KINDS[2]: [self.text, w.HBox(examples, layout=w.Layout(flex_flow="row wrap"))]}
        self.chooser = w.VBox()
        half = {"flex": "1 1 330px", "min_width": "0", "margin": "0 20px 0 0"}
        controls = w.HBox([self.run, self.stop, self.progress], layout=w.Layout(align_items="center", flex_flow="row wrap"))
        left = w.VBox([self.kind, self.chooser, self.task, controls, self.status, fold("Settings", self.main.widget)],
                      layout=w.Layout(**half))
        right = w.VBox([self.card], layout=w.Layout(**half))
        own, chain, compare = (w.VBox([box, shown]) for box, shown in zip(
            (self.own, self.rounds, fold("Settings B (A is above)", self.other.widget)), self.views[2:], strict=True))
        self.tabs = w.Tab([self.views[0], self.views[1], own, chain, compare, self.runs.widget], titles=[
            "Round trip", "Step by step", "Own caption", "Chain", "Compare", "Finished runs"])
        self.jobs = [self.round_trip, self.step_by_step, self.contest, self.chain, self.compare, self.runs.refresh]
        page = w.VBox([w.HTML(view.style()), w.HBox([left, right], layout=w.Layout(flex_flow="row wrap")), self.tabs])
        page.add_class("cx-page")
        return page

    def _observe(self) -> None:
        self.run.on_click(lambda _: self.start())
        self.stop.on_click(lambda _: self._stopping.set())
        self.dataset.observe(lambda _: self.guarded(self.list_items), "value")
        self.kind.observe(lambda _: self.guarded(self.switch), "value")
        for box in (self.item, self.file, self.captions, self.text, self.task, self.main.seed):
            box.observe(lambda _: self.guarded(self.show_source), "value")
        self.guarded(self.list_items)
        self.guarded(self.switch)

    # --- the source ---

    def list_items(self) -> None:
        """Offer the items of the chosen dataset."""
        items = session.dataset(self.dataset.value).subset(self.n_sources or None, self.main.seed.number).items
        self.item.options = [(f"{i.id} · {(i.references or ('no caption',))[0][:60]}", i.id) for i in items]
        known = session.FIRST_SOURCE.get(self.dataset.value)
        self.item.value = known if known in dict(self.item.options).values() else items[0].id

    def switch(self) -> None:
        """Show the controls of the chosen kind of source."""
        self.chooser.children = self.boxes[self.kind.value]
        self.task.disabled = self.kind.value != KINDS[0]
        if self.task.disabled:
            self.task.value = "image" if self.kind.value == KINDS[1] else "text"
        self.show_source()

    def trip(self, settings: Settings | None = None) -> Trip:
        """The round trip that the controls describe; UserError for what is missing."""
        settings = settings or self.main
        preset, home = settings.preset(), OWN
        if self.kind.value == KINDS[0]:
            source, home = session.pick_item(self.dataset.value, self.item.value), self.dataset.value
        elif self.kind.value == KINDS[1]:
            if not self.file.value:
                raise UserError("no image is chosen: press 'Choose an image' first")
            file = self.file.value[0]
            lines = [" ".join(line.split()) for line in self.captions.value.splitlines() if line.strip()]
            source = session.uploaded(bytes(file["content"]), file["name"], lines)
        else:
            source = session.typed(self.text.value)
        alone = self.task.value == "image" and preset.captioner.sender.deterministic
        return Trip(source, self.task.value, preset, home, 1 if alone else settings.count.number, settings.seed.number)

    def show_source(self) -> None:
        """Show the source; results of another one leave."""
        self.card.value = ""
        for shown in self.views:
            shown.value = ""
        if self.kind.value == KINDS[1] and not self.file.value:
            return
        trip = self.trip()
        note = ""
        if trip.dataset == OWN and trip.preset.captioner.id.startswith("data/models/mini"):
            note = "The mini models know only their picture book: expect nothing sensible for other images and texts."
        self.card.value = view.source(trip) + view.message(note)

    def lender(self) -> str:
        """The dataset whose document frequencies an own image borrows."""
        return self.dataset.value or NAMES[0]

    # --- work in the background, so that Stop answers ---

    def guarded(self, work: Callable[[], Any]) -> bool:
        """Do work; an error is shown on the page. Returns whether it ended well."""
        self.status.value = ""
        try:
            work()
            return True
        except Stopped:
            self.status.value = view.message("Stopped.")
        except UserError as error:
            self.status.value = view.message(str(error), "alert", "alert")
        except Exception as error:  # the page must show what a log would swallow
            traceback.print_exc()
            self.status.value = view.message(f"unexpected {type(error).__name__}: {error}", "alert", "alert")
        return False

    def start(self) -> None:
        """Run the open tab's job beside the page; one at a time."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._stopping.clear()
        self._thread = threading.Thread(target=self._work, args=(self.jobs[self.tabs.selected_index or 0],), daemon=True)
        self._thread.start()

    def _work(self, job: Callable[[], None]) -> None:
        begun, self.run.disabled = time.monotonic(), True
        try:
            self.tell(0.02)
            if self.guarded(job):
                self.status.value = view.message(f"Done in {time.monotonic() - begun:.1f} s: {self.main.words()}.")
        finally:
            self.progress.value, self.run.disabled = 0, False

    def tell(self, share: float) -> None:
        """Show how much is done; ends the work here if Stop was pressed."""
        if self._stopping.is_set():
            raise Stopped
        self.progress.value = share

    def candidates(self, trip: Trip, show: Callable[[list[Candidate]], None]) -> list[Candidate]:
        """All candidates of a trip, shown while they arrive, at last with scores."""
        words = unknown_words(session.models_for(trip.preset).generator if trip.task == "text" else None, trip.text or "")
        if words:
            raise UserError(f"the models do not know: {', '.join(words)}. Try one of the examples")
        models, made = session.models_for(trip.preset), []
        for made in session.reconstruct(trip, models):
            self.tell(sum(not np.isnan(c.similarity) for c in made) / len(made))
            show(made)
        made = session.scored(trip, made, models, self.lender())
        show(made)
        return made

    # --- the jobs, one a tab ---

    def round_trip(self) -> None:
        """The candidates of the source."""
        trip = self.trip()
        self.candidates(trip, lambda c: setattr(self.views[0], "value", view.trip(trip, c)))

    def step_by_step(self) -> None:
        """The same with every number."""
        trip = self.trip()
        made = self.candidates(trip, lambda c: None)
        self.views[1].value = view.steps(trip, made, session.models_for(trip.preset))

    def contest(self) -> None:
        """A caption by hand against the captioner's candidates, which are made once."""
        words, trip = session.typed(self.own.value).references[0], self.trip()
        models = session.models_for(trip.preset)
        mine = session.own_caption(trip, words, models)
        if self._key != trip:
            self._key, self._tries = trip, []
            self._theirs = self.candidates(trip, lambda c: setattr(self.views[2], "value", view.trip(trip, c)))
        self._tries += session.scored(trip, [mine], models, self.lender())
        self.views[2].value = view.contest(trip, self._tries, self._theirs)

    def chain(self) -> None:
        """Each selected reconstruction as the next source."""
        trip, records = self.trip(), []
        for record in session.chain(trip, self.rounds.number, session.models_for(trip.preset)):
            records.append(record)
            self.views[3].value = view.rounds(trip, records)
            self.tell(len(records) / self.rounds.number)

    def compare(self) -> None:
        """Two settings on the same source."""
        trips = {"A": self.trip(), "B": self.trip(self.other)}
        titles, found = {"A": self.main.words(), "B": self.other.words()}, {}
        for name, trip in trips.items():
            def show(made: list[Candidate], name: str = name) -> None:
                found[name] = made
                self.views[4].value = view.sides(trips["A"], found, titles)

            self.candidates(trip, show)


def _is_here(name: str) -> bool:
    """Whether a dataset can be loaded on this machine."""
    try:
        return bool(session.dataset(name).items)
    except UserError:
        return False


class RunsTab:
    """Rows of finished runs: filter them, click a point to see its round trip."""

    def __init__(self, page: Page) -> None:
        self.page, self.rows = page, None
        self.run = field(w.Dropdown, "run", options=[])
        self.score = field(w.Dropdown, "score", options=[])
        self.domain = field(w.Dropdown, "domain", options=["all"])
        self.similarity = field(w.FloatRangeSlider, "similarity", value=(-1, 1), min=-1, max=1, step=0.01)
        self.plot = go.FigureWidget(layout={"height": 360, "margin": {"l": 50, "r": 10, "t": 10, "b": 40}, "template": "simple_white",
                                            "xaxis_title": "similarity", "showlegend": True, "legend": {"orientation": "h", "y": 1.1}})
        for name, colour, size in (("candidate", "#0072b2", 6), ("selected", "#00785a", 9)):
            self.plot.add_scatter(mode="markers", name=name, marker={"color": colour, "size": size, "opacity": 0.6})
        self.shown = w.HTML()
        controls = w.VBox([self.run, self.score, self.domain, self.similarity], layout=w.Layout(flex="1 1 300px"))
        plot = w.VBox([self.plot], layout=w.Layout(flex="2 1 420px", min_width="0"))
        self.widget = w.VBox([w.HBox([controls, plot], layout=w.Layout(flex_flow="row wrap")), self.shown])
        self.run.observe(lambda _: page.guarded(self.open), "value")
        for box in (self.score, self.domain, self.similarity):
            box.observe(lambda _: page.guarded(self.draw), "value")
        for trace in self.plot.data:
            trace.on_click(self.clicked)
        page_runs = session.finished_runs()
        self.run.options = [(run.name, run) for run in page_runs]

    def refresh(self) -> None:
        """List the runs that are finished by now."""
        self.run.options = [(run.name, run) for run in session.finished_runs()]
        if not self.run.options:
            raise UserError("no run is finished yet: ./run_all.sh makes some")

    def open(self) -> None:
        """Read the chosen run's rows."""
        if self.run.value is None:
            return
        self.rows = self.run.value.rows()
        names = [n for n in ("cider", "clip_score", "sem_f", "bleu4", "clip_score_second", "clipscore") if self.rows[n].notna().any()]
        self.domain.options = ["all", *sorted(self.rows["domain"].dropna().unique())]
        self.score.options = [(view.LABELS.get(n, n), n) for n in names]
        self.draw()

    def draw(self) -> None:
        """Draw the rows that the filters leave."""
        if self.rows is None or self.score.value is None:
            return
        low, high = self.similarity.value
        kept = self.rows[self.rows["similarity"].between(low, high)].sort_values("rank").head(MOST_POINTS)
        kept = kept if self.domain.value == "all" else kept[kept["domain"] == self.domain.value]
        self.parts = [kept[~kept["selected"]], kept[kept["selected"]]]
        with self.plot.batch_update():
            self.plot.layout.yaxis.title = view.LABELS.get(self.score.value, self.score.value)
            for trace, part in zip(self.plot.data, self.parts, strict=True):
                words = part["message"].where(part["task"] == "image", part["reconstruction"])
                trace.x, trace.y, trace.text = part["similarity"], part[self.score.value], words

    def clicked(self, trace: Any, points: Any, _: Any) -> None:
        """Show the round trip of the source whose candidate was clicked."""
        if points.point_inds:
            row = self.parts[self.plot.data.index(trace)].iloc[points.point_inds[0]]
            self.page.guarded(lambda: self.show(row))

    def show(self, row: Any) -> None:
        """The round trip of a row's source, from the stored rows and images."""
        run = self.run.value
        rows = self.rows[self.rows["item"] == row["item"]]
        image = row["task"] == "image"
        trip = Trip(run.dataset.by_id()[row["item"]], row["task"], run.preset, run.dataset.name, len(rows), run.seed)
        made = [Candidate(r.candidate, r.seed, r.message if image else r.reconstruction,
                          np.asarray(run.image(r.reconstruction if image else r.message)), r.logprob, r.flagged, r.truncated,
                          r.similarity, r.similarity_second, {n: getattr(r, n) for n in view.LABELS if getattr(r, n) == getattr(r, n)})
                for r in rows.itertuples()]
        self.shown.value = view.trip(trip, made, f"{run.name}, source {row['item']}")


def open_page(preset: str = "mini", dataset: str = "all", n_sources: int = 0, n_candidates: int = 0, seed: int = 0) -> w.Widget:
    """Return the page as a widget; "all" and 0 stand for the preset's own."""
    chosen = load_preset(preset)
    names = chosen.datasets if dataset == "all" else [dataset]
    return Page(chosen, names, n_sources, n_candidates or chosen.n_candidates, seed).widget
