"""Datasets by name: sources with their references.

- ``picturebook-coco``, ``picturebook-nocaps``: embedded, with true scenes;
- ``coco`` (2,000 of Karpathy's test images, see ``lib.data.splits``), ``coco-val2014``, ``coco-val2017``,
  ``nocaps``: in ``data/coco`` and ``data/nocaps``, or where COCO_DIR and NOCAPS_DIR point;
- ``folder:PATH``, ``texts:FILE``: yours, see ``lib.data.own``.

A subset is drawn by hashing ids, so it does not depend on the order of the files, and a larger subset contains a
smaller one. It is drawn from all *listed* images: fetching more never changes a draw, and a drawn image that is
absent is counted as missing, not replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from lib.base import ROOT, UserError, folder_setting, stable_seed
from lib.data.captions import Entry, read_coco, read_json, with_words
from lib.data.images import decode_image

KARPATHY_SPLIT = ROOT / "data" / "splits" / "coco_karpathy.json"  # made by lib.data.splits


@dataclass(frozen=True)
class Item:
    """One source: an image (path) with human captions, perhaps none, or a text (path None).

    id: unique within the dataset; domain: NoCaps' in-domain, near-domain or out-domain; scene: the true scene as
    plain data (picture book only).
    """

    id: str
    path: Path | None
    references: tuple[str, ...] = ()
    domain: str | None = None
    scene: Mapping[str, Any] | None = None

    def image(self) -> Image.Image:
        """Return the image in RGB; UserError if it cannot be read or the item is a text."""
        if self.path is None:
            raise UserError(f"item {self.id} is a text and has no image")
        return decode_image(self.path)


@dataclass(frozen=True)
class Dataset:
    """Items, and what was read to get them.

    name: what seeds and folders call it (no path); address: the name that loads it again from anywhere;
    references: id -> captions of the FULL split, for document frequencies; absent: id -> file name of listed images
    that are not there; notes: one-line remarks on what was read.
    """

    name: str
    items: tuple[Item, ...]
    references: Mapping[str, tuple[str, ...]]
    address: str
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def by_id(self) -> dict[str, Item]:
        """Return the items by id."""
        return {item.id: item for item in self.items}

    def subset(self, n: int | None, seed: int = 0) -> Dataset:
        """Return a seeded sample of n listed items (None, or n above the size: all), in the dataset's order.

        UserError unless n >= 1, or if no drawn image is there.
        """
        if n is None:
            return self
        kept = draw({item.id for item in self.items} | set(self.absent), self.name, n, seed)
        items = tuple(item for item in self.items if item.id in kept)
        absent = {key: name for key, name in self.absent.items() if key in kept}
        if not items:
            raise UserError(f"dataset {self.name}: none of the {len(kept)} images drawn with seed {seed} is there: "
                            f"{_remedy(self.name)}")
        return replace(self, items=items, absent=absent)

    def feeds(self, task: str) -> str | None:
        """Return None if the ``image`` or ``text`` task has a source here, else one line on what is missing."""
        if task == "image" and not any(item.path for item in self.items):
            return f"dataset {self.name} has no images, which image reconstruction starts from: {_remedy(self.name)}"
        if task == "text" and not any(item.references for item in self.items):
            return (f"dataset {self.name} has no captions, which text reconstruction starts from: add captions.json "
                    "or captions.csv (data/README.md)")
        return None

    def check_images(self) -> None:
        """Decode every image; UserError that names all that cannot be read, and why the first cannot."""
        items = [item for item in self.items if item.path]
        with ThreadPoolExecutor() as pool:
            bad = [(item.id, str(error)) for item, error in zip(items, pool.map(_trouble, items), strict=True) if error]
        if len(bad) > 1:
            raise UserError(f"dataset {self.name}: {len(bad)} of {len(items)} images cannot be read: "
                            f"{examples([name for name, _ in bad], 99)}; first: {bad[0][1]}")
        if bad:
            raise UserError(bad[0][1])

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of all that can change a row: ids, the content of the images, references, domains, scenes."""
        digest = hashlib.sha256()
        for item in sorted(self.items, key=lambda i: i.id):
            try:
                image = hashlib.sha256(item.path.read_bytes()).hexdigest() if item.path else None
            except OSError as error:
                raise UserError(f"image {item.path} cannot be read ({error.strerror}): check the file") from error
            record = [item.id, image, item.references, item.domain, item.scene]
            digest.update(json.dumps(record, sort_keys=True).encode())
        digest.update(json.dumps(sorted(self.references.items())).encode())
        return digest.hexdigest()


def draw(ids: Iterable[str], name: str, n: int, seed: int) -> frozenset[str]:
    """Return n of a dataset's ids, those with the smallest hashes; UserError unless n >= 1."""
    if not isinstance(n, int) or n < 1:
        raise UserError(f"number of sources = {n!r}: must be a whole number of at least 1")
    return frozenset(sorted(ids, key=lambda key: (stable_seed(seed, "subset", name, key), key))[:n])


def examples(names: Iterable[str], most: int = 3) -> str:
    """Return the first names in one line, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True)
class Layout:
    """Where a dataset lies below its root; of alternatives the first that exists counts."""

    annotations: tuple[str, ...]
    images: tuple[str, ...]
    folder: str
    variable: str = ""

    def root(self) -> Path:
        """Return the folder that the environment variable names, else the one in the repository."""
        return Path(folder_setting(self.variable, ROOT / self.folder))

    def annotation_file(self) -> Path | None:
        """Return the annotation file, None if there is none."""
        return next((self.root() / name for name in self.annotations if (self.root() / name).is_file()), None)

    def image_folder(self) -> Path:
        """Return the folder of the images: the first that exists, else where a fetch puts them."""
        root = self.root()
        return next((root / name for name in self.images if (root / name).is_dir()), root / self.images[0])


_VAL2014 = Layout(("annotations/captions_val2014.json", "annotations/captions_val2014.json.gz", "captions_val2014.json"),
                  ("val2014", "images/val2014", "images"), "data/coco", "COCO_DIR")
LAYOUTS: dict[str, Layout] = {
    "picturebook-coco": Layout(("annotations/captions_val.json",), ("images",), "data/picturebook/coco"),
    "picturebook-nocaps": Layout(("annotations/nocaps_val.json",), ("images",), "data/picturebook/nocaps"),
    "coco": _VAL2014,
    "coco-val2014": _VAL2014,
    "coco-val2017": Layout(("annotations/captions_val2017.json", "captions_val2017.json"),
                           ("val2017", "images/val2017", "images"), "data/coco", "COCO_DIR"),
    "nocaps": Layout(("annotations/nocaps_val_4500_captions.json", "annotations/nocaps_val.json",
                      "nocaps_val_4500_captions.json"), ("images", "val", "validation", "val_imgs"),
                     "data/nocaps", "NOCAPS_DIR"),
}
NAMES = (*LAYOUTS, "folder:PATH", "texts:FILE")


def load_dataset(name: str) -> Dataset:
    """Return the dataset of that name; UserError for an unknown name, absent or malformed files."""
    from lib.data.own import load_folder, load_texts  # which itself makes a Dataset

    kind, _, place = name.partition(":")
    if name in LAYOUTS:
        return _load_named(name, LAYOUTS[name])
    if kind not in ("folder", "texts"):
        raise UserError(f"unknown dataset {name!r}: choose one of {', '.join(NAMES)}")
    if not place.strip():
        raise UserError(f"dataset {name!r}: add the path after the colon, as in {kind}:my/{kind}")
    return load_folder(place) if kind == "folder" else load_texts(place)


def listed(name: str) -> list[Entry]:
    """Return the images that a named dataset lists, there or not; UserError if its annotation file is absent."""
    layout = LAYOUTS[name]
    annotation = layout.annotation_file()
    if annotation is None:
        raise UserError(f"dataset {name}: {layout.root() / layout.annotations[0]} is absent: {_remedy(name)}")
    entries = read_coco(annotation)
    if name == "coco":
        split = frozenset(map(str, read_json(KARPATHY_SPLIT)["ids"]))
        entries = [entry for entry in entries if entry.id in split]
        if not entries:
            raise UserError(f"{annotation}: none of the ids in {KARPATHY_SPLIT} is in it: wrong file?")
    return entries


def words_note(raw: Mapping[str, Iterable[str]], kept: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return a remark on the captions that were left out because they have no word, none if none was."""
    fewer = [key for key, texts in raw.items() if len(list(texts)) > len(kept[key])]
    return [f"captions without a word were left out: {examples(fewer)}"] if fewer else []


def _load_named(name: str, layout: Layout) -> Dataset:
    """One of the datasets whose place is known. Without any image it has captions only."""
    entries = listed(name)
    raw = {entry.id: entry.captions for entry in entries}
    captions = {key: with_words(texts) for key, texts in raw.items()}
    images, scenes = layout.image_folder(), layout.root() / "scenes.json"
    truth = read_json(scenes) if scenes.is_file() else {}
    absent = {entry.id: entry.file_name for entry in entries if not (images / entry.file_name).is_file()}
    none = len(absent) == len(entries)
    items = tuple(Item(entry.id, None if none else images / entry.file_name, captions[entry.id], entry.domain,
                       truth.get(entry.id)) for entry in entries if none or entry.id not in absent)
    note = f"{name}: {len(entries) - len(absent):,} images, {sum(map(len, captions.values())):,} captions"
    if absent:
        note += f"; {len(absent):,} listed images are not in {images}, such as {next(iter(absent.values()))}"
    if bare := [item.id for item in items if not item.references]:
        note += f"; {len(bare):,} images without captions, such as {bare[0]}"
    return Dataset(name, items, {key: texts for key, texts in captions.items() if texts}, name, absent,
                   (note, *words_note(raw, captions)))


def _remedy(name: str) -> str:
    """How to get a dataset's absent files."""
    variable = LAYOUTS[name].variable if name in LAYOUTS else ""
    if name.startswith("picturebook-"):
        return "run python -m lib.picturebook.build"
    return (f"fetch them with ./run_all.sh --fetch --preset paper --dataset {name}, or set {variable} to a folder that "
            "has the official files") if variable else "put the files there or correct the path"


def _trouble(item: Item) -> UserError | None:
    """Why an image cannot be read, None if it can."""
    try:
        item.image()
    except UserError as error:
        return error
    return None
