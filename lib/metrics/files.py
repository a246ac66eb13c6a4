"""Caption files of the metrics command, for either side: COCO results, COCO captions, plain JSON, JSON lines, CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pydantic
from pydantic import AfterValidator, AliasChoices, Field, StrictFloat, StrictInt, StrictStr

from lib.base import UserError
from lib.data.captions import CAPTION_KEYS, NAME_KEYS, ONE_IS_A_LIST, records, validated

_Id = Annotated[StrictInt | StrictFloat | StrictStr, AfterValidator(str)]
_Record = pydantic.create_model(
    "_Record", image_id=(_Id, Field(validation_alias=AliasChoices("image_id", *NAME_KEYS))),
    captions=(Annotated[list[StrictStr | None], ONE_IS_A_LIST], Field(validation_alias=AliasChoices(*CAPTION_KEYS))))


def read_captions(path: Path) -> pd.DataFrame:
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
