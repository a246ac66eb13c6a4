"""BLIP's COCO-tuned caption checkpoint (paper 4.1), fetched once and converted to safetensors.

Its tensors have the names of its authors' code. The pickle is read as tensors only and then deleted.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pooch
import torch

from lib.base import UserError
from lib.models.hub import SMALL_FILES
from lib.models.loading import load_processor

BLIP_URL = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large_caption.pth"
# Configuration and tokenizer come from here; its weights (the base ones) are not used.
BLIP_TOKENIZER = "Salesforce/blip-image-captioning-large"

# The vision tower's names in the authors' code -> in transformers; text names are the same.
_NAMES = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm", r"vision_model.encoder.layers.\1.layer_norm"),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)


def fetch_blip(target: Path, url: str = BLIP_URL, tokenizer: str = BLIP_TOKENIZER, head_width: int = 64) -> Path:
    """Fetch and convert the checkpoint; return the folder that the ``blip`` adapter loads."""
    from huggingface_hub import snapshot_download

    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = Path(pooch.retrieve(url, None, path=target.parent, fname=Path(url).name, progressbar=True))
    small = Path(snapshot_download(tokenizer, allow_patterns=list(SMALL_FILES)))
    convert_blip(checkpoint, small, target, {"source": url, "revision": pooch.file_hash(str(checkpoint))}, head_width)
    checkpoint.unlink()
    return target


def convert_blip(checkpoint: Path, tokenizer_folder: Path, target: Path, source: Mapping[str, str],
                 head_width: int = 64) -> Path:
    """Convert BLIP's original caption checkpoint, ``{"model": state dict}``, to a model folder.

    source: what ``source.json`` records. head_width: channels of an attention head (64 in all published
    sizes). Raises UserError if the checkpoint is something else.
    """
    from transformers import BlipForConditionalGeneration, BlipProcessor

    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    except Exception as error:  # pickle, zip and runtime errors: torch raises many kinds
        raise UserError(f"checkpoint {checkpoint} is damaged or holds more than tensors: delete it and fetch it again"
                        ) from error
    state = {_name(name): tensor for name, tensor in saved.items() if not name.endswith("position_ids")}
    processor = load_processor(BlipProcessor, tokenizer_folder)
    tokenizer = processor.tokenizer
    if tokenizer.bos_token is None:  # the authors add these two behind BERT's own pieces
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    try:
        config = _config(state, tokenizer, head_width)
        model = BlipForConditionalGeneration(config)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{checkpoint} is no BLIP caption checkpoint: {error}") from error
    # The text encoder of other BLIP tasks may ride along; nothing of the captioner may be absent.
    unexpected = [name for name in unexpected if name.startswith(("vision_model.", "text_decoder."))]
    if missing or unexpected:
        raise UserError(f"{checkpoint} does not fit BLIP: {len(missing)} weights missing, {len(unexpected)} left over, "
                        f"such as {(missing + unexpected)[0]}")
    size = config.vision_config.image_size
    processor.image_processor.size = {"height": size, "width": size}
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # appears under its name when it is complete
        whole = Path(folder) / "model"
        model.save_pretrained(whole)
        processor.save_pretrained(whole)
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


def _config(state: Mapping[str, torch.Tensor], tokenizer: Any, head_width: int) -> Any:
    """The sizes of a BLIP captioner, read off its tensors."""
    from transformers import BlipConfig

    patch = state["vision_model.embeddings.patch_embedding.weight"]  # (D, 3, p, p)
    positions = state["vision_model.embeddings.position_embedding"].shape[1] - 1
    words = state["text_decoder.bert.embeddings.word_embeddings.weight"]  # (V, D)
    vision = {
        "hidden_size": patch.shape[0], "patch_size": patch.shape[2],
        "image_size": math.isqrt(positions) * patch.shape[2],
        "num_hidden_layers": _layers(state, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": patch.shape[0] // head_width,
        "intermediate_size": state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-6}  # as in the authors' vision transformer
    text = {
        "vocab_size": words.shape[0], "hidden_size": words.shape[1], "encoder_hidden_size": patch.shape[0],
        "num_hidden_layers": _layers(state, r"text_decoder\.bert\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": words.shape[1] // head_width,
        "intermediate_size": state["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id}
    return BlipConfig(vision_config=vision, text_config=text)


def _layers(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many numbered layers the tensors' names show."""
    return 1 + max(int(match[1]) for match in (re.match(pattern, name) for name in state) if match)
