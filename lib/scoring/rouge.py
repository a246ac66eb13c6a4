"""ROUGE-L of an image's candidates, by ``pycocoevalcap`` (Lin, 2004; beta 1.2)."""

from __future__ import annotations

from collections.abc import Sequence

from pycocoevalcap.rouge.rouge import Rouge


def scores(candidates: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L of each candidate against the references, in [0, 1]; all are PTB tokens.

    Precision and recall each take their best reference. Equal candidates are scored once; an
    empty one scores 0.
    """
    rouge = Rouge()
    known = {"": 0.0}
    for candidate in candidates:
        if candidate not in known:
            known[candidate] = float(rouge.calc_score([candidate], list(references)))
    return [known[candidate] for candidate in candidates]
