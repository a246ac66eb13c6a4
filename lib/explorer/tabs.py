"""The ways to play: once, against the captioner, round after round, two settings side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ipywidgets as widgets

from lib.errors import UserError
from lib.explorer import html, walk
from lib.explorer.panels import Runner, SettingsPanel, SourcePanel, button, control, load, panel
from lib.explorer.play import (
    Candidate,
    Game,
    check_contest,
    compare,
    drift,
    embeddings,
    play_one,
    ranked,
    selected,
    try_caption,
)
from lib.explorer.scoring import score
from lib.players import Models

LEND = "picturebook-coco"  # whose word statistics score the captions of an uploaded picture


def lend(game: Game, source: SourcePanel) -> str | None:
    """The dataset whose word statistics an own source borrows."""
    return (source.dataset.value or LEND) if game.source.path is None else None


class PlayTab:
    """Play once: rows appear as they are made, then their scores."""

    title = "Play"

    def __init__(self, source: SourcePanel, settings: SettingsPanel, runner: Runner) -> None:
        self.source, self.settings, self.runner = source, settings, runner
        self.candidates: dict[int, Candidate] = {}
        self.start = runner.starter("Play", "play the chosen source", self.play)
        self.shown = widgets.HTML()
        hint = widgets.HTML(html.note(
            "The sender proposes candidates, the receiver reconstructs the source from each of them, "
            "and the encoder says which reconstruction comes closest: that one is selected."))
        self.widget = panel(hint, self.start, self.shown)

    def play(self) -> None:
        """The work behind the button."""
        game = self.settings.game(self.source)
        self.candidates = {}
        self.shown.value = ""
        models = load(game, self.runner)

        def show(missing: str = "") -> None:
            self.shown.value = html.round_trip(game, list(self.candidates.values()), missing)

        play_into(self.candidates, game, models, self.runner, show)
        self.runner.tell("Scoring …")
        scored, missing = score(game, list(self.candidates.values()), models, lend(game, self.source))
        self.candidates.update({candidate.index: candidate for candidate in scored})
        show(missing)


def play_into(
    found: dict[int, Candidate], game: Game, models: Models, runner: Runner,
    show: Callable[[], None],
) -> None:
    """Play a game, keep its candidates as they come, and tell how far it is."""
    runner.tell("Sending …", 0.05)
    for candidate in play_one(game, models, runner.stopped):
        found[candidate.index] = candidate
        done = sum(one.complete for one in found.values())
        runner.tell(f"{done} of {game.n_candidates} candidates", done / game.n_candidates)
        show()


class WalkTab:
    """The same game, slowly: every quantity of the paper's Figures 1 and 2."""

    title = "Step by step"

    def __init__(self, source: SourcePanel, settings: SettingsPanel, runner: Runner) -> None:
        self.source, self.settings, self.runner = source, settings, runner
        self.start = runner.starter("Walk through it", "play once and print every quantity", self.play)
        self.shown = widgets.HTML()
        hint = widgets.HTML(html.note(
            "How the game works, on the source that you have chosen, with every number on the way. "
            "Change the direction above to see the other half."))
        self.widget = panel(hint, self.start, self.shown)

    def play(self) -> None:
        """The work behind the button."""
        game, found = self.settings.game(self.source), {}
        self.shown.value = ""
        models = load(game, self.runner)
        play_into(found, game, models, self.runner, lambda: None)
        complete = [c for c in found.values() if c.complete and not c.flagged]
        best = selected(complete)
        if best is None:
            raise UserError("every picture was withheld by the safety checker: choose another source")
        scored, missing = score(game, complete, models, lend(game, self.source))
        self.shown.value = "".join((
            walk.flow(game, best), walk.sent(game, list(found.values())), walk.received(game, complete),
            walk.compared(game, complete, *embeddings(game, complete, models)),
            walk.chosen(game, scored), html.note(missing)))


class BeatTab:
    """Write the caption yourself and see what the generator makes of it."""

    title = "Beat the captioner"

    def __init__(self, source: SourcePanel, settings: SettingsPanel, runner: Runner) -> None:
        self.source, self.settings, self.runner = source, settings, runner
        self.key: object = None
        self.theirs: dict[int, Candidate] = {}
        self.tries: list[Candidate] = []
        self.text = control(widgets.Textarea, "Your caption", rows=2,
                            placeholder="describe the source picture")
        self.start = runner.starter("Draw my caption", "see what the generator makes of it", self.play)
        self.take = button("Start from the captioner's best", "copy the selected caption to edit it")
        self.take.on_click(lambda _: self.runner.guarded(self.copy_best))
        self.shown = widgets.HTML()
        hint = widgets.HTML(html.note(
            "Can you beat the captioner? Write what you see: your caption is drawn from the noise of its first "
            "candidate and compared with all of them. Then change one word and see what it does."))
        self.widget = panel(hint, self.text, widgets.HBox([self.start, self.take], layout=widgets.Layout(
            flex_flow="row wrap")), self.shown)

    def copy_best(self) -> None:
        """Put the selected caption into the text field, or say why there is none."""
        best = selected(list(self.theirs.values()))
        if best is None or self.key != self.settings.game(self.source):
            self.runner.tell(f"The captioner has not played this source: press '{self.start.description}' first.")
        else:
            self.text.value = best.text or ""

    def play(self) -> None:
        """The captioner plays once for each source and settings; then your caption is drawn."""
        game = self.settings.game(self.source)
        check_contest(game)
        models = load(game, self.runner)
        words = lend(game, self.source)
        if self.key != game:
            self.key, self.theirs, self.tries = None, {}, []
            play_into(self.theirs, game, models, self.runner, lambda: self.show(game))
            scored, _ = score(game, list(self.theirs.values()), models, words)
            self.theirs = {candidate.index: candidate for candidate in scored}
            self.key = game
        if self.text.value.strip():
            self.runner.tell("Drawing your caption …")
            mine = try_caption(game, self.text.value, models)
            scored, _ = score(game, [mine], models, words)
            self.tries.append(scored[0])
        elif not self.tries:
            self.copy_best()
        self.show(game)

    def show(self, game: Game) -> None:
        """Your tries, the verdict on the last one, the captioner's candidates."""
        self.shown.value = html.contest(game, self.tries, list(self.theirs.values()))


class DriftTab:
    """Feed the reconstruction back in and watch the meaning drift."""

    title = "Keep playing"

    def __init__(self, source: SourcePanel, settings: SettingsPanel, runner: Runner) -> None:
        self.source, self.settings, self.runner = source, settings, runner
        self.rounds = control(widgets.BoundedIntText, "Rounds", min=1, max=30, value=5)
        self.start = runner.starter("Keep playing", "feed each reconstruction back in", self.play)
        self.shown = widgets.HTML()
        hint = widgets.HTML(html.note(
            "The selected reconstruction becomes the next source. With one candidate nothing is "
            "selected: compare how fast the meaning drifts with one and with ten."))
        self.widget = panel(hint, self.rounds, self.start, self.shown)

    def play(self) -> None:
        """The work behind the button."""
        game = self.settings.game(self.source)
        self.shown.value = html.legs(game, [])
        models, found = load(game, self.runner), []
        for leg in drift(game, self.rounds.value, models, self.runner.stopped):
            found.append(leg)
            self.runner.tell(f"round {leg.number} of {self.rounds.value}", leg.number / self.rounds.value)
            self.shown.value = html.legs(game, found)


class CompareTab:
    """Two captioners, generators, encoders or ways to decode on the same source."""

    title = "Compare"

    def __init__(self, source: SourcePanel, settings: SettingsPanel, other: SettingsPanel,
                 runner: Runner) -> None:
        self.source, self.runner = source, runner
        self.settings: Mapping[str, SettingsPanel] = {"A": settings, "B": other}
        other.strategy.value = "beam"
        self.start = runner.starter("Compare", "play both settings", self.play)
        self.shown = widgets.HTML()
        hint = widgets.HTML(html.note(
            "A is the settings panel above. B is set here: another preset, captioner, generator or "
            "encoder, or the same ones with other sampling. Similarities by different encoders have "
            "different scales."))
        self.widget = panel(hint, other.widget, self.start, self.shown)

    def play(self) -> None:
        """The work behind the button."""
        games = {name: side.game(self.source) for name, side in self.settings.items()}
        titles = {name: side.describe(self.source.direction.value) for name, side in self.settings.items()}
        found: dict[str, dict[int, Candidate]] = {name: {} for name in games}
        total = sum(game.n_candidates for game in games.values())
        self.runner.tell("Loading the models …", 0.02)
        for name, candidate in compare(games, self.runner.stopped):
            found[name][candidate.index] = candidate
            done = sum(one.complete for side in found.values() for one in side.values())
            self.runner.tell(f"{done} of {total} candidates", done / total)
            self.show(games["A"], found, titles)
        for name, game in games.items():
            scored, _ = score(game, list(found[name].values()), lend=lend(game, self.source))
            found[name] = {candidate.index: candidate for candidate in scored}
        self.show(games["A"], found, titles)

    def show(self, game: Game, found: Mapping[str, Mapping[int, Candidate]],
             titles: Mapping[str, str]) -> None:
        """Both sides as they are now."""
        sides = {name: ranked(list(side.values())) for name, side in found.items()}
        self.shown.value = html.side_by_side(game, sides, titles)
