"""Caption files: COCO and NoCaps JSON, and those of a user. Only LF, CR LF and CR end a line."""

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
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
ONE_IS_A_LIST = BeforeValidator(lambda value: value if isinstance(value, list) else [value])


class Entry(pydantic.BaseModel):
    """A listed image: its name in the image folder, NoCaps' domain, its captions."""
    id: Id
    file_name: FileName
    domain: StrictStr | None = None
    captions: list[str] = []


_Annotation = pydantic.create_model("_Annotation", image_id=(Id, ...), caption=(StrictStr, ...))
_CocoFile = pydantic.create_model("_CocoFile", images=(Annotated[list[Entry], Field(min_length=1)], ...),
                                  annotations=(Annotated[list[_Annotation], Field(min_length=1)], ...))
_Record = pydantic.create_model(
    "_Record", file_name=(FileName, Field(validation_alias=AliasChoices(*NAME_KEYS, "image_id"))),
    captions=(Annotated[list[StrictStr], ONE_IS_A_LIST], Field(validation_alias=AliasChoices(*CAPTION_KEYS))))
_adapter = cache(pydantic.TypeAdapter)


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file (gzip if so named), without a byte-order mark."""
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'absent'}: check the path")
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
    try:
        return _adapter(model).validate_json(data) if isinstance(data, str) else _adapter(model).validate_python(data)
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
    """Return captions by file name from one of CAPTION_FILES; those of one image add up."""
    known: dict[str, list[str]] = {}
    for where, data in records(path, lambda _: [entry.model_dump() for entry in read_coco(path)]):
        record = validated(_Record, data, where)
        known.setdefault(record.file_name, []).extend(record.captions)
    if not known:
        raise UserError(f"{path} has no captions: write some or remove the file")
    return known


def records(path: Path, coco: Callable[[dict], list]) -> Iterator[tuple[str, Any]]:
    """Return (place, record) of each record of a caption file, perhaps gzipped. JSON: ``{name: caption or captions}``, a
    list of records, or COCO captions, whose records ``coco`` gives; JSONL: a record a line; CSV: so, below a header."""
    suffix = PurePosixPath(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".csv":
        return _csv_records(path)
    if suffix == ".jsonl":
        return ((f"{path} line {number}", line) for number, line in read_lines(path))
    text = read_text(path)
    data = validated(dict[str, Any] | list[Any], text, str(path))
    json.loads(text, object_pairs_hook=partial(_once, path), parse_int=str)
    if isinstance(data, dict):
        data = coco(data) if "annotations" in data else [{"file_name": n, "captions": c} for n, c in data.items()]
    return ((f"{path} entry {number}", record) for number, record in enumerate(data, start=1))


def _once(path: Path, pairs: list[tuple[str, Any]]) -> None:
    """UserError if a JSON object has a name twice: readers keep the last one without a word."""
    if len(dict(pairs)) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise UserError(f"{path}: {twice!r:.80} is there twice: give its captions as one list")


def _csv_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line by itself: a quote that is not closed is an error there and takes no other line along."""
    header: list[str] = []
    for number, line in read_lines(path):
        where = f"{path} line {number}"
        if not header:
            delimiter = max(",;\t", key=line.count)
        reader = csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            fields = [field.strip() for field in next(reader)]
        except csv.Error as error:
            raise UserError(f"{where}: a quote is not closed on it ({error}): write each caption on one line") from error
        if not header:
            header = [field.lower() for field in fields]
            if sum(field in CAPTION_KEYS for field in header) != 1 or not {"image_id", *NAME_KEYS} & {*header}:
                raise UserError(f"{where} needs a column file_name (or image_id) and one column caption, for example "
                                "file_name,caption")
        elif len(fields) != len(header):
            raise UserError(f"{where} has {len(fields)} fields, the header {len(header)}: put captions in quotes")
        else:
            yield where, dict(zip(header, fields, strict=True))
