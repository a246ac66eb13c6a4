"""Tiny random checkpoints of real architectures, saved in the layout the loaders read."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
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

WORDS = ["a", "an", "the", "red", "blue", "owl", "cat", "boat", "tree", "on", "in", "beside", "sea", "beach",
         "two", "three", "small", "big", "with", "and", "picture", "of", ",", "."]
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2}


def bert_tokenizer() -> BertTokenizer:
    """A word-level BERT tokenizer with [DEC] as its start."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    return BertTokenizer(vocab={t: i for i, t in enumerate(tokens)}, bos_token="[DEC]",
                         model_max_length=32)


def clip_tokenizer(max_length: int = 16) -> CLIPTokenizer:
    """A CLIP tokenizer of letters: every character is a token."""
    letters = sorted({c for word in WORDS for c in word})
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[],
                         model_max_length=max_length)


def build_blip(folder: Path, seed: int = 0) -> Path:
    """A tiny BLIP captioner; its vocabulary head is sharpened so that captions end at times."""
    torch.manual_seed(seed)
    tokenizer = bert_tokenizer()
    model = BlipForConditionalGeneration(BlipConfig(
        text_config=SIZE | {
            "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 64,
            "initializer_range": 0.5, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.sep_token_id, "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id},
        vision_config=SIZE | {"image_size": 32, "patch_size": 8, "initializer_range": 0.2}))
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}),
                  tokenizer).save_pretrained(folder)
    return folder


def build_clip(folder: Path, seed: int = 0) -> Path:
    """A tiny CLIP."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    model = CLIPModel(CLIPConfig(
        projection_dim=24,
        text_config=SIZE | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config=SIZE | {"image_size": 32, "patch_size": 8}))
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32},
                                      crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def tiny_vae(**extra) -> AutoencoderKL:
    """A tiny autoencoder that downsamples by two."""
    return AutoencoderKL(**extra, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                         down_block_types=("DownEncoderBlock2D",) * 2, sample_size=32,
                         up_block_types=("UpDecoderBlock2D",) * 2)


def tiny_text_encoder(tokenizer: CLIPTokenizer, model_class: type = CLIPTextModel, **extra):
    """A tiny CLIP text tower."""
    config = CLIPTextConfig(**(SIZE | extra), vocab_size=len(tokenizer), max_position_embeddings=16,
                            bos_token_id=tokenizer.bos_token_id, projection_dim=32,
                            eos_token_id=tokenizer.eos_token_id, pad_token_id=1)
    return model_class(config)


def tiny_unet(**extra) -> UNet2DConditionModel:
    """A tiny U-Net with cross-attention on 16x16 latents."""
    settings = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 4}
    return UNet2DConditionModel(**(settings | extra))


def build_stable_diffusion(folder: Path, seed: int = 0) -> Path:
    """A tiny Stable Diffusion v1 pipeline with v-prediction, without safety checker."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=tiny_text_encoder(tokenizer), tokenizer=tokenizer,
        unet=tiny_unet(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1))
    pipeline.save_pretrained(folder)
    return folder
