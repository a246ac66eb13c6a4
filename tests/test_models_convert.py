"""Converting pickled checkpoints: the same captions before and after, and nothing but tensors."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lib.convert import convert_blip, convert_pickle
from lib.errors import UserError
from lib.models import load_captioner, load_encoder
from lib.presets import CaptionerSpec, Decoding, EncoderSpec
from tests.tiny_models import build_blip, build_clip

# transformers' names -> those of BLIP's authors, written down apart from the code under test
TO_ORIGINAL = {
    r"vision_model\.embeddings\.class_embedding": "visual_encoder.cls_token",
    r"vision_model\.embeddings\.position_embedding": "visual_encoder.pos_embed",
    r"vision_model\.embeddings\.patch_embedding": "visual_encoder.patch_embed.proj",
    r"vision_model\.post_layernorm": "visual_encoder.norm",
    r"vision_model\.encoder\.layers": "visual_encoder.blocks",
    r"self_attn\.projection": "attn.proj",
    r"self_attn": "attn",
    r"layer_norm([12])": r"norm\1",
}


def original_names(state):
    """A state dict as BLIP's authors would have saved it."""
    renamed = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in TO_ORIGINAL.items():
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor
    return renamed


def test_blip_checkpoint_of_the_authors(tmp_path):
    source = build_blip(tmp_path / "source")
    state = original_names(load_file(source / "model.safetensors"))
    head = "text_decoder.cls.predictions"
    state[f"{head}.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(64)[None]
    assert "visual_encoder.blocks.1.attn.qkv.weight" in state
    torch.save({"model": state}, tmp_path / "caption.pth")
    target = convert_blip(tmp_path / "caption.pth", source, tmp_path / "hub" / "blip", head_width=16)
    images = [Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))]
    decoding = Decoding("nucleus", max_tokens=8)
    captions = [load_captioner(CaptionerSpec(str(folder)), "cpu").caption(images, [[1, 2, 3]], decoding)
                for folder in (source, target)]
    assert [c.text for c in captions[0][0]] == [c.text for c in captions[1][0]]
    assert not list((tmp_path / "hub").glob(".*"))  # no half-made folder is left

    del state["visual_encoder.norm.weight"]
    torch.save({"model": state}, tmp_path / "cut.pth")
    with pytest.raises(UserError, match="1 weights missing"):
        convert_blip(tmp_path / "cut.pth", source, tmp_path / "cut", head_width=16)
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no BLIP caption checkpoint"):
        convert_blip(tmp_path / "other.pth", source, tmp_path / "other")


def test_pickled_hub_folder(tmp_path):
    source = build_clip(tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    target = convert_pickle(source, tmp_path / "target")
    both = [load_encoder(EncoderSpec(str(folder)), "cpu").embed_texts(["a cat"])
            for folder in (source, target)]
    assert np.array_equal(*both) and not list(target.glob("*.bin"))


class Harmful:
    """Something that a pickle may run and a tensor file may not."""

    def __reduce__(self):
        return print, ("run",)


def test_pickles_with_code_are_refused(tmp_path, capsys):
    torch.save({"model": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="more than tensors"):
        convert_pickle(tmp_path, tmp_path / "target")
    assert "run" not in capsys.readouterr().out
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="damaged"):
        convert_pickle(tmp_path, tmp_path / "target")
    with pytest.raises(UserError, match="does not exist"):
        convert_pickle(tmp_path / "gone", tmp_path / "target")
