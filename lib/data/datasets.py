"""A dataset: sources with their references. A subset is drawn by hashing the ids of all *listed* images: a larger one
contains a smaller one, no order of files and no fetching changes it, and a drawn image that is absent is counted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from lib.base import UserError, stable_seed
from lib.data.captions import with_words
from lib.data.images import decode_image


@dataclass(frozen=True)
class Item:
    """One source: an image with human captions, perhaps none, or a text (path None). domain: NoCaps' in-domain,
    near-domain or out-domain; scene: the true scene as plain data (picture book only)."""

    id: str
    path: Path | None
    references: tuple[str, ...] = ()
    domain: str | None = None
    scene: Mapping[str, Any] | None = None

    def image(self) -> Image.Image:
        """Return the image in RGB; UserError if it cannot be read. A text has none."""
        return decode_image(self.path)


@dataclass(frozen=True)
class Dataset:
    """Items, and what was read to get them. name: without path, for seeds and folders; references: id -> captions of the
    FULL split, for document frequencies; absent: id -> file name of listed images that are not there; notes: one-line
    remarks; remedy: how absent files come here."""

    name: str
    items: tuple[Item, ...]
    references: Mapping[str, tuple[str, ...]]
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    remedy: str = "use folder:PATH for images"

    def __len__(self) -> int:
        return len(self.items)

    def by_id(self) -> dict[str, Item]:
        """Return the items by id."""
        return {item.id: item for item in self.items}

    def subset(self, n: int | None, seed: int = 0) -> Dataset:
        """Return a seeded sample of n listed items (None, or n above the size: all), in the dataset's order; UserError
        unless n >= 1, or if no drawn image is there."""
        if n is None:
            return self
        kept = draw({item.id for item in self.items} | set(self.absent), self.name, n, seed)
        items = tuple(item for item in self.items if item.id in kept)
        if not items:
            raise UserError(f"dataset {self.name}: no image drawn with seed {seed} is there: {self.remedy}")
        return replace(self, items=items, absent={key: name for key, name in self.absent.items() if key in kept})

    def feeds(self, task: str) -> str | None:
        """Return None if the ``image`` or ``text`` task has a source here, else one line on what is missing."""
        needed, what, remedy = {"image": ("path", "images", self.remedy),
                                "text": ("references", "captions", "add captions.csv to it")}[task]
        here = any(getattr(item, needed) for item in self.items)
        return None if here else f"dataset {self.name} has no {what}, which {task} reconstruction starts from: {remedy}"

    def check_images(self) -> None:
        """Decode every image; UserError that names all that cannot be read, and why the first cannot."""
        bad: dict[str, UserError] = {}
        for item in self.items:
            try:
                item.image() if item.path else None
            except UserError as error:
                bad[item.id] = error
        if bad:
            raise UserError(f"dataset {self.name}: {len(bad)} of {len(self.items)} images cannot be read: "
                            f"{examples(bad, 99)}; {next(iter(bad.values()))}")

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


def examples(names: Collection[str], most: int = 3) -> str:
    """Return the first names in one line, and how many more there are."""
    return ", ".join(list(names)[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def build(name: str, raw: Mapping[str, Collection[str]], items: Iterable[Item], more: str = "", **rest: Any) -> Dataset:
    """Return a dataset of items with those of their ``raw`` captions that have a word; notes say what was read, and more."""
    if odd := [key for key in (name, *raw) if re.search(r"[\x00-\x1f\ud800-\udfff]", key)]:
        raise UserError(f"dataset {name!a}: {odd[0]!a} is not UTF-8 or has a control character: rename it")
    captions = {key: with_words(texts) for key, texts in raw.items()}
    items = tuple(replace(item, references=captions[item.id]) for item in items)
    images = sum(item.path is not None for item in items)
    count = f"{sum(map(len, captions.values())):,}"
    line = f"{name}: {images:,} images, {count} captions" if images else f"{name}: {count} texts, no images"
    bare = [item.id for item in items if not item.references]
    if 0 < len(bare) < len(items):
        line += f"; images without captions: {len(bare):,} ({examples(bare)})"
    fewer = [key for key, texts in raw.items() if len(texts) > len(captions[key])]
    words = (f"{name}: captions without a word were left out: {examples(fewer)}",) if fewer else ()
    references = {key: texts for key, texts in captions.items() if texts}
    return Dataset(name, items, references, notes=(line + more, *words), **rest)
