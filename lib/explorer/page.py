"""The explorer's page: plain ipywidgets over ``session``; the same in JupyterLab and in Voila."""

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import ipywidgets as w
import pandas as pd

from lib.base import UserError
from lib.data.named import NAMED
from lib.explorer import session, view
from lib.explorer.session import Trip
from lib.models import is_here
from lib.presets import PRESETS, Preset, load_preset

DATASET, IMAGE, TEXT = KINDS = ["a dataset", "my image", "my text"]
TASKS = {"image → caption → image": "image", "text → image → caption": "text"}
TABS = ["Round trip", "Step by step", "Own caption", "Chain", "Compare", "Finished runs"]
FIRST = ("picturebook-coco", "107")  # what a fresh page shows: a source with a clear winner
EXAMPLES = ["two red owls on a beach", "a small snowman with a red scarf at night", "a blue boat next to a yellow ball"]
MOST_POINTS = 5000
# A plot is drawn before it has a place, 700 pixels wide; at this event it takes the width of a phone or a desktop.
FIT = """<img src="data:," hidden onerror="for (const ms of [300, 1500, 4000])
    setTimeout(() => window.dispatchEvent(new Event('resize')), ms)">"""
ROW = {"flex_flow": "row wrap", "align_items": "center"}


def field(kind: type[w.Widget], label: str, **options: Any) -> w.Widget:
    """Return a labelled control that fits a phone."""
    return kind(description=label, style={"description_width": "7.5rem"},
                layout=w.Layout(width="auto", max_width="26rem"), **options)


def button(label: str, act: Callable[[], Any], style: str = "") -> w.Button:
    """Return a button as wide as its label."""
    made = w.Button(description=label, button_style=style, layout=w.Layout(width="auto", margin="4px 8px 4px 0"))
    made.on_click(lambda _: act())
    return made


def number(label: str, low: float, high: float, kind: type = float, value: float = 1) -> w.Text:
    """Return a field whose ``number`` is in use and always shown: what is no number goes back to the last one."""
    box = field(w.Text, label, value=f"{value:g}", continuous_update=False)
    box.number = kind(value)

    def read(_: Any) -> None:
        with suppress(ValueError):
            box.number = kind(min(max(low, float(box.value.replace(",", "."))), high))
        box.value = f"{box.number:.10g}"

    box.observe(read, "value")
    return box


def fold(title: str, content: w.Widget) -> w.VBox:
    """Return a box that a button shows and hides."""
    content.layout.display = "none"
    toggle = w.ToggleButton(description=title, layout=w.Layout(width="auto", align_self="flex-start"))
    toggle.observe(lambda now: setattr(content.layout, "display", "flex" if now["new"] else "none"), "value")
    return w.VBox([toggle, content])


class Settings:
    """Which models take part and how they decode: a preset, and parts of others that are on this machine."""

    def __init__(self, preset: Preset, n_candidates: int, seed: int, task: w.Dropdown) -> None:
        others = [load_preset(path.stem) for path in sorted(PRESETS.glob("*.toml"))]
        known = {one.name: one for one in (preset, *others, preset)}  # comes first, and replaces one of its name
        self.parts = {}
        for part in ("captioner", "generator", "encoder"):
            offered = {}
            for name, settings in ((name, getattr(other, part)) for name, other in known.items()):
                if settings not in offered.values() and (name == preset.name or is_here(settings)):
                    offered[f"{name}: {settings.id.removeprefix('data/models/')}"] = settings
            self.parts[part] = field(w.Dropdown, part, options=offered)
        here, self.hint = split(known, lambda name: all(
            getattr(known[name], part) in box.options.values() for part, box in self.parts.items()), "--preset")
        self.presets, self.models = known, field(w.Dropdown, "preset", options=here, value=preset.name)
        self.strategy = field(w.Dropdown, "decoding", options=["nucleus", "top_k", "greedy", "beam"])
        self.p, self.steps = number("nucleus p", 0.01, 1), number("steps", 1, 200, int)
        self.guidance, self.count = number("guidance scale", 0, 30), number("candidates", 1, 50, int, n_candidates)
        self.seed, self.task = number("seed", 0, 2**31 - 1, int, seed), task
        self.widget = w.VBox([self.count, self.seed, self.models, *self.parts.values(), self.strategy, self.p, self.steps,
                              self.guidance])
        self.models.observe(lambda _: self._follow(), "value")
        for box in self.parts.values():
            box.observe(lambda _: self._show_decoding(), "value")
        for box in (self.strategy, task):
            box.observe(lambda _: self._disable(), "value")
        self._follow()

    def _follow(self) -> None:
        """Choose the parts of the chosen preset."""
        for part, box in self.parts.items():
            box.value = getattr(self.presets[self.models.value], part)
        self._show_decoding()

    def _show_decoding(self) -> None:
        """Show the values that the chosen parts have in their presets."""
        sender, generator = self.parts["captioner"].value.sender, self.parts["generator"].value
        self.strategy.value, self.p.value = sender.strategy, f"{sender.p:g}"
        self.steps.value, self.guidance.value = str(generator.steps), f"{generator.guidance:g}"
        self._disable()

    def _disable(self) -> None:
        """Disable what has no effect: in text reconstruction the captioner decodes as its preset's receiver."""
        self.strategy.disabled = self.task.value == "text"
        self.count.disabled = not self.strategy.disabled and self.strategy.value in ("greedy", "beam")
        self.p.disabled = self.strategy.disabled or self.strategy.value != "nucleus"

    def preset(self) -> Preset:
        """Return the preset that the controls describe."""
        captioner, generator, encoder = (box.value for box in self.parts.values())
        sender = captioner.sender.model_copy(update={"strategy": self.strategy.value, "p": self.p.number})
        drawing = {"steps": self.steps.number, "guidance": self.guidance.number}
        return self.presets[self.models.value].model_copy(update={
            "captioner": captioner.model_copy(update={"sender": sender}),
            "generator": generator.model_copy(update=drawing), "encoder": encoder})

    def words(self) -> str:
        """Return the settings in use, in one line."""
        own = self.presets[self.models.value]
        others = [f"{part} of {box.label}" for part, box in self.parts.items() if box.value != getattr(own, part)]
        boxes = (self.strategy, self.p, self.steps, self.guidance, self.seed)
        return ", ".join([own.name, *others, *(f"{box.description} {box.value}" for box in boxes if not box.disabled)])


def split(names: Iterable[str], is_here: Callable[[str], bool], option: str) -> tuple[list[str], str]:
    """Return the names of what is on this machine, and a line on the others."""
    here = [name for name in names if is_here(name)]
    absent = ", ".join(name for name in names if name not in here)
    return here, absent and f"Not on this machine: {absent} (./run_all.sh --fetch {option} NAME)."


class Page:
    """All parts of the page; ``widget`` is what a cell displays."""

    def __init__(self, preset: Preset, datasets: Sequence[str], n_sources: int, n_candidates: int, seed: int) -> None:
        self.task = field(w.Dropdown, "direction", options=TASKS)
        self.n_sources, self.main = n_sources, Settings(preset, n_candidates, seed, self.task)
        self.other = Settings(preset, n_candidates, seed, self.task)
        self.datasets, self.hint = split(dict.fromkeys([*datasets, *NAMED]), session.is_here, "--dataset")
        self.kind = w.RadioButtons(options=KINDS, orientation="horizontal", layout=w.Layout(width="auto"))
        self.dataset, self.item = field(w.Dropdown, "dataset", options=self.datasets), field(w.Dropdown, "source")
        self.file = w.FileUpload(accept="image/*", description="Choose an image",
                                 layout=w.Layout(width="auto", align_self="flex-start"))
        self.captions = field(w.Textarea, "references", rows=2, placeholder="optional: one caption a line")
        self.text = field(w.Text, "text", value=EXAMPLES[0], continuous_update=False)
        self.own = field(w.Text, "your caption", placeholder="describe the source image")
        self.rounds = number("rounds", 1, 30, int, 5)
        self.run, self.stop = button("Run", self.start, "primary"), button("Stop", lambda: self._stopping.set())
        self.progress = w.FloatProgress(min=0, max=1, layout=w.Layout(width="9rem"))
        self.status, self.card, self.views = w.HTML(), w.HTML(), [w.HTML() for _ in TABS[:-1]]
        self.runs = RunsTab(self)
        self.jobs = [self.round_trip, self.round_trip, self.contest, self.chain, self.compare, self.runs.refresh]
        self._stopping, self._thread, self._tried = threading.Event(), None, None
        self.widget = self._arrange()
        self.dataset.observe(lambda _: self.guarded(self.list_items), "value")
        self.kind.observe(lambda _: self.guarded(self.switch), "value")
        self.tabs.observe(lambda tab: tab["new"] == 5 and self.guarded(self.runs.refresh), "selected_index")
        for box in (self.item, self.file, self.captions, self.text, self.task, self.main.seed):
            box.observe(lambda _: self.guarded(self.show_source), "value")
        self.guarded(self.list_items)
        self.guarded(self.switch)

    def _arrange(self) -> w.Widget:
        """Source and Run above, settings folded, results in tabs below."""
        examples = [button(text, lambda text=text: setattr(self.text, "value", text)) for text in EXAMPLES]
        self.boxes = {DATASET: [self.dataset, self.item], IMAGE: [self.file, self.captions],
                      TEXT: [self.text, w.HBox(examples, layout=w.Layout(**ROW))]}
        self.chooser, half = w.VBox(), {"flex": "1 1 330px", "min_width": "0", "margin": "0 20px 0 0"}
        controls = w.HBox([self.run, self.stop, self.progress], layout=w.Layout(**ROW))
        settings = w.VBox([self.main.widget, w.HTML(view.message(f"{self.main.hint} {self.hint}".strip()))])
        left = w.VBox([self.kind, self.chooser, self.task, controls, self.status, fold("Settings", settings)],
                      layout=w.Layout(**half))
        extras = [self.own, self.rounds, fold("Settings B (A is above)", self.other.widget)]
        inside = [w.VBox([box, shown]) for box, shown in zip(extras, self.views[2:], strict=True)]
        self.tabs = w.Tab([*self.views[:2], *inside, self.runs.widget], titles=TABS)
        above = w.HBox([left, w.VBox([self.card], layout=w.Layout(**half))], layout=w.Layout(flex_flow="row wrap"))
        page = w.VBox([w.HTML(view.STYLE), above, self.tabs])
        page.add_class("cx-page")
        return page

    def list_items(self) -> None:
        """Offer the items of the chosen dataset."""
        items = session.dataset(self.dataset.value).subset(self.n_sources or None, self.main.seed.number).items
        options = [(f"{i.id} · {(i.references or ('no caption',))[0][:60]}", i.id) for i in items]
        first = FIRST[1] if self.dataset.value == FIRST[0] and FIRST[1] in dict(options).values() else items[0].id
        self.item.options, self.item.value = options, first

    def switch(self) -> None:
        """Show the controls of the chosen kind of source."""
        self.chooser.children, self.task.disabled = self.boxes[self.kind.value], self.kind.value != DATASET
        if self.task.disabled:
            self.task.value = "image" if self.kind.value == IMAGE else "text"
        self.show_source()

    def trip(self, settings: Settings | None = None) -> Trip:
        """The round trip that the controls describe; UserError for what is missing."""
        settings, home = settings or self.main, session.OWN
        if self.kind.value == DATASET:
            home = session.dataset(self.dataset.value)
            source, home = home.by_id()[self.item.value], home.name
        elif self.kind.value == TEXT:
            source = session.typed(self.text.value)
        elif self.file.value:
            file, lines = self.file.value[0], self.captions.value.splitlines()
            source = session.uploaded(bytes(file["content"]), file["name"], [line for line in lines if line.strip()])
        else:
            raise UserError("no image is chosen: press 'Choose an image' first")
        count = 1 if settings.count.disabled else settings.count.number
        return Trip(source, self.task.value, settings.preset(), home, count, settings.seed.number)

    def show_source(self) -> None:
        """Show the source; results of another one leave, and what makes them ends."""
        self._stopping.set()
        for shown in (self.card, *self.views):
            shown.value = ""
        if self.kind.value != IMAGE or self.file.value:
            trip = self.trip()
            own = trip.dataset == session.OWN and trip.preset.generator.id.startswith("data/models/mini")
            self.card.value = view.source(trip, "The mini models know only their picture book: expect nothing sensible "
                                                "of other images and texts." if own else "")

    def guarded(self, work: Callable[[], Any]) -> bool:
        """Do work; an error is shown on the page. Returns whether it ended well."""
        self.status.value = ""
        try:
            work()
            return True
        except UserError as error:
            self.status.value = view.message(str(error), "alert", "alert")
        except Exception as error:  # the page must show what a log would swallow
            traceback.print_exc()
            self.status.value = view.message(f"unexpected {type(error).__name__}: {error}", "alert", "alert")
        return False

    def start(self) -> None:
        """Run the open tab's job beside the page; one at a time."""
        if not self.run.disabled:
            self.run.disabled, self.progress.value = True, 0.02
            self._stopping.clear()
            self._thread = threading.Thread(target=self._work, args=(self.jobs[self.tabs.selected_index or 0],), daemon=True)
            self._thread.start()

    def _work(self, job: Callable[[], None]) -> None:
        begun = time.monotonic()
        if self.guarded(job):
            self.status.value = view.message(f"Done in {time.monotonic() - begun:.1f} s: {self.main.words()}.")
        self.run.disabled, self.progress.value = False, 0

    def tell(self, share: float) -> None:
        """Show how much is done; ends the work here if Stop was pressed."""
        if self._stopping.is_set():
            raise UserError("stopped")
        self.progress.value = share

    def candidates(self, trip: Trip) -> Iterator[pd.DataFrame]:
        """Yield the candidates of a trip while they arrive, at last with scores."""
        models = session.models_for(trip.preset)
        for made in session.reconstruct(trip, models):
            self.tell((made["similarity"].notna() | made["flagged"]).mean())
            yield made
        yield session.scored(trip, made, models, self.dataset.value)

    def round_trip(self) -> None:
        """The candidates of the source, and the same with every number."""
        trip = self.trip()
        for made in self.candidates(trip):
            self.views[0].value = view.cards(trip, made)
        self.views[1].value = view.steps(trip, made)

    def contest(self) -> None:
        """A caption by hand against the captioner's candidates, which are made once."""
        words, trip = session.typed(self.own.value).references[0], self.trip()
        models = session.models_for(trip.preset)
        mine = session.scored(trip, session.own_caption(trip, words, models), models, self.dataset.value)
        if self._tried is None or self._tried[0] != trip:
            for made in self.candidates(trip):
                self.views[2].value = view.cards(trip, made)
            self._tried = trip, made, []
        self._tried[2].append(mine)
        self.views[2].value = view.contest(trip, self._tried[2], self._tried[1])

    def chain(self) -> None:
        """Each selected reconstruction as the next source."""
        trip = self.trip()
        for found in session.chain(trip, self.rounds.number, session.models_for(trip.preset)):
            self.tell(len(found) / self.rounds.number)
            self.views[3].value = view.rounds(trip, found)

    def compare(self) -> None:
        """Two settings on the same source."""
        found = {}
        for name, settings in {"A": self.main, "B": self.other}.items():
            trip = self.trip(settings)
            for made in self.candidates(trip):
                found[f"{name}: {settings.words()}"] = made
                self.views[4].value = view.sides(trip, found)


class RunsTab:
    """Rows of finished runs: click a point to see its round trip."""

    def __init__(self, page: Page) -> None:
        self.page, self.shown, self.widget = page, w.HTML(), w.VBox()
        self.run, self.score = field(w.Dropdown, "run", options=[]), field(w.Dropdown, "score", options=[])
        self.where = field(w.Text, "only where", continuous_update=False, placeholder="similarity > 0.9 and rank == 1")
        self.run.observe(lambda run: run["new"] and page.guarded(self.open), "value")
        for box in (self.score, self.where):
            box.observe(lambda _: self.score.value and page.guarded(self.draw), "value")

    def refresh(self) -> None:
        """Offer the finished runs; UserError if there is none."""
        found = session.finished_runs(self.page.datasets)
        if not found:
            raise UserError("no run is finished yet: ./run_all.sh makes some")
        if list(found) != list(self.run.options):
            self.run.options, self.run.index = found, 0

    def open(self) -> None:
        """Read the chosen run's rows."""
        self.rows, self.score.index = self.run.value.rows(), None
        self.score.options = [(name, key) for key, name in view.LABELS.items() if self.rows[key].notna().any()]
        self.score.index = 0

    def draw(self) -> None:
        """Draw the chosen score, in a new figure: one that is changed while JupyterLab loads it stays empty."""
        from plotly import graph_objects as go  # takes seconds, and not every page needs it

        try:
            rows = self.rows.query(self.where.value) if self.where.value.strip() else self.rows
        except Exception as error:  # pandas has many kinds
            raise UserError(f"only where {self.where.value}: {error}; write for example domain == 'in-domain' and "
                            "similarity > 0.9 with columns of the run's rows") from error
        kept = rows.sort_values("rank", kind="stable").head(MOST_POINTS)
        self.shown.value = view.message(f"{len(kept):,} of {len(self.rows):,} candidates. Click one to see its round trip.")
        self.parts = [kept[~kept["selected"]], kept[kept["selected"]]]
        words = "message" if self.run.value.task == "image" else "reconstruction"
        self.plot = go.FigureWidget([go.Scatter(
            x=part["similarity"], y=100 * part[self.score.value], text=part[words], mode="markers", name=name,
            marker={"color": colour, "size": size, "opacity": 0.6}) for part, (name, colour, size) in zip(
                self.parts, (("candidate", "#0072b2", 6), ("selected", "#00785a", 9)), strict=True)], {
            "height": 360, "margin": {"l": 50, "r": 10, "t": 10, "b": 40}, "template": "simple_white",
            "xaxis_title": "similarity", "yaxis_title": f"{view.LABELS[self.score.value]} × 100",
            "legend": {"orientation": "h", "y": 1.1}, "autosize": True})
        self.plot._config = {"responsive": True, "displayModeBar": False}  # as wide as a phone; plotly has no public name
        for part, trace in zip(self.parts, self.plot.data, strict=True):
            trace.on_click(lambda _, points, __, part=part: self.page.guarded(lambda: self.show(part, points.point_inds)))
        self.widget.children = [self.run, self.score, self.where, self.plot, w.HTML(FIT), self.shown]

    def show(self, part: pd.DataFrame, places: Sequence[int]) -> None:
        """Show the round trip of the source of a clicked candidate, from the stored rows and images."""
        if places:
            item = part["item"].iloc[places[0]]
            trip, made = session.stored(self.run.value, self.rows[self.rows["item"] == item])
            self.shown.value = view.cards(trip, made, f"Source {item} of {self.run.value.name}. ")


def open_page(preset: str = "mini", dataset: str = "all", n_sources: int = 0, n_candidates: int = 0,
              seed: int = 0) -> w.Widget:
    """Return the page as a widget; "all" and 0 stand for the preset's own. dataset: also names with commas between."""
    chosen = load_preset(preset)
    names = chosen.datasets if dataset == "all" else dataset.split(",")
    return Page(chosen, names, n_sources, n_candidates or chosen.n_candidates, seed).widget
