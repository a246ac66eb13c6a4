"""The GPU benchmark at a small size on the CPU: it runs and its table is consistent; no time is judged."""

from __future__ import annotations

import pytest

from tests.benchmarks import gpu


def test_every_arm_has_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COMPENDIUM_DEVICE", "cpu")
    arms = gpu.main(["--steps", "3", "--batches", "2", "--out", str(tmp_path / "page.md")])
    assert [(arm.stage, arm.name.split(",")[0]) for arm in arms] == [("images", "documented"), ("images", "ours"),
        ("captions", "documented"), ("captions", "ours"), ("embeddings", "one a call"), ("embeddings", "ours")]
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.strip() == capsys.readouterr().out.strip() and "nan" not in page and "inf" not in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == len(arms) + 2 and len({line.count("|") for line in lines}) == 1
    assert all(arm.per_second > 0 and arm.flop > 0 and len(arm.seconds) == 2 for arm in arms)
    images = [arm.flop for arm in arms if arm.stage == "images"]
    assert images[0] > 0 and images == pytest.approx([images[0]] * 2)  # every arm needs the same work
