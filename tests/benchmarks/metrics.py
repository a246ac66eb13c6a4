"""Time and memory of the caption metrics, ours beside the stock library, on the same captions.

    python -m tests.benchmarks.metrics [--images 4500] [--meteor] [--spice]

Each image has 10 references and 10 candidates: 45,000 candidates by default. The captions are
COCO's where ``../shared`` holds them, else those of the picture book, drawn with a fixed seed. Each
arm runs in a process of its own, one after the other, so that its peak memory is its own. The
values of both arms are compared. Run by hand; the tests do not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import lib

ROOT = Path(lib.__file__).parent.parent
COCO = ROOT.parent / "shared" / "data" / "coco" / "captions_val2014.json.gz"
PICTURE_BOOK = ROOT / "data" / "picturebook" / "nocaps" / "annotations" / "nocaps_val.json"
PER_IMAGE = 10
NAMES = ("bleu1", "bleu2", "bleu3", "bleu4", "cider_d", "rouge_l")  # what both arms have

References = dict[str, list[str]]
Candidates = list[tuple[str, str]]


def captions(images: int, seed: int = 0) -> tuple[References, Candidates]:
    """Ten references and ten candidates for each of so many images."""
    if COCO.is_file():
        with gzip.open(COCO, "rt", encoding="utf-8") as file:
            pool = [one["caption"] for one in json.load(file)["annotations"]]
    else:
        found = json.loads(PICTURE_BOOK.read_text(encoding="utf-8"))["annotations"]
        pool = [one["caption"] for one in found]
    draw = random.Random(seed)
    references = {str(i): draw.choices(pool, k=PER_IMAGE) for i in range(images)}
    candidates = []
    for item, own in references.items():
        # half of them share words with the references, as candidates of a captioner do
        for k in range(PER_IMAGE):
            words = draw.choice(own).split() if k % 2 else draw.choice(pool).split()
            candidates.append((item, " ".join(words[: draw.randint(4, 14)])))
    return references, candidates


def ours(references: References, candidates: Candidates) -> np.ndarray:
    from lib.metrics import METRICS, Corpus, score_all

    names = [name for name in METRICS if name not in ("meteor", "spice", "spice_spacy")]
    ids, texts = zip(*candidates, strict=False)
    with tempfile.TemporaryDirectory() as cache:
        corpus = stage("tokens of references", lambda: Corpus.build(references, cache))
        stage("tokens of candidates", lambda: corpus.tokenize(texts))
        table, _ = stage("scores, both CIDErs", lambda: score_all(ids, texts, corpus, names))
    return table[list(NAMES)].to_numpy()


def stock(references: References, candidates: Candidates) -> np.ndarray:
    """The library, once for the k-th candidates of all images, k = 1..10.

    All candidates in one call would count each image ten times among the documents, which gives
    another CIDEr for n-grams that no reference has.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(groups: dict[str, list[str]]) -> dict[str, list[str]]:
        return PTBTokenizer().tokenize({i: [{"caption": c} for c in g] for i, g in groups.items()})

    texts: dict[str, list[str]] = {}
    for item, text in candidates:
        texts.setdefault(item, []).append(text)
    gts, res = stage("tokens", lambda: (tokens(references), tokens(texts)))
    passes = [{item: [group[k]] for item, group in res.items()} for k in range(PER_IMAGE)]
    bleu = stage("BLEU", lambda: [Bleu().compute_score(gts, one, verbose=0)[1] for one in passes])
    cider = stage("CIDEr-D", lambda: [Cider().compute_score(gts, one)[1] for one in passes])
    rouge = stage("ROUGE-L", lambda: [Rouge().compute_score(gts, one)[1] for one in passes])
    by_pass = [[*b, c, r] for b, c, r in zip(bleu, cider, rouge, strict=False)]
    return np.array(by_pass).transpose(2, 0, 1).reshape(-1, len(NAMES))  # image, k, metric


def meteor(references: References, candidates: Candidates) -> None:
    from lib.metrics import Corpus, score_all

    ids, texts = zip(*candidates, strict=False)
    with tempfile.TemporaryDirectory() as cache:
        corpus = Corpus.build(references, cache)
        corpus.tokenize(texts)
        stage("METEOR, start included", lambda: score_all(ids, texts, corpus, ["meteor"]))


def spice(references: References, candidates: Candidates) -> None:
    from lib.metrics import Corpus, score_all
    from lib.scoring.spice_spacy import load_parser

    keep = set(list(references)[:200])
    some = [(item, text) for item, text in candidates if item in keep]
    ids, texts = zip(*some, strict=False)
    with tempfile.TemporaryDirectory() as cache:
        corpus = Corpus.build({item: references[item] for item in keep}, cache)
        distinct = len({*corpus.tokenize(texts), *corpus.tokens.values()})
        load_parser()
        began = time.perf_counter()
        stage("SPICE (spaCy) of 200 images", lambda: score_all(ids, texts, corpus, ["spice_spacy"]))
    print(f"  {distinct / (time.perf_counter() - began):.0f} distinct captions a second, scores included")


def stage(name: str, work: Callable):
    """Do the work and print its time."""
    began = time.perf_counter()
    result = work()
    print(f"  {name:<32}{time.perf_counter() - began:7.1f} s", flush=True)
    return result


def arm(work: Callable, images: int, results) -> None:
    """One arm in its own process: its time and the peak memory of it and of its Java."""
    references, candidates = captions(images)
    print(f"{work.__name__}: {len(candidates)} candidates", flush=True)
    began = time.perf_counter()
    found = work(references, candidates)
    seconds = time.perf_counter() - began
    own, java = (
        resource.getrusage(who).ru_maxrss / 2**20
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(f"  total {seconds:.1f} s, peak memory {own:.2f} GiB, Java {java:.2f} GiB", flush=True)
    results.put((seconds, found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.metrics")
    parser.add_argument("--images", type=int, default=4500)
    parser.add_argument("--meteor", action="store_true", help="time METEOR too")
    parser.add_argument("--spice", action="store_true", help="time SPICE (spaCy) too")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    extra = [meteor] * options.meteor + [spice] * options.spice
    found = {}
    for work in (ours, stock, *extra):
        results = context.SimpleQueue()
        process = context.Process(target=arm, args=(work, options.images, results))
        process.start()
        found[work.__name__] = results.get()
        process.join()
    (fast, our_rows), (slow, stock_rows) = found["ours"], found["stock"]
    print(f"stock / ours: {slow / fast:.1f} times; "
          f"largest difference of a score {np.abs(our_rows - stock_rows).max():.1e}")


if __name__ == "__main__":
    main()
