"""``python -m lib.metrics``: score any captions without a notebook, and check the metrics."""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from lib.errors import UserError
from lib.metrics import DEFAULT_METRICS, LABELS, METRICS, Corpus, check_metrics, score_all
from lib.scoring import selfcheck, spice_official
from lib.scoring.tokens import one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 1 when a check failed, 2 on bad input."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    options = _parser().parse_args(arguments)
    try:
        if options.action == "check":
            return selfcheck.run()
        if options.action == "fetch-spice":
            for path in spice_official.fetch():
                print(path)
            return 0
        return _score(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lib.metrics", description="Caption scores, without a notebook."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    score = actions.add_parser("score", help="score captions against references")
    score.add_argument("candidates", type=Path, metavar="CANDIDATES.json",
                       help='COCO results: [{"image_id": 1, "caption": "a cat"}, ...]')
    score.add_argument("references", type=Path, metavar="REFERENCES.json",
                       help='COCO captions, or {"id": ["caption", ...]}; may be gzipped (.gz)')
    score.add_argument("--metrics", default=",".join(DEFAULT_METRICS),
                       help=f"comma-separated: bleu, {', '.join(METRICS)} (default: all)")
    score.add_argument("--out", type=Path, default=Path("scores.csv"),
                       help="one line a caption (default: scores.csv)")
    score.add_argument("--cache", type=Path, default=None,
                       help="where tokens and scene graphs are kept (default: data/cache)")
    actions.add_parser("check", help="score a small bundled example and compare")
    actions.add_parser("fetch-spice", help="fetch the parser of the official SPICE")
    return parser


def _score(options: argparse.Namespace) -> int:
    """The ``score`` command: a table on the screen, a line a caption in a file."""
    metrics = check_metrics(part.strip() for part in options.metrics.split(",") if part.strip())
    if not metrics:
        raise UserError(f"--metrics: name at least one of bleu, {', '.join(METRICS)}")
    ids, captions = read_candidates(options.candidates)
    references = read_references(options.references)
    if not set(ids) & references.keys():
        raise UserError(
            f"{options.candidates}: none of its {len(set(ids))} image ids is in "
            f"{options.references}; do both speak of the same images?"
        )
    corpus = Corpus.build(references, options.cache)
    table, values = score_all(ids, captions, corpus, metrics)
    _print_values(values, table)
    _print_notes(table, ids, references)
    write_table(options.out, ids, captions, table)
    print(f"wrote {options.out}: {len(table)} captions")
    return 0


def _print_values(values: Mapping[str, float], table: pd.DataFrame) -> None:
    print(f"{'metric':<15}{'corpus':>9}{'x 100':>9}{'captions':>10}")
    for name, value in values.items():
        scored = int(table[name].notna().sum())
        shown = (("-", "-") if math.isnan(value) else (f"{value:.4f}", f"{100 * value:.2f}"))
        print(f"{LABELS[name]:<15}{shown[0]:>9}{shown[1]:>9}{scored:>10}")


def _print_notes(
    table: pd.DataFrame, ids: Sequence[str], references: Mapping[str, Sequence[str]]
) -> None:
    """What is missing, what was left out, and what the numbers rest on."""
    for name, reason in table.attrs["missing"].items():
        print(f"{LABELS[name]} is missing: {reason}")
    unscored = table.attrs["unscored"]
    if unscored:
        print(f"{len(unscored)} captions have no score, the first: {next(iter(unscored.values()))}")
    idle = len(references.keys() - set(ids))
    if idle:
        print(f"{idle} images have references but no candidate; they count in document frequencies")


def read_candidates(path: Path) -> tuple[list[str], list[str | None]]:
    """Image ids and captions of a COCO results file; an image may come several times.

    A caption that is not text becomes ``None`` and spoils no other.
    """
    entries = _read_json(path)
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{path}: expected a list of {{"image_id": ..., "caption": ...}}, not empty')
    ids, captions = [], []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "image_id" not in entry or "caption" not in entry:
            raise UserError(f"{path}: entry {number} needs an image_id and a caption")
        ids.append(str(entry["image_id"]))
        captions.append(entry["caption"] if isinstance(entry["caption"], str) else None)
    return ids, captions


def read_references(path: Path) -> dict[str, list[str]]:
    """Image id -> captions, of a COCO captions file or a plain {id: [captions]}."""
    content = _read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected COCO captions or {{id: [captions]}}, not empty")
    if "annotations" not in content:
        for key, captions in content.items():
            if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
                raise UserError(f"{path}: the references of {key!r} are not a list of texts")
        return content
    references: dict[str, list[str]] = {}
    for image in content.get("images") or []:
        if isinstance(image, dict) and "id" in image:
            references[str(image["id"])] = []
    for number, entry in enumerate(content["annotations"] or []):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
            raise UserError(f"{path}: annotation {number} has no caption")
        if "image_id" not in entry:
            raise UserError(f"{path}: annotation {number} has no image_id")
        references.setdefault(str(entry["image_id"]), []).append(entry["caption"])
    if not any(references.values()):
        raise UserError(f"{path}: holds no caption at all")
    return references


def write_table(
    path: Path, ids: Sequence[str], captions: Sequence[str | None], table: pd.DataFrame
) -> None:
    """CSV with one line a caption: image_id, candidate (its number within the image), scores."""
    lines = table.copy()
    lines.insert(0, "image_id", list(ids))
    lines.insert(1, "candidate", lines.groupby("image_id").cumcount())
    lines.insert(2, "caption", [None if c is None else one_line(c) for c in captions])
    try:
        lines.to_csv(path, index=False)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror})") from error


def _read_json(path: Path) -> object:
    """The content of a JSON file, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
