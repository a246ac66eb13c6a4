"""BLIP's COCO-tuned caption checkpoint (paper 4.1), fetched once and converted to safetensors."""

import json
import tempfile
from pathlib import Path

import pooch
import torch

from lib.base import UserError
from lib.models.hub import SMALL_FILES

BLIP_URL = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large_caption.pth"
# The same architecture: configuration and tokenizer come from here, its weights (the base ones) are not used.
BLIP_SAME = "Salesforce/blip-image-captioning-large", "353689b859fcf0523410b1806dace5fb46ecdf41"
# Parts of the vision tower's names in the authors' code -> in transformers, in this order; text names are the same.
_RENAMED = {
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual_encoder.norm": "vision_model.post_layernorm",
    "visual_encoder.blocks": "vision_model.encoder.layers",
    ".norm": ".layer_norm", ".attn.proj": ".self_attn.projection", ".attn.": ".self_attn."}


def fetch_blip(target: Path, url: str = BLIP_URL, same: tuple[str, str | None] = BLIP_SAME) -> None:
    """Fetch and convert the checkpoint to the folder that the ``blip`` adapter loads."""
    from huggingface_hub import snapshot_download

    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = Path(pooch.retrieve(url, None, path=target.parent, fname=Path(url).name, progressbar=True))
    small = Path(snapshot_download(same[0], revision=same[1], allow_patterns=list(SMALL_FILES)))
    convert_blip(checkpoint, small, target)
    (target / "source.json").write_text(json.dumps({"source": url, "revision": pooch.file_hash(str(checkpoint))}))
    checkpoint.unlink()


def convert_blip(checkpoint: Path, small: Path, target: Path) -> None:
    """Convert BLIP's original caption checkpoint to a model folder, with configuration and tokenizer of ``small``."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

    model = BlipForConditionalGeneration(BlipConfig.from_pretrained(small))
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
        for old, new in _RENAMED.items():
            saved = {name.replace(old, new): tensor for name, tensor in saved.items()}
        # The text encoder of other BLIP tasks may ride along.
        model.load_state_dict({name: tensor for name, tensor in saved.items() if not name.endswith("position_ids")
                               and name.startswith(("vision_model.", "text_decoder."))})
    except Exception as error:  # pickle, zip and runtime errors: torch raises many kinds
        raise UserError(f"checkpoint {checkpoint} is damaged or no BLIP caption checkpoint of this size, delete it and "
                        f"fetch it again: {' '.join(str(error).split())[:300]}") from error
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # appears under its name when it is complete
        whole = Path(folder) / "model"
        model.save_pretrained(whole)
        BlipProcessor.from_pretrained(small, backend="pil").save_pretrained(whole)
        whole.rename(target)
