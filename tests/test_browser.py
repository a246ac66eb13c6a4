"""The page in a real browser, as a person opens it: one server, the mini models."""

from __future__ import annotations

import contextlib
import time
import urllib.error
import urllib.request

import psutil
import pytest

from tests.browser import CHROMIUM, NO_CHROMIUM, PHONE, chromium, open_page, run, served

pytest.importorskip("voila")
pytest.importorskip("playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)


@pytest.fixture(scope="module")
def explorer():
    with served("--dataset", "picturebook-coco", "--n", "20") as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


def kernels(server: psutil.Process) -> int:
    count = 0
    for one in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            count += "ipykernel_launcher" in " ".join(one.cmdline())
    return count


def is_in_sight(page, name, size):
    box = page.get_by_role("button", name=name, exact=True).bounding_box()
    return box["y"] > 0 and box["y"] + box["height"] < size[1]


def test_nobody_gets_in_without_the_token(explorer):
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *arguments):
            return None

    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.build_opener(Stay).open(explorer[0].split("?")[0])
    assert refused.value.code in (302, 401, 403)


def test_a_round_trip_on_a_phone_and_a_page_that_is_reloaded_and_closed(browser, explorer):
    address, server = explorer
    page, wrong = open_page(browser, address, PHONE)
    assert is_in_sight(page, "Run", PHONE)
    page.get_by_role("tab", name="Own caption", exact=True).click()
    assert "the text is empty" in run(page, "Own caption")
    assert "Done" in run(page, candidates=2)
    values = page.locator(".card:not(.origin) dd:nth-of-type(1):visible").all_inner_texts()
    assert len(values) == 2 and values == sorted(values, reverse=True)
    assert page.locator(".best:visible .badge").inner_text() == "selected"
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    assert wrong == []  # before the reload, which cuts connections that a browser then complains of
    page.get_by_role("button", name="Run", exact=True).click()
    page.reload()  # while it computes
    page.locator(".source img").wait_for()
    deadline = time.monotonic() + 60
    while kernels(server) > 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert kernels(server) == 1
    page.close(run_before_unload=True)
    while kernels(server) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert kernels(server) == 0, "a closed page ends its kernel"
