"""Scores of captions and images: rows in, columns out. README.md says which, in what scale, and by whom."""

from lib.metrics.bleu import COUNTS, bleu_from_counts
from lib.metrics.images import SEMANTIC_SCORES, clipscore, ref_clipscore, score_semantics
from lib.metrics.scores import BLEU, CAPTION_SCORES, LABELS, References, available, bleu_counts, score_captions, score_corpus

__all__ = ["BLEU", "CAPTION_SCORES", "COUNTS", "LABELS", "SEMANTIC_SCORES", "References", "available", "bleu_counts",
           "bleu_from_counts", "clipscore", "ref_clipscore", "score_captions", "score_corpus", "score_semantics"]
