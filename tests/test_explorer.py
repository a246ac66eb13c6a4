"""The explorer's functions and its page without a browser, with small deterministic models."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import numpy as np
import pytest
from PIL import Image

from lib.base import UserError
from lib.data import load_dataset
from lib.explorer import session, view
from lib.explorer.page import EXAMPLES, IMAGE, TABS, TEXT, Page, number
from lib.explorer.session import Trip
from lib.roundtrip import plan_run, round_trip
from tests.standins import ColourEncoder, paint, preset, stand_ins

MINI = preset()
K = 4


@pytest.fixture
def captioned(tmp_path):
    return paint(tmp_path / "mine", 6, captions=True)


@pytest.fixture
def trip(captioned):
    home = load_dataset(captioned)
    return Trip(home.items[0], "image", MINI, home.name, K)


def finished(trip, models=None):
    *_, made = session.reconstruct(trip, models or stand_ins())
    return made


@pytest.mark.parametrize("noise", ["source", "candidate"])
@pytest.mark.parametrize("task", ["image", "text"])
def test_a_source_has_the_same_candidates_here_as_in_a_run(captioned, task, noise):
    home = load_dataset(captioned)
    settings = preset(generator=MINI.generator.model_copy(update={"noise": noise}))
    rows = round_trip(task, home.items[:2], stand_ins(), settings, home.name, K, 3).rows.iloc[K:]
    trip = Trip(home.items[1], task, settings, home.name, K, 3)
    made = session.scored(trip, finished(trip), stand_ins(), None)
    assert made["caption"].tolist() == rows["message" if task == "image" else "reconstruction"].tolist()
    assert made["seed"].tolist() == rows["seed"].tolist()
    score = "clipscore" if task == "image" else "clip_score"
    for mine, theirs in (("similarity", "similarity"), ("second", "similarity_second"), (score, score)):
        assert made[mine].to_numpy() == pytest.approx(rows[theirs].to_numpy(), abs=1e-9)


def test_candidates_arrive_one_by_one_and_the_best_so_far_is_marked(trip):
    seen = list(session.reconstruct(trip, stand_ins()))
    assert [int(made["similarity"].notna().sum()) for made in seen] == list(range(K + 1))
    assert all(seen[0]["caption"]) and "waiting" in view.cards(trip, seen[0]) and "best" not in view.cards(trip, seen[0])
    for made in seen[1:]:
        first = view.cards(trip, made).split("<li")[2]
        assert ("best so far" in first, "selected" in first) == (made is not seen[-1], made is seen[-1])
        assert view.number(made["similarity"].max()) in first


def test_what_the_safety_checker_withheld_has_no_similarity_and_no_score(trip):
    models = stand_ins(flag="one")
    made = session.scored(trip, finished(trip, models), models, None)
    assert made["flagged"].any() and made.loc[made["flagged"], ["similarity", "clipscore"]].isna().all(axis=None)
    assert "withheld" in view.cards(trip, made)


def test_a_caption_by_hand_starts_from_the_candidates_noise(trip):
    theirs = finished(trip).iloc[0]
    mine = session.own_caption(trip, f"  {theirs['caption']} ", stand_ins())
    assert mine["similarity"][0] == pytest.approx(theirs["similarity"])
    assert "ties with" in view.contest(trip, [mine], finished(trip).iloc[:1])
    with pytest.raises(UserError, match="text is empty"):
        session.own_caption(trip, " ", stand_ins())


def test_a_chain_starts_each_round_from_the_last_selected_image(trip):
    *_, found = session.chain(trip, 3, stand_ins())
    assert len(found) == 3 and found["first"][0] == found["similarity"][0]
    first, last = found["image"][0], Trip(session.Given("x", None, pixels=found["image"][1]), "image", MINI)
    encoder = ColourEncoder(0.3)
    vectors = [encoder.embed_images([image])[0] for image in (trip.image, last.image)]
    assert found["first"][1] == pytest.approx(
        vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1]), abs=1e-6)
    assert first is not trip.image and "round 3" in view.rounds(trip, found)


def test_words_that_a_model_does_not_know_are_named():
    class Tokenizer(list):
        unk_token = "?"
        tokenize = staticmethod(lambda word: [word if word in ("a", "red", "owl") else "?"])

    models = stand_ins()
    models.encoder.tokenizer = Tokenizer(range(200))
    with pytest.raises(UserError, match=r"do not know: zebra, laptop\."):
        next(session.reconstruct(Trip(session.typed("a zebra, a red laptop"), "text", MINI), models))
    next(session.reconstruct(Trip(session.typed("a red owl"), "text", MINI), models))


def test_texts_are_shown_as_texts():
    trip = Trip(session.typed("<script>alert(1)</script> a red thing"), "text", MINI, n_candidates=2)
    for html in (view.source(trip), view.cards(trip, finished(trip)), view.steps(trip, finished(trip))):
        assert "<script" not in html and "&lt;script" in html


@pytest.fixture
def page(captioned, monkeypatch):
    monkeypatch.setattr(session, "models_for", lambda preset: stand_ins())
    monkeypatch.setattr(session, "QUICK_SCORES", ("cider",))
    return Page(MINI, [captioned], 0, K, 0)


def said(page, tab="Round trip"):
    """Run a tab to its end; what the status line says."""
    page.tabs.selected_index = TABS.index(tab)
    page.start()
    page._thread.join()
    return page.status.value


def choose(page, name, content):
    """Upload a file."""
    page.file.value = ({"name": name, "content": memoryview(content), "type": "", "size": len(content),
                        "last_modified": datetime.now(UTC)},)


@pytest.mark.parametrize("tab, shows", [("Round trip", "selected"), ("Step by step", "e · e′"), ("Chain", "round 5"),
                                        ("Compare", "B: "), ("Own caption", "Your caption")])
def test_every_tab_runs_and_its_result_leaves_with_the_source(page, tab, shows):
    page.own.value = "a red thing"
    assert "Done" in said(page, tab)
    shown = page.views[TABS.index(tab)]
    assert shows in shown.value
    page.item.index += 1
    assert shown.value == "" and "References" in page.card.value


@pytest.mark.parametrize("kind, given, used", [
    (float, "2.5", "2.5"), (float, "1e1", "10"), (float, "1e3", "30"), (float, "2,5", "2.5"), (float, "nan", "0"),
    (float, "many", "7"), (float, "", "7"), (int, "2.5", "2"), (int, "1e3", "30"), (int, "nan", "0")])
def test_a_number_field_shows_what_is_used(kind, given, used):
    box = number("guidance scale", 0, 30, kind, 7)
    box.value = given
    assert box.value == used and f"{box.number:g}" == used


def test_a_part_of_another_preset_brings_its_own_decoding(page):
    page.main.parts["generator"].label = "mini-teacher: mini/generator"
    used = page.trip().preset
    assert used.generator.id == "data/models/mini/generator" and used.encoder == MINI.encoder
    assert page.main.steps.value == "8" and "generator of mini-teacher" in page.main.words()
    page.main.models.value = "mini-teacher"
    page.main.models.value = "mini"
    assert page.trip().preset.generator.id == MINI.generator.id


def test_fields_without_effect_are_disabled(page):
    main = page.main
    assert not main.p.disabled and not main.count.disabled
    main.strategy.value = "beam"
    assert main.p.disabled and main.count.disabled and page.trip().n_candidates == 1
    page.task.value = "text"
    assert main.strategy.disabled and not main.count.disabled
    assert page.trip().n_candidates == K


def test_wrong_inputs_are_one_line_and_load_nothing(page, monkeypatch):
    monkeypatch.setattr(session, "models_for", lambda preset: pytest.fail("models were loaded"))
    assert "the text is empty" in said(page, "Own caption")
    page.kind.value = TEXT
    page.text.value = " "
    assert "the text is empty" in said(page)
    page.kind.value = IMAGE
    assert "no image is chosen" in said(page)
    choose(page, "letter.png", b"Dear Sir")
    assert "letter.png is not an image" in page.status.value and page.card.value == ""


def test_own_images_and_texts_run_and_mini_says_what_it_knows(page):
    page.main.parts["generator"].label = "mini-teacher: mini/generator"
    page.kind.value = TEXT
    page.text.value = EXAMPLES[1]
    assert "picture book" in page.card.value and "Done" in said(page)
    stream = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(stream, "PNG")
    page.kind.value = IMAGE
    page.captions.value = "a red page\n\n"
    choose(page, "mine.png", stream.getvalue())
    assert "picture book" in page.card.value and "a red page" in page.card.value
    assert "Done" in said(page) and "CIDEr" in page.views[0].value


def test_stop_keeps_what_is_there(page, monkeypatch):
    models = stand_ins()
    generate = models.generator.generate

    def generate_and_stop(texts, seeds):
        page.stop.click()
        return generate(texts, seeds)

    models.generator.generate = generate_and_stop
    monkeypatch.setattr(session, "models_for", lambda preset: models)
    assert "stopped" in said(page) and "waiting" in page.views[0].value
    assert not page.run.disabled


def test_what_is_not_on_this_machine_is_named(page):
    assert page.dataset.options[0].startswith("folder:") and "nocaps" in page.hint
    assert "paper" in page.main.hint and "fast" in page.main.hint and "paper" not in page.main.models.options


def test_a_click_on_a_point_shows_its_stored_round_trip(tmp_path):
    name = paint(tmp_path / "bare", 6)
    page = Page(MINI, [name], 0, K, 0)
    page.tabs.selected_index = TABS.index("Finished runs")
    assert "no run is finished" in page.status.value
    run = plan_run(MINI, load_dataset(name), "image", K, 0).execute(models=stand_ins(), progress=False)
    page.tabs.selected_index = 0
    page.tabs.selected_index = TABS.index("Finished runs")
    trace = page.runs.plot.data[1]
    assert page.runs.run.label == run.name and len(trace.x) == 6
    page.runs.where.value = "domain == 'no column like this' or nonsense"
    assert "only where" in page.status.value and "similarity" in page.status.value
    page.runs.where.value = "similarity < 2"
    trace = page.runs.plot.data[1]
    page.runs.show(page.runs.parts[1], [2])
    rows = run.rows()
    chosen = rows[rows["selected"]].sort_values("rank", kind="stable").iloc[2]
    assert f"Source {chosen['item']}" in page.runs.shown.value and view.number(trace.x[2]) in page.runs.shown.value
    assert page.runs.shown.value.count("<img") == K + 1
