"""Holm's correction and what it says of many verdicts, against values worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lib import multiplicity

NAN = float("nan")


def test_holm_by_hand() -> None:
    p = np.array([0.01, 0.04, 0.03, NAN])
    # sorted 0.01 * 3, 0.03 * 2, then 0.04 * 1 raised to its predecessor's 0.06
    np.testing.assert_allclose(multiplicity.holm(p), [0.03, 0.06, 0.06, NAN])
    # 0.03 fails at 0.05 / 2, so 0.04 is held to the same level and not to 0.05 / 1, where it would pass
    np.testing.assert_allclose(multiplicity.holm_levels(p), [1 - 0.05 / 3, 0.975, 0.975, NAN])


@pytest.mark.parametrize("seed", range(20))
def test_an_interval_excludes_zero_only_where_the_test_decides(seed: int) -> None:
    p = np.random.default_rng(seed).beta(0.5, 6, size=9)
    excludes = p <= 1 - multiplicity.holm_levels(p)  # what an interval of that level does
    np.testing.assert_array_equal(excludes, multiplicity.holm(p) <= 0.05)


def record(finding: str, p: float | None) -> dict:
    return {"finding": finding, "p": p}


def test_standing_verdicts_and_the_sentence_by_hand() -> None:
    records = [record("holds", 0.001), record("reversed", 0.012), record("holds", 0.03),
               record("undecided", 0.4), record("unknown", None)]
    # four tested: 0.004, 0.036, then 0.03 * 2 = 0.06 falls
    assert multiplicity.standing(records) == [True, True, False, False, False]
    said = multiplicity.tally(records)
    assert "less than one of 4" in said and said.endswith("remain: 1 holds, 1 reversed.")
    assert [multiplicity.counted(n, "holds") for n in (0, 1, 2)] == ["0 hold", "1 holds", "2 hold"]
    assert "about 2 of 40" in multiplicity.tally([record("undecided", 0.5)] * 40)
    many = multiplicity.tally([record("holds", 2 / 2001)] * 60)
    assert "about 3 of 60" in many and many.endswith("too many to be judged all together by 2000 resamples.")


def test_no_p_values_no_sentence() -> None:
    assert multiplicity.tally([]) == multiplicity.tally([{"finding": "holds"}]) == ""
