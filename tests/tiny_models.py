"""Tiny random checkpoints of every architecture that the presets name, saved in the layout that the loaders read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as tf
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["a", "an", "the", "red", "blue", "owl", "cat", "boat", "tree", "on", "in", "beside", "sea", "beach",
         "two", "three", "small", "big", "with", "and", "picture", "of", ",", "."]
LETTERS = sorted({c for word in WORDS for c in word})
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = {"image_size": 32, "patch_size": 8}
EAGER_PIXELS = SIZE | PIXELS | {"initializer_range": 0.2}  # an image encoder whose outputs differ between images
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}"
    " <end_of_utterance> {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}")


def save(folder: Path, *parts: Any) -> Path:
    """Save models, processors or tokenizers into one folder."""
    for part in parts:
        part.save_pretrained(folder)
    return folder


# --- tokenizers and parts of pipelines ----------------------------------------------------------

def bert_tokenizer() -> tf.BertTokenizer:
    """A word-level BERT tokenizer with [DEC] as its start."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    return tf.BertTokenizer(vocab={t: i for i, t in enumerate(tokens)}, bos_token="[DEC]", model_max_length=32)


def clip_tokenizer() -> tf.CLIPTokenizer:
    """A CLIP tokenizer of letters: every character is a token."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(c + "</w>" for c in LETTERS)]
    return tf.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=16)


def word_tokenizer(*special: str) -> tf.PreTrainedTokenizerFast:
    """A word-level tokenizer with </s> as start, end and, as in OPT, <pad> apart."""
    tokens = ["<pad>", "</s>", "<unk>", *WORDS, "user", "assistant", ":"]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
                                      bos_token="</s>", additional_special_tokens=list(special))


def t5_tokenizer(**special: Any) -> tf.T5Tokenizer:
    """A T5 tokenizer of words and letters."""
    pieces = ["▁", *LETTERS, *("▁" + word for word in WORDS)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece, -float(i + 1)) for i, piece in enumerate(dict.fromkeys(pieces))]
    return tf.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=24, **special)


def t5_encoder(tokenizer: tf.T5Tokenizer, width: int = 32) -> tf.T5EncoderModel:
    """A tiny T5 encoder."""
    return tf.T5EncoderModel(tf.T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=48, num_layers=1,
                                         num_heads=2))


def vae(**extra: Any) -> diffusers.AutoencoderKL:
    """A tiny autoencoder that downsamples by two."""
    return diffusers.AutoencoderKL(**extra, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                                   down_block_types=("DownEncoderBlock2D",) * 2, sample_size=32,
                                   up_block_types=("UpDecoderBlock2D",) * 2)


def text_encoder(tokenizer: tf.CLIPTokenizer, model_class: type = tf.CLIPTextModel) -> Any:
    """A tiny CLIP text tower."""
    return model_class(tf.CLIPTextConfig(
        **SIZE, vocab_size=len(tokenizer), max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
        projection_dim=32, eos_token_id=tokenizer.eos_token_id, pad_token_id=1))


def unet(**extra: Any) -> diffusers.UNet2DConditionModel:
    """A tiny U-Net with cross-attention on 16x16 latents."""
    return diffusers.UNet2DConditionModel(**{
        "sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32, "attention_head_dim": 8} | extra)


# --- captioners ---------------------------------------------------------------------------------

def build_blip(folder: Path) -> Path:
    """A tiny BLIP captioner; its vocabulary head is sharpened so that captions end at times."""
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    model = tf.BlipForConditionalGeneration(tf.BlipConfig(
        text_config=SIZE | {
            "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "max_position_embeddings": 64,
            "initializer_range": 0.5, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id},
        vision_config=EAGER_PIXELS))
    return save(folder, model, tf.BlipProcessor(tf.BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer))


def build_blip2(folder: Path, language: str = "opt") -> Path:
    """BLIP-2 over an OPT, or over a T5."""
    torch.manual_seed(0)
    if language == "opt":
        tokenizer = word_tokenizer("<image>")
        text = tf.OPTConfig(vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
                            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, bos_token_id=1,
                            eos_token_id=1, pad_token_id=0, init_std=0.5)
    else:
        tokenizer = t5_tokenizer(additional_special_tokens=["<image>"])
        text = tf.T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2,
                           initializer_factor=1.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    model = tf.Blip2ForConditionalGeneration(tf.Blip2Config(
        vision_config=EAGER_PIXELS, text_config=text.to_dict(), num_query_tokens=4,
        qformer_config=SIZE | {"encoder_hidden_size": 32, "vocab_size": 20, "max_position_embeddings": 20,
                               "initializer_range": 0.2},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>")))
    return save(folder, model, tf.Blip2Processor(tf.BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer,
                                                 num_query_tokens=4))


def build_chat(folder: Path) -> Path:
    """IDEFICS 3: SigLIP-like tower, pixel shuffle, Llama."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    llama = tf.LlamaConfig(**SIZE, vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=128,
                           initializer_range=0.5, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    config = tf.Idefics3Config(vision_config=EAGER_PIXELS, text_config=llama.to_dict(), scale_factor=2,
                               image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    images = tf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 32},
                                          do_image_splitting=False)
    return save(folder, tf.AutoModelForImageTextToText.from_config(config), tf.Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE))


def build_florence2(folder: Path) -> Path:
    """Florence-2: a four-stage DaViT and a BART."""
    torch.manual_seed(0)
    letters = sorted({*LETTERS, *"WhatdoestheimagrcbDIiJnklmpquvwxyz?."})
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>", *letters, "Ġ", *("Ġ" + c for c in letters)]
    tokenizer = tf.RobertaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[],
                                    extra_special_tokens={"image_token": "<image>"})
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    forced = {"forced_bos_token_id": 0, "forced_eos_token_id": 2, "decoder_start_token_id": 2}
    bart = tf.BartConfig(vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, init_std=0.5,
                         encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
                         max_position_embeddings=128, **ids, **forced)
    vision = {"depths": [1] * 4, "embed_dim": [8, 16, 16, 32], "num_heads": [1] * 4, "num_groups": [1] * 4,
              "window_size": 4, "projection_dim": 32, "drop_path_rate": 0.0, "initializer_range": 0.2}
    model = tf.Florence2ForConditionalGeneration(tf.Florence2Config(
        vision_config=vision, text_config=bart.to_dict(), image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **ids))
    # As in the published checkpoint, which asks for beams and forced tokens by itself.
    model.generation_config = tf.GenerationConfig(num_beams=3, no_repeat_ngram_size=3, **ids, **forced)
    images = tf.CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5  # 2x2 cells and their mean
    return save(folder, model, tf.Florence2Processor(images, tokenizer))


def build_git(folder: Path) -> Path:
    """GIT: a CLIP-like tower feeding a BERT-like decoder."""
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    model = tf.GitForCausalLM(tf.GitConfig(
        vision_config=EAGER_PIXELS, **SIZE, vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.5,
        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id, pad_token_id=0))
    return save(folder, model, tf.GitProcessor(
        tf.CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False), tokenizer))


# --- encoders -----------------------------------------------------------------------------------

def build_clip(folder: Path) -> Path:
    """A tiny CLIP."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    model = tf.CLIPModel(tf.CLIPConfig(projection_dim=24, text_config=SIZE | ids, vision_config=SIZE | PIXELS))
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return save(folder, model, tf.CLIPProcessor(images, tokenizer))


def build_siglip(folder: Path) -> Path:
    """SigLIP with a T5-like tokenizer."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    text = SIZE | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32,
                   "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    return save(folder, tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=SIZE | PIXELS)),
                tf.SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)


def build_dinov2(folder: Path) -> Path:
    """DINOv2."""
    torch.manual_seed(0)
    config = tf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **PIXELS)
    return save(folder, tf.Dinov2Model(config), tf.BitImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}))


def build_sentence(folder: Path, class_token: bool = False) -> Path:
    """A sentence encoder: BERT and a pooling file."""
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": class_token}))
    config = tf.BertConfig(**SIZE, vocab_size=len(tokenizer), max_position_embeddings=32)
    return save(folder, tf.BertModel(config), tokenizer)


# --- generators ---------------------------------------------------------------------------------

def build_stable_diffusion(folder: Path, checked: bool = False) -> Path:
    """Stable Diffusion v1 with v-prediction; checked: with a safety checker that flags every image."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    checker = extractor = None
    if checked:
        config = tf.CLIPConfig(vision_config=SIZE | PIXELS, text_config=SIZE, projection_dim=16)
        checker = StableDiffusionSafetyChecker(config)
        checker.concept_embeds.data = torch.ones(17, 16)
        checker.concept_embeds_weights.data = torch.full((17,), -2.0)  # below any cosine
        extractor = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return save(folder, diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(tokenizer), tokenizer=tokenizer, unet=unet(), safety_checker=checker,
        feature_extractor=extractor, requires_safety_checker=checked, scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1)))


def build_sdxl(folder: Path) -> Path:
    """SDXL-Turbo: two text towers, trailing Euler ancestral steps."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    network = unet(cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
                   projection_class_embeddings_input_dim=80, use_linear_projection=True)
    return save(folder, diffusers.StableDiffusionXLPipeline(
        vae=vae(), unet=network, tokenizer=tokenizer, tokenizer_2=clip_tokenizer(), text_encoder=text_encoder(tokenizer),
        text_encoder_2=text_encoder(tokenizer, tf.CLIPTextModelWithProjection), add_watermarker=False,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")))


def build_lcm(folder: Path) -> Path:
    """A latent consistency model: the guidance scale is an input of the U-Net."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return save(folder, diffusers.LatentConsistencyModelPipeline(
        vae=vae(), text_encoder=text_encoder(tokenizer), tokenizer=tokenizer, unet=unet(time_cond_proj_dim=8),
        scheduler=diffusers.LCMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False))


def build_pixart(folder: Path) -> Path:
    """PixArt-alpha: a diffusion transformer that reads a T5."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=16, sample_size=16, patch_size=2, caption_channels=32)
    return save(folder, diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=t5_encoder(tokenizer), vae=vae(), transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler()))


def build_sd3(folder: Path) -> Path:
    """Stable Diffusion 3: two CLIP towers, a T5, a joint transformer, flow matching."""
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    towers = [text_encoder(clip, tf.CLIPTextModelWithProjection) for _ in range(2)]
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4)
    return save(folder, diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(shift_factor=0.1),
        text_encoder=towers[0], tokenizer=clip, text_encoder_2=towers[1], tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(t5, 64), tokenizer_3=t5))


def build_flux(folder: Path) -> Path:
    """FLUX.1 schnell: a CLIP for the pooled text, a T5 for the sequence, no guidance input."""
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(4, 4, 8))
    return save(folder, diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(shift_factor=0.1),
        text_encoder=text_encoder(clip), tokenizer=clip, text_encoder_2=t5_encoder(t5), tokenizer_2=t5,
        transformer=transformer))
