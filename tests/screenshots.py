"""Makes the README's images of the explorer: ``python -m tests.screenshots``. Needs Chromium and a finished run."""

from __future__ import annotations

import io
import sys
from typing import Any

from PIL import Image

from lib.base import ROOT
from tests.browser import CHROMIUM, DESKTOP, NO_CHROMIUM, PHONE, chromium, open_page, run, served

FOLDER = ROOT / "figures" / "mini" / "screenshots"


def shot(page: Any, first: str = "body") -> Image.Image:
    """What is in the window once an element is at its upper edge."""
    page.mouse.move(0, 0)
    page.locator(f"{first}:visible").first.evaluate("e => e.scrollIntoView({block: 'start', behavior: 'instant'})")
    page.wait_for_timeout(600)  # lets the last image be painted
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def save(image: Image.Image, name: str) -> None:
    """Write an image as a small PNG."""
    image.quantize(256).save(FOLDER / f"{name}.png", optimize=True)
    print(f"{name}.png: {(FOLDER / f'{name}.png').stat().st_size // 1024} kB", flush=True)


def main() -> int:
    """Make the images; return the exit status."""
    if CHROMIUM is None:
        print(f"error: {NO_CHROMIUM}", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    with served("--dataset", "picturebook-coco") as (address, _), chromium() as browser:
        page, _ = open_page(browser, address, (DESKTOP[0], 960))
        run(page, candidates=5)
        save(shot(page), "explorer-round-trip")
        page.get_by_role("tab", name="Finished runs", exact=True).click()
        point = page.locator(".js-plotly-plot .points path.point").nth(500)
        point.wait_for()
        page.locator(".js-plotly-plot").first.scroll_into_view_if_needed()
        box = point.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_timeout(1000)
        page.mouse.down()
        page.mouse.up()
        page.locator(".note", has_text="Source ").wait_for()
        save(shot(page, ".jupyter-widget-tab"), "explorer-runs")
        page.close()
        page, _ = open_page(browser, address, PHONE)
        shots = [shot(page)]
        run(page, candidates=4)
        shots.append(shot(page, ".cards"))
    joined = Image.new("RGB", (2 * PHONE[0] + 20, PHONE[1]), "white")
    for place, one in enumerate(shots):
        joined.paste(one, (place * (PHONE[0] + 20), 0))
    save(joined, "explorer-phone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
