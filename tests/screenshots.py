"""Makes the pictures of explorer and report that the README shows: ``python -m tests.screenshots``.

Needs Chromium, the mini models and the committed figures; takes a minute. The same actions give the
same pictures, up to the seconds in the status line. ``--to FOLDER`` writes them elsewhere.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lib import figures, report, serve
from lib.presets import REPO_ROOT, get_preset
from tests.browser import (
    DESKTOP,
    PHONE,
    begin,
    chromium,
    find_chromium,
    open_explorer,
    open_file,
    open_tab,
    set_count,
    wait_for_end,
)

FOLDER = REPO_ROOT / "figures" / "mini" / "screenshots"
PARAMETERS = {"PRESET": "mini", "DATASET": "picturebook-coco", "N_CANDIDATES": 5}
SOURCE = 87  # the place of a source with two things in it


def picture_of(page: object) -> Image.Image:
    """What is in the window."""
    page.wait_for_timeout(400)  # lets the last picture be painted
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def save(picture: Image.Image, folder: Path, name: str) -> None:
    """As a PNG, packed as small as it goes without loss."""
    path = folder / f"{name}.png"
    picture.save(path, optimize=True)
    print(f"wrote {path} ({path.stat().st_size // 1024} kB)", flush=True)


def to_top(page: object, selector: str) -> None:
    """Scroll so that an element is at the window's upper edge."""
    found = page.locator(f"{selector}:visible").first
    found.evaluate("e => e.scrollIntoView({block: 'start', behavior: 'instant'})")


def explorer(browser: object, address: str, folder: Path) -> None:
    """Play; beat the captioner; click a point of a finished run."""
    page = open_explorer(browser, address, (DESKTOP[0], 1330)).page
    page.get_by_label("Source", exact=True).first.select_option(index=SOURCE)
    set_count(page, 5)
    begin(page, "Play")
    wait_for_end(page)
    save(picture_of(page), folder, "explorer-play")
    open_tab(page, "Step by step")
    begin(page, "Walk through it")
    wait_for_end(page)
    to_top(page, ".widget-tab, .jupyter-widget-tab")
    save(picture_of(page), folder, "explorer-steps")
    open_tab(page, "Finished runs")
    dots = page.locator(".cx-dot")
    if dots.count():
        dots.nth(dots.count() // 2).dispatch_event("click")
        page.locator(".cx-looked-at:visible").wait_for()
        to_top(page, ".widget-tab, .jupyter-widget-tab")
        save(picture_of(page), folder, "explorer-runs")
    page.context.close()


def phones(browser: object, address: str, path: Path, folder: Path) -> None:
    """Explorer and report on a phone, side by side; the report light and dark."""
    page = open_explorer(browser, address, PHONE).page
    page.get_by_label("Source", exact=True).first.select_option(index=SOURCE)
    set_count(page, 4)
    begin(page, "Play")
    wait_for_end(page)
    to_top(page, ".cx-round")
    shots = [picture_of(page)]
    page.context.close()
    for place, dark in ((".strip", True), (".verdicts", False)):
        page = open_file(browser, path, PHONE, dark).page
        to_top(page, place)
        shots.append(picture_of(page))
        page.context.close()
    gap = 20
    joined = Image.new("RGB", (sum(one.width + gap for one in shots) - gap, PHONE[1]), "white")
    for place, one in enumerate(shots):
        joined.paste(one, (place * (PHONE[0] + gap), 0))
    save(joined, folder, "phones")


def reading(browser: object, path: Path, folder: Path) -> None:
    """The head of the report."""
    page = open_file(browser, path, (DESKTOP[0], 1120)).page
    save(picture_of(page), folder, "report")
    page.context.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Make all screenshots; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.screenshots", description=__doc__)
    parser.add_argument("--to", type=Path, default=FOLDER, help="where to write (default: %(default)s)")
    folder = parser.parse_args(arguments).to
    if find_chromium() is None:
        print("error: no Chromium here; Debian and Ubuntu: apt-get install chromium", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    path = figures.folder(get_preset("mini")) / "index.html"
    if not path.is_file():
        path = report.build_report("mini")
    with serve.served(PARAMETERS) as page, chromium() as browser:
        reading(browser, path, folder)
        explorer(browser, page.address, folder)
        phones(browser, page.address, path, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
