"""The datasets whose place is known: ``data/datasets.toml`` says where they lie and where they come from."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from lib.base import ROOT, UserError, folder_setting, stable_seed
from lib.data.captions import Entry, read_coco, read_text, validated, with_words
from lib.data.datasets import Dataset, Item, remarks


class Named(BaseModel):
    """One dataset of ``data/datasets.toml``, which explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: str
    variable: str = ""
    annotations: list[str]
    images: list[str]
    split: str = ""
    split_size: int = 0
    url: str = ""
    size: int = 0
    sha256: str | None = None
    member: str | None = None
    listed: int = 0
    image_size: int = 0
    image_urls: list[str] = []
    page: str = ""

    @property
    def root(self) -> Path:
        """The folder that the environment variable names, else the one in the repository."""
        return Path(folder_setting(self.variable, ROOT / self.folder))

    @property
    def annotation_file(self) -> Path:
        """The annotation file: the first that exists, else where a fetch puts it."""
        root = self.root
        return next((root / name for name in self.annotations if (root / name).is_file()), root / self.annotations[0])

    @property
    def image_folder(self) -> Path:
        """The folder of the images: the first that exists, else where a fetch puts them."""
        root = self.root
        return next((root / name for name in self.images if (root / name).is_dir()), root / self.images[0])


_TABLES = tomllib.loads((ROOT / "data" / "datasets.toml").read_text(encoding="utf-8"))
NAMED = {name: Named.model_validate(_TABLES.get(table.pop("base", ""), {}) | table) for name, table in _TABLES.items()}


def remedy(name: str) -> str:
    """Return how absent files of a dataset come here."""
    if not NAMED[name].variable:
        return "run python -m lib.picturebook.build"
    return (f"fetch them with ./run_all.sh --fetch --preset paper --dataset {name}, or set {NAMED[name].variable} to a "
            "folder that has the official files")


def split_ids(name: str) -> frozenset[str]:
    """Return the ids that a dataset is restricted to; empty if it has all images of its annotation file.

    For ``coco`` those of Karpathy's test images (Karpathy and Li, 2015) with the smallest hashes: the paper evaluates
    on 2,000 validation images that it does not list, with a captioner tuned on all of COCO but these and Karpathy's.
    """
    if not NAMED[name].split:
        return frozenset()
    lines = (ROOT / NAMED[name].split).read_text(encoding="utf-8").splitlines()
    ids = [key for line in lines if not line.startswith("#") for key in line.split()]
    return frozenset(sorted(ids, key=lambda key: (stable_seed(0, "coco-karpathy", key), key))[:NAMED[name].split_size])


def listed(name: str) -> list[Entry]:
    """Return the images that a dataset lists, there or not; UserError if its annotation file is absent or wrong."""
    annotation = NAMED[name].annotation_file
    if not annotation.is_file():
        raise UserError(f"dataset {name}: {annotation} is absent: {remedy(name)}")
    split = split_ids(name)
    entries = [entry for entry in read_coco(annotation) if not split or entry.id in split]
    if not entries:
        raise UserError(f"{annotation}: none of the ids in {NAMED[name].split} is in it: wrong file?")
    return entries


def load_named(name: str) -> Dataset:
    """Return one of these datasets; where no image is there, it has captions only."""
    entries, folder, scenes = listed(name), NAMED[name].image_folder, NAMED[name].root / "scenes.json"
    truth = validated(dict[str, dict], read_text(scenes), str(scenes)) if scenes.is_file() else {}
    raw = {entry.id: entry.captions for entry in entries}
    captions = {key: with_words(texts) for key, texts in raw.items()}
    absent = {entry.id: entry.file_name for entry in entries if not (folder / entry.file_name).is_file()}
    none = len(absent) == len(entries)
    items = tuple(Item(entry.id, None if none else folder / entry.file_name, captions[entry.id], entry.domain,
                       truth.get(entry.id)) for entry in entries if none or entry.id not in absent)
    line = f"{name}: {len(entries) - len(absent):,} images, {sum(map(len, captions.values())):,} captions"
    if absent:
        line += f"; {len(absent):,} listed images are not in {folder}, such as {next(iter(absent.values()))}"
    if bare := [key for key, texts in captions.items() if not texts]:
        line += f"; {len(bare):,} images without captions, such as {bare[0]}"
    references = {key: texts for key, texts in captions.items() if texts}
    return Dataset(name, name, items, references, absent, remarks(line, raw, captions), remedy(name))
