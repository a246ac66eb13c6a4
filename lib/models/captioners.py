"""Captioners: images in, K captions an image out, each with its log-probability (paper 3.2)."""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from PIL import Image

from lib.base import UserError
from lib.models import Caption, as_pil
from lib.models.local import LocalModel, check_end_token, check_tokenizer
from lib.models.sampling import RowSampler
from lib.presets import Decoding

# Neutral values for everything that a checkpoint's generation_config might switch on by itself. In sampling mode
# ``generate`` repeats encoded rows; the sampler leaves one possible token, so its own draw has one outcome.
NEUTRAL = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_beams": 1, "min_length": 0,
           "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "length_penalty": 1.0, "early_stopping": False,
           "max_length": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "use_cache": True}


class Captioner(LocalModel):
    """What every captioner shares: batches, seeds, decoding.

    A family names its classes of transformers, model and processor, and sets ``_end`` (ids of end tokens) in
    ``_prepare``; its ``_rows`` captions a batch of images, ``each`` rows an image, image by image.
    """

    classes: ClassVar[tuple[str, str]]

    def _load(self) -> None:
        settings = self.settings
        model_class, processor_class = (getattr(transformers, name) for name in self.classes)
        self.model = self._network(model_class)
        self.processor = self._processor(processor_class)
        self.tokenizer = self.processor.tokenizer
        self._prepare()
        check_tokenizer(self.tokenizer, self.model.get_input_embeddings().num_embeddings, settings.id)
        if not set(self._end) <= set(self.tokenizer.get_vocab().values()):
            raise UserError(f"model {settings.id} ends captions with token {self._end}, which its tokenizer does not "
                            "have: use the model's own tokenizer files")
        self._pad = self._end[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self._check_prompt(settings.sender)
        self._check_prompt(settings.receiver)

    def caption(self, images: Sequence[Image.Image | np.ndarray], seeds: Sequence[Sequence[int]],
                decoding: Decoding | None = None) -> list[list[Caption]]:
        """Return ``len(seeds[i])`` captions of ``images[i]``, in the order of the seeds.

        images: PIL, or uint8 arrays (H, W, 3). decoding: the preset's sender if None. Greedy and beam captions do
        not depend on the seed: they are made once an image and repeated.
        """
        decoding = self.settings.sender if decoding is None else decoding
        self._check_prompt(decoding)
        used = [list(row)[:1] if decoding.deterministic else list(row) for row in seeds]
        rows = [(i, seed) for i, row in enumerate(used) for seed in row]
        most = max(map(len, used), default=1) or 1
        with torch.inference_mode():
            parts = self._run(len(rows), lambda some: self._batch(images, rows[some], decoding), most)
        made = iter([caption for part in parts for caption in part])
        captions = [[next(made) for _ in row] for row in used]
        self._check_finite([c.logprob for row in captions for c in row])
        return [row * len(asked) if decoding.deterministic else row for row, asked in zip(captions, seeds, strict=True)]

    def _batch(self, images: Sequence[Any], rows: list[tuple[int, int]], decoding: Decoding) -> list[Caption]:
        """Caption rows (image, seed): each image is encoded once for equally many rows, the surplus is dropped."""
        seeds: dict[int, list[int]] = {i: [] for i, _ in rows}
        for i, seed in rows:
            seeds[i].append(seed)
        each = max(map(len, seeds.values()))
        padded = [seed for row in seeds.values() for seed in row + [0] * (each - len(row))]
        made = self._rows([as_pil(images[i]) for i in seeds], padded, each, decoding)
        return [made[n * each + k] for n, row in enumerate(seeds.values()) for k in range(len(row))]

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """Preprocessed images (b, 3, h, w) on the device."""
        pixels = self.processor.image_processor(images, return_tensors="pt").pixel_values
        return pixels.to(self.device, self.dtype)

    def _check_prompt(self, decoding: Decoding) -> None:
        """Raise UserError where prompt and caption together are longer than the model's position table."""
        text = self.model.config.get_text_config(decoder=True)
        longest = getattr(text, "max_position_embeddings", None)
        prompt = len(self.tokenizer(decoding.prompt, add_special_tokens=False, verbose=False).input_ids)
        if longest is not None and 1 + prompt + decoding.max_tokens > longest:
            raise UserError(f"captioner {self.settings.id} reads {longest} tokens, a prompt of {prompt} and max_tokens "
                            f"= {decoding.max_tokens} need {1 + prompt + decoding.max_tokens}: shorten them")

    def _decode(self, model: Any, decoding: Decoding, seeds: list[int], prompt_length: int, each: int = 1,
                **inputs: Any) -> list[Caption]:
        """Run ``model.generate`` and cut the prompt of ``prompt_length`` tokens off.

        inputs hold one row an image if ``each`` > 1 (``generate`` repeats them after encoding).
        """
        settings = NEUTRAL | {"max_new_tokens": decoding.max_tokens, "pad_token_id": self._pad,
                              "eos_token_id": list(self._end), "return_dict_in_generate": True}
        if decoding.strategy == "beam":
            return self._beam(model, decoding, settings, prompt_length, inputs)
        sampler = RowSampler(decoding, seeds, self._end, self.device)
        output = model.generate(**inputs, **settings, num_return_sequences=each,
                                logits_processor=transformers.LogitsProcessorList([sampler]))
        texts = self._texts(output.sequences[:, prompt_length:])
        return list(map(Caption, texts, sampler.logprob.tolist(), sampler.n_tokens.tolist()))

    def _beam(self, model: Any, decoding: Decoding, settings: dict[str, Any], prompt_length: int,
              inputs: dict[str, Any]) -> list[Caption]:
        """Beam search; log-probabilities from the logits before any processor."""
        settings = settings | {
            "num_beams": decoding.beams, "do_sample": False, "output_logits": True, "output_scores": True,
            "min_length": None, "min_new_tokens": decoding.min_tokens or None,
            "repetition_penalty": decoding.repetition_penalty}
        output = model.generate(**inputs, **settings)
        tokens = output.sequences[:, prompt_length:]
        scores = model.compute_transition_scores(output.sequences, output.logits,
                                                 getattr(output, "beam_indices", None), normalize_logits=True)
        tokens, scores = tokens[:, :scores.shape[1]], scores[:, :tokens.shape[1]]  # (B, steps)
        end = torch.isin(tokens, torch.tensor(self._end, device=tokens.device))
        after = (end.cumsum(1) - end.long()) > 0  # strictly after the first end token
        logprobs = torch.where(after, 0.0, scores).sum(1).tolist()
        return list(map(Caption, self._texts(tokens), logprobs, (~after & ~end).sum(1).tolist()))

    def _texts(self, tokens: torch.Tensor) -> list[str]:
        """Decode new tokens (B, L) up to the first end token; single spaces, no special tokens."""
        rows = [itertools.takewhile(lambda token: token not in self._end, row) for row in tokens.tolist()]
        return [" ".join(self.tokenizer.decode(list(row), skip_special_tokens=True).split()) for row in rows]


class Blip(Captioner):
    """BLIP (Li et al. 2022), the paper's captioner: ViT encoder, BERT decoder with cross-attention."""

    classes, model_types = ("BlipForConditionalGeneration", "BlipProcessor"), ("blip",)

    def _prepare(self) -> None:
        config = self.model.config.text_config
        self._start, self._end = config.bos_token_id, (config.sep_token_id,)
        check_end_token(config.sep_token_id, self.tokenizer, self.settings.id, "sep_token_id")
        if self._start != (self.tokenizer.bos_token_id or self._start) or self._start >= config.vocab_size:
            raise UserError(f"model {self.settings.id} starts captions with token {self._start}, which is not its "
                            "tokenizer's: set bos_token_id in its config.json")

    def _rows(self, images: list[Image.Image], seeds: list[int], each: int, decoding: Decoding) -> list[Caption]:
        features = self.model.vision_model(self._pixels(images)).last_hidden_state  # (b, T, D)
        memory = features.repeat_interleave(each, dim=0)  # (B, T, D)
        prompt = [self._start, *self.tokenizer(decoding.prompt, add_special_tokens=False).input_ids]
        input_ids = torch.tensor([prompt] * len(seeds), device=self.device)  # (B, L)
        return self._decode(
            self.model.text_decoder, decoding, seeds, len(prompt), input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids), encoder_hidden_states=memory,
            encoder_attention_mask=torch.ones(memory.shape[:-1], dtype=torch.long, device=self.device))


# The others encode an image inside ``generate``, which then repeats the encoded rows for the K captions of an image
# (GIT alone encodes an image again for every caption: its decoder reads the pixels itself).


def end_tokens(*sources: Any) -> tuple[int, ...]:
    """Return all end tokens named by generation configs or tokenizers (an id, a list of ids, or None)."""
    named = [getattr(source, "eos_token_id", None) for source in sources]
    return tuple(dict.fromkeys(int(one) for some in named if some is not None for one in np.ravel(some)))


class Blip2(Captioner):
    """BLIP-2 (Li et al. 2023): frozen ViT, Q-Former, and a language model (OPT or T5)."""

    classes, model_types = ("Blip2ForConditionalGeneration", "Blip2Processor"), ("blip-2",)
    half_on_gpu = True  # billions of weights

    def _prepare(self) -> None:
        configs = self.model.generation_config, self.model.language_model.generation_config
        self._end = end_tokens(*configs) or (self.tokenizer.eos_token_id,)

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

    classes = ("AutoModelForImageTextToText", "AutoProcessor")
    half_on_gpu = True  # billions of weights

    def _prepare(self) -> None:
        if not getattr(self.processor, "chat_template", None) and not self.tokenizer.chat_template:
            raise UserError(f"captioner {self.settings.id} has no chat template: use another adapter")
        self.tokenizer.padding_side = "left"  # captions start where the prompts end
        self._end = end_tokens(self.model.generation_config, self.tokenizer)

    def _rows(self, images: list[Image.Image], seeds: list[int], each: int, decoding: Decoding) -> list[Caption]:
        question = {"type": "text", "text": decoding.prompt or "Describe this picture in one short sentence."}
        message = [{"role": "user", "content": [{"type": "image"}, question]}]
        prompt = self.processor.apply_chat_template(message, add_generation_prompt=True)
        inputs = self.processor(text=[prompt] * len(images), images=[[image] for image in images],
                                padding=True, return_tensors="pt").to(self.device, self.dtype)
        return self._decode(self.model, decoding, seeds, inputs.input_ids.shape[1], each, **inputs)


class Florence2(Captioner):
    """Florence-2 (Xiao et al. 2024): DaViT encoder, BART-like encoder and decoder.

    The preset's ``prompt`` is one of its task tokens; ``<CAPTION>`` if none is given.
    """

    classes, model_types = ("Florence2ForConditionalGeneration", "Florence2Processor"), ("florence2",)

    def _prepare(self) -> None:
        text = self.model.config.text_config
        start = self.model.generation_config.decoder_start_token_id
        # BART's decoder reads its start token and then a forced <s>: both belong to the prompt.
        self._prompt = [text.decoder_start_token_id if start is None else start, text.bos_token_id]
        self._end = end_tokens(text)
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

    classes, model_types = ("GitForCausalLM", "GitProcessor"), ("git",)

    def _prepare(self) -> None:
        self._end = (self.tokenizer.sep_token_id,)

    def _rows(self, images: list[Image.Image], seeds: list[int], each: int, decoding: Decoding) -> list[Caption]:
        prompt = [self.tokenizer.cls_token_id, *self.tokenizer(decoding.prompt, add_special_tokens=False).input_ids]
        input_ids = torch.tensor([prompt] * len(images), device=self.device)
        return self._decode(self.model, decoding, seeds, len(prompt), each, pixel_values=self._pixels(images),
                            input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
