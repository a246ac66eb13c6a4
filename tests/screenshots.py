"""Makes the pictures of the explorer that the README shows: ``python -m tests.screenshots``.

Needs Chromium and the mini models; takes a minute. The same actions give the same pictures, up to
the seconds in the status line.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lib import serve
from lib.presets import REPO_ROOT
from tests.browser import (
    DESKTOP,
    PHONE,
    begin,
    chromium,
    find_chromium,
    open_explorer,
    set_count,
    wait_for_end,
)

FOLDER = REPO_ROOT / "figures" / "mini" / "screenshots"
PARAMETERS = {"PRESET": "mini", "DATASET": "picturebook-coco", "N_CANDIDATES": 6}


def shoot(page: object, name: str) -> Path:
    """One picture of what is in the window, in the folder of screenshots."""
    path = FOLDER / f"{name}.png"
    page.wait_for_timeout(400)  # lets the last picture be painted
    page.screenshot(path=path, full_page=False)
    print(f"wrote {path.relative_to(REPO_ROOT)}", flush=True)
    return path


def tab(page: object, name: str) -> None:
    """Go to a tab and bring it into view."""
    page.get_by_role("tab", name=name).click()
    page.get_by_role("tab", name=name).scroll_into_view_if_needed()


def desktop(browser: object, address: str) -> None:
    """Play, beat the captioner, keep playing, compare, browse."""
    page = open_explorer(browser, address, DESKTOP).page
    shoot(page, "explorer-start")
    set_count(page, 6)
    begin(page, "Play")
    wait_for_end(page)
    page.set_viewport_size({"width": DESKTOP[0], "height": 1500})
    shoot(page, "explorer-play")
    tab(page, "Keep playing")
    begin(page, "Keep playing")
    wait_for_end(page)
    shoot(page, "explorer-drift")
    tab(page, "Beat the captioner")
    page.get_by_label("Your caption").fill("a small orange ball on a street in the city")
    begin(page, "Draw my caption")
    wait_for_end(page)
    shoot(page, "explorer-beat")
    tab(page, "Compare")
    begin(page, "Compare")
    wait_for_end(page)
    shoot(page, "explorer-compare")
    tab(page, "Finished runs")
    dots = page.locator(".cx-dot")
    if dots.count():
        dots.nth(dots.count() // 2).click(force=True)
        page.wait_for_timeout(1500)
    shoot(page, "explorer-runs")


def phone(browser: object, address: str) -> None:
    """The same page on a phone."""
    page = open_explorer(browser, address, PHONE).page
    shoot(page, "explorer-phone-start")
    set_count(page, 4)
    begin(page, "Play")
    wait_for_end(page)
    page.locator(".cx-card:visible").first.scroll_into_view_if_needed()
    shoot(page, "explorer-phone-play")


def main() -> int:
    """Make all screenshots; returns the exit status."""
    if find_chromium() is None:
        print("error: no Chromium here; Debian and Ubuntu: apt-get install chromium", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    with serve.served(PARAMETERS) as page, chromium() as browser:
        desktop(browser, page.address)
        phone(browser, page.address)
    return 0


if __name__ == "__main__":
    sys.exit(main())
