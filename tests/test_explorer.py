"""The explorer's plain functions with small deterministic players; its widgets without a browser."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from PIL import Image

from lib import explorer, notebooks, roundtrip, serve
from lib.datasets import Item
from lib.errors import UserError
from lib.explorer import html, runs, walk
from lib.explorer.browser import RunsTab
from lib.explorer.models import Stopped, stopping
from lib.explorer.page import Page
from lib.explorer.panels import KINDS, Runner
from lib.explorer.play import OWN
from lib.game import TASKS, play_shard
from lib.players import Models
from lib.presets import get_preset
from tests.standins import COLOURS, stand_ins, without_weights

MINI = without_weights(get_preset("mini"))
BY_CANDIDATE = dataclasses.replace(
    MINI, generator=dataclasses.replace(MINI.generator, noise="candidate"))


def picture_bytes(colour="red", kind="PNG", size=(12, 10)):
    rng = np.random.default_rng(3)
    base = np.array(COLOURS[colour]) * 0.6 + 50
    pixels = np.clip(base + rng.normal(0, 30, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind)
    return stream.getvalue()


@pytest.fixture
def item(tmp_path):
    """A source on disk with a caption, without a dataset around it."""
    path = tmp_path / "a.png"
    path.write_bytes(picture_bytes())
    return Item("a", path, ("a red thing on a page",))


def finish(game, models=None):
    """All candidates of a game in their last state."""
    return list({c.index: c for c in explorer.play_one(game, models or stand_ins())}.values())


# --- playing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [MINI, BY_CANDIDATE], ids=["shared noise", "own noise"])
@pytest.mark.parametrize("direction", ["image", "text"])
def test_the_explorer_plays_what_a_run_plays(item, direction, preset):
    game = explorer.new_game(item, direction, preset, 6, 3, "somewhere")
    rows = play_shard(game.shard, TASKS[direction], stand_ins()).rows.to_pandas()
    found = finish(game)
    spoken = rows["message" if direction == "image" else "reconstruction"]
    assert [c.text for c in found] == spoken.tolist()
    assert [c.seed for c in found] == rows["seed"].tolist()
    assert [c.similarity for c in found] == pytest.approx(rows["similarity"].tolist(), abs=1e-9)
    assert [c.judged for c in found] == pytest.approx(rows["similarity_judge"].tolist(), abs=1e-9)
    if direction == "image":  # the stand-in reads its own pictures without fail
        assert len({c.similarity for c in found}) > 1


def test_messages_come_first_and_then_one_reconstruction_after_the_other(item):
    game = explorer.new_game(item, "image", MINI, 4)
    stream = [(c.index, c.complete) for c in explorer.play_one(game, stand_ins())]
    assert stream == [(k, False) for k in range(4)] + [(k, True) for k in range(4)]
    game = explorer.new_game(item, "text", MINI, 2)
    stream = [(c.index, c.picture is not None, c.text is not None)
              for c in explorer.play_one(game, stand_ins())]
    assert stream == [(0, True, False), (0, True, True), (1, True, False), (1, True, True)]


def test_the_most_similar_is_first_and_selected_and_the_unknown_last():
    made = [explorer.Candidate(k, k, similarity=s) for k, s in enumerate((0.2, math.nan, 0.9, 0.9))]
    assert [c.index for c in explorer.ranked(made)] == [2, 3, 0, 1]
    assert explorer.selected(made).index == 2
    assert explorer.selected(made[1:2]) is None


def test_a_caption_by_hand_is_drawn_from_the_candidates_noise(item):
    game = explorer.new_game(item, "image", MINI, 3)
    theirs = finish(game)[0]
    mine = explorer.try_caption(game, f"  {theirs.text} ", stand_ins())
    assert mine.index == -1 and mine.similarity == pytest.approx(theirs.similarity)
    assert np.array_equal(mine.picture, theirs.picture)
    with pytest.raises(UserError, match="text is empty"):
        explorer.try_caption(game, " \n", stand_ins())


@pytest.mark.parametrize("direction", ["image", "text"])
def test_drift_feeds_the_reconstruction_back(item, direction):
    game = explorer.new_game(item, direction, MINI, 3)
    legs = list(explorer.drift(game, 3, stand_ins()))
    assert [leg.number for leg in legs] == [1, 2, 3]
    assert legs[0].to_first == pytest.approx(legs[0].to_last)
    best = explorer.selected(finish(game))
    assert legs[0].winner.text == best.text and legs[0].to_last == pytest.approx(best.similarity)
    assert all(math.isnan(leg.sem_f) for leg in legs)  # no true scene is known
    with pytest.raises(UserError, match="rounds = 0"):
        list(explorer.drift(game, 0, stand_ins()))


def test_two_settings_side_by_side(item):
    greedy = explorer.tune(MINI, strategy="greedy")
    games = {"A": explorer.new_game(item, "image", MINI, 3), "B": explorer.new_game(item, "image", greedy, 3)}
    found = list(explorer.compare(games, load=lambda preset: stand_ins()))
    assert [name for name, _ in found] == ["A"] * 6 + ["B"] * 2  # greedy: one candidate
    assert found[-1][1].text.startswith("a ")


def test_settings_change_the_preset_and_nothing_else():
    tuned = explorer.tune(MINI, strategy="beam", p=0.5, beams=3, steps=7, guidance=1.5)
    assert tuned.captioner.sender == dataclasses.replace(
        MINI.captioner.sender, strategy="beam", p=0.5, beams=3)
    assert (tuned.generator.steps, tuned.generator.guidance) == (7, 1.5)
    assert explorer.tune(MINI) == MINI
    swapped = explorer.mix("mini", "paper", "mini", "judge")
    assert swapped.encoder == get_preset("mini").judge and swapped.judge == get_preset("mini").encoder
    assert swapped.generator == get_preset("paper").generator
    with pytest.raises(UserError, match="guidance"):
        explorer.tune(MINI, guidance=-1.0)
    with pytest.raises(UserError, match="choose one of nucleus, greedy"):
        explorer.tune(MINI, strategy="magic")


def test_stopping_reaches_into_a_drawing_and_leaves_no_hook():
    class Pipeline:
        unet = torch.nn.Linear(2, 2)

    class Generator:
        pipeline = Pipeline()

    models, asked = Models(None, Generator(), None), []
    with pytest.raises(Stopped), stopping(models, lambda: len(asked) > 1):
        for _ in range(5):
            asked.append(Pipeline.unet(torch.zeros(1, 2)))
    assert len(asked) == 2
    assert Pipeline.unet(torch.zeros(1, 2)).shape == (1, 2)


# --- sources and bad input ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_an_upload_is_a_source(kind):
    content = picture_bytes(kind=kind)
    source = explorer.uploaded(content, "my.png", ["a red page"])
    assert source.image().size == (12, 10) and source.references == ("a red page",)
    assert source.id == explorer.uploaded(content, "renamed.jpg").id
    assert len(finish(explorer.new_game(source, "image", MINI, 3))) == 3


@pytest.mark.parametrize("content", [b"", b"not a picture", b"%PDF-1.7", picture_bytes()[:60]])
def test_a_bad_upload_is_one_clear_line(content):
    with pytest.raises(UserError, match="my file"):
        explorer.uploaded(content, "my file.png")


def test_what_cannot_start_a_game(item):
    with pytest.raises(UserError, match="text is empty"):
        explorer.typed("  \n ")
    with pytest.raises(UserError, match="source is a text"):
        explorer.new_game(explorer.typed("a red owl"), "image", MINI)
    with pytest.raises(UserError, match="without a caption"):
        explorer.new_game(explorer.uploaded(picture_bytes(), "a.png"), "text", MINI)
    with pytest.raises(UserError, match="direction 'sideways'"):
        explorer.new_game(item, "sideways", MINI)
    for count in (0, -1, 2.5, True):
        with pytest.raises(UserError, match="number of candidates"):
            explorer.new_game(item, "image", MINI, count)
    with pytest.raises(UserError, match="has no item 'x'"):
        explorer.pick_item("picturebook-coco", "x")


def test_scores_are_missing_with_a_reason():
    source = explorer.uploaded(picture_bytes(), "a.png")
    game = explorer.new_game(source, "image", MINI, 2)
    scored, missing = explorer.score(game, finish(game), stand_ins())
    assert "nobody has described" in missing
    assert all(set(c.scores) == {"clipscore"} for c in scored)


def test_an_upload_with_a_description_is_scored_with_a_datasets_words():
    source = explorer.uploaded(picture_bytes(), "a.png", ["a red thing on a page"])
    game = explorer.new_game(source, "image", MINI, 3)
    scored, missing = explorer.score(game, finish(game), stand_ins(), lend="picturebook-coco")
    assert missing == "" and all({"cider", "bleu4", "rouge_l"} <= set(c.scores) for c in scored)


def test_a_picture_book_source_is_scored_against_its_scene():
    source = explorer.pick_item("picturebook-coco", 0)
    game = explorer.new_game(source, "image", MINI, 2, 0, "picturebook-coco")
    perfect = dataclasses.replace(finish(game)[0], text=source.references[0])
    scored, _ = explorer.score(game, [perfect], stand_ins())
    assert 0 < scored[0].scores["sem_f"] <= 1 and scored[0].scores["cider"] > 1


# --- finished runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run without captions of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(COLOURS):
        (folder / f"{number}.png").write_bytes(picture_bytes(colour))
    root = tmp_path_factory.mktemp("runs")
    return roundtrip.play(MINI, f"folder:{folder}", "image", 6, 4, 0, models=stand_ins(), root=root,
                          progress=False)


def test_runs_are_found_sorted_and_filtered(run):
    assert runs.finished_runs(run.path.parent) == [run]
    rows = runs.rows_of(run)
    assert "clipscore" in runs.scores_of(rows) and "cider" not in runs.scores_of(rows)
    shown = runs.points(rows, runs.View("clipscore"))
    assert len(shown) == 24 and shown["disagreement"].between(-1, 1).all()
    for sort, (column, ascending) in runs.SORTS.items():
        values = runs.sources(shown, runs.View("clipscore", sort=sort))[column].fillna("").tolist()
        assert values == sorted(values, reverse=not ascending) and len(values) == 6
    middle = rows["similarity"].median()
    half = runs.points(rows, runs.View("clipscore", low=middle))
    assert 0 < len(half) < 24 and (half["similarity"] >= middle).all()
    good = runs.points(rows, runs.View("clipscore", score_low=rows["clipscore"].median()))
    assert len(good) == 12 and (good["score"] >= rows["clipscore"].median()).all()
    apart = runs.points(rows, runs.View("clipscore", disagreement=0.25))
    assert 0 < len(apart) < 24 and (apart["disagreement"].abs() >= 0.25).all()
    with pytest.raises(UserError, match="no score 'beauty'"):
        runs.points(rows, runs.View("beauty"))


def test_a_round_trip_of_a_run_comes_back_as_candidates(run):
    key = runs.rows_of(run)["item"].iloc[0]
    found = runs.candidates_of(run, key)
    assert len(found) == 4 and all(c.complete for c in found)
    row = run.rows().query("item == @key and selected").iloc[0]
    assert explorer.selected(found).index == row["candidate"]
    with pytest.raises(UserError, match="no item 'nothing'"):
        runs.candidates_of(run, "nothing")


def test_the_tab_opens_with_a_run_and_a_round_trip(run, monkeypatch):
    monkeypatch.setattr(runs, "finished_runs", lambda: [run])
    runner = Runner()
    tab = RunsTab(runner)
    assert runner.errors.value == "" and tab.run.value == run
    assert tab.trip.value.count('<li class="cx-card') == 4 and "<table" in tab.table.value
    tab.differ.value = 1.0
    assert "widen them" in tab.table.value
    tab.differ.value = 0.0
    best = max(map(float, tab.scatter.ys))
    tab.score_low.value = best
    assert len(tab.scatter.ys) == sum(one == best for one in tab.scatter.ys) > 0
    tab.open_run()
    assert len(tab.scatter.ys) == 24, "opening a run shows all of it"
    tab.low.value, tab.high.value = 5.0, 6.0
    assert tab.trip.value == "" and "widen them" in tab.table.value and runner.errors.value == ""


# --- what is shown -----------------------------------------------------------------------------


def test_what_is_shown_is_escaped_and_marked(item):
    evil = "<script>alert(1)</script>"
    nasty = dataclasses.replace(item, references=(evil,))
    game = explorer.new_game(nasty, "image", MINI, 3)
    found = [dataclasses.replace(c, text=evil) for c in finish(game)]
    page = html.source_card(game) + html.cards(found) + html.alert(evil) + html.status(evil)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("cx-selected") == 1 and page.count('class="cx-badge">selected') == 1
    assert page.count("<img") == 4 and page.count('alt="') == 4 and "cx-crisp" in page
    assert 'role="alert"' in page and 'aria-live="polite"' in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_an_equal_caption_does_not_beat_the_captioner():
    theirs = [explorer.Candidate(k, k, "a", similarity=s) for k, s in enumerate((0.5, 0.9))]
    for mine, words in ((0.9004, "draws level with"), (0.8996, "draws level with"), (0.95, "beats"),
                        (0.7, "does not beat")):
        said = html.duel(explorer.Candidate(-1, 0, "b", similarity=mine), theirs)
        assert f"<b>Your caption {words} the captioner</b>" in said
        assert ("1 of its 2 candidates comes closer" in said) == (mine == 0.7)
    assert html.duel(explorer.Candidate(-1, 0, "b"), theirs) == ""


def test_own_captions_stand_beside_the_source(item):
    game = explorer.new_game(item, "image", MINI, 2)
    theirs = list({c.index: c for c in explorer.play_one(game, stand_ins())}.values())
    mine = [explorer.try_caption(game, words, stand_ins()) for words in ("a first try", "a second try")]
    shown = html.contest(game, mine, theirs)
    first, board = shown.index("The captioner's candidates"), shown.index("your captions")
    assert shown.index("cx-verdict") < shown.index("cx-origin") < board < first
    assert board < shown.index("a second try") < shown.index("a first try") < first
    assert shown.count("cx-origin") == 1 and html.contest(game, [], theirs) == html.round_trip(game, theirs)


def test_a_text_that_is_too_long_to_draw_says_so():
    cut = explorer.Candidate(0, 0, "a red thing", np.zeros((4, 4, 3), np.uint8), cut=True)
    assert "only the beginning" in html.card(cut, False)
    assert "only the beginning" not in html.card(dataclasses.replace(cut, cut=False), False)
    with pytest.raises(UserError, match="play the game first"):
        explorer.embeddings(explorer.new_game(explorer.typed("a red thing"), "text", MINI, 1), [], stand_ins())


def test_a_lead_of_nothing_is_called_luck():
    made = [explorer.Candidate(k, k, similarity=s) for k, s in enumerate((0.9, 0.9003, 0.2))]
    assert "Another one is as similar, to within 0.001" in html.lead(made) and "0.667" in html.lead(made)
    assert "leads by 0.700" in html.lead(made[1:])
    assert html.lead(made[:1]) == "" and html.lead([*made, explorer.Candidate(3, 3)]) == ""


@pytest.mark.parametrize("direction", ["image", "text"])
def test_the_walk_prints_what_the_game_has_used(item, direction):
    game = explorer.new_game(item, direction, MINI, 3)
    found = finish(game)
    source, others = explorer.embeddings(game, found, stand_ins())
    steps = (walk.sent(game, found) + walk.received(game, found)
             + walk.compared(game, found, source, others) + walk.chosen(game, found))
    best = explorer.selected(found)
    assert steps.count('<section class="cx cx-step">') == 4 and f"candidate {best.index}." in steps
    for candidate in found:
        assert candidate.text in steps and str(candidate.seed) in steps
        assert f"{candidate.similarity:.4f}".replace("-", "−") in steps
    assert ("samples 3 captions" in steps) == (direction == "image")
    assert ("here without sampling" in steps) == (direction == "text")
    shown = walk.flow(game, best)
    assert best.text in shown and shown.count("cx-model") == 3 and shown.count("<img") >= 1


def test_the_walk_does_not_call_a_search_sampling(item):
    game = explorer.new_game(item, "image", explorer.tune(MINI, "beam"), 3)
    said = walk.sent(game, finish(game))
    assert "samples" not in said and "finds one caption y by greedy decoding or beam search" in said


def test_unfinished_and_withheld_candidates_say_so():
    waiting = explorer.Candidate(0, 0, "a red thing")
    withheld = explorer.Candidate(1, 1, "a red thing", np.zeros((4, 4, 3), np.uint8), flagged=True)
    shown = html.cards([waiting, withheld])
    assert "drawing …" in shown and "withheld" in shown and "cx-selected" not in shown


def test_large_pictures_are_reduced_before_they_travel():
    large = Image.effect_noise((1600, 900), 60).convert("RGB")
    shown = html.picture(large, "noise")
    assert "image/jpeg" in shown and "cx-crisp" not in shown and len(shown) < 150_000
    assert large.size == (1600, 900)


# --- the page without a browser ----------------------------------------------------------------


def test_the_page_shows_errors():
    page = Page(n_candidates=2)
    assert page.runner.errors.value == "" and "<img" in page.source.shown.value
    page.source.kind.value = KINDS[1]
    page.play.start.click()
    page.runner.wait(60)
    assert "no picture is chosen" in page.runner.errors.value
    assert not page.play.start.disabled and page.runner.stop_button.disabled
    broken = {"name": "broken.png", "type": "image/png", "size": 3, "content": memoryview(b"abc")}
    page.source.file.value = ({**broken, "last_modified": datetime.now(UTC)},)
    assert "broken.png" in page.runner.errors.value


def test_the_page_plays_the_mini_models_in_every_way():
    page = Page(dataset="picturebook-coco", n_sources=5, n_candidates=2)
    ways = [(page.play, "image", 2), (page.walk, "image", 2), (page.walk, "text", 2),
            (page.beat, "image", 3), (page.drift, "image", 2), (page.compare, "image", 3)]
    page.drift.rounds.value = 2
    page.beat.text.value = "a small orange ball"
    for tab, direction, cards in ways:  # the comparison's B is beam search: one candidate
        page.source.direction.value = direction
        tab.start.click()
        page.runner.wait(300)
        assert page.runner.errors.value == "" and "Done after" in page.runner.text.value
        assert tab.shown.value.count('<li class="cx-card') == cards and "drawing …" not in tab.shown.value
    assert "the captioner</b>" in page.beat.shown.value
    page.beat.key, page.source.direction.value = None, "text"
    page.beat.start.click()
    page.runner.wait(300)
    assert "starts from a picture" in page.runner.errors.value and page.beat.key is None, "said before playing"


def test_a_comparison_names_the_decoding_that_is_used():
    page = Page(dataset="picturebook-coco", n_sources=2)
    other = page.compare.settings["B"]
    assert "beam search, 5 beams" in other.describe("image")
    assert "captioner mini (greedy)" in other.describe("text"), "the receiver reads without sampling"


def test_a_preset_sets_its_parts_and_the_preset_keeps_its_own_sampling():
    page = Page(dataset="picturebook-coco", n_sources=2)
    assert page.settings.preset() == explorer.tune(get_preset("mini"))
    page.settings.base.value = "paper"
    paper = get_preset("paper")
    assert page.settings.preset() == explorer.tune(paper)
    assert page.settings.steps.value == paper.generator.steps
    page.settings.strategy.value = "beam"
    assert page.settings.preset().captioner.sender.strategy == "beam"


def test_the_page_opens_with_an_unknown_preset():
    page = Page(preset="papr")
    assert "unknown preset" in page.runner.errors.value


# --- the server's side -------------------------------------------------------------------------


def test_the_notebook_is_served_with_its_parameters(tmp_path):
    copy = serve.with_parameters({"PRESET": "mine.toml", "N_CANDIDATES": 3, "UNKNOWN": 1}, tmp_path)
    sources = ["".join(cell["source"]) for cell in json.loads(copy.read_text())["cells"]]
    injected = next(text for text in sources if text.startswith("# Parameters"))
    assert "N_CANDIDATES = 3" in injected and "UNKNOWN" not in injected
    assert f'PRESET = "{notebooks.REPO_ROOT / "mine.toml"}"' in injected


def test_the_server_is_for_this_machine_only_and_hides_its_token():
    said = serve.command(notebooks.NOTEBOOKS / "x.ipynb", 1234)
    assert "--Voila.ip=127.0.0.1" in said and "--Voila.auto_token=True" in said
    assert not [word for word in said if "token=" in word.replace("auto_token=", "")]
    taken = serve.free_port(0)
    assert 1024 <= taken < 65536


def test_own_sources_have_their_own_seeds(item):
    own = explorer.new_game(explorer.typed("a red thing"), "text", MINI, 2)
    assert own.dataset == OWN
    again = explorer.new_game(explorer.typed(" a red  thing"), "text", MINI, 2)
    assert explorer.noise_seeds(own) == explorer.noise_seeds(again)
