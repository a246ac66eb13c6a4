"""The explorer as ``./run_all.sh --explore`` serves it, in a Chromium without a window: for tests and screenshots."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from lib.base import ROOT

DESKTOP, PHONE = (1280, 900), (390, 844)
SLOW = 300_000  # ms: a busy machine loads models and draws images in its own time
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NO_CHROMIUM = "no Chromium here; Debian and Ubuntu: apt-get install chromium"


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """The command running: the page's address, and the process whose descendants are server and kernels."""
    command = [sys.executable, "-m", "lib.run", "--explore", *arguments]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        try:
            found = (re.search(r"http://127\.0\.0\.1:\S+", line) for line in process.stdout)
            yield next(filter(None, found))[0], psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]  # a container's root needs the first
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def open_page(browser: Any, address: str, size: tuple[int, int] = DESKTOP) -> tuple[Any, list[str]]:
    """The page, ready to run, and what goes wrong on it: console errors and requests that leave the machine."""
    page = browser.new_context(viewport={"width": size[0], "height": size[1]}).new_page()
    page.set_default_timeout(SLOW)
    wrong, local = [], ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
    page.on("request", lambda asked: asked.url.startswith(local) or wrong.append(asked.url))
    page.goto(address, timeout=SLOW)
    page.locator(".source img").wait_for()
    return page, wrong


def run(page: Any, tab: str = "Round trip", candidates: int = 0) -> str:
    """Run a tab to its end; what the status line says."""
    if candidates:
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_label("candidates").first.fill(str(candidates))
        page.get_by_label("candidates").first.press("Tab")
        page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_role("tab", name=tab, exact=True).click()
    page.evaluate("document.querySelectorAll('p[role]').forEach(e => e.classList.add('old'))")
    page.get_by_role("button", name="Run", exact=True).click()
    end = page.locator("p[role]:not(.old):not(.verdict):visible").first
    end.wait_for()
    page.wait_for_function("!document.querySelector('.mod-primary').disabled")
    return end.inner_text()
