"""``python -m lib.metrics``: score caption files without a notebook, check the metrics, fetch SPICE's parser."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import pandas as pd
import pydantic
from pydantic import AfterValidator, AliasChoices, Field, StrictFloat, StrictInt, StrictStr

from lib.base import UserError
from lib.data.captions import CAPTION_KEYS, NAME_KEYS, ONE_IS_A_LIST, records, validated
from lib.metrics import CAPTION_SCORES, LABELS, References, score_corpus, spice_official
from lib.metrics.java import find_java, java_version, one_line
from lib.metrics.scores import check_metrics

EXAMPLE = Path(__file__).with_name("example.json")
TOLERANCE = 1e-6  # rounding of the example's values
SCALES = "CIDEr and CIDEr-D are in [0, 10], the others in [0, 1]; papers print them times 100"
FORMS = "COCO results or captions, {id: caption}, {id: [captions]}, JSON lines or CSV (image_id,caption)"
_Id = Annotated[StrictInt | StrictFloat | StrictStr, AfterValidator(str)]
_Record = pydantic.create_model(
    "_Record", image_id=(_Id, Field(validation_alias=AliasChoices("image_id", *NAME_KEYS))),
    captions=(Annotated[list[StrictStr | None], ONE_IS_A_LIST], Field(validation_alias=AliasChoices(*CAPTION_KEYS))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when all went well, 1 when a check failed, 2 on bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (UserError, OSError) as error:  # a file that cannot be written, no connection
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lib.metrics", description="Caption scores, without a notebook.")
    actions = parser.add_subparsers(required=True)
    score = actions.add_parser("score", help="score captions against references",
                               description=f"Both files: {FORMS}. {SCALES}.")
    score.add_argument("candidates", type=Path, help="an image may come several times")
    score.add_argument("references", type=Path)
    score.add_argument("--metrics", default=",".join(CAPTION_SCORES), help="comma-separated; bleu stands for all four")
    score.add_argument("--document-frequencies", choices=("scored", "file"), default="scored",
                       help="CIDEr: count over the scored images (default, as the COCO evaluation) or the whole file")
    score.add_argument("--out", type=Path, default=Path("scores.csv"), help="one row a caption, .csv or .json")
    score.set_defaults(run=_score)
    actions.add_parser("check", help="score a bundled example and compare").set_defaults(run=_check)
    actions.add_parser("fetch-spice", help="fetch the parser of the official SPICE (400 MB)").set_defaults(
        run=lambda _: print(*spice_official.fetch(), sep="\n"))
    return parser


def _score(options: argparse.Namespace) -> int:
    """Print a table of corpus scores and notes, and write one row for each caption."""
    metrics = check_metrics(part.strip() for part in options.metrics.split(",") if part.strip())
    own, given = _read_captions(options.candidates), _read_captions(options.references)
    references = given.fillna({"caption": ""}).groupby("item", sort=False)["caption"].agg(list).to_dict()
    idle = references.keys() - set(own["item"])
    if len(idle) == len(references):
        raise UserError(f"{options.candidates}: no caption is of an image in {options.references}; ids are, for "
                        f"example, {own['image_id'][0]!r} here and {given['image_id'][0]!r} there")
    scored = options.document_frequencies == "scored"
    ready = References.build({item: group for item, group in references.items() if not scored or item not in idle})
    values, table = score_corpus(own["item"], own["caption"], ready, metrics)
    _print_values(values, table)
    if {"cider", "cider_d"} & set(metrics):
        scope = "that are scored, as in the COCO evaluation" if scored else f"of {options.references}"
        print(f"document frequencies of CIDEr: the {ready.frequencies.documents:,} images {scope}")
    if idle:
        print(f"{len(idle):,} images of {options.references} have no caption to score")
    for what, some in (("references have no word and are dropped", ready.dropped),
                       ("captions have no or not every score", list(table.attrs["unscored"].values()))):
        if some:
            print(f"{len(some):,} {what}: {'; '.join(shorten(text, 200) for text in some[:2])}")
    rows = own[["image_id"]].assign(candidate=own.groupby("image_id").cumcount(),
                                    caption=own["caption"].map(one_line, na_action="ignore")).join(table)
    if options.out.suffix.lower() == ".json":
        rows.to_json(options.out, orient="records", indent=1, force_ascii=False, double_precision=15)
    else:
        rows.to_csv(options.out, index=False)
    print(f"wrote {options.out}: {len(rows):,} captions")
    return 0


def _read_captions(path: Path) -> pd.DataFrame:
    """Return one row a caption, in the file's order: image_id as text, caption (None for null), and item, the id that
    both files share: 42, 42.0 and 000042 are the same image. UserError names the file and the place."""
    def coco(data: dict) -> list:
        return validated(list[Any], data["annotations"], f"{path}.annotations")

    found = [validated(_Record, data, where) for where, data in records(path, coco)]
    pairs = [(record.image_id, caption) for record in found for caption in record.captions]
    if not pairs:
        raise UserError(f"{path} holds no caption")
    table = pd.DataFrame(pairs, columns=["image_id", "caption"], dtype=object)
    table["item"] = table["image_id"].str.replace(r"^0*(\d+)(\.0+)?$", r"\1", regex=True)
    ids = table.drop_duplicates("image_id").sort_values("item", kind="stable")
    alike = ids.loc[ids["item"].duplicated(keep=False), "image_id"].tolist()
    if alike:
        raise UserError(f"{path}: image ids {alike[0]!r} and {alike[1]!r} are the same number; write both alike")
    return table


def _print_values(values: dict[str, float], table: pd.DataFrame) -> None:
    print(f"{'metric':<15}{'corpus':>9}{'captions':>10}")
    for name, value in values.items():
        shown = "-" if math.isnan(value) else f"{value:.4f}"
        print(f"{LABELS[name]:<15}{shown:>9}{table[name].notna().sum():>10,}")
    print(SCALES)
    for name, reason in table.attrs["missing"].items():
        print(f"{LABELS[name]} is missing: {reason}")


def _check(options: argparse.Namespace) -> int:
    """Score the bundled example, print each value and whether it is the expected one; official SPICE may be missing."""
    example = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    versions = [f"{name} {metadata.version(name)}" for name in ("pycocoevalcap", "spacy")]
    print(f"Java {java_version(find_java())} ({find_java()}), {', '.join(versions)}")
    ids, captions = zip(*example["candidates"].items(), strict=True)
    values, table = score_corpus(ids, captions, References.build(example["references"]))
    _print_values(values, table)
    expected = example["expected"]
    wrong = [LABELS[name] for name, value in expected.items() if not abs(values[name] - value) <= TOLERANCE]
    print(f"check failed: {', '.join(wrong)} differ" if wrong else f"check passed: {len(expected)} scores as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
