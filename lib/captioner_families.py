"""Captioners beside the paper's BLIP: BLIP-2, chat models (IDEFICS, SmolVLM ...), Florence-2, GIT.

All of them encode a picture inside ``generate``, which then repeats the encoded rows for the K
captions of a picture (GIT alone encodes a picture again for every caption: its decoder reads the
pixels itself).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from PIL import Image

from lib.captioners import Caption, Captioner
from lib.errors import UserError
from lib.presets import Decoding

# What chat models are asked unless the preset's ``prompt`` asks something else.
INSTRUCTION = "Describe this picture in one short sentence."


def end_tokens(*sources: Any) -> tuple[int, ...]:
    """All end tokens named by generation configs or tokenizers (an id, a list of ids, or None)."""
    found: dict[int, None] = {}
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            values: Iterable[int] = value if isinstance(value, (list, tuple)) else [value]
            found.update(dict.fromkeys(int(v) for v in values))
    return tuple(found)


class Blip2(Captioner):
    """BLIP-2 (Li et al. 2023): frozen ViT, Q-Former, and a language model (OPT or T5)."""

    model_types = ("blip-2",)
    networks: ClassVar = {"image encoder": ("vision_model", "qformer", "language_projection"),
                          "language model": ("language_model",)}
    half_on_gpu = True  # billions of weights

    def _load(self) -> None:
        from transformers import Blip2ForConditionalGeneration, Blip2Processor

        self.model = self._load_model(Blip2ForConditionalGeneration)
        self.processor = self._load_processor(Blip2Processor)
        tokenizer, language = self.processor.tokenizer, self.model.language_model
        self._end = end_tokens(self.model.generation_config, language.generation_config) or (
            tokenizer.eos_token_id,)
        self._pad = self._end[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _caption_rows(self, images: list[Image.Image], seeds: list[int], each: int,
                      decoding: Decoding) -> list[Caption]:
        config, tokenizer = self.model.config, self.processor.tokenizer
        pixels = self.processor.image_processor(images, return_tensors="pt").pixel_values
        # The picture's tokens come first, even before the start token that the tokenizer adds.
        prompt = tokenizer(decoding.prompt).input_ids
        row = [config.image_token_index] * config.num_query_tokens + prompt
        input_ids = torch.tensor([row] * len(images), device=self.device)  # (b, L)
        language_config = self.model.language_model.config
        # An encoder-decoder answers after its start token, a decoder after the whole prompt.
        prompt_length = 1 if language_config.is_encoder_decoder else len(row)
        return self._decode(
            self.model, decoding, seeds, prompt_length, tokenizer, self._end, self._pad, each,
            pixel_values=pixels.to(self.device, self.dtype), input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids))


class Chat(Captioner):
    """Any image-text-to-text model with a chat template: IDEFICS 2 and 3, SmolVLM, LLaVA ...

    The open Flamingo line of the paper's title. The preset's ``prompt`` is the instruction.
    """

    half_on_gpu = True
    # generate() asks some parts by themselves for the pictures
    networks: ClassVar = {"model": ("", "model.*")}

    def _load(self) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = self._load_model(AutoModelForImageTextToText)
        self.processor = self._chat_processor()
        tokenizer = self.processor.tokenizer
        if not getattr(self.processor, "chat_template", None) and not tokenizer.chat_template:
            raise UserError(f"captioner {self.spec.id} has no chat template: use another adapter")
        tokenizer.padding_side = "left"  # captions start where the prompts end
        self._end = end_tokens(self.model.generation_config, tokenizer)
        self._pad = self._end[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _chat_processor(self) -> Any:
        """The model's processor; SmolVLM's as IDEFICS 3's, whose picture handling it shares.

        SmolVLM's own processor also reads videos, for which it needs torchvision.
        """
        from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, Idefics3Processor

        if self.model.config.model_type != "smolvlm":
            return self._load_processor(AutoProcessor)
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        template = self.folder / "chat_template.jinja"
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        return Idefics3Processor(
            AutoImageProcessor.from_pretrained(self.folder, backend="pil", local_files_only=True),
            tokenizer, image_seq_len=side**2 // self.model.config.scale_factor**2,
            chat_template=template.read_text(encoding="utf-8") if template.is_file()
            else tokenizer.chat_template)

    def _caption_rows(self, images: list[Image.Image], seeds: list[int], each: int,
                      decoding: Decoding) -> list[Caption]:
        question = {"type": "text", "text": decoding.prompt or INSTRUCTION}
        message = [{"role": "user", "content": [{"type": "image"}, question]}]
        prompt = self.processor.apply_chat_template(message, add_generation_prompt=True)
        inputs = self.processor(text=[prompt] * len(images), images=[[image] for image in images],
                                padding=True, return_tensors="pt").to(self.device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(self.dtype)
        return self._decode(self.model, decoding, seeds, inputs.input_ids.shape[1],
                            self.processor.tokenizer, self._end, self._pad, each, **inputs)


class Florence2(Captioner):
    """Florence-2 (Xiao et al. 2024): DaViT encoder, BART-like encoder and decoder.

    The preset's ``prompt`` is one of its task tokens; ``<CAPTION>`` if none is given.
    """

    model_types = ("florence2",)
    networks: ClassVar = {"image encoder": ("model.vision_tower", "model.multi_modal_projector"),
                          "text encoder": ("model.language_model.encoder",),
                          "text decoder": ("model.language_model.decoder", "lm_head")}

    def _load(self) -> None:
        from transformers import Florence2ForConditionalGeneration, Florence2Processor

        self.model = self._load_model(Florence2ForConditionalGeneration)
        self.processor = self._load_processor(Florence2Processor)
        text = self.model.config.text_config
        start = self.model.generation_config.decoder_start_token_id
        # BART's decoder reads its start token and then a forced <s>: both belong to the prompt.
        self._prompt = [text.decoder_start_token_id if start is None else start, text.bos_token_id]
        self._end = end_tokens(text)
        self._pad = text.pad_token_id

    def _caption_rows(self, images: list[Image.Image], seeds: list[int], each: int,
                      decoding: Decoding) -> list[Caption]:
        task = decoding.prompt or "<CAPTION>"
        inputs = self.processor(text=[task] * len(images), images=images, padding=True,
                                return_tensors="pt")
        decoder_ids = torch.tensor([self._prompt] * len(images), device=self.device)
        return self._decode(
            self.model, decoding, seeds, len(self._prompt), self.processor.tokenizer, self._end,
            self._pad, each, input_ids=inputs.input_ids.to(self.device),
            attention_mask=inputs.attention_mask.to(self.device), decoder_input_ids=decoder_ids,
            pixel_values=inputs.pixel_values.to(self.device, self.dtype))


class Git(Captioner):
    """GIT (Wang et al. 2022): one decoder over picture and text tokens."""

    model_types = ("git",)

    def _load(self) -> None:
        from transformers import GitForCausalLM, GitProcessor

        self.model = self._load_model(GitForCausalLM)
        self.processor = self._load_processor(GitProcessor)
        tokenizer = self.processor.tokenizer
        self._start, self._end = tokenizer.cls_token_id, (tokenizer.sep_token_id,)
        self._pad = tokenizer.pad_token_id

    def _caption_rows(self, images: list[Image.Image], seeds: list[int], each: int,
                      decoding: Decoding) -> list[Caption]:
        tokenizer = self.processor.tokenizer
        pixels = self.processor.image_processor(images, return_tensors="pt").pixel_values
        prompt = [self._start, *tokenizer(decoding.prompt, add_special_tokens=False).input_ids]
        input_ids = torch.tensor([prompt] * len(images), device=self.device)
        return self._decode(
            self.model, decoding, seeds, len(prompt), tokenizer, self._end, self._pad, each,
            pixel_values=pixels.to(self.device, self.dtype), input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids))
