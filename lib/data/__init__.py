"""Sources of the round trips: the picture book, COCO, NoCaps, a folder of images or a text file of yours."""

from lib.base import UserError
from lib.data.datasets import Dataset, Item
from lib.data.images import decode_image
from lib.data.named import NAMED, fetch, load_named, missing_files
from lib.data.own import load_folder, load_texts

__all__ = ["NAMES", "Dataset", "Item", "decode_image", "fetch", "load_dataset", "missing_files"]
NAMES = (*NAMED, "folder:PATH", "texts:FILE")


def load_dataset(name: str) -> Dataset:
    """Return the dataset of that name, one of NAMES; UserError for another name, absent or malformed files."""
    kind, _, place = name.partition(":")
    load = {"folder": load_folder, "texts": load_texts}.get(kind)
    if name not in NAMED and not (load and place.strip()):
        raise UserError(f"unknown dataset {name!r}: choose one of {', '.join(NAMES)}")
    return load_named(name) if name in NAMED else load(place)
