"""A headless Chromium on the explorer's page, for the browser tests and the screenshots."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

DESKTOP, PHONE = (1280, 900), (390, 844)
SLOW = 300_000  # ms: a busy machine loads models and draws pictures in its own time


def find_chromium() -> str | None:
    """The system's Chromium or Chrome; None where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"):
        found = shutil.which(name)
        if found:
            return found
    return None


@dataclass
class Watched:
    """A page and what it has said: console errors, failed loads, requests that leave the machine."""

    page: object
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


def watch(page: object) -> Watched:
    """Collect a page's complaints from now on."""
    watched = Watched(page)
    page.on("pageerror", lambda error: watched.errors.append(str(error)))
    page.on("console", lambda said: said.type == "error" and watched.errors.append(said.text))
    local = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:", "file:", "about:")
    page.on("request", lambda asked: asked.url.startswith(local) or watched.foreign.append(asked.url))
    page.set_default_timeout(SLOW)
    return watched


@contextmanager
def chromium() -> Iterator[object]:
    """A browser without a window; needs :func:`find_chromium` to find one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # --no-sandbox: in a container Chromium refuses to start as root otherwise.
        browser = driver.chromium.launch(
            executable_path=find_chromium(), headless=True,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


def open_explorer(browser: object, address: str, size: tuple[int, int] = DESKTOP) -> Watched:
    """The explorer in a new window, ready to play."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    watched = watch(context.new_page())
    watched.page.goto(address, wait_until="domcontentloaded", timeout=SLOW)
    watched.page.get_by_role("button", name="Play", exact=True).wait_for(timeout=SLOW)
    return watched


def open_tab(page: object, name: str) -> None:
    """Go to a tab of the explorer."""
    page.get_by_role("tab", name=name, exact=True).click()


def open_file(browser: object, path: Path, size: tuple[int, int] = DESKTOP, dark: bool = False) -> Watched:
    """A page from disk, watched from its first request on."""
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    watched = watch(context.new_page())
    watched.page.goto(path.resolve().as_uri())
    return watched


def set_count(page: object, n: int) -> None:
    """Set the number of candidates of the settings panel (the comparison has one of its own)."""
    field = page.get_by_label("Candidates", exact=True).first
    field.fill(str(n))
    field.press("Tab")


def upload(page: object, name: str, content: bytes) -> None:
    """Choose a picture as a person does; the widget keeps its file input out of the document."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose a picture").click()
    chooser.value.set_files({"name": name, "mimeType": "image/png", "buffer": content})


def begin(page: object, button: str, key: str = "") -> None:
    """Press a button that starts work, by its key if one is given.

    The status line of earlier work is marked as old, so that nobody takes its end for the new end.
    """
    page.evaluate("document.querySelectorAll('.cx-status').forEach(e => e.classList.add('old'))")
    found = page.get_by_role("button", name=button, exact=True)
    found.press(key) if key else found.click()


def wait_for_end(page: object, word: str = "Done") -> str:
    """Wait until the work that was begun has ended; what the status line says."""
    line = page.locator(".cx-status:not(.old)").filter(has_text=re.compile("(Done|Failed|Stopped) after"))
    line.first.wait_for(timeout=SLOW)
    said = line.first.inner_text()
    alerts = page.locator(".cx-alert:visible").all_inner_texts()
    assert said.startswith(word), f"wanted '{word}', the page says {said!r} {alerts}"
    return said


# Texts with less contrast than WCAG 2.2 asks of them (1.4.3), by kind; what is switched off may be paler.
FAINT = """() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    canvas.fillStyle = "white"; canvas.fillRect(0, 0, 1, 1);
    for (const one of colours) { canvas.fillStyle = one; canvas.fillRect(0, 0, 1, 1); }
    return light(canvas.getImageData(0, 0, 1, 1).data);
  };
  const found = {};
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest(":disabled, .mod-disabled, svg, style, script")) continue;
    const behind = [];
    for (let n = e; n; n = n.parentElement) behind.unshift(getComputedStyle(n).backgroundColor);
    const pair = [paint(behind), paint([...behind, getComputedStyle(e).color])].sort((a, b) => a - b);
    const contrast = (pair[1] + 0.05) / (pair[0] + 0.05);
    if (contrast < 4.5) found[`${e.tagName}.${e.className} ${contrast.toFixed(2)}`] = e.textContent.slice(0, 40);
  }
  return found;
}"""
