"""Time of the caption metrics beside the stock library's on the same captions; SPICE (spaCy) against official SPICE.

    python -m tests.benchmarks.metrics [--images 4500] [--metrics cider,meteor,spice_spacy]

Each image has 10 references and 10 candidates, drawn from the picture book's captions with a fixed seed, or from those
of COCO where ``../shared`` holds them. Run by hand; the tests do not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import time
from collections.abc import Callable

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from lib.base import ROOT
from lib.metrics import References, score_captions
from lib.metrics.java import tokenize
from tests.test_spice import SAMPLE, agreement

SHARED = ROOT.parent / "shared" / "data" / "spice"
COCO = SHARED.parent / "coco" / "captions_val2014.json.gz"
PICTURE_BOOK = ROOT / "data" / "picturebook" / "nocaps" / "annotations" / "nocaps_val.json"
PER_IMAGE = 10
NAMES = ["bleu1", "bleu2", "bleu3", "bleu4", "cider_d", "rouge_l"]  # what both have


def captions(images: int, seed: int = 0) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Ten references and ten candidates (ids, captions) for each of so many images."""
    text = gzip.open(COCO, "rt", encoding="utf-8").read() if COCO.is_file() else PICTURE_BOOK.read_text("utf-8")
    pool = [one["caption"] for one in json.loads(text)["annotations"]]
    draw = random.Random(seed)
    references = {str(i): draw.choices(pool, k=PER_IMAGE) for i in range(images)}
    ids = [item for item in references for _ in range(PER_IMAGE)]
    # half of them share words with the references, as candidates of a captioner do
    whole = [draw.choice(references[item] if k % 2 else pool).split() for k, item in enumerate(ids)]
    return references, ids, [" ".join(words[: draw.randint(4, 14)]) for words in whole]


def stock(references: References, ids: list[str], tokens: list[str]) -> np.ndarray:
    """The library's scores, once for the k-th candidates of all images: document frequencies count an image once."""
    gts = {item: list(group) for item, group in references.tokens.items()}
    columns = []
    for k in range(PER_IMAGE):
        res = {item: [caption] for item, caption in zip(ids[k::PER_IMAGE], tokens[k::PER_IMAGE], strict=True)}
        bleu = Bleu().compute_score(gts, res, verbose=0)[1]
        columns.append([*bleu, *(scorer.compute_score(gts, res)[1] for scorer in (Cider(), Rouge()))])
    return np.array(columns).transpose(2, 0, 1).reshape(-1, len(NAMES))  # image, k, metric


def shared_entries() -> list[dict]:
    """The 300 captions that the sample is from, in its form."""
    texts, scores = (json.loads((SHARED / f"{name}.json").read_text("utf-8")) for name in ("captions", "spice_scores"))
    return [{"caption": text["test"], "references": text["refs"], "spice": score["scores"]["All"]["f"] or 0.0}
            for text, score in zip(texts, scores, strict=True)]


def timed(name: str, work: Callable) -> object:
    """What the work returns; its time is printed."""
    began = time.perf_counter()
    result = work()
    print(f"{name:<44}{time.perf_counter() - began:8.1f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.metrics")
    parser.add_argument("--images", type=int, default=4500)
    parser.add_argument("--metrics", default="cider", help="further metrics to time, one after the other")
    options = parser.parse_args()
    groups, ids, texts = captions(options.images)
    references = timed("tokens of references", lambda: References.build(groups))
    words = timed(f"tokens of {len(texts):,} captions", lambda: tokenize(texts))
    ours = timed(", ".join(NAMES), lambda: score_captions(ids, texts, references, NAMES))
    theirs = timed("the same by pycocoevalcap, tokens given", lambda: stock(references, ids, [words[t] for t in texts]))
    print(f"largest difference of a score {np.abs(ours.to_numpy() - theirs).max():.1e}")
    for name in options.metrics.split(","):
        timed(name, lambda name=name: score_captions(ids, texts, references, [name]))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    for what, entries in {"sample": SAMPLE, "all 300": shared_entries() if SHARED.is_dir() else []}.items():
        if entries:
            pearson, error, bias = agreement(entries)
            print(f"SPICE (spaCy) - official SPICE, {what}: Pearson {pearson:.3f}, mean |difference| {error:.3f}, "
                  f"mean difference {bias:+.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
