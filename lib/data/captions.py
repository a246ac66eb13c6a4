"""Caption files: COCO and NoCaps JSON, and those that lie in a folder of yours.

Readers raise UserError with the file, the place in it and the remedy. Only LF, CR LF and CR end a line.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lib.base import UserError

CAPTION_FILES = ("captions.json", "captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
_NAME_KEYS = ("file_name", "file", "image", "filename")
_CAPTION_KEYS = ("captions", "caption", "text")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character that takes two such codes
_shown = reprlib.Repr()  # of values in messages, which may be as long as a file
_shown.maxstring = _shown.maxother = 100
Record = tuple[str, str, list[str]]  # place for messages, file name, captions


@dataclass(frozen=True)
class Entry:
    """A listed image: its file name in the image folder, its captions as they are, NoCaps' domain, and the listed
    URL and (width, height)."""

    id: str
    file_name: str
    captions: tuple[str, ...]
    domain: str | None
    links: Mapping[str, str]
    size: tuple[Any, Any]


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file (gzip if so named), without a byte-order mark."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return (line number from 1, text) of the lines that are not blank."""
    lines = enumerate(re.split(r"\r\n|\n|\r", read_text(path)), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def read_json(path: Path) -> Any:
    """Return the parsed content of a JSON file."""
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path} is empty: fetch or write it again")
    return _parse(text, str(path))


def with_words(captions: Iterable[str]) -> tuple[str, ...]:
    """Return the captions that have a letter or digit, each with single blanks: no score is defined for the others."""
    return tuple(" ".join(text.split()) for text in captions if any(map(str.isalnum, text)))


def read_coco(path: Path) -> list[Entry]:
    """Return the images of ``{"images": [...], "annotations": [...]}`` with their captions, in the file's order.

    NoCaps adds a ``domain`` to each image. Ids become texts. UserError if the file is malformed, repeats an image
    id, captions an unlisted image, or has no caption at all.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected an object with images and annotations, as in COCO captions")
    for key in ("images", "annotations"):
        if not isinstance(data.get(key), list) or not all(isinstance(record, dict) for record in data[key]):
            raise UserError(f"{path}: the list {key!r} is absent or malformed: expected the COCO captions format")
        if not data[key]:
            raise UserError(f"{path} has no {key}: fetch or write it again")
    captions: dict[str, list[str]] = {}
    for index, image in enumerate(data["images"]):
        key = _value(image, "id", f"{path}, images[{index}]", (int, str))
        if str(key) in captions:
            raise UserError(f"{path}: image id {key} is there twice: ids must be unique, remove one")
        captions[str(key)] = []
    for index, annotation in enumerate(data["annotations"]):
        where = f"{path}, annotations[{index}]"
        key = str(_value(annotation, "image_id", where, (int, str)))
        if key not in captions:
            raise UserError(f"{where}: image_id {key} is not among the images: correct the file")
        captions[key].append(_value(annotation, "caption", where, (str,)))
    return [_entry(image, tuple(captions[str(image["id"])]), f"{path}, image {image['id']}") for image in data["images"]]


def read_folder_captions(path: Path) -> dict[str, list[str]]:
    """Return captions by file name from one of CAPTION_FILES.

    JSON: COCO captions, ``{name: caption or list}`` or a list of records; JSONL: one record a line; CSV: a header
    with ``file_name`` and ``caption``. A record has ``file_name`` (or file, image, filename) and ``caption``,
    ``captions`` or ``text``; records of one image add up.
    """
    known: dict[str, list[str]] = {}
    readers = {".jsonl": _jsonl_records, ".csv": _csv_records, ".json": _json_records}
    for where, name, texts in readers[path.suffix.lower()](path):
        known.setdefault(_safe_name(name, where), []).extend(texts)
    if not known:
        raise UserError(f"{path} has no captions: write some or remove the file")
    return known


def _parse(text: str, where: str) -> Any:
    """Parsed JSON. Half characters are refused here: they could not be written into any table."""
    try:
        data = json.loads(text)
        if _HALF_CHARACTER.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): fetch or write it again") from error
    return data


def _value(record: Mapping[str, Any], key: str, where: str, types: tuple[type, ...]) -> Any:
    """The value of a key; UserError if it is absent or of another type."""
    value = record.get(key)
    if value is None:
        raise UserError(f"{where}: the key {key!r} is absent: correct the file")
    if not isinstance(value, types) or isinstance(value, bool):
        raise UserError(f"{where}: {key} {_shown.repr(value)} is not a "
                        f"{'text' if types == (str,) else 'whole number or a text'}: correct the file")
    return value


def _safe_name(name: Any, where: str) -> str:
    """A file name from a data file; UserError if it is none or leaves its folder (links there are the user's wish)."""
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: file name {_shown.repr(name)} is not a text: correct it")
    pure = PurePosixPath(name)
    outside = pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name
    if outside or any(ord(character) < 32 for character in name):
        raise UserError(f"{where}: file name {_shown.repr(name)} leaves its folder: only names inside it are allowed")
    return pure.as_posix()


def _entry(image: Mapping[str, Any], captions: tuple[str, ...], where: str) -> Entry:
    name = _safe_name(_value(image, "file_name", where, (str,)), where)
    domain = _value(image, "domain", where, (str,)) if image.get("domain") is not None else None
    links = {key: value for key, value in image.items() if key.endswith("_url") and isinstance(value, str)}
    return Entry(str(image["id"]), name, captions, domain, links, (image.get("width"), image.get("height")))


def _jsonl_records(path: Path) -> Iterator[Record]:
    for number, line in read_lines(path):
        yield _record(_parse(line, f"{path} line {number}"), f"{path} line {number}")


def _csv_records(path: Path) -> Iterator[Record]:
    """Each line by itself, so that a quote which is not closed is an error there and takes no other line along."""
    header, delimiter = None, ","
    for number, line in read_lines(path):
        where = f"{path} line {number}"
        if header is None:
            delimiter = max(",;\t", key=line.count)
        try:
            fields = next(csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True))
        except csv.Error as error:
            raise UserError(f"{where}: a quote is not closed, or the field is too long ({error}): "
                            "write each caption on one line, in quotes") from error
        if header is None:
            header = [field.strip().lower() for field in fields]
            if not set(header) & set(_NAME_KEYS) or not set(header) & set(_CAPTION_KEYS):
                raise UserError(f"{where} has no columns file_name and caption: make file_name,caption the first line")
        elif len(fields) != len(header):
            raise UserError(f"{where} has {len(fields)} fields, the header {len(header)}: put captions with a comma "
                            "in quotes")
        else:
            yield _record(dict(zip(header, fields, strict=True)), where)


def _json_records(path: Path) -> Iterator[Record]:
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


def _record(record: Any, where: str) -> Record:
    """The file name and the captions of one record, under any of their usual keys."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected a record with file_name and caption")
    name = next((record[key] for key in _NAME_KEYS if record.get(key) is not None), None)
    texts = next((record[key] for key in _CAPTION_KEYS if record.get(key) is not None), None)
    if name is None or texts is None:
        has = ", ".join(map(_shown.repr, list(record)[:9])) or "nothing"
        raise UserError(f"{where}: needs file_name and caption, has {has}")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: captions {_shown.repr(texts)} are neither a text nor a list of texts")
    return where, name, texts
