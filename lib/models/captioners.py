"""Captioners: images in, K captions an image out, each with its log-probability (paper 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessorList

from lib.base import UserError
from lib.models.device import Batches, pick_device, pick_dtype
from lib.models.hub import folder_of, wanted
from lib.models.loading import check_end_token, check_tokenizer, finite, load_processor, load_transformer, loading
from lib.models.sampling import RowSampler
from lib.models.types import Caption, as_pil
from lib.presets import CaptionerSettings, Decoding

# Neutral values for everything that a checkpoint's generation_config might switch on by itself.
NEUTRAL = {"num_beams": 1, "min_length": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
           "length_penalty": 1.0, "early_stopping": False, "max_length": None,
           "forced_bos_token_id": None, "forced_eos_token_id": None, "use_cache": True}
UNFILTERED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


class Captioner:
    """What every captioner shares: batches, seeds, decoding.

    A family's ``_load`` sets ``model``, ``processor``, ``_end`` (ids of end tokens) and ``_pad``; its ``_rows``
    captions a batch of images, ``each`` rows an image, image by image.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    half_on_gpu: ClassVar[bool] = False  # float32 keeps tokens equal under any batch size

    def __init__(self, settings: CaptionerSettings, device: str | torch.device | None = None) -> None:
        self.settings = settings
        self.device = pick_device(device)
        self.dtype = pick_dtype(settings.dtype, self.device, self.half_on_gpu)
        self.folder = folder_of(wanted(settings)[0])
        self._batches = Batches(settings.batch_size, f"captioner {settings.id}")
        with loading(settings.id):
            self._load()
        check_tokenizer(self.tokenizer, self.model.get_input_embeddings().num_embeddings, settings.id)
        if not set(self._end) <= set(self.tokenizer.get_vocab().values()):
            raise UserError(f"model {settings.id} ends captions with token {self._end}, which its tokenizer does not "
                            "have: use the model's own tokenizer files")
        for decoding in (settings.sender, settings.receiver):
            self._check_prompt(decoding)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of captions and prompts."""
        return self.processor.tokenizer

    def caption(self, images: Sequence[Image.Image | np.ndarray], seeds: Sequence[Sequence[int]],
                decoding: Decoding | None = None) -> list[list[Caption]]:
        """Return ``len(seeds[i])`` captions of ``images[i]``, in the order of the seeds.

        images: PIL, or uint8 arrays (H, W, 3). decoding: the preset's sender if None. Each caption depends on
        its image, its seed and the decoding only. Greedy and beam captions do not depend on the seed: they
        are made once an image and repeated.
        """
        decoding = self.settings.sender if decoding is None else decoding
        self._check_prompt(decoding)
        used = [list(row)[:1] if decoding.deterministic else list(row) for row in seeds]
        rows = [(i, seed) for i, row in enumerate(used) for seed in row]
        most = max(map(len, used), default=1) or 1
        with torch.inference_mode():
            parts = self._batches.run(len(rows), lambda some: self._batch(images, rows[some], decoding), most)
        made = iter([caption for part in parts for caption in part])
        captions = [[next(made) for _ in row] for row in used]
        finite([c.logprob for row in captions for c in row], f"captioner {self.settings.id} in {self.dtype}",
               'set dtype = "float32" in the preset')
        return [row * len(asked) if decoding.deterministic else row
                for row, asked in zip(captions, seeds, strict=True)]

    def _batch(self, images: Sequence[Any], rows: list[tuple[int, int]], decoding: Decoding) -> list[Caption]:
        """Caption rows (image, seed): every image is encoded once and gets equally many rows, of which the
        surplus is dropped."""
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
        # generate repeats rows only in sampling mode. The sampler leaves one possible token, so
        # its multinomial draw has one outcome.
        repeat = UNFILTERED if each > 1 else {"do_sample": False}
        output = model.generate(**inputs, **settings, **repeat, num_return_sequences=each,
                                logits_processor=LogitsProcessorList([sampler]))
        texts = self._texts(output.sequences[:, prompt_length:])
        return list(map(Caption, texts, sampler.logprob.tolist(), sampler.n_tokens.tolist()))

    def _beam(self, model: Any, decoding: Decoding, settings: dict[str, Any], prompt_length: int,
              inputs: dict[str, Any]) -> list[Caption]:
        """Beam search; log-probabilities from the logits before any processor."""
        settings = settings | {
            "num_beams": decoding.beams, "do_sample": False, "output_logits": True, "output_scores": True,
            "repetition_penalty": decoding.repetition_penalty}
        if decoding.min_tokens > 0:
            settings |= {"min_length": None, "min_new_tokens": decoding.min_tokens}
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
        texts = []
        for row in tokens.tolist():
            stop = next((i for i, token in enumerate(row) if token in self._end), len(row))
            texts.append(" ".join(self.tokenizer.decode(row[:stop], skip_special_tokens=True).split()))
        return texts


class Blip(Captioner):
    """BLIP (Li et al. 2022), the paper's captioner: ViT encoder, BERT decoder with cross-attention."""

    model_types = ("blip",)

    def _load(self) -> None:
        from transformers import BlipForConditionalGeneration, BlipProcessor

        self.model = load_transformer(BlipForConditionalGeneration, self)
        self.processor = load_processor(BlipProcessor, self.folder)
        config = self.model.config.text_config
        self._start, self._end, self._pad = config.bos_token_id, (config.sep_token_id,), config.pad_token_id
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
