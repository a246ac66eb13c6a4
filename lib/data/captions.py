"""Caption files: COCO and NoCaps JSON, and those of a folder of yours. Only LF, CR LF and CR end a line."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, StrictInt, StrictStr

from lib.base import UserError

CAPTION_FILES = ("captions.json", "captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
NAME_KEYS, CAPTION_KEYS = ("file_name", "file", "image", "filename"), ("captions", "caption", "text")


def _inside(name: str) -> str:
    """A file name as a POSIX path; ValueError if it leaves its folder (a link there is the user's wish)."""
    pure = PurePosixPath(name)
    if not name.strip() or pure.is_absolute() or ".." in pure.parts or re.search(r"[\\:\x00-\x1f]", name):
        raise ValueError(f"file name {name[:100]!r} is empty or leaves its folder")
    return pure.as_posix()


Id = Annotated[StrictInt | StrictStr, AfterValidator(str)]
FileName = Annotated[StrictStr, AfterValidator(_inside)]
Captions = Annotated[list[StrictStr], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Entry(pydantic.BaseModel):
    """A listed image: its name in the image folder, NoCaps' domain, its captions."""

    id: Id
    file_name: FileName
    domain: StrictStr | None = None
    captions: list[str] = []


_Annotation = pydantic.create_model("_Annotation", image_id=(Id, ...), caption=(StrictStr, ...))
_CocoFile = pydantic.create_model("_CocoFile", images=(Annotated[list[Entry], Field(min_length=1)], ...),
                                  annotations=(Annotated[list[_Annotation], Field(min_length=1)], ...))
_Record = pydantic.create_model("_Record", file_name=(FileName, Field(validation_alias=AliasChoices(*NAME_KEYS))),
                                captions=(Captions, Field(validation_alias=AliasChoices(*CAPTION_KEYS))))


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file (gzip if so named), without a byte-order mark."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): save it as text in UTF-8") from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return (line number from 1, text) of the lines that are not blank."""
    lines = enumerate(re.split(r"\r\n|\n|\r", read_text(path)), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def validated(model: Any, data: Any, where: str) -> Any:
    """Return data (JSON if a text) as a pydantic model; UserError that names the first place where it does not fit."""
    adapter = pydantic.TypeAdapter(model)
    try:
        return adapter.validate_json(data) if isinstance(data, str) else adapter.validate_python(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, (where, *first['loc'])))}: {first['msg']} (given: "
                        f"{first['input']!r:.80}): correct the file or fetch it again") from error


def with_words(captions: Iterable[str]) -> tuple[str, ...]:
    """Return the captions that have a letter or digit, each with single blanks: no score is defined for the others."""
    return tuple(" ".join(text.split()) for text in captions if any(map(str.isalnum, text)))


def read_coco(path: Path) -> list[Entry]:
    """Return the images of a file in the COCO or NoCaps format with their captions, in its order; ids become texts."""
    data = validated(_CocoFile, read_text(path), str(path))
    entries = {entry.id: entry for entry in data.images}
    if len(entries) < len(data.images):
        raise UserError(f"{path}: an image id is there twice: ids must be unique")
    for annotation in data.annotations:
        if annotation.image_id not in entries:
            raise UserError(f"{path}: no image has the image_id {annotation.image_id} of an annotation: correct it")
        entries[annotation.image_id].captions.append(annotation.caption)
    return data.images


def read_folder_captions(path: Path) -> dict[str, list[str]]:
    """Return captions by file name from one of CAPTION_FILES; those of one image add up. JSON: COCO captions, ``{name:
    caption or list}`` or a list of records; JSONL: a record a line; CSV: a header with file_name and caption."""
    readers = {".csv": _csv_records, ".json": _json_records,
               ".jsonl": lambda path: ((f"{path} line {number}", line) for number, line in read_lines(path))}
    known: dict[str, list[str]] = {}
    for where, data in readers[path.suffix.lower()](path):
        record = validated(_Record, data, where)
        known.setdefault(record.file_name, []).extend(record.captions)
    if not known:
        raise UserError(f"{path} has no captions: write some or remove the file")
    return known


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # JSON keeps the last of equal names without a word
        if twice := [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]:
            raise UserError(f"{path}: {twice[0]!r:.80} is there twice: give its captions as one list")
        return dict(pairs)

    text = read_text(path)
    data = validated(dict[str, Any] | list[Any], text, str(path))
    json.loads(text, object_pairs_hook=once, parse_int=str)
    if isinstance(data, dict) and "annotations" in data:
        data = {entry.file_name: entry.captions for entry in read_coco(path)}
    if isinstance(data, dict):
        data = [{"file_name": name, "captions": texts} for name, texts in data.items()]
    return ((f"{path}[{index}]", record) for index, record in enumerate(data))


def _csv_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line by itself, so that a quote which is not closed is an error there and takes no other line along."""
    header: list[str] = []
    for number, line in read_lines(path):
        where = f"{path} line {number}"
        if not header:
            delimiter = max(",;\t", key=line.count)
        reader = csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            fields = [field.strip() for field in next(reader)]
        except csv.Error as error:
            raise UserError(f"{where}: a quote is not closed ({error}): write each caption on one line") from error
        if header and len(fields) != len(header):
            raise UserError(f"{where} has {len(fields)} fields, the header {len(header)}: put captions in quotes")
        if header:
            yield where, dict(zip(header, fields, strict=True))
        header = header or [field.lower() for field in fields]
        if [sum(field in keys for field in header) for keys in (NAME_KEYS, CAPTION_KEYS)] != [1, 1]:
            raise UserError(f"{where} needs one column file_name and one column caption: write file_name,caption")
