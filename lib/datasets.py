"""Pictures with their reference captions: COCO, NoCaps, the picture book, a folder or texts of yours.

COCO and NoCaps come in one JSON format, and the picture book is written in it, so one reader serves
all three. Names:

- ``picturebook-coco``, ``picturebook-nocaps``: embedded, with true scenes;
- ``coco`` (2,000 of Karpathy's test pictures, see ``lib.splits``), ``coco-val2014``,
  ``coco-val2017``, ``nocaps``: under ``data/coco`` and ``data/nocaps``, or where the environment
  variables ``COCO_DIR`` and ``NOCAPS_DIR`` point; ``./run_all.sh --fetch`` brings what is absent;
- ``folder:PATH``: pictures, optionally with ``captions.json``, ``.jsonl`` or ``.csv``;
- ``texts:PATH``: a text file with one prompt a line (text reconstruction only).

A subset is drawn by hashing ids, so it does not depend on the order of the files, and a larger
subset contains a smaller one. Of a named dataset it is drawn from all *listed* pictures, whether
their files are there or not: fetching more never changes a draw, and a drawn picture that is
absent is counted as missing, not replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from lib import captions
from lib.errors import UserError
from lib.images import EXTENSIONS, open_image
from lib.presets import REPO_ROOT
from lib.seeds import stable_seed


@dataclass(frozen=True)
class Item:
    """One picture (or one text): what the game starts from and what it is judged by.

    id: unique within the dataset; path: the picture, None for a text; references: human captions,
    perhaps none; domain: NoCaps' in-domain, near-domain or out-domain; scene: the true scene as
    plain data (picture book only).
    """

    id: str
    path: Path | None
    references: tuple[str, ...] = ()
    domain: str | None = None
    scene: Mapping[str, Any] | None = None

    def image(self) -> Image.Image:
        """The picture in RGB; UserError if it cannot be opened or the item is a text."""
        if self.path is None:
            raise UserError(f"item {self.id} is a text and has no picture")
        return open_image(self.path)


@dataclass(frozen=True)
class Dataset:
    """Items to play with, and the references of the whole split they come from.

    name: what seeds and folders call it (no path); address: the name that loads it again;
    references: id -> captions of the FULL split, for document frequencies; absent: id -> file name
    of the listed pictures that are not there, which a draw can hit; strays: file names that a
    folder's captions speak of though the folder has no such picture; unreferenced: ids without any
    caption.
    """

    name: str
    items: tuple[Item, ...]
    references: Mapping[str, tuple[str, ...]]
    absent: Mapping[str, str] = field(default_factory=dict)
    strays: tuple[str, ...] = ()
    unreferenced: tuple[str, ...] = ()
    address: str = ""

    def __len__(self) -> int:
        return len(self.items)

    @property
    def missing(self) -> tuple[str, ...]:
        """File names that are listed but absent; of a subset, those that it has drawn."""
        return (*self.absent.values(), *self.strays)

    def by_id(self) -> dict[str, Item]:
        """The items by id."""
        return {item.id: item for item in self.items}

    def subset(self, n: int | None, seed: int = 0) -> Dataset:
        """A seeded sample of n listed pictures (None: all), in the dataset's order.

        Where n exceeds the size all are kept. Raises UserError unless n >= 1, or if no drawn
        picture is there.
        """
        if n is None:
            return self
        kept = draw([*(item.id for item in self.items), *self.absent], self.name, n, seed)
        items = tuple(item for item in self.items if item.id in kept)
        if not items:
            raise UserError(f"dataset {self.name}: none of the {len(kept)} pictures drawn with seed {seed} "
                            f"is there: {_remedy(self.name)}")
        return replace(self, items=items,
                       absent={key: name for key, name in self.absent.items() if key in kept})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that can change a row: ids, references, scenes, and the picture files'
        names and sizes (not their bytes: that would read every picture before the first is used).
        """
        digest = hashlib.sha256()
        for item in sorted(self.items, key=lambda i: i.id):
            file = None if item.path is None else [item.path.name, item.path.stat().st_size]
            record = [item.id, file, item.references, item.domain, item.scene]
            digest.update(json.dumps(record, sort_keys=True).encode())
        for key in sorted(self.references):
            digest.update(json.dumps([key, self.references[key]]).encode())
        return digest.hexdigest()


def draw(ids: Iterable[str], name: str, n: int, seed: int) -> frozenset[str]:
    """Draw n of a dataset's ids (all where n exceeds them); UserError unless n >= 1."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UserError(f"number of sources = {n!r}: must be a whole number of at least 1")
    return frozenset(sorted(ids, key=lambda key: (stable_seed(seed, "subset", name, key), key))[:n])


@dataclass(frozen=True)
class Layout:
    """Where a captions-JSON dataset lies below its root; alternatives are tried in order."""

    annotation: tuple[str, ...]
    images: tuple[str, ...]
    folder: str
    variable: str | None = None
    scenes: str | None = None

    def root(self) -> Path:
        """The dataset's folder: the environment variable's if set, else the one in ``data/``."""
        override = os.environ.get(self.variable) if self.variable else None
        return Path(override).expanduser() if override else REPO_ROOT / self.folder

    def annotation_file(self) -> Path | None:
        """The annotation file, or None as long as there is none."""
        root = self.root()
        return next((root / name for name in self.annotation if (root / name).is_file()), None)

    def image_folder(self) -> Path:
        """The folder of the pictures: the first that exists, else where a fetch puts them."""
        root = self.root()
        return next((root / name for name in self.images if (root / name).is_dir()), root / self.images[0])


_VAL2014 = ("annotations/captions_val2014.json", "annotations/captions_val2014.json.gz",
            "captions_val2014.json")
_IMAGES_2014 = ("val2014", "images/val2014", "images")
LAYOUTS: dict[str, Layout] = {
    "picturebook-coco": Layout(("annotations/captions_val.json",), ("images",),
                               "data/picturebook/coco", scenes="scenes.json"),
    "picturebook-nocaps": Layout(("annotations/nocaps_val.json",), ("images",),
                                 "data/picturebook/nocaps", scenes="scenes.json"),
    "coco": Layout(_VAL2014, _IMAGES_2014, "data/coco", "COCO_DIR"),
    "coco-val2014": Layout(_VAL2014, _IMAGES_2014, "data/coco", "COCO_DIR"),
    "coco-val2017": Layout(("annotations/captions_val2017.json", "captions_val2017.json"),
                           ("val2017", "images/val2017", "images"), "data/coco", "COCO_DIR"),
    "nocaps": Layout(("annotations/nocaps_val_4500_captions.json", "annotations/nocaps_val.json",
                      "nocaps_val_4500_captions.json"), ("images", "val", "validation", "val_imgs"),
                     "data/nocaps", "NOCAPS_DIR"),
}
KARPATHY_SPLIT = REPO_ROOT / "data" / "splits" / "coco_karpathy.json"  # made by lib.splits
NAMES = (*LAYOUTS, "folder:PATH", "texts:PATH")


def load_dataset(name: str, n: int | None = None, seed: int = 0) -> Dataset:
    """Load a dataset by name and draw a seeded subset of n items (None: all).

    Raises UserError for an unknown name, absent or malformed files, or if no picture is there.
    """
    if not isinstance(name, str):
        raise UserError(f"dataset {name!r}: give a name, one of {', '.join(NAMES)}")
    kind, _, place = name.partition(":")
    _check_name(name, "dataset")
    if kind in ("folder", "texts") and not place:
        raise UserError(f"dataset {name!r}: add the path after the colon, as in {kind}:my/{kind}")
    if kind == "folder":
        whole = load_folder(Path(place).expanduser())
    elif kind == "texts":
        whole = load_texts(Path(place).expanduser())
    elif name in LAYOUTS:
        whole = _load_named(name, LAYOUTS[name])
    else:
        raise UserError(f"unknown dataset {name!r}: choose one of {', '.join(NAMES)}")
    return whole.subset(n, seed)


def _load_named(name: str, layout: Layout) -> Dataset:
    """One of the datasets whose place is known."""
    annotation = layout.annotation_file()
    if annotation is None:
        remedy = "run python -m lib.picturebook.build" if layout.scenes else (
            f"{_remedy(name)}, or set {layout.variable} to a folder that has the official files")
        raise UserError(f"dataset {name}: {layout.root() / layout.annotation[0]} is absent: {remedy}")
    scenes = layout.root() / layout.scenes if layout.scenes else None
    return load_captions_json(name, annotation, layout.image_folder(), scenes, split_ids(name))


def _remedy(name: str) -> str:
    """How to get a dataset's absent files."""
    layout = LAYOUTS.get(name)
    if layout is None or layout.variable is None:
        return "put the files there or correct the path"
    return f"fetch them with ./run_all.sh --fetch --preset paper --dataset {name}"


def split_ids(name: str) -> frozenset[str] | None:
    """The ids that a dataset is restricted to; None: all that its annotation file lists."""
    return read_split(KARPATHY_SPLIT) if name == "coco" else None


def read_split(path: Path) -> frozenset[str]:
    """Ids listed by a split file: JSON ``{"ids": [...]}``."""
    if not path.is_file():
        raise UserError(f"split file {path} is absent: write it with python -m lib.splits")
    data = captions.read_json(path)
    ids = data.get("ids") if isinstance(data, dict) else None
    if not isinstance(ids, list) or not ids:
        raise UserError(f"split file {path} has no list of ids: write it with python -m lib.splits")
    return frozenset(str(i) for i in ids)


def read_entries(annotation: Path, keep: frozenset[str] | None = None) -> list[captions.Entry]:
    """The pictures that an annotation file lists, those of a split if ``keep`` names its ids."""
    entries = captions.read_coco(annotation)
    if keep is None:
        return entries
    kept = [entry for entry in entries if entry.id in keep]
    if not kept:
        raise UserError(f"{annotation}: none of the split's ids is in it: wrong file?")
    return kept


def load_captions_json(
    name: str,
    annotation: Path,
    images: Path,
    scenes: Path | None = None,
    keep: frozenset[str] | None = None,
) -> Dataset:
    """Read an annotation file in the COCO captions or NoCaps format and find its pictures.

    images: the folder of the pictures; scenes: JSON of true scenes by image id; keep: only these
    ids are the evaluation split. Raises UserError if the file is malformed or no picture is there.
    """
    entries = read_entries(annotation, keep)
    truth = captions.read_scenes(scenes) if scenes is not None and scenes.is_file() else {}
    is_there = file_finder(images)
    items, absent = [], {}
    for entry in entries:
        if not is_there(entry.file_name):
            absent[entry.id] = entry.file_name
            continue
        items.append(Item(entry.id, images / entry.file_name, entry.captions, entry.domain,
                          truth.get(entry.id)))
    if not items:
        raise UserError(f"dataset {name}: none of the {len(entries)} pictures listed in "
                        f"{annotation} is in {images}: {_remedy(name)}")
    return Dataset(
        name=name, items=tuple(items), address=name, absent=absent,
        references={e.id: e.captions for e in entries if e.captions},
        unreferenced=tuple(item.id for item in items if not item.references),
    )


def file_finder(folder: Path) -> Callable[[str], bool]:
    """A function that tells whether a file is in a folder, from one listing instead of many look-ups."""
    try:
        with os.scandir(folder) as entries:
            listed = frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        listed = frozenset()  # absent: every picture is then reported as missing
    return lambda name: name in listed or ("/" in name and (folder / name).is_file())


def load_folder(folder: Path) -> Dataset:
    """The pictures in a folder and its subfolders; ids are their paths within it.

    Captions come from ``captions.json``, ``.jsonl`` or ``.csv`` there, if one exists.
    """
    if not folder.is_dir():
        raise UserError(f"dataset folder {folder} does not exist: check the path")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file()
                   and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not paths:
        raise UserError(f"folder {folder} has no pictures ({', '.join(sorted(EXTENSIONS))})")
    known = captions.read_folder_captions(folder)
    items = []
    for path in paths:
        key = path.relative_to(folder).as_posix()
        _check_name(key, f"folder {folder}")
        items.append(Item(key, path, known.get(key, ())))
    return Dataset(
        name=f"folder:{folder.resolve().name}", items=tuple(items), address=f"folder:{folder}",
        references={item.id: item.references for item in items if item.references},
        strays=tuple(sorted(set(known) - {item.id for item in items})),
        unreferenced=tuple(item.id for item in items if not item.references),
    )


def _check_name(name: str, where: str) -> None:
    """UserError for a file name that no table and no line of a message can hold."""
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in name):
        raise UserError(f"{where}: file name {name!a} is not UTF-8 or has a control character: rename it")


def load_texts(path: Path) -> Dataset:
    """A text file with one prompt a line; blank lines are skipped, ids are line numbers."""
    if not path.is_file():
        raise UserError(f"text file {path} does not exist: check the path")
    lines = captions.read_text(path).splitlines()
    items = tuple(Item(f"{number:06d}", None, (line.strip(),))
                  for number, line in enumerate(lines, start=1) if line.strip())
    if not items:
        raise UserError(f"text file {path} has no text: write one prompt a line")
    return Dataset(name=f"texts:{path.name}", items=items, address=f"texts:{path}",
                   references={item.id: item.references for item in items})
