"""Caption files of the metrics command: COCO results, COCO captions, plain JSON and CSV, for either side."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lib.base import UserError
from lib.data.captions import read_text
from lib.metrics.java import one_line

ID_KEYS = ("image_id", "file_name", "filename", "file", "image")
CAPTION_KEYS = ("caption", "captions", "text")


def read_captions(path: Path) -> list[tuple[str, str | None]]:
    """Return (image id as text, caption) in the file's order; a caption that is no text becomes None.

    JSON: ``[{"image_id": 1, "caption": "a cat"}, ...]``, COCO captions, ``{id: caption}`` or ``{id: [captions]}``;
    CSV: a header with image_id and caption. Any of them may be gzipped (.gz). UserError names the file and the place.
    """
    records = _csv_records if path.name.lower().removesuffix(".gz").endswith(".csv") else _json_records
    found = [pair for where, record in records(path) for pair in _pairs(record, where)]
    if not found:
        raise UserError(f"{path} holds no caption")
    return found


def by_number(ids: Sequence[str], path: Path) -> dict[str, str]:
    """Return {id: the id that both files share}: 42, 42.0 and 000042 are the same image.

    UserError if that makes one image of two ids of the same file.
    """
    shared = {id_: re.sub(r"^0*(\d+)(\.0+)?$", r"\1", id_) for id_ in ids}
    owners: dict[str, str] = {}
    for id_, key in shared.items():
        if owners.setdefault(key, id_) != id_:
            raise UserError(f"{path}: image ids {owners[key]!r} and {id_!r} are the same number; write both alike")
    return shared


def write_table(path: Path, ids: Sequence[str], captions: Sequence[str | None], table: pd.DataFrame) -> None:
    """Write one row for each caption, as CSV or (.json) JSON: image_id, candidate (its number within the image), ..."""
    rows = table.copy()
    rows.insert(0, "image_id", list(ids))
    rows.insert(1, "candidate", rows.groupby("image_id").cumcount())
    rows.insert(2, "caption", [None if c is None else one_line(c) for c in captions])
    if path.suffix.lower() == ".json":
        rows.to_json(path, orient="records", indent=1, force_ascii=False, double_precision=15)
    else:
        rows.to_csv(path, index=False)


def _pairs(record: Any, where: str) -> Iterator[tuple[str, str | None]]:
    """Yield (id, caption) of one record."""
    record = record if isinstance(record, Mapping) else {}
    id_ = next((record[key] for key in ID_KEYS if record.get(key) is not None), None)
    texts = next((record[key] for key in CAPTION_KEYS if key in record), record)
    if not isinstance(id_, str | int | float) or texts is record:
        raise UserError(f"{where}: needs image_id and caption, has {', '.join(map(repr, record)) or 'neither'}")
    for text in texts if isinstance(texts, list) else [texts]:
        yield str(id_), text if isinstance(text, str) else None


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of each entry."""
    try:
        data = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if isinstance(data, Mapping) and isinstance(data.get("annotations"), list):
        data = data["annotations"]
    if isinstance(data, Mapping):
        yield from ((f"{path}, {key!r}", {"image_id": key, "caption": value}) for key, value in data.items())
    elif isinstance(data, list):
        yield from ((f"{path}, entry {number}", entry) for number, entry in enumerate(data, start=1))
    else:
        raise UserError(f"{path}: expected captions, for example {{image id: [captions]}}")


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, record) of each row; a caption with a comma or a line end must be in quotes."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header, end = None, 0
    try:
        for row in filter(None, reader):
            end = reader.line_num
            where = f"{path} line {end}"
            if header is None:
                header = [name.strip().lower() for name in row]
                if not set(header) & set(ID_KEYS) or not set(header) & set(CAPTION_KEYS):
                    raise UserError(f"{where}: the first line must name the columns, as image_id,caption does")
            elif len(row) != len(header):
                raise UserError(f"{where} has {len(row)} fields, the header {len(header)}: put captions in quotes")
            else:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path} after line {end}: {error}; is a quote not closed?") from error
