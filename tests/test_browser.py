"""The page in a real browser: both directions, an upload, a bad file, stopping, the keyboard; the report.

One server and one page for all tests, in order, as a person would use them.
"""

from __future__ import annotations

import io
import re
import shutil
import urllib.error
import urllib.request

import pytest
from PIL import Image

from lib import report, serve
from lib.presets import REPO_ROOT
from tests.browser import (
    FAINT,
    PHONE,
    begin,
    chromium,
    find_chromium,
    open_explorer,
    open_file,
    open_tab,
    set_count,
    upload,
    wait_for_end,
)

pytest.importorskip("voila", reason="the package voila is not installed")
pytest.importorskip("playwright", reason="the package playwright is not installed")
pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium here; Debian and Ubuntu: apt-get install chromium")

PARAMETERS = {"PRESET": "mini", "DATASET": "picturebook-coco", "N_SOURCES": 20, "N_CANDIDATES": 3}


@pytest.fixture(scope="module")
def server():
    with serve.served(PARAMETERS) as page:
        yield page


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def explorer(browser, server):
    return open_explorer(browser, server.address)


def picture(kind="PNG", size=(80, 60)):
    stream = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(stream, format=kind)
    return stream.getvalue()


def visible(page, selector):
    return page.locator(f"{selector}:visible")


def play(page):
    begin(page, "Play")
    return wait_for_end(page)


def test_nobody_gets_in_without_the_token(server):
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *arguments):
            return None

    opener = urllib.request.build_opener(Stay)
    for address in ("/", "/?token=wrong"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            opener.open(f"http://127.0.0.1:{server.port}{address}")
        assert refused.value.code in (302, 401, 403)


def test_the_page_loads_without_errors_and_without_a_network(explorer):
    page = explorer.page
    assert page.locator("h1").first.inner_text().startswith("Do a captioner and a generator")
    assert visible(page, ".cx-source img").count() >= 1
    assert explorer.errors == [] and explorer.foreign == []


def test_image_reconstruction(explorer):
    page = explorer.page
    set_count(page, 3)
    assert "Done after" in play(page)
    cards = visible(page, "li.cx-card")
    assert cards.count() == 3
    values = [float(text.replace("−", "-")) for text in
              visible(page, "dd.cx-main").all_inner_texts()]
    assert values == sorted(values, reverse=True)
    assert "cx-selected" in cards.first.get_attribute("class")
    # Waits: a picture is decoded after the card that has it is there.
    page.wait_for_function("[...document.querySelectorAll('.cx-card img')].every(i => i.naturalWidth > 0)")
    assert explorer.errors == []


def test_text_reconstruction_of_a_typed_text(explorer):
    page = explorer.page
    page.get_by_label("my text", exact=True).check()
    field = page.get_by_label("Text", exact=True)
    field.fill("a big red owl in the snow")
    field.blur()
    play(page)
    assert visible(page, "li.cx-card").count() == 3
    assert "a big red owl in the snow" in visible(page, ".cx-source").first.inner_text()
    set_count(page, 1)
    field.fill("a big red owl in the snow " * 80)
    field.blur()
    play(page)
    assert "only the beginning" in visible(page, "li.cx-card").first.inner_text()
    set_count(page, 3)


def test_an_uploaded_picture_plays(explorer):
    page = explorer.page
    page.get_by_label("my picture", exact=True).check()
    large = picture("BMP", (2000, 2000))
    assert len(large) > 10 * 2**20, "more than the server's own limit lets through"
    upload(page, "mine.bmp", large)
    visible(page, ".cx-source img").first.wait_for()
    play(page)
    assert visible(page, "li.cx-card").count() == 3
    assert "nobody has described" in visible(page, ".cx-note").all_inner_texts()[-1]


def test_a_bad_file_gets_a_clear_message(explorer):
    page = explorer.page
    upload(page, "letter.png", b"Dear Sir or Madam")
    alert = visible(page, ".cx-alert")
    alert.wait_for()
    assert "letter.png" in alert.inner_text() and "not a picture" in alert.inner_text()


def test_a_caption_by_hand_and_the_walk(explorer):
    page = explorer.page
    page.get_by_label("a dataset", exact=True).check()
    open_tab(page, "Beat the captioner")
    page.get_by_label("Your caption", exact=True).fill("a small orange ball in the city")
    begin(page, "Draw my caption")
    wait_for_end(page)
    assert re.search("(beats|does not beat|draws level with) the captioner",
                     visible(page, ".cx-verdict").inner_text())
    open_tab(page, "Step by step")
    begin(page, "Walk through it")
    wait_for_end(page)
    assert visible(page, ".cx-step").count() == 4 and visible(page, ".cx-flow").count() == 1
    open_tab(page, "Play")


def test_a_long_run_stops(explorer):
    page = explorer.page
    page.get_by_label("Direction").select_option(index=1)  # texts: every candidate is drawn anew
    set_count(page, 50)
    begin(page, "Play")
    page.locator(".cx-status").filter(has_text="of 50 candidates").first.wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    wait_for_end(page, "Stopped")
    assert 0 < visible(page, "li.cx-card").count() < 50
    assert page.get_by_role("button", name="Play", exact=True).is_enabled()


def test_controls_have_names_and_take_the_keyboard(explorer):
    page = explorer.page
    nameless = page.evaluate("""() => [...document.querySelectorAll('select, textarea, input')]
        .filter(e => e.offsetParent && !e.labels?.length && !e.ariaLabel && !e.title && e.type !== 'file')
        .map(e => e.outerHTML.slice(0, 120))""")
    assert nameless == []
    page.get_by_role("tab", name="Play", exact=True).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Walk through it").wait_for()
    page.get_by_role("button", name="Walk through it").press("Shift+Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus is seen"
    open_tab(page, "Play")
    set_count(page, 2)
    begin(page, "Play", key="Enter")
    wait_for_end(page)
    assert visible(page, "li.cx-card").count() == 2


def test_words_can_be_read(explorer):
    page = explorer.page
    for tab in ("Beat the captioner", "Step by step", "Finished runs", "Play"):
        open_tab(page, tab)
        assert page.evaluate(FAINT) == {}


def test_nothing_left_the_machine_and_nothing_of_ours_failed(explorer):
    assert explorer.foreign == [] and explorer.errors == []


# --- the report --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report_page(tmp_path_factory):
    """The report as this code makes it from the committed figures."""
    root = tmp_path_factory.mktemp("figures")
    shutil.copytree(REPO_ROOT / "figures" / "mini", root / "mini",
                    ignore=shutil.ignore_patterns("notebooks", "screenshots", "*.pdf"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPENDIUM_FIGURES", str(root))
        return report.build_report("mini")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_opens_from_disk(browser, report_page, dark):
    watched = open_file(browser, report_page, PHONE, dark)
    page = watched.page
    pictures = page.evaluate("[...document.images].filter(i => i.src).map(i => [i.naturalWidth, i.alt])")
    assert len(pictures) > 4 and all(width > 0 and alt for width, alt in pictures)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0], "wider than a phone"
    grey = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (max(grey) < 60) == dark
    assert page.evaluate(FAINT) == {}
    page.locator(".enlarge").first.press("Enter")
    page.wait_for_function("document.querySelector('dialog img').naturalWidth > 0")
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="hidden")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 690, "height": 1000})  # A4 between its margins
    assert page.evaluate("[...document.querySelectorAll('.wide')].every(e => e.scrollWidth <= e.clientWidth)")
    assert watched.foreign == [] and watched.errors == []
    page.context.close()
