"""Reading caption files: COCO and NoCaps JSON, scenes, and the captions file of a folder of yours.

Every reader returns plain records or raises UserError with the file, the place in it and the
remedy. File names come from outside: :func:`safe_name` keeps them inside their folder.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lib.errors import UserError

FOLDER_FILES = ("captions.json", "captions.jsonl", "captions.csv")
_NAME_KEYS = ("file_name", "file", "image", "filename")
_CAPTION_KEYS = ("captions", "caption", "text")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character that takes two such codes
_shown = reprlib.Repr()  # of values in messages, which may be as long as a file
_shown.maxstring = _shown.maxother = 100


@dataclass(frozen=True)
class Entry:
    """One listed picture: id, file name inside the image folder, captions (perhaps none), domain.

    size: (width, height) in pixels, where the file tells it; links: its addresses in the network by
    their keys in the file (``coco_url``, ``flickr_url``).
    """

    id: str
    file_name: str
    captions: tuple[str, ...]
    domain: str | None = None
    size: tuple[int, int] | None = None
    links: Mapping[str, str] = field(default_factory=dict)


def read_text(path: Path) -> str:
    """A UTF-8 text file (gzip if so named), without a byte-order mark."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> Any:
    """Parse a JSON file."""
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path} is empty: fetch or write it again")
    return _parse(text, str(path))


def _parse(text: str, where: str) -> Any:
    """Parse JSON. Half characters are refused here: they could not be written into any table."""
    try:
        data = json.loads(text)
        if _HALF_CHARACTER.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): fetch or write it again") from error
    return data


def safe_name(name: Any, where: str) -> str:
    """Check that a file name from a data file stays inside its folder; returns it.

    The check is by name only: a link that the user has put into the folder is the user's wish.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: file name {_shown.repr(name)} is not a text: correct it")
    pure = PurePosixPath(name)
    outside = pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name
    if outside or any(ord(character) < 32 for character in name):
        raise UserError(f"{where}: file name {_shown.repr(name)} leaves its folder: only names inside it are allowed")
    return pure.as_posix()


def clean_caption(text: Any, where: str) -> str:
    """One caption without surrounding blanks; UserError if it is empty or no text."""
    if not isinstance(text, str):
        raise UserError(f"{where}: caption {_shown.repr(text)} is not a text: correct it")
    caption = " ".join(text.split())
    if not caption:
        raise UserError(f"{where}: the caption is empty: write one or remove the entry")
    return caption


# --- COCO captions and NoCaps ------------------------------------------------------------------


def read_coco(path: Path) -> list[Entry]:
    """Read ``{"images": [...], "annotations": [...]}``, in the order of ``images``.

    NoCaps is the same format with a ``domain`` for each image. Ids may be numbers or texts and
    become texts. Raises UserError if the file is malformed, repeats an id, captions an unlisted
    picture, or has no caption at all.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected an object with images and annotations, as in COCO captions")
    images = _list_of_objects(data, "images", path)
    annotations = _list_of_objects(data, "annotations", path)
    ids = _unique((_value(image, "id", f"{path}, images[{i}]") for i, image in enumerate(images)),
                  f"{path}: image id")
    _unique((a["id"] for a in annotations if "id" in a), f"{path}: annotation id")
    captions: dict[str, list[str]] = {key: [] for key in ids}
    for index, annotation in enumerate(annotations):
        where = f"{path}, annotations[{index}]"
        key = str(_value(annotation, "image_id", where))
        if key not in captions:
            raise UserError(f"{where}: image_id {key} is not among the images: correct the file")
        captions[key].append(clean_caption(_value(annotation, "caption", where), where))
    if not annotations:
        raise UserError(f"{path} has no annotations: fetch or write it again")
    return [
        Entry(key, safe_name(_value(image, "file_name", f"{path}, image {key}"), f"{path}, image {key}"),
              tuple(captions[key]), _domain(image, f"{path}, image {key}"), _size(image), _links(image))
        for key, image in zip(ids, images, strict=True)
    ]


def _list_of_objects(data: Mapping[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    value = data.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"{path}: the list {key!r} is absent or malformed: expected the COCO captions format")
    if key == "images" and not value:
        raise UserError(f"{path} lists no images: fetch or write it again")
    return value


def _value(record: Mapping[str, Any], key: str, where: str) -> Any:
    if record.get(key) is None:
        raise UserError(f"{where}: the key {key!r} is absent: correct the file")
    return record[key]


def _domain(image: Mapping[str, Any], where: str) -> str | None:
    domain = image.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise UserError(f"{where}: domain {_shown.repr(domain)} is not a text: correct the file")
    return domain


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def _links(image: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key, value in image.items() if key.endswith("_url") and isinstance(value, str)}


def _unique(values: Iterable[Any], what: str) -> list[str]:
    """The values as texts; UserError at the first one that is repeated or no id."""
    seen: dict[str, None] = {}
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise UserError(f"{what} {_shown.repr(value)} is neither a whole number nor a text: correct the file")
        if str(value) in seen:
            raise UserError(f"{what} {value} is there twice: ids must be unique, remove one")
        seen[str(value)] = None
    return list(seen)


def read_scenes(path: Path) -> dict[str, dict[str, Any]]:
    """True scenes by image id: JSON ``{image id: scene}``."""
    data = read_json(path)
    if not isinstance(data, dict) or not all(isinstance(scene, dict) for scene in data.values()):
        raise UserError(f"{path}: expected an object of scenes by image id: build the picture book again")
    return data


# --- a folder's own captions file --------------------------------------------------------------


def read_folder_captions(folder: Path) -> dict[str, tuple[str, ...]]:
    """Captions by file name from the folder's captions file; empty if it has none.

    JSON: COCO captions, ``{name: caption or list}`` or a list of records; JSONL: one record a
    line; CSV: columns ``file_name`` and ``caption``. A record has ``file_name`` (or file, image,
    filename) and ``caption``, ``captions`` or ``text``; records of one picture add up.
    """
    found = [folder / name for name in FOLDER_FILES if (folder / name).is_file()]
    if not found:
        return {}
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"folder {folder} has {names}: keep one captions file")
    path = found[0]
    known: dict[str, list[str]] = {}
    for where, name, texts in _folder_records(path):
        known.setdefault(safe_name(name, where), []).extend(
            clean_caption(text, where) for text in ([texts] if isinstance(texts, str) else texts)
        )
    if not known:
        raise UserError(f"{path} has no captions: write some or remove the file")
    return {name: tuple(texts) for name, texts in known.items()}


def _folder_records(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """(place for messages, file name, caption or list of captions) of each record of a file."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if line.strip():
                yield _record(_parse(line, f"{path} line {number}"), f"{path} line {number}")
    elif path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        for row in reader:
            yield _record(row, f"{path} line {reader.line_num}")
    else:
        yield from _json_records(path)


def _json_records(path: Path) -> Iterator[tuple[str, Any, Any]]:
    data = read_json(path)
    if isinstance(data, dict) and "annotations" in data:
        for entry in read_coco(path):
            yield str(path), entry.file_name, list(entry.captions)
    elif isinstance(data, dict):
        for name, texts in data.items():
            yield _record({"file_name": name, "captions": texts}, f"{path}, {_shown.repr(name)}")
    elif isinstance(data, list):
        for index, record in enumerate(data):
            yield _record(record, f"{path}[{index}]")
    else:
        raise UserError(f"{path}: expected an object or a list of captions")


def _record(record: Any, where: str) -> tuple[str, Any, Any]:
    """Take the file name and the captions out of one record, under any of their usual keys."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected a record with file_name and caption")
    name = next((record[key] for key in _NAME_KEYS if record.get(key) is not None), None)
    texts = next((record[key] for key in _CAPTION_KEYS if record.get(key) is not None), None)
    if name is None or texts is None:
        has = ", ".join(map(_shown.repr, list(record)[:9])) or "nothing"
        raise UserError(f"{where}: needs file_name and caption, has {has}")
    if not isinstance(texts, (str, list)):
        raise UserError(f"{where}: captions {_shown.repr(texts)} are neither a text nor a list of texts")
    return where, name, texts
