"""Sources of the round trips: the picture book, COCO, NoCaps, a folder of images or a text file of yours."""

from lib.data.datasets import NAMES, Dataset, Item, load_dataset
from lib.data.download import fetch, missing_files
from lib.data.images import decode_image, png_bytes

__all__ = ["NAMES", "Dataset", "Item", "decode_image", "fetch", "load_dataset", "missing_files", "png_bytes"]
