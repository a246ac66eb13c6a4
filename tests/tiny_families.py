"""Tiny random checkpoints of every other family the presets may name (see ``tiny_models``)."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.tiny_models import (
    SIZE,
    WORDS,
    bert_tokenizer,
    build_stable_diffusion,
    clip_tokenizer,
    tiny_text_encoder,
    tiny_unet,
    tiny_vae,
)

PIXELS = {"image_size": 32, "patch_size": 8}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}"
    " <end_of_utterance> {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}")


def word_tokenizer(*special: str) -> tf.PreTrainedTokenizerFast:
    """A word-level tokenizer with </s> as start, end and, as in OPT, <pad> apart."""
    tokens = ["<pad>", "</s>", "<unk>", *WORDS, "user", "assistant", ":"]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>",
                                           unk_token="<unk>", eos_token="</s>", bos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def t5_tokenizer(max_length: int = 24) -> tf.T5Tokenizer:
    """A T5 tokenizer of words and letters."""
    letters = sorted({c for word in WORDS for c in word})
    pieces = ["▁", *letters, *("▁" + word for word in WORDS)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece, -float(i + 1)) for i, piece in enumerate(dict.fromkeys(pieces))]
    return tf.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_length)


def t5_encoder(tokenizer: tf.T5Tokenizer) -> tf.T5EncoderModel:
    """A tiny T5 encoder."""
    return tf.T5EncoderModel(tf.T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48,
                                         num_layers=1, num_heads=2))


# --- captioners ---------------------------------------------------------------------------------

def build_blip2(folder: Path, language: str = "opt") -> Path:
    """BLIP-2 over an OPT, or over a T5."""
    torch.manual_seed(0)
    if language == "opt":
        tokenizer = word_tokenizer("<image>")
        text = tf.OPTConfig(vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32,
                            ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
                            max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0,
                            init_std=0.5)
    else:
        tokenizer = t5_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        text = tf.T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=48, num_layers=1,
                           num_heads=2, initializer_factor=1.0, decoder_start_token_id=0,
                           pad_token_id=0, eos_token_id=1)
    model = tf.Blip2ForConditionalGeneration(tf.Blip2Config(
        vision_config=SIZE | PIXELS | {"initializer_range": 0.2},
        qformer_config=SIZE | {"encoder_hidden_size": 32, "vocab_size": 20,
                               "max_position_embeddings": 20, "initializer_range": 0.2},
        text_config=text.to_dict(), num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>")))
    model.save_pretrained(folder)
    tf.Blip2Processor(tf.BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer,
                      num_query_tokens=4).save_pretrained(folder)
    return folder


def build_chat(folder: Path) -> Path:
    """IDEFICS 3: SigLIP-like tower, pixel shuffle, Llama."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    llama = tf.LlamaConfig(**SIZE, vocab_size=len(tokenizer), num_key_value_heads=2,
                           max_position_embeddings=128, initializer_range=0.5, bos_token_id=1,
                           eos_token_id=1, pad_token_id=0)
    config = tf.Idefics3Config(vision_config=SIZE | PIXELS | {"initializer_range": 0.2},
                               text_config=llama.to_dict(), scale_factor=2,
                               image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    tf.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    images = tf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 32},
                                          do_image_splitting=False)
    tf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


def build_florence2(folder: Path) -> Path:
    """Florence-2: a four-stage DaViT and a BART."""
    torch.manual_seed(0)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>"]
    letters = sorted({c for word in WORDS for c in word} | set("WhatdoestheimagrcbDIiJnklmpquvwxyz?."))
    vocab = {t: i for i, t in enumerate([*tokens, *letters, "Ġ", *("Ġ" + c for c in letters)])}
    tokenizer = tf.RobertaTokenizer(vocab=vocab, merges=[],
                                    extra_special_tokens={"image_token": "<image>"})
    bart = tf.BartConfig(vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1,
                         encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
                         decoder_ffn_dim=48, max_position_embeddings=128, init_std=0.5,
                         bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
                         forced_bos_token_id=0, forced_eos_token_id=2)
    vision = {"depths": [1] * 4, "embed_dim": [8, 16, 16, 32], "num_heads": [1] * 4,
              "num_groups": [1] * 4, "window_size": 4, "projection_dim": 32,
              "drop_path_rate": 0.0, "initializer_range": 0.2}
    model = tf.Florence2ForConditionalGeneration(tf.Florence2Config(
        vision_config=vision, text_config=bart.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), bos_token_id=0, pad_token_id=1,
        eos_token_id=2))
    # As in the published checkpoint, which asks for beams and forced tokens by itself.
    model.generation_config = tf.GenerationConfig(
        num_beams=3, no_repeat_ngram_size=3, forced_bos_token_id=0, forced_eos_token_id=2,
        decoder_start_token_id=2, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    pictures = tf.CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    pictures.image_seq_length = 5  # 2x2 cells and their mean
    tf.Florence2Processor(pictures, tokenizer).save_pretrained(folder)
    return folder


def build_git(folder: Path) -> Path:
    """GIT: a CLIP-like tower feeding a BERT-like decoder."""
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    model = tf.GitForCausalLM(tf.GitConfig(
        vision_config=SIZE | PIXELS | {"initializer_range": 0.2}, **SIZE,
        vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.5,
        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id, pad_token_id=0))
    model.save_pretrained(folder)
    tf.GitProcessor(tf.CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False),
                    tokenizer).save_pretrained(folder)
    return folder


# --- encoders -----------------------------------------------------------------------------------

def build_siglip(folder: Path) -> Path:
    """SigLIP with a T5-like tokenizer."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    text = SIZE | {"vocab_size": len(tokenizer), "max_position_embeddings": 16,
                   "projection_size": 32, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=SIZE | PIXELS)
                   ).save_pretrained(folder)
    tf.SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_dinov2(folder: Path) -> Path:
    """DINOv2."""
    torch.manual_seed(0)
    tf.Dinov2Model(tf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                   image_size=32, patch_size=8)).save_pretrained(folder)
    tf.BitImageProcessorPil(size={"shortest_edge": 36},
                            crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def build_sentence(folder: Path, class_token: bool = False) -> Path:
    """A sentence encoder: BERT and a pooling file."""
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    tf.BertModel(tf.BertConfig(**SIZE, vocab_size=len(tokenizer), max_position_embeddings=32)
                 ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": class_token}), encoding="utf-8")
    return folder


# --- generators ---------------------------------------------------------------------------------

def build_sdxl(folder: Path) -> Path:
    """SDXL-Turbo: two text towers, trailing Euler ancestral steps."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    unet = tiny_unet(cross_attention_dim=64, addition_embed_type="text_time",
                     addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
                     use_linear_projection=True)
    diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(), unet=unet, tokenizer=tokenizer, tokenizer_2=clip_tokenizer(),
        text_encoder=tiny_text_encoder(tokenizer),
        text_encoder_2=tiny_text_encoder(tokenizer, tf.CLIPTextModelWithProjection),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
        add_watermarker=False).save_pretrained(folder)
    return folder


def build_lcm(folder: Path) -> Path:
    """A latent consistency model: the guidance scale is an input of the U-Net."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    diffusers.LatentConsistencyModelPipeline(
        vae=tiny_vae(), text_encoder=tiny_text_encoder(tokenizer), tokenizer=tokenizer,
        unet=tiny_unet(time_cond_proj_dim=8), scheduler=diffusers.LCMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def build_pixart(folder: Path) -> Path:
    """PixArt-alpha: a diffusion transformer that reads a T5."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=16, sample_size=16, patch_size=2, caption_channels=32)
    diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=t5_encoder(tokenizer), vae=tiny_vae(),
        transformer=transformer, scheduler=diffusers.DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)
    return folder


def build_sd3(folder: Path) -> Path:
    """Stable Diffusion 3: two CLIP towers, a T5, a joint transformer, flow matching."""
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    towers = [tiny_text_encoder(clip, tf.CLIPTextModelWithProjection) for _ in range(2)]
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32,
        pooled_projection_dim=64, out_channels=4)
    text_3 = tf.T5EncoderModel(tf.T5Config(vocab_size=len(t5), d_model=64, d_kv=8, d_ff=48,
                                           num_layers=1, num_heads=2))
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(shift_factor=0.1), text_encoder=towers[0], tokenizer=clip, text_encoder_2=towers[1],
        tokenizer_2=clip_tokenizer(), text_encoder_3=text_3, tokenizer_3=t5).save_pretrained(folder)
    return folder


def build_flux(folder: Path) -> Path:
    """FLUX.1 schnell: a CLIP for the pooled text, a T5 for the sequence, no guidance input."""
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        guidance_embeds=False, axes_dims_rope=(4, 4, 8))
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(shift_factor=0.1),
        text_encoder=tiny_text_encoder(clip), tokenizer=clip, text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5, transformer=transformer).save_pretrained(folder)
    return folder


def build_checked_stable_diffusion(folder: Path) -> Path:
    """A tiny Stable Diffusion v1 whose safety checker flags every picture."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    plain = build_stable_diffusion(folder.with_name(folder.name + "-plain"))
    checker = StableDiffusionSafetyChecker(tf.CLIPConfig(
        vision_config=SIZE | PIXELS, text_config=SIZE, projection_dim=16))
    checker.concept_embeds.data = torch.ones(17, 16)
    checker.concept_embeds_weights.data = torch.full((17,), -2.0)  # below any cosine
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(plain, safety_checker=None)
    extractor = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    diffusers.StableDiffusionPipeline(
        **{**pipeline.components, "safety_checker": checker, "feature_extractor": extractor},
        requires_safety_checker=True).save_pretrained(folder)
    return folder
