"""What tables, figures and sentences call things: one name for each dataset, task and score."""

from __future__ import annotations

DATASETS: dict[str, str] = {
    "picturebook-coco": "Picture book (COCO-like)",
    "picturebook-nocaps": "Picture book (NoCaps-like)",
    "coco": "COCO",
    "coco-val2014": "COCO val 2014",
    "coco-val2017": "COCO val 2017",
    "nocaps": "NoCaps",
}
# Beside a curve there is no room for more.
SHORT: dict[str, str] = {"picturebook-coco": "COCO-like", "picturebook-nocaps": "NoCaps-like"}
TASKS: dict[str, str] = {"image": "Image reconstruction", "text": "Text reconstruction"}
DOMAINS: dict[str, str] = {
    "all": "all",
    "in-domain": "in-domain",
    "near-domain": "near-domain",
    "out-domain": "out-of-domain",
}
METRICS: dict[str, str] = {
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "cider": "CIDEr",
    "cider_d": "CIDEr-D",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "spice": "SPICE",
    "spice_spacy": "SPICE (spaCy)",
    "clipscore": "CLIPScore",
    "ref_clipscore": "RefCLIPScore",
    "clip_score": "CLIP score",
    "clip_score_judge": "CLIP score (judge)",
    "sem_f": "Semantic F1",
}
# The score that the paper judges each task's message by (4.3).
PRIMARY: dict[str, str] = {"image": "cider", "text": "clip_score"}
# What the similarity of each task compares (3.5, 3.6).
SIMILARITY: dict[str, str] = {
    "image": "Similarity of the images",
    "text": "Similarity of the texts",
}


def dataset_label(name: str) -> str:
    """Readable name of a dataset; a folder or text file keeps its last path part."""
    if name in DATASETS:
        return DATASETS[name]
    kind, _, path = name.partition(":")
    return f"Own {kind} ({path.rstrip('/').rsplit('/', 1)[-1]})" if path else name


def short_label(name: str) -> str:
    """Name of a dataset for a direct label in a figure."""
    return SHORT.get(name, dataset_label(name))


def metric_label(name: str) -> str:
    """Readable name of a score column."""
    return METRICS.get(name, name.replace("sem_", "semantic ").replace("_", " "))


def resembles_nocaps(dataset: str) -> bool:
    """Whether a dataset is NoCaps or its embedded likeness."""
    return "nocaps" in dataset
