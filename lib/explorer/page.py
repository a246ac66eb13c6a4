"""The explorer's page: source and settings above, the ways to play below."""

from __future__ import annotations

import ipywidgets as widgets

from lib.errors import UserError
from lib.explorer import html
from lib.explorer.browser import RunsTab
from lib.explorer.panels import MOST_CANDIDATES, Runner, SettingsPanel, SourcePanel, panel
from lib.explorer.tabs import BeatTab, CompareTab, DriftTab, PlayTab, WalkTab
from lib.presets import MINI, get_preset


class Page:
    """All parts of the page; ``widget`` is what a cell displays."""

    def __init__(self, preset: str = "mini", dataset: str = "all", n_sources: int = 0,
                 n_candidates: int = 0, seed: int = 0) -> None:
        self.runner, wrong = Runner(), ""
        try:
            chosen, name = get_preset(preset), preset
        except UserError as error:  # the page is the place where errors are shown
            chosen, name, wrong = MINI, MINI.name, str(error)
        count = min(MOST_CANDIDATES, n_candidates or chosen.n_candidates)
        names = chosen.datasets if dataset == "all" else (dataset,)
        self.source = SourcePanel(names, self.runner, n_sources, seed)
        self.settings = SettingsPanel(chosen, name, count, seed)
        self.settings.seed.observe(self._reseed, "value")
        other = SettingsPanel(chosen, name, count, seed)
        for control in ("count", "seed"):  # what is compared shall differ in what one has changed
            widgets.dlink((getattr(self.settings, control), "value"), (getattr(other, control), "value"))
        self.play = PlayTab(self.source, self.settings, self.runner)
        self.walk = WalkTab(self.source, self.settings, self.runner)
        self.beat = BeatTab(self.source, self.settings, self.runner)
        self.drift = DriftTab(self.source, self.settings, self.runner)
        self.compare = CompareTab(self.source, self.settings, other, self.runner)
        self.runs = RunsTab(self.runner)
        if wrong:  # last: showing a source clears what was said before
            self.runner.fail(wrong)
        self.widget = self._arrange()

    def _reseed(self, change: dict) -> None:
        """The seed also decides which of a source's captions the text direction starts from."""
        self.source.seed = change["new"]
        self.runner.guarded(self.source.refresh)

    def _arrange(self) -> widgets.Widget:
        """Source and settings side by side where there is room, then the tabs."""
        column = widgets.Layout(flex="1 1 340px", min_width="0", margin="0 24px 0 0")
        left = widgets.VBox([widgets.HTML('<h3 class="cx">1 · Start from</h3>'), self.source.widget],
                            layout=column)
        right = widgets.VBox([widgets.HTML('<h3 class="cx">2 · Settings</h3>'), self.settings.widget],
                             layout=column)
        top = widgets.HBox([left, right], layout=widgets.Layout(flex_flow="row wrap"))
        parts = [self.play, self.walk, self.beat, self.drift, self.compare, self.runs]
        tabs = widgets.Tab([part.widget for part in parts], titles=[part.title for part in parts])
        head = widgets.HTML('<h3 class="cx">3 · Game</h3>')
        return panel(widgets.HTML(html.style()), top, head, self.runner.widget, tabs)
