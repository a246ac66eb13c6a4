"""The mini models: the same classes and architectures as the paper's, small enough for a laptop's CPU."""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    GitConfig,
    GitForCausalLM,
)

from lib.picturebook.scenes import ACCESSORY_OF, CATEGORIES, COLOURS, SETTINGS
from lib.picturebook.vocabulary import MAX_TOKENS

SIDE, PATCH = 64, 8


def _vision(width: int, layers: int) -> dict:
    return dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 32,
        image_size=SIDE, patch_size=PATCH, initializer_range=0.02,
    )  # fmt: skip


def _text(width: int, layers: int, vocabulary: int) -> dict:
    return dict(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=MAX_TOKENS,
    )  # fmt: skip


def build_captioner(tokenizer: BertTokenizer, width: int = 128, layers: int = 3) -> BlipForConditionalGeneration:
    """BLIP: a vision transformer and a text decoder with cross-attention (paper 3.2)."""
    text = _text(width, layers, len(tokenizer)) | dict(
        encoder_hidden_size=width, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=_vision(width, layers)))


def build_git_captioner(tokenizer: BertTokenizer, width: int = 128, layers: int = 3) -> GitForCausalLM:
    """GIT: one decoder reads image tokens and words alike, without cross-attention; the second captioner."""
    text = _text(width, layers, len(tokenizer)) | dict(
        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, tie_word_embeddings=True,
    )  # fmt: skip
    return GitForCausalLM(GitConfig(vision_config=_vision(width, layers), **text))


def _clip_ids(tokenizer: CLIPTokenizer) -> dict:
    return dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def build_encoder(tokenizer: CLIPTokenizer, width: int = 128, layers: int = 3) -> CLIPModel:
    """CLIP: image and text towers with a shared space (paper 3.4)."""
    text = _text(width, layers, len(tokenizer)) | _clip_ids(tokenizer)
    return CLIPModel(CLIPConfig(projection_dim=width, text_config=text, vision_config=_vision(width, layers)))


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 128, layers: int = 3) -> CLIPTextModel:
    """The generator's own text encoder; it shares no weights with the encoders that compare."""
    return CLIPTextModel(CLIPTextConfig(**_text(width, layers, len(tokenizer)), **_clip_ids(tokenizer)))


def build_autoencoder(channels: int = 32, block_at_full_size: bool = True) -> AutoencoderTiny:
    """The latent space: downsampling by 8, four channels, as in Stable Diffusion (paper 3.3 and 4.2).

    The tiny variant: on two CPU cores it trains twice as fast as an AutoencoderKL of equal sharpness. Nearly half
    of its decoder's cost is the block at full size, 64 x 64; the decoder that is shipped does without.
    """
    return AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 4,
        decoder_block_out_channels=(channels,) * 4,
        num_encoder_blocks=(0, 2, 3, 3),
        num_decoder_blocks=(3, 3, 2, int(block_at_full_size)),
        latent_channels=4,
    )


def build_unet(cross_attention: int = 128) -> UNet2DConditionModel:
    """The denoiser on 8 x 8 latents."""
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(80, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction; samplers are made from its configuration."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def few_step_scheduler(teacher: DDIMScheduler, passes: int) -> DDIMScheduler:
    """The sampler of the few-step generator: evenly spaced from pure noise, its last pass lands on the image."""
    scheduler = DDIMScheduler.from_config(teacher.config, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(passes)
    return scheduler


class Probe(nn.Module):
    """A small convolutional classifier that tells what an image shows; it takes no part in any round trip.

    `forward`: (B, 3, 64, 64) in [-1, 1] -> logits `present` (B, 26), `colour` (B, 26, 8), `setting` (B, 6) and
    `accessory` (B, 9), the last over the categories that can wear one.
    """

    wearers = tuple(ACCESSORY_OF)

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)  # (B, 4 w, 4, 4)
        self.sizes = (len(CATEGORIES), len(CATEGORIES) * len(COLOURS), len(SETTINGS), len(self.wearers))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64 * width, 256), nn.SiLU(), nn.Linear(256, sum(self.sizes)))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        present, colour, setting, accessory = self.head(self.trunk(pixels)).split(self.sizes, dim=1)
        colour = colour.view(-1, len(CATEGORIES), len(COLOURS))
        return {"present": present, "colour": colour, "setting": setting, "accessory": accessory}


def count_parameters(module: nn.Module) -> int:
    """Number of weights."""
    return sum(weight.numel() for weight in module.parameters())


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1], as the autoencoder and the probe take it."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0


def picture_loss(error: Tensor) -> Tensor:
    """L1 + L2 + L1 of the image gradients of an error (B, 3, H, W): plain L2 alone leaves shapes blurred."""
    down, right = error.diff(dim=2).abs().mean(), error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + down + right


def to_bytes(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
