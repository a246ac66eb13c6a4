"""Convert published pickled weights to safetensors, once, without running any of their code.

Two cases: the original COCO-tuned BLIP caption checkpoint (paper 4.1), whose tensors have the
names of its authors' code, and hub repositories that hold ``pytorch_model.bin`` only.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lib.errors import UserError

BLIP_CAPTION_URL = ("https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"
                    "model_large_caption.pth")
# Configuration and tokenizer come from here; its weights (the base ones) are not used.
BLIP_TOKENIZER = "Salesforce/blip-image-captioning-large"
SOURCE_FILE = "source.json"
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")

# The vision tower's names in the authors' code -> in transformers; text names are the same.
_BLIP_NAMES = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm", r"vision_model.encoder.layers.\1.layer_norm"),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
     r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)


def convert_blip(checkpoint: Path, tokenizer_folder: Path, target: Path,
                 head_width: int = 64) -> Path:
    """Convert BLIP's original caption checkpoint to a folder that the ``blip`` adapter loads.

    checkpoint: ``{"model": state dict}`` as published. tokenizer_folder: BERT's word pieces and
    BLIP's picture preprocessing. head_width: channels of an attention head (64 in all published
    sizes). Raises UserError if the checkpoint is something else.
    """
    from transformers import BlipForConditionalGeneration, BlipProcessor

    state = {_blip_name(name): tensor for name, tensor in _load(checkpoint).items()
             if not name.endswith("position_ids")}
    tokenizer_source = BlipProcessor.from_pretrained(tokenizer_folder, backend="pil",
                                                     local_files_only=True)
    tokenizer = tokenizer_source.tokenizer
    if tokenizer.bos_token is None:  # the authors add these two behind BERT's own pieces
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    try:
        config = _blip_config(state, tokenizer, head_width)
        model = BlipForConditionalGeneration(config)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{checkpoint} is no BLIP caption checkpoint: {error}") from error
    # The text encoder of other BLIP tasks may ride along; nothing of the captioner may be absent.
    unexpected = [name for name in unexpected if name.startswith(("vision_model.", "text_decoder."))]
    if missing or unexpected:
        raise UserError(f"{checkpoint} does not fit BLIP: {len(missing)} weights missing, "
                        f"{len(unexpected)} left over, such as {(missing + unexpected)[0]}")
    size = config.vision_config.image_size
    tokenizer_source.image_processor.size = {"height": size, "width": size}
    with _new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer_source.save_pretrained(folder)
    return target


def _blip_name(name: str) -> str:
    """One tensor's name in transformers."""
    for pattern, replacement in _BLIP_NAMES:
        name, changed = re.subn(pattern, replacement, name)
        if changed:
            break
    return name


def _blip_config(state: Mapping[str, torch.Tensor], tokenizer: Any, head_width: int) -> Any:
    """Read the sizes of a BLIP captioner off its tensors."""
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
        "layer_norm_eps": 1e-6,  # as in the authors' vision transformer
    }
    layer = "text_decoder.bert.encoder.layer.0"
    text = {
        "vocab_size": words.shape[0], "hidden_size": words.shape[1],
        "encoder_hidden_size": patch.shape[0],
        "num_hidden_layers": _layers(state, r"text_decoder\.bert\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": words.shape[1] // head_width,
        "intermediate_size": state[f"{layer}.intermediate.dense.weight"].shape[0],
        "max_position_embeddings":
            state["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id,
    }
    return BlipConfig(vision_config=vision, text_config=text)


def _layers(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many numbered layers the tensors' names show."""
    return 1 + max(int(match.group(1)) for match in (re.match(pattern, name) for name in state)
                   if match)


def convert_pickle(source: Path, target: Path) -> Path:
    """Copy a model folder, its ``pytorch_model.bin`` turned into ``model.safetensors``."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous().clone()  # tensors that share storage are written apart
               for name, tensor in _load(source / "pytorch_model.bin").items()}
    with _new_folder(target) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for pattern in SMALL_FILES:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    return target


def _load(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a pickled checkpoint; anything but tensors in it is refused."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {file} does not exist: fetch it first") from error
    except Exception as error:  # pickle, zip and runtime errors: torch raises many kinds
        raise UserError(f"checkpoint {file} is damaged or holds more than tensors: delete it and "
                        "fetch it again") from error
    state = content.get("model", content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"checkpoint {file} holds no tensors: it is no model")
    return tensors


def write_source(folder: Path, source: str, revision: str) -> None:
    """Record beside converted weights what they were made from: an address or id, and a hash."""
    (folder / SOURCE_FILE).write_text(
        json.dumps({"source": source, "revision": revision}, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
