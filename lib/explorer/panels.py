"""The controls that all parts of the page share: the source, the settings, and who is at work.

Numbers are typed into fields rather than slid: fields have labels and take the keyboard.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from lib import labels
from lib.datasets import LAYOUTS, Item
from lib.errors import UserError
from lib.explorer import html
from lib.explorer.models import Stopped, mix, models_for, tune
from lib.explorer.play import OWN, Game, dataset, new_game, pick_item, typed, uploaded
from lib.presets import PRESETS, Preset, get_preset
from lib.seeds import stable_seed

DIRECTIONS = {"picture → caption → picture": "image", "text → picture → text": "text"}
KINDS = ("a dataset", "my picture", "my text")
STRATEGIES = {"the preset's own": "", "nucleus": "nucleus", "beam search": "beam",
              "greedy": "greedy", "top-k": "top_k"}
MOST_CANDIDATES = 50
WIDE = widgets.Layout(width="100%", max_width="30rem")
LONG = {"description_width": "8.5rem"}


def control(kind: type[widgets.Widget], label: str, **settings: Any) -> Any:
    """A control with its label, as wide as the page allows."""
    settings.setdefault("layout", WIDE)
    return kind(description=label, style=LONG, **settings)


def button(label: str, hint: str, kind: str = "") -> widgets.Button:
    """A button that is as wide as its words."""
    room = widgets.Layout(width="auto", margin="4px 8px 4px 2px", align_self="flex-start")
    return widgets.Button(description=label, tooltip=hint, button_style=kind, layout=room)


def panel(*children: widgets.Widget) -> widgets.VBox:
    """Controls one below the other."""
    box = widgets.VBox(children, layout=widgets.Layout(width="100%"))
    box.add_class("cx-panel")
    return box


def columns(*children: widgets.Widget) -> widgets.GridBox:
    """Controls in as many columns as the page has room for."""
    return widgets.GridBox(children, layout=widgets.Layout(
        width="100%", grid_gap="0 28px",
        grid_template_columns="repeat(auto-fill, minmax(min(100%, 330px), 1fr))"))


def unfolding(title: str, box: widgets.Box) -> widgets.Widget:
    """A box that a button shows and hides (ipywidgets' accordion does not take the keyboard)."""
    shown, box.layout.display = box.layout.display, "none"
    toggle = widgets.ToggleButton(description=f"▸ {title}", layout=widgets.Layout(
        width="auto", align_self="flex-start"))

    def turn(change: dict) -> None:
        box.layout.display = shown if change["new"] else "none"
        toggle.description = f"{'▾' if change['new'] else '▸'} {title}"

    toggle.observe(turn, "value")
    return panel(toggle, box)


# --- work in the background --------------------------------------------------------------------


class Runner:
    """Runs one piece of work at a time beside the page, so that its stop button answers.

    Errors are shown in the page: a UserError's message as it is, others with their kind.
    """

    def __init__(self) -> None:
        self.progress = widgets.FloatProgress(min=0, max=1, layout=widgets.Layout(width="12rem"))
        self.stop_button = button("Stop", "end what is being made; what is there stays", "danger")
        self.text, self.errors = widgets.HTML(html.status("Ready.")), widgets.HTML()
        self.stop_button.disabled = True
        self.stop_button.on_click(lambda _: self.stop())
        self.starters: list[widgets.Button] = []
        self._stop, self._ended, self._thread = threading.Event(), threading.Event(), None
        line = widgets.HBox([self.stop_button, self.progress, self.text],
                            layout=widgets.Layout(flex_flow="row wrap", align_items="center"))
        self.widget = panel(line, self.errors)

    def starter(self, label: str, hint: str, work: Callable[[], None]) -> widgets.Button:
        """A button that starts this work and is off while any work runs."""
        made = button(label, hint, "primary")
        made.on_click(lambda _: self.start(work))
        self.starters.append(made)
        return made

    def start(self, work: Callable[[], None]) -> None:
        """Run ``work`` in a thread; a second start while one runs does nothing."""
        if self._thread is not None:
            if not self._ended.is_set():
                return
            self._thread.join()  # the page may know of its end a moment before it is over
        self._stop.clear()
        self._ended.clear()
        self.errors.value = ""
        self._enable(False)
        self.tell("Starting …", 0.0)
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the work to end at its next step."""
        self._stop.set()
        self.tell("Stopping …")

    def stopped(self) -> bool:
        """Whether the user has asked to stop."""
        return self._stop.is_set()

    def tell(self, message: str, share: float | None = None) -> None:
        """Say what is going on, and how much of it is done (0 to 1)."""
        self.text.value = html.status(message)
        if share is not None:
            self.progress.value = share

    def fail(self, message: str) -> None:
        """Show an error in the page."""
        self.errors.value = html.alert(message)

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the work's end (for tests and cells)."""
        if self._thread is not None:
            self._thread.join(seconds)

    def guarded(self, work: Callable[[], None]) -> None:
        """Do quick work at once, with errors shown in the page."""
        try:
            work()
        except UserError as error:
            self.fail(str(error))
        except Exception as error:
            traceback.print_exc()
            self.fail(f"Unexpected {type(error).__name__}: {error}")

    def _run(self, work: Callable[[], None]) -> None:
        start = time.monotonic()
        try:
            self.guarded_unless_stopped(work)
        finally:
            self._ended.set()
            self._enable(True)
            end = "Stopped" if self.stopped() else "Failed" if self.errors.value else "Done"
            self.tell(f"{end} after {time.monotonic() - start:.1f} s.", 0.0 if end != "Done" else 1.0)

    def guarded_unless_stopped(self, work: Callable[[], None]) -> None:
        """Like :meth:`guarded`; being stopped is no error."""
        def until_stopped() -> None:
            try:
                work()
            except Stopped:
                self._stop.set()

        self.guarded(until_stopped)

    def _enable(self, ready: bool) -> None:
        for starter in self.starters:
            starter.disabled = not ready
        self.stop_button.disabled = ready


# --- the source --------------------------------------------------------------------------------


class SourcePanel:
    """Choose a dataset's item, upload a picture or type a text."""

    def __init__(self, datasets: Sequence[str], runner: Runner, n_sources: int = 0,
                 seed: int = 0) -> None:
        self.runner, self.n_sources, self.seed = runner, n_sources, seed
        # Not toggle buttons: these do not tell screen readers which of them is on.
        self.kind = control(widgets.RadioButtons, "Start from", options=KINDS, orientation="horizontal")
        self.kind.add_class("cx-kinds")
        self.direction = control(widgets.Dropdown, "Direction", options=DIRECTIONS)
        names = list(dict.fromkeys([*datasets, *LAYOUTS]))
        self.dataset = control(widgets.Dropdown, "Dataset",
                               options=[(labels.dataset_label(name), name) for name in names])
        self.item = control(widgets.Dropdown, "Source", options=[])
        self.another = button("Draw a source by lot", "choose another source of the dataset")
        self.file = widgets.FileUpload(accept="image/*", description="Choose a picture", icon="",
                                       layout=widgets.Layout(width="auto", align_self="flex-start"))
        self.captions = control(widgets.Textarea, "Description", rows=2,
                                placeholder="optional: one description a line, to score captions by")
        self.text = control(widgets.Textarea, "Text", rows=2, value="a red owl in the snow",
                            placeholder="what the generator shall draw")
        self.shown = widgets.HTML()
        self._drawn = 0
        self.boxes = {KINDS[0]: panel(self.dataset, self.item, self.another),
                      KINDS[1]: panel(self.file, self.captions), KINDS[2]: panel(self.text)}
        self.chooser = panel()
        self.widget = panel(self.kind, self.chooser, self.direction, self.shown)
        self._observe()

    def _observe(self) -> None:
        self.dataset.observe(lambda _: self.runner.guarded(self.list_items), "value")
        self.kind.observe(lambda _: self.runner.guarded(self.switch), "value")
        for one in (self.item, self.file, self.captions, self.text, self.direction):
            one.observe(lambda _: self.runner.guarded(self.refresh), "value")
        self.another.on_click(lambda _: self.runner.guarded(self.draw_lot))
        self.runner.guarded(self.list_items)
        self.runner.guarded(self.switch)

    def list_items(self) -> None:
        """Offer the chosen dataset's items, each with its id and first caption."""
        self.item.options = []
        items = dataset(self.dataset.value).subset(self.n_sources or None, self.seed).items
        self.runner.errors.value = ""
        self.item.options = [(_title(item), item.id) for item in items]
        self.item.value = items[0].id

    def draw_lot(self) -> None:
        """Another item; the same presses give the same items on every machine."""
        self._drawn += 1
        ids = [value for _, value in self.item.options]
        if ids:
            self.item.value = ids[stable_seed("lot", self.dataset.value, self._drawn) % len(ids)]

    def switch(self) -> None:
        """Show the controls of the chosen kind of source; its direction follows."""
        self.chooser.children = [self.boxes[self.kind.value]]
        self.direction.disabled = self.kind.value != KINDS[0]
        if self.kind.value == KINDS[1]:
            self.direction.value = "image"
        elif self.kind.value == KINDS[2]:
            self.direction.value = "text"
        self.refresh()

    def source(self) -> tuple[Item, str]:
        """The source and the dataset it belongs to; UserError if there is none."""
        if self.kind.value == KINDS[2]:
            return typed(self.text.value), OWN
        if self.kind.value == KINDS[1]:
            if not self.file.value:
                raise UserError("no picture is chosen: press 'Choose a picture' first")
            file = self.file.value[0]
            lines = [" ".join(line.split()) for line in self.captions.value.splitlines()]
            return uploaded(bytes(file["content"]), file["name"], [line for line in lines if line]), OWN
        if self.item.value is None:
            raise UserError("no source is chosen: choose a dataset that is there")
        return pick_item(self.dataset.value, self.item.value), self.dataset.value

    def refresh(self) -> None:
        """Show the chosen source, or nothing while there is none."""
        self.shown.value = ""
        if self.kind.value == KINDS[1] and not self.file.value:
            return
        if self.kind.value == KINDS[2] and not self.text.value.strip():
            return
        if self.kind.value == KINDS[0] and self.item.value is None:
            return
        source, home = self.source()
        self.runner.errors.value = ""
        game = new_game(source, self.direction.value, get_preset("mini"), 1, self.seed, home)
        self.shown.value = html.source_card(game)


def _title(item: Item) -> str:
    """How an item is called in the list."""
    hint = item.references[0] if item.references else "no description"
    return f"{item.id} · {hint[:60]}"


# --- the settings ------------------------------------------------------------------------------


class SettingsPanel:
    """Which models play and how they decode; a preset first, its parts where they are unfolded."""

    def __init__(self, preset: Preset, name: str, n_candidates: int, seed: int) -> None:
        names = list(dict.fromkeys([name, *PRESETS]))

        def named(label: str) -> widgets.Combobox:
            return control(widgets.Combobox, label, options=names, value=name,
                           placeholder="a preset's name or a .toml file")

        self.base = named("Preset")
        self.parts = {"captioner": named("Captioner of"), "generator": named("Generator of"),
                      "encoder": named("Encoder of")}
        self.ranked_by = control(widgets.Dropdown, "Ranked by", options={
            "the preset's encoder": "encoder", "its judge (second encoder)": "judge"})
        self.strategy = control(widgets.Dropdown, "Sampling", options=STRATEGIES)
        sender, generator = preset.captioner.sender, preset.generator
        self.p = control(widgets.BoundedFloatText, "Nucleus p", min=0.01, max=1.0, step=0.05,
                         value=sender.p)
        self.beams = control(widgets.BoundedIntText, "Beams", min=1, max=20, value=sender.beams)
        self.steps = control(widgets.BoundedIntText, "Denoising steps", min=1, max=200,
                             value=generator.steps)
        self.guidance = control(widgets.BoundedFloatText, "Guidance", min=0, max=30, step=0.5,
                                value=generator.guidance)
        self.count = control(widgets.BoundedIntText, "Candidates", min=1, max=MOST_CANDIDATES,
                             value=n_candidates)
        self.seed = control(widgets.BoundedIntText, "Seed", min=0, max=2**31 - 1, value=seed)
        self.base.observe(self._follow_preset, "value")
        self.parts["captioner"].observe(self._follow_captioner, "value")
        self.parts["generator"].observe(self._follow_generator, "value")
        hint = widgets.HTML(html.note(f"Presets: {', '.join(names)}, or the path of a .toml file."))
        self.widget = panel(
            hint, columns(self.base, self.count, self.strategy, self.p, self.beams, self.steps,
                          self.guidance, self.seed),
            unfolding("Models one by one", columns(*self.parts.values(), self.ranked_by)))

    def _follow_preset(self, change: dict) -> None:
        for part in self.parts.values():
            part.value = change["new"]

    def _follow_captioner(self, change: dict) -> None:
        """p and beams of a newly chosen captioner are its preset's own."""
        if change["new"] in PRESETS:
            own = PRESETS[change["new"]].captioner.sender
            self.p.value, self.beams.value = own.p, own.beams

    def _follow_generator(self, change: dict) -> None:
        """Steps and guidance of a newly chosen generator are its preset's own."""
        if change["new"] in PRESETS:
            own = PRESETS[change["new"]].generator
            self.steps.value, self.guidance.value = own.steps, own.guidance

    def preset(self) -> Preset:
        """The preset that the controls describe; UserError for a name that is none."""
        mixed = mix(*(self.parts[part].value.strip() for part in ("captioner", "generator", "encoder")),
                    self.ranked_by.value)
        return tune(mixed, self.strategy.value or None, self.p.value, self.beams.value, self.steps.value,
                    self.guidance.value)

    def game(self, source: SourcePanel) -> Game:
        """The game that the controls describe."""
        item, home = source.source()
        return new_game(item, source.direction.value, self.preset(), self.count.value,
                        self.seed.value, home)

    def describe(self, direction: str) -> str:
        """The settings in a few words, for titles of a comparison.

        direction: "image" or "text"; in the second the captioner is the receiver, which has a way to
        decode of its own.
        """
        preset = self.preset()
        captioner, generator = preset.captioner, preset.generator
        words = captioner.sender if direction == "image" else captioner.receiver
        how = {"nucleus": f"nucleus p = {words.p:g}", "beam": f"beam search, {words.beams} beams",
               "top_k": f"top-k, k = {words.k}", "greedy": "greedy"}[words.strategy]
        return (f"captioner {self.parts['captioner'].value} ({how}), generator "
                f"{self.parts['generator'].value} ({generator.steps} steps, guidance "
                f"{generator.guidance:g}), ranked by {self.ranked_by.value} of "
                f"{self.parts['encoder'].value}")


def load(game: Game, runner: Runner) -> Any:
    """A game's models, with a word about it: loading takes seconds the first time."""
    runner.tell("Loading the models …", 0.02)
    return models_for(game.preset)
