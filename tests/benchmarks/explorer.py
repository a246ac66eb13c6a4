"""How long a person waits for the explorer, and how large the report is.

    python -m tests.benchmarks.explorer [--rounds 5]

Starts ``./run_all.sh --explore`` as a person does, opens its page in headless Chromium and measures
from the start of the command: the address, the page with its first picture (the source), the first
picture drawn (models loaded within). Then, with the models loaded, rounds in both directions: seconds
until the page says that it is done, divided by the candidates.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from lib import figures
from lib.presets import REPO_ROOT, get_preset
from tests.browser import begin, chromium, find_chromium, open_explorer, set_count, wait_for_end

CANDIDATES = 10
DIRECTIONS = ("picture → caption → picture", "text → picture → text")


@contextmanager
def started() -> Iterator[tuple[str, float]]:
    """The explorer's command running; yields its address and the time at which it was started."""
    begun = time.monotonic()
    process = subprocess.Popen(["./run_all.sh", "--explore"], cwd=REPO_ROOT, text=True,
                               stdout=subprocess.PIPE, start_new_session=True)
    try:
        for line in process.stdout:
            found = re.search(r"http://127\.0\.0\.1:\S+", line)
            if found:
                yield found[0], begun
                return
        raise SystemExit(f"the explorer ended with status {process.wait()} and printed no address")
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


def rounds(page: object, direction: str, n: int) -> list[float]:
    """Seconds of each of n played rounds, from the press to the word "Done", scores included."""
    page.get_by_label("Direction").select_option(label=direction)
    spent = []
    for number in range(n):
        page.get_by_label("Source", exact=True).first.select_option(index=number)
        start = time.monotonic()
        begin(page, "Play")
        wait_for_end(page)
        spent.append(time.monotonic() - start)
    return spent


def measure(n: int) -> None:
    """Print what the page costs, one line a number."""
    with started() as (address, begun), chromium() as browser:
        print(f"address printed after {time.monotonic() - begun:.1f} s", flush=True)
        page = open_explorer(browser, address).page
        page.locator(".cx-source img").first.wait_for()
        print(f"page with its first picture after {time.monotonic() - begun:.1f} s", flush=True)
        set_count(page, CANDIDATES)
        pressed = time.monotonic()
        begin(page, "Play")
        page.locator("li.cx-card img").first.wait_for()
        print(f"first picture drawn {time.monotonic() - pressed:.1f} s after Play (models loaded within)")
        wait_for_end(page)
        for direction in DIRECTIONS:
            spent = rounds(page, direction, n)
            print(f"{direction}: {median(spent) / CANDIDATES:.2f} s a round trip (median of {n} games of "
                  f"{CANDIDATES} candidates: {min(spent):.1f} to {max(spent):.1f} s)", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.explorer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="games in each direction (default: 5)")
    given = parser.parse_args(arguments)
    if find_chromium() is None:
        print("error: no Chromium here; Debian and Ubuntu: apt-get install chromium", file=sys.stderr)
        return 2
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores, load before: {load}", flush=True)
    measure(given.rounds)
    page = figures.folder(get_preset("mini")) / "index.html"
    if page.is_file():
        print(f"report {page.name}: {page.stat().st_size / 2**20:.2f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
