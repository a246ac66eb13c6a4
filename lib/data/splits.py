"""Which COCO images the dataset ``coco`` consists of: 2,000 of Karpathy's 5,000 test images.

The paper evaluates on 2,000 images of COCO's validation set and does not list them. Its captioner was tuned on all
of COCO but Karpathy's validation and test images (Karpathy and Li, 2015), so the sample is taken from these test
images. ``data/splits/karpathy_test.txt`` has the official ids; ``python -m lib.data.splits`` draws the sample and
writes ``data/splits/coco_karpathy.json``.
"""

from __future__ import annotations

import json

from lib.base import stable_seed, write_atomic
from lib.data.datasets import KARPATHY_SPLIT

OFFICIAL = KARPATHY_SPLIT.with_name("karpathy_test.txt")
SIZE = 2000
SEED = 0
IDS_A_LINE = 14


def official_ids() -> list[str]:
    """Return the ids of Karpathy's test images."""
    lines = OFFICIAL.read_text(encoding="utf-8").splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


def sample(ids: list[str], size: int = SIZE, seed: int = SEED) -> list[str]:
    """Return the ids with the smallest hashes, sorted by number; independent of the order they come in."""
    return sorted(sorted(ids, key=lambda key: (stable_seed(seed, "coco-karpathy", key), key))[:size], key=int)


def split_file() -> str:
    """Return the content of the split file: how the sample was made, and its ids, several a line."""
    ids, drawn = official_ids(), sample(official_ids())
    head = {
        "name": "coco",
        "what": f"{SIZE:,} of the {len(ids):,} test images of Karpathy's COCO split, all of val2014",
        "from": "data/splits/karpathy_test.txt, which names its source",
        "seed": SEED,
        "rule": "the ids with the smallest lib.base.stable_seed(seed, 'coco-karpathy', id)",
        "made_by": "python -m lib.data.splits",
    }
    rows = [", ".join(drawn[i : i + IDS_A_LINE]) for i in range(0, len(drawn), IDS_A_LINE)]
    return json.dumps(head, indent=1).removesuffix("\n}") + ',\n "ids": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


if __name__ == "__main__":
    write_atomic(KARPATHY_SPLIT, split_file())
    print(f"wrote {KARPATHY_SPLIT}")
