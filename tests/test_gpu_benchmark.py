"""The GPU benchmark at a small size on the CPU: it runs, its tables are consistent, no time is judged."""

from __future__ import annotations

import re

import pytest

from tests.benchmarks import gpu

WORK = gpu.Work(sources=2, candidates=2, steps=1, size=64, tokens=3, batch=3, width=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The report of the command, and the page that it wrote."""
    folder = tmp_path_factory.mktemp("benchmark")
    sizes = [word for name, value in vars(WORK).items() for word in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPENDIUM_DEVICE", "cpu")
        report = gpu.main([*sizes, "--rounds", "1", "--no-compile", "--out", str(folder / "page.md")])
    return report, (folder / "page.md").read_text(encoding="utf-8")


@pytest.fixture
def report(made):
    return made[0]


def test_arms_do_equal_work(report):
    documented, batched, ours = (result.rows for result in report.results)
    n = WORK.sources * WORK.candidates
    for rows in (documented, batched, ours):
        assert rows["denoiser"] == 2 * n * WORK.steps  # with and without the text
        assert rows["image decoder"] == n
        assert rows["text decoder"] == n * WORK.tokens
        assert rows["images"] == n + WORK.sources  # sources and reconstructions
    assert documented["image encoder"] == n  # again for every caption
    assert batched["image encoder"] == ours["image encoder"] == WORK.sources
    assert documented["text encoder"] == 2 * n
    assert ours["text encoder"] <= n  # the empty prompt was encoded in the warm-up


def test_shares_add_up(report):
    for result in report.results:
        shares = [result.share(stage) for stage in (*gpu.STAGES, "rest")]
        assert sum(shares) == pytest.approx(1) and all(share >= 0 for share in shares)
        assert report.fraction(result) > 0
        parts = [report.fraction(result, [s]) * result.seconds[s] for s in gpu.STAGES]
        assert report.fraction(result) * result.total == pytest.approx(sum(parts))


def test_the_page_says_what_was_measured(made):
    report, page = made
    lines = [line for line in page.splitlines() if line.startswith("|")]
    for result in report.results:
        percent = [float(re.findall(r"([\d.]+) %", line)[0]) for line in lines
                   if line.startswith(f"| {result.name} |") and "whole game" not in line]
        assert len(percent) == 4 and sum(percent) == pytest.approx(100, abs=0.3)
    assert page.startswith("# Speed on cpu") and "16 times narrower" in page
    assert "nan" not in page and "inf" not in page
    widths = {table: {line.count("|") for line in lines if line.startswith(f"| {table}")}
              for table in ("ours", "denoiser", "arm", "network")}
    assert widths["ours"] == widths["arm"] and widths["denoiser"] == widths["network"]


def test_every_lever_is_measured_and_put_back(report):
    names = " ".join(lever.name for lever in report.levers)
    for word in ("batches of", "channels last", "fused attention", "host synchronisation", "equal captions",
                 "empty prompt", "image encoder once", "without a PNG", "another thread"):
        assert word in names
    assert all(lever.without > 0 and lever.with_it > 0 for lever in report.levers)
    assert "%" in report.profile
