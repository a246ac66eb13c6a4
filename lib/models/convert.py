"""BLIP's COCO-tuned caption checkpoint (paper 4.1), fetched once and converted to safetensors.

Its tensors have the names of its authors' code. The pickle is read as tensors only and then deleted.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pooch
import torch

from lib.base import UserError
from lib.models.hub import SMALL_FILES
from lib.models.loading import load_processor

BLIP_URL = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large_caption.pth"
# The same architecture: configuration and tokenizer come from here, its weights (the base ones) are not used.
BLIP_SAME = "Salesforce/blip-image-captioning-large", "353689b859fcf0523410b1806dace5fb46ecdf41"
# The vision tower's names in the authors' code -> in transformers; text names are the same.
_NAMES = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm", r"vision_model.encoder.layers.\1.layer_norm"),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."))


def fetch_blip(target: Path, url: str = BLIP_URL, same: tuple[str, str | None] = BLIP_SAME) -> Path:
    """Fetch and convert the checkpoint; return the folder that the ``blip`` adapter loads."""
    from huggingface_hub import snapshot_download

    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = Path(pooch.retrieve(url, None, path=target.parent, fname=Path(url).name, progressbar=True))
    small = Path(snapshot_download(same[0], revision=same[1], allow_patterns=list(SMALL_FILES)))
    convert_blip(checkpoint, small, target, {"source": url, "revision": pooch.file_hash(str(checkpoint))})
    checkpoint.unlink()
    return target


def convert_blip(checkpoint: Path, small: Path, target: Path, source: Mapping[str, str]) -> Path:
    """Convert BLIP's original caption checkpoint, ``{"model": state dict}``, to a model folder.

    small: configuration and tokenizer. source: what ``source.json`` records. Raises UserError if the
    checkpoint is something else.
    """
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    except Exception as error:  # pickle, zip and runtime errors: torch raises many kinds
        raise UserError(f"checkpoint {checkpoint} is damaged or holds more than tensors: delete it and fetch it again"
                        ) from error
    model = BlipForConditionalGeneration(BlipConfig.from_pretrained(small))
    try:
        state = {_name(name): tensor for name, tensor in saved.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"checkpoint {checkpoint} is no BLIP caption checkpoint of this size: {str(error)[:200]}"
                        ) from error
    # The text encoder of other BLIP tasks may ride along; nothing of the captioner may be absent.
    unexpected = [name for name in unexpected if name.startswith(("vision_model.", "text_decoder."))
                  and not name.endswith("position_ids")]
    if missing or unexpected:
        raise UserError(f"checkpoint {checkpoint} does not fit BLIP: {len(missing)} weights missing, {len(unexpected)} "
                        f"left over, such as {(missing + unexpected)[0]}")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # appears under its name when it is complete
        whole = Path(folder) / "model"
        model.save_pretrained(whole)
        load_processor(BlipProcessor, small).save_pretrained(whole)
        (whole / "source.json").write_text(json.dumps(dict(source), indent=2) + "\n", encoding="utf-8")
        whole.rename(target)
    return target


def _name(name: str) -> str:
    """One tensor's name in transformers."""
    for pattern, replacement in _NAMES:
        name, changed = re.subn(pattern, replacement, name)
        if changed:
            break
    return name
