"""Captioners beside the paper's BLIP: BLIP-2, chat models (IDEFICS ...), Florence-2, GIT.

All of them encode an image inside ``generate``, which then repeats the encoded rows for the K captions
of an image (GIT alone encodes an image again for every caption: its decoder reads the pixels itself).
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from lib.base import UserError
from lib.models.captioners import Captioner
from lib.models.loading import check_end_token, load_processor, load_transformer
from lib.models.types import Caption
from lib.presets import Decoding

# What chat models are asked unless the preset's ``prompt`` asks something else.
INSTRUCTION = "Describe this picture in one short sentence."


def end_tokens(*sources: Any) -> tuple[int, ...]:
    """Return all end tokens named by generation configs or tokenizers (an id, a list of ids, or None)."""
    values = [getattr(source, "eos_token_id", None) for source in sources]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values if value is not None]
    return tuple(dict.fromkeys(int(one) for some in lists for one in some))


class Blip2(Captioner):
    """BLIP-2 (Li et al. 2023): frozen ViT, Q-Former, and a language model (OPT or T5)."""

    model_types = ("blip-2",)
    half_on_gpu = True  # billions of weights

    def _load(self) -> None:
        from transformers import Blip2ForConditionalGeneration, Blip2Processor

        self.model = load_transformer(Blip2ForConditionalGeneration, self)
        self.processor = load_processor(Blip2Processor, self.folder)
        own = self.tokenizer
        self._end = end_tokens(self.model.generation_config, self.model.language_model.generation_config) or (
            own.eos_token_id,)
        self._pad = self._end[0] if own.pad_token_id is None else own.pad_token_id

    def _rows(self, images: list[Image.Image], seeds: list[int], each: int, decoding: Decoding) -> list[Caption]:
        config = self.model.config
        # The image's tokens come first, even before the start token that the tokenizer adds.
        row = [config.image_token_index] * config.num_query_tokens + self.tokenizer(decoding.prompt).input_ids
        input_ids = torch.tensor([row] * len(images), device=self.device)  # (b, L)
        # An encoder-decoder answers after its start token, a decoder after the whole prompt.
        prompt_length = 1 if self.model.language_model.config.is_encoder_decoder else len(row)
        return self._decode(self.model, decoding, seeds, prompt_length, each, pixel_values=self._pixels(images),
                            input_ids=input_ids, attention_mask=torch.ones_like(input_ids))


class Chat(Captioner):
    """Any image-text-to-text model with a chat template: IDEFICS 2 and 3, LLaVA ...

    The open Flamingo line of the paper's title. The preset's ``prompt`` is the instruction.
    """

    half_on_gpu = True  # billions of weights

    def _load(self) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = load_transformer(AutoModelForImageTextToText, self)
        self.processor = load_processor(AutoProcessor, self.folder)
        if not getattr(self.processor, "chat_template", None) and not self.tokenizer.chat_template:
            raise UserError(f"captioner {self.settings.id} has no chat template: use another adapter")
        self.tokenizer.padding_side = "left"  # captions start where the prompts end
        self._end = end_tokens(self.model.generation_config, self.tokenizer)
        self._pad = self._end[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def _rows(self, images: list[Image.Image], seeds: list[int], each: int, decoding: Decoding) -> list[Caption]:
        question = {"type": "text", "text": decoding.prompt or INSTRUCTION}
        message = [{"role": "user", "content": [{"type": "image"}, question]}]
        prompt = self.processor.apply_chat_template(message, add_generation_prompt=True)
        inputs = self.processor(text=[prompt] * len(images), images=[[image] for image in images],
                                padding=True, return_tensors="pt").to(self.device, self.dtype)
        return self._decode(self.model, decoding, seeds, inputs.input_ids.shape[1], each, **inputs)


class Florence2(Captioner):
    """Florence-2 (Xiao et al. 2024): DaViT encoder, BART-like encoder and decoder.

    The preset's ``prompt`` is one of its task tokens; ``<CAPTION>`` if none is given.
    """

    model_types = ("florence2",)

    def _load(self) -> None:
        from transformers import Florence2ForConditionalGeneration, Florence2Processor

        self.model = load_transformer(Florence2ForConditionalGeneration, self)
        self.processor = load_processor(Florence2Processor, self.folder)
        text = self.model.config.text_config
        start = self.model.generation_config.decoder_start_token_id
        # BART's decoder reads its start token and then a forced <s>: both belong to the prompt.
        self._prompt = [text.decoder_start_token_id if start is None else start, text.bos_token_id]
        self._end, self._pad = end_tokens(text), text.pad_token_id
        check_end_token(self._end[0], self.tokenizer, self.settings.id)

    def _rows(self, images: list[Image.Image], seeds: list[int], each: int, decoding: Decoding) -> list[Caption]:
        task = decoding.prompt or "<CAPTION>"
        inputs = self.processor(text=[task] * len(images), images=images, padding=True,
                                return_tensors="pt").to(self.device, self.dtype)
        decoder_ids = torch.tensor([self._prompt] * len(images), device=self.device)
        return self._decode(self.model, decoding, seeds, len(self._prompt), each, input_ids=inputs.input_ids,
                            attention_mask=inputs.attention_mask, decoder_input_ids=decoder_ids,
                            pixel_values=inputs.pixel_values)


class Git(Captioner):
    """GIT (Wang et al. 2022): one decoder over image and text tokens."""

    model_types = ("git",)

    def _load(self) -> None:
        from transformers import GitForCausalLM, GitProcessor

        self.model = load_transformer(GitForCausalLM, self)
        self.processor = load_processor(GitProcessor, self.folder)
        self._end, self._pad = (self.tokenizer.sep_token_id,), self.tokenizer.pad_token_id

    def _rows(self, images: list[Image.Image], seeds: list[int], each: int, decoding: Decoding) -> list[Caption]:
        prompt = self.tokenizer(decoding.prompt, add_special_tokens=False).input_ids
        prompt = [self.tokenizer.cls_token_id, *prompt]
        input_ids = torch.tensor([prompt] * len(images), device=self.device)
        return self._decode(self.model, decoding, seeds, len(prompt), each, pixel_values=self._pixels(images),
                            input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
