"""Which COCO pictures the dataset ``coco`` consists of: 2,000 of Karpathy's 5,000 test pictures.

The paper evaluates on 2,000 pictures of COCO's validation set and does not list them. Its captioner
was tuned on all of COCO but Karpathy's validation and test pictures (Karpathy and Li, 2015), so the
sample is taken from these test pictures. ``data/splits/karpathy_test.txt`` has the official ids;
``python -m lib.splits`` draws the sample from them and writes ``data/splits/coco_karpathy.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lib.datasets import KARPATHY_SPLIT
from lib.errors import UserError
from lib.seeds import stable_seed

OFFICIAL = KARPATHY_SPLIT.with_name("karpathy_test.txt")
SIZE = 2000
SEED = 0
IDS_A_LINE = 14


def official_ids(path: Path = OFFICIAL) -> list[str]:
    """The ids of Karpathy's test pictures; UserError unless the file has unique whole numbers."""
    if not path.is_file():
        raise UserError(f"{path} is absent: it belongs to the repository, restore it with git checkout")
    lines = path.read_text(encoding="utf-8").splitlines()
    ids = [word for line in lines if not line.startswith("#") for word in line.split()]
    wrong = next((word for word in ids if not word.isdecimal()), None)
    if wrong is not None or len(set(ids)) != len(ids) or not ids:
        raise UserError(f"{path}: needs unique image ids, has {wrong or 'repeated or no ones'}: restore it")
    return ids


def sample(ids: list[str], size: int = SIZE, seed: int = SEED) -> list[str]:
    """The ids with the smallest hashes, sorted by number; independent of the order they come in."""
    drawn = sorted(ids, key=lambda key: (stable_seed(seed, "coco-karpathy", key), key))[:size]
    return sorted(drawn, key=int)


def record(ids: list[str]) -> dict[str, Any]:
    """The split file's content: how the sample was made, and its ids."""
    return {
        "name": "coco",
        "what": f"{SIZE:,} of the {len(ids):,} test pictures of Karpathy's COCO split, all of val2014",
        "from": "data/splits/karpathy_test.txt, which names its source",
        "seed": SEED,
        "rule": "the ids with the smallest lib.seeds.stable_seed(seed, 'coco-karpathy', id)",
        "made_by": "python -m lib.splits",
        "ids": sample(ids),
    }


def as_text(data: dict[str, Any]) -> str:
    """JSON with several ids a line."""
    ids = [str(i) for i in data["ids"]]
    rows = [", ".join(ids[i : i + IDS_A_LINE]) for i in range(0, len(ids), IDS_A_LINE)]
    head = json.dumps({key: value for key, value in data.items() if key != "ids"}, indent=1)
    return head.removesuffix("\n}") + ',\n "ids": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def main() -> None:
    """``python -m lib.splits``: write the split file again."""
    argparse.ArgumentParser(prog="python -m lib.splits", description=__doc__.splitlines()[0]).parse_args()
    try:
        KARPATHY_SPLIT.write_text(as_text(record(official_ids())), encoding="utf-8")
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {KARPATHY_SPLIT}")


if __name__ == "__main__":
    main()
