"""Captioners: images in, K captions an image out, each with its log-probability (paper 3.2).

Every family is one class: it encodes a batch of images once, then decodes rows (image, seed).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessorList

from lib.encoders import rgb_picture
from lib.errors import UserError
from lib.flops import Meter
from lib.hardware import Batches, pick_device, pick_dtype
from lib.presets import CaptionerSpec, Decoding
from lib.sampling import RowSampler
from lib.weights import load_transformer, loading, model_folder

log = logging.getLogger(__name__)

# Neutral values for everything that a checkpoint's generation_config might switch on by itself.
NEUTRAL = {"num_beams": 1, "min_length": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
           "length_penalty": 1.0, "early_stopping": False, "max_length": None,
           "forced_bos_token_id": None, "forced_eos_token_id": None, "use_cache": True}
UNFILTERED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@dataclass(frozen=True)
class Caption:
    """A caption without its prompt.

    logprob: sum of the natural-log probabilities of its tokens, the end token included, under the
    model's full distribution (never of the filtered one). n_tokens: new tokens without the end.
    """

    text: str
    logprob: float
    n_tokens: int


class Captioner:
    """What every captioner shares: batching, seeds, shapes. Families fill in ``_captions``."""

    model_types: ClassVar[tuple[str, ...]] = ()
    half_on_gpu: ClassVar[bool] = False  # float32 keeps tokens equal under any batch size
    networks: ClassVar[Mapping[str, tuple[str, ...]]] = {"model": ("",)}  # whose cost is counted

    def __init__(self, spec: CaptionerSpec, device: str | torch.device | None = None) -> None:
        self.spec = spec
        self.device = pick_device(device)
        self.dtype = pick_dtype(spec.dtype, self.device, self.half_on_gpu)
        self.folder: Path = model_folder(spec.id, spec.revision)
        self._batches = Batches(spec.batch_size, f"captioner {spec.id}", "caption", nested=True)
        self._each = Batches(sys.maxsize, f"captioner {spec.id}", "caption")
        with loading(spec.id):
            self._load()
        self.meter = Meter.of(getattr(self, "model", None), self.networks)

    def _load(self) -> None:
        """Set ``self.model`` and ``self.processor``."""
        raise NotImplementedError

    def _load_model(self, model_class: Any) -> Any:
        """Load the weights as the given transformers class."""
        return load_transformer(model_class, self.folder, self.spec.id, self.dtype, self.device,
                                self.spec.attention, self.model_types)

    def _load_processor(self, processor_class: Any) -> Any:
        """Load the processor; the PIL backend gives the same pixels on every machine."""
        return processor_class.from_pretrained(self.folder, backend="pil", local_files_only=True,
                                               trust_remote_code=False)

    def caption(self, images: Sequence[Image.Image | np.ndarray], seeds: Sequence[Sequence[int]],
                decoding: Decoding | None = None) -> list[list[Caption]]:
        """Return ``len(seeds[i])`` captions of ``images[i]``, in the order of the seeds.

        images: PIL, or uint8 arrays (H, W, 3) straight from a generator.
        decoding: the preset's sender decoding if None. Each caption depends on its image, its
        seed and the decoding only. Greedy and beam captions do not depend on the seed: they are
        made once an image and repeated.
        """
        if len(images) != len(seeds):
            raise ValueError(f"{len(images)} images but seeds for {len(seeds)}")
        decoding = self.spec.sender if decoding is None else decoding
        if decoding.deterministic:
            asked, seeds_used = [len(row) for row in seeds], [list(row)[:1] for row in seeds]
        else:
            asked, seeds_used = [1] * len(seeds), [list(row) for row in seeds]
        with torch.inference_mode():
            parts = self._captions([rgb_picture(image) for image in images], seeds_used, decoding)
        self._check_finite(parts)
        return [row * n if decoding.deterministic else row
                for row, n in zip(parts, asked, strict=True)]

    def _captions(self, images: list[Image.Image], seeds: list[list[int]],
                  decoding: Decoding) -> list[list[Caption]]:
        """The captions of all images; the default repeats the images' rows inside ``generate``."""
        most = max((len(row) for row in seeds), default=0)
        if most == 0:
            return [[] for _ in seeds]
        # Rows must be as many for every image here; surplus ones get seed 0 and are dropped.
        padded = [row + [0] * (most - len(row)) for row in seeds]
        captions: list[list[Caption]] = [[] for _ in images]
        for block in self._each.run(most, lambda some: self._block(
                images, [row[some] for row in padded], decoding)):
            for row, more in zip(captions, block, strict=True):
                row += more
        return [row[:len(asked)] for row, asked in zip(captions, seeds, strict=True)]

    def _block(self, images: list[Image.Image], seeds: list[list[int]],
               decoding: Decoding) -> list[list[Caption]]:
        """Equally many captions of every image."""
        each = len(seeds[0])
        # The batch size counts rows (captions), so fewer images fit when each gets several.
        batches = Batches(max(1, self._batches.size // each), f"captioner {self.spec.id}", "picture",
                          nested=True)
        whole = batches.size
        parts = batches.run(len(images), lambda rows: self._caption_rows(
            images[rows], [seed for row in seeds[rows] for seed in row], each, decoding))
        if batches.size < whole:
            self._batches.size = batches.size * each  # the next call need not find out again
        done = [caption for part in parts for caption in part]
        return [done[start:start + each] for start in range(0, len(done), each)]

    def _caption_rows(self, images: list[Image.Image], seeds: list[int], each: int,
                      decoding: Decoding) -> list[Caption]:
        """Caption a batch, ``each`` rows an image, image by image."""
        raise NotImplementedError

    def _check_finite(self, captions: Sequence[Sequence[Caption]]) -> None:
        """A model that overflowed must not pass for one that captions badly."""
        if not all(abs(c.logprob) < float("inf") for row in captions for c in row):
            raise UserError(f"captioner {self.spec.id} gave non-finite probabilities in "
                            f"{self.dtype}: set dtype = \"float32\" in the preset")

    # --- decoding, shared by all families -----------------------------------------------------

    def _decode(self, model: Any, decoding: Decoding, seeds: list[int], prompt_length: int,
                tokenizer: Any, end_tokens: Sequence[int], pad_token: int, each: int = 1,
                **inputs: Any) -> list[Caption]:
        """Run ``model.generate`` and cut the prompt off.

        inputs hold one row an image if ``each`` > 1 (``generate`` repeats them after encoding),
        else one row a caption. ``prompt_length`` counts the tokens before the caption.
        """
        settings = NEUTRAL | {"max_new_tokens": decoding.max_tokens, "pad_token_id": pad_token,
                              "eos_token_id": list(end_tokens), "return_dict_in_generate": True}
        if decoding.strategy == "beam":
            return self._beam(model, decoding, settings, prompt_length, tokenizer, inputs)
        sampler = RowSampler(decoding, seeds, end_tokens, self.device)
        # generate repeats rows only in sampling mode. The sampler leaves one possible token, so
        # its multinomial draw has one outcome.
        repeat = UNFILTERED if each > 1 else {"do_sample": False}
        output = model.generate(**inputs, **settings, **repeat, num_return_sequences=each,
                                logits_processor=LogitsProcessorList([sampler]))
        texts = _texts(tokenizer, output.sequences[:, prompt_length:], end_tokens)
        return [Caption(text, logprob, n) for text, logprob, n in
                zip(texts, sampler.logprob.tolist(), sampler.n_tokens.tolist(), strict=True)]

    def _beam(self, model: Any, decoding: Decoding, settings: dict[str, Any], prompt_length: int,
              tokenizer: Any, inputs: dict[str, Any]) -> list[Caption]:
        """Beam search; log-probabilities from the logits before any processor."""
        settings = settings | {
            "num_beams": decoding.beams, "do_sample": False, "output_logits": True,
            "output_scores": True, "repetition_penalty": decoding.repetition_penalty}
        if decoding.min_tokens > 0:
            settings |= {"min_length": None, "min_new_tokens": decoding.min_tokens}
        output = model.generate(**inputs, **settings)
        tokens = output.sequences[:, prompt_length:]
        scores = model.compute_transition_scores(
            output.sequences, output.logits, getattr(output, "beam_indices", None),
            normalize_logits=True)  # (B, steps)
        tokens, scores = tokens[:, :scores.shape[1]], scores[:, :tokens.shape[1]]
        end = torch.isin(tokens, torch.tensor(settings["eos_token_id"], device=tokens.device))
        after = (end.cumsum(1) - end.long()) > 0  # strictly after the first end token
        logprobs = torch.where(after, 0.0, scores).sum(1).tolist()
        lengths = (~after & ~end).sum(1).tolist()
        texts = _texts(tokenizer, tokens, settings["eos_token_id"])
        return [Caption(*row) for row in zip(texts, logprobs, lengths, strict=True)]


def _texts(tokenizer: Any, tokens: torch.Tensor, end_tokens: Sequence[int]) -> list[str]:
    """Decode new tokens (B, L) up to the first end token; single spaces, no special tokens."""
    texts = []
    for row in tokens.tolist():
        stop = next((i for i, token in enumerate(row) if token in end_tokens), len(row))
        texts.append(" ".join(tokenizer.decode(row[:stop], skip_special_tokens=True).split()))
    return texts


class Blip(Captioner):
    """BLIP (Li et al. 2022), the paper's captioner: ViT encoder, BERT decoder with cross-attention."""

    model_types = ("blip",)
    networks: ClassVar = {"image encoder": ("vision_model",), "text decoder": ("text_decoder",)}

    def _load(self) -> None:
        from transformers import BlipForConditionalGeneration, BlipProcessor

        self.model = self._load_model(BlipForConditionalGeneration)
        self.processor = self._load_processor(BlipProcessor)
        config = self.model.config.text_config
        self._end, self._pad = config.sep_token_id, config.pad_token_id
        self._start = config.bos_token_id
        self._image_batches = Batches(self.spec.batch_size, f"captioner {self.spec.id}", "picture")

    def _captions(self, images: list[Image.Image], seeds: list[list[int]],
                  decoding: Decoding) -> list[list[Caption]]:
        """Encode each image once, then decode the rows of a batch of images together."""
        prompt = self._prompt_tokens(decoding)

        def work(chosen: slice) -> list[list[Caption]]:
            features = self._encode(images[chosen])
            rows = [(i, seed) for i, row in enumerate(seeds[chosen]) for seed in row]
            parts = self._batches.run(len(rows), lambda some: self._decode_rows(
                features, rows[some], prompt, decoding))
            captions = (caption for part in parts for caption in part)
            return [[next(captions) for _ in row] for row in seeds[chosen]]

        return [row for part in self._image_batches.run(len(images), work) for row in part]

    def _encode(self, images: list[Image.Image]) -> torch.Tensor:
        """Image features (b, T, D)."""
        pixels = self.processor.image_processor(images, return_tensors="pt").pixel_values
        return self.model.vision_model(pixels.to(self.device, self.dtype)).last_hidden_state

    def _prompt_tokens(self, decoding: Decoding) -> list[int]:
        """[DEC] and the prompt's tokens."""
        prompt = self.processor.tokenizer(decoding.prompt, add_special_tokens=False).input_ids
        return [self._start, *prompt]

    def _decode_rows(self, features: torch.Tensor, rows: list[tuple[int, int]],
                     prompt: list[int], decoding: Decoding) -> list[Caption]:
        """Decode rows (image in batch, seed) over the image features (b, T, D)."""
        index = torch.tensor([i for i, _ in rows], device=self.device)
        memory = features[index]  # (B, T, D)
        input_ids = torch.tensor([prompt] * len(rows), device=self.device)  # (B, L)
        return self._decode(
            self.model.text_decoder, decoding, [seed for _, seed in rows], len(prompt),
            self.processor.tokenizer, (self._end,), self._pad, input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids), encoder_hidden_states=memory,
            encoder_attention_mask=torch.ones(memory.shape[:-1], dtype=torch.long,
                                              device=self.device))
