"""The paper's architectures from their published configurations, with random weights.

``width=1`` builds them at full size (for ``tests/slow/full_size.py``), ``width=16`` a sixteenth as
wide, of the same depth in kind but fewer layers, for the ordinary tests. The tokenizers have the
published vocabulary sizes; their entries are made up.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
CLIP_IDS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}


def tower(hidden: int, layers: int, heads: int, feed: int, width: int) -> dict[str, int]:
    """A transformer's sizes, divided by ``width``; few layers if it is not full size."""
    return {"hidden_size": hidden // width, "num_hidden_layers": layers if width == 1 else 2,
            "num_attention_heads": heads if width == 1 else 2, "intermediate_size": feed // width}


def clip_tokenizer() -> CLIPTokenizer:
    """49,408 entries: characters, fillers, and the two special tokens at CLIP's places."""
    characters = [*LETTERS, *(c + "</w>" for c in LETTERS)]
    fillers = [f"filler{i}" for i in range(CLIP_IDS["bos_token_id"] - len(characters))]
    tokens = [*characters, *fillers, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def bert_tokenizer() -> BertTokenizer:
    """30,522 entries, [CLS] and [SEP] at BERT's places, [DEC] and [ENC] behind them."""
    words = ["a", "picture", "of", "the", "cat", "dog", "man", "woman", "street", "beach", "table", "plate",
             "red", "blue", "two", "on", "in"]  # fmt: skip
    tokens = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    tokens |= {word: 1000 + i for i, word in enumerate(words)}
    taken = set(tokens.values())
    tokens |= {f"word{i}": i for i in range(30522) if i not in taken}
    tokenizer = BertTokenizer(vocab=tokens, model_max_length=512)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def blip_large(width: int = 1) -> BlipForConditionalGeneration:
    """BLIP with ViT-L/16 at 384 px and a BERT-base decoder."""
    return BlipForConditionalGeneration(BlipConfig(
        vision_config=tower(1024, 24, 16, 4096, width) | {
            "image_size": 384 if width == 1 else 96, "patch_size": 16, "layer_norm_eps": 1e-6,
            "initializer_range": 0.02},
        text_config=tower(768, 12, 12, 3072, width) | {
            "vocab_size": 30524, "max_position_embeddings": 512,
            "encoder_hidden_size": 1024 // width, "bos_token_id": 30522, "eos_token_id": 102,
            "sep_token_id": 102, "pad_token_id": 0}))


def build_blip_large(folder: Path, width: int = 1) -> Path:
    """Save :func:`blip_large` with its processor."""
    torch.manual_seed(0)
    model = blip_large(width)
    model.half().save_pretrained(folder)
    size = model.config.vision_config.image_size
    BlipProcessor(BlipImageProcessorPil(size={"height": size, "width": size}),
                  bert_tokenizer()).save_pretrained(folder)
    return folder


def _clip_text(width: int, hidden: int = 768, heads: int = 12) -> dict[str, int]:
    """CLIP's text tower."""
    return tower(hidden, 12, heads, 4 * hidden, width) | CLIP_IDS | {
        "vocab_size": 49408, "max_position_embeddings": 77}


def clip(width: int = 1, large: bool = True) -> CLIPModel:
    """CLIP ViT-L/14, or ViT-B/32, at 224 px."""
    size = 224 if width == 1 else 56
    vision = (tower(1024, 24, 16, 4096, width) | {"patch_size": 14} if large
              else tower(768, 12, 12, 3072, width) | {"patch_size": 32 if width == 1 else 28})
    hidden, heads = (768, 12) if large else (512, 8)
    return CLIPModel(CLIPConfig(
        projection_dim=hidden // width, vision_config=vision | {"image_size": size},
        text_config=_clip_text(width, hidden, heads)))


def build_clip(folder: Path, width: int = 1, large: bool = True) -> Path:
    """Save :func:`clip` with its processor."""
    torch.manual_seed(0)
    model = clip(width, large)
    size = model.config.vision_config.image_size
    model.half().save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": size},
                                        crop_size={"height": size, "width": size}),
                  clip_tokenizer()).save_pretrained(folder)
    return folder


def stable_diffusion_unet(width: int = 1) -> UNet2DConditionModel:
    """The U-Net of Stable Diffusion v1, 860 M weights."""
    return UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, layers_per_block=2 if width == 1 else 1,
        block_out_channels=tuple(c // width for c in (320, 640, 1280, 1280)),
        cross_attention_dim=768 // width, attention_head_dim=8 if width == 1 else 2,
        norm_num_groups=32 if width == 1 else 4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)


def stable_diffusion_vae(width: int = 1) -> AutoencoderKL:
    """The autoencoder of Stable Diffusion v1, 84 M weights."""
    return AutoencoderKL(
        latent_channels=4, sample_size=512, layers_per_block=2 if width == 1 else 1,
        block_out_channels=tuple(c // width for c in (128, 256, 512, 512)), scaling_factor=0.18215,
        norm_num_groups=32 if width == 1 else 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)


def build_stable_diffusion_v1(folder: Path, width: int = 1) -> Path:
    """Stable Diffusion v1 with CLIP ViT-L/14's text tower and the safety checker."""
    torch.manual_seed(0)
    size = 224 if width == 1 else 56
    unet, vae = stable_diffusion_unet(width), stable_diffusion_vae(width)
    text = CLIPTextModel(CLIPTextConfig(**_clip_text(width)))
    checker = StableDiffusionSafetyChecker(CLIPConfig(
        projection_dim=768 // width, text_config=_clip_text(width),
        vision_config=tower(1024, 24, 16, 4096, width) | {"image_size": size, "patch_size": 14}))
    checker.concept_embeds_weights.data.fill_(2.0)  # above any cosine: random weights flag nothing
    checker.special_care_embeds_weights.data.fill_(2.0)
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True,
                              steps_offset=1)
    extractor = CLIPImageProcessorPil(size={"shortest_edge": size},
                                      crop_size={"height": size, "width": size})
    StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text.half(), tokenizer=clip_tokenizer(), unet=unet.half(),
        scheduler=scheduler, safety_checker=checker.half(), feature_extractor=extractor,
    ).save_pretrained(folder)
    return folder


def build_all(folder: Path, width: int = 1, steps: int = 2) -> Path:
    """Build the ``paper`` preset's four models; return a preset file that points there."""
    parts = {"captioner": build_blip_large(folder / "captioner", width),
             "generator": build_stable_diffusion_v1(folder / "generator", width),
             "encoder": build_clip(folder / "encoder", width),
             "second_encoder": build_clip(folder / "second_encoder", width, large=False)}
    lines = ['base = "paper"', 'name = "full-size-random"']
    for part, path in parts.items():
        lines += [f"[{part}]", f'id = "{path}"']
        if part == "generator":
            lines += [f"steps = {steps}"] + ([] if width == 1 else ["size = 128", "output_size = 64"])
    file = folder / "full-size-random.toml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
