"""The datasets whose place is known: ``data/datasets.toml`` says where they lie and where they come from."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from lib.base import ROOT, UserError, folder_setting, stable_seed
from lib.data.captions import Entry, read_coco, read_text, validated
from lib.data.datasets import Dataset, Item, build, examples

_TABLES = tomllib.loads((ROOT / "data" / "datasets.toml").read_text(encoding="utf-8"))
NAMED: dict[str, dict[str, Any]] = {name: _TABLES.get(table.get("base"), {}) | table for name, table in _TABLES.items()}


def place(name: str) -> tuple[Path, Path, Path]:
    """Return a dataset's folder, its annotation file and its image folder: the first that exists, else where a fetch
    puts them."""
    table = NAMED[name]
    root = Path(folder_setting(table.get("variable", ""), ROOT / table["folder"]))
    annotation, images = (next((root / one for one in table[key] if (root / one).exists()), root / table[key][0])
                          for key in ("annotations", "images"))
    return root, annotation, images


def split_ids(name: str) -> frozenset[str]:
    """Return the ids that a dataset is restricted to; empty if it has all images of its annotation file.

    For ``coco`` those of Karpathy's test images (Karpathy and Li, 2015) with the smallest hashes: the paper does not
    list its 2,000 validation images, and its captioner was tuned on all but Karpathy's.
    """
    if "split" not in NAMED[name]:
        return frozenset()
    lines = (ROOT / NAMED[name]["split"]).read_text(encoding="utf-8").splitlines()
    ids = [key for line in lines if not line.startswith("#") for key in line.split()]
    ids.sort(key=lambda key: (stable_seed(0, "coco-karpathy", key), key))
    return frozenset(ids[:NAMED[name]["split_size"]])


def listed(name: str) -> list[Entry]:
    """Return the images that a dataset lists, there or not; UserError if its annotation file is absent or wrong."""
    annotation, split = place(name)[1], split_ids(name)
    if not annotation.is_file():
        raise UserError(f"dataset {name}: {annotation} is absent: {_remedy(name)}")
    entries = [entry for entry in read_coco(annotation) if not split or entry.id in split]
    if not entries:
        raise UserError(f"{annotation}: none of the ids in {NAMED[name]['split']} is in it: wrong file?")
    return entries


def load_named(name: str) -> Dataset:
    """Return one of these datasets; where no image is there, it has captions only."""
    entries, (root, _, folder) = listed(name), place(name)
    truth = root / "scenes.json"
    scenes = validated(dict[str, dict], read_text(truth), str(truth)) if truth.is_file() else {}
    absent = {entry.id: entry.file_name for entry in entries if not (folder / entry.file_name).is_file()}
    none = len(absent) == len(entries)
    items = [Item(entry.id, None if none else folder / entry.file_name, (), entry.domain, scenes.get(entry.id))
             for entry in entries if none or entry.id not in absent]
    more = f"; {len(absent):,} listed images are not in {folder}, such as {examples(absent.values())}" if absent else ""
    return build(name, name, {entry.id: entry.captions for entry in entries}, items, more, absent=absent,
                 remedy=_remedy(name))


def _remedy(name: str) -> str:
    """How absent files of a dataset come here."""
    return NAMED[name].get("remedy", f"fetch them with ./run_all.sh --fetch --preset paper --dataset {name}, or set "
                                     f"{NAMED[name].get('variable')} to a folder that has the official files")
