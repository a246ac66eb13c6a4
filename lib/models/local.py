"""What all models on this machine share: device, number type, weights, batches, and checks when they load."""

import gc
import itertools
import json
import logging
import os
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import transformers.utils.logging as of_transformers
from huggingface_hub.utils import enable_progress_bars

from lib.base import UserError
from lib.models.hub import folder_of, wanted

log = logging.getLogger(__name__)
T = TypeVar("T")
# How torch, cuBLAS, cuDNN and Metal say that memory ran out.
_SHORTAGE = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "invalid buffer size")

of_transformers.set_verbosity_error()
of_transformers.disable_progress_bar()
enable_progress_bars()  # the hub's, of downloads, stay


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device asked for, else that of $COMPENDIUM_DEVICE, else CUDA, Apple MPS or the CPU."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = device or os.environ.get("COMPENDIUM_DEVICE", "").strip() or found
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used by torch {torch.__version__} "
                        f"({str(error).splitlines()[0][:200]}): check the driver, or set COMPENDIUM_DEVICE=cpu") from error
    return torch.device(device)


def pick_dtype(name: str, device: torch.device, half_on_gpu: bool, may_overflow: bool = True) -> torch.dtype:
    """Return the number type asked for; "auto": float32, or half precision on a GPU if that is wished.

    Of the two halves bfloat16 cannot overflow, and float16 rounds eight times as finely: it is taken
    on older GPUs, which lack the other, and for networks that were published in it.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and half_on_gpu:
        native = may_overflow and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.float16 if device.type == "mps" and half_on_gpu else torch.float32


class LocalModel:
    """Settings, device, number type, the folder of weights; work in batches.

    A subclass loads its networks in ``_load``. Whatever goes wrong there is one UserError.
    """

    model_types: ClassVar[tuple[str, ...]] = ()  # of the configurations that it loads; empty: any
    half_on_gpu: ClassVar[bool] = False  # float32 keeps tokens equal under any batch size, and similarities close

    def __init__(self, settings: Any, device: str | torch.device | None = None) -> None:
        self.settings, self._batch_size = settings, settings.batch_size
        self.device = pick_device(device)
        self.folder = folder_of(wanted(settings)[0])
        # Pipelines around a U-Net (Stable Diffusion 1, SDXL, LCM) are used in float16 everywhere;
        # the text encoders of later ones (T5) overflow in it.
        self.dtype = pick_dtype(settings.dtype, self.device, self.half_on_gpu,
                                may_overflow=not (self.folder / "unet").is_dir())
        try:
            self._load()
        except UserError:
            raise
        except Exception as error:  # OSError, KeyError, RuntimeError, SafetensorError ...
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            remedy = "check its files and its settings in the preset"
            if is_out_of_memory(error):
                remedy = "out of memory, set a half-precision dtype or choose another device with COMPENDIUM_DEVICE"
            elif "tiktoken" in said or "sentencepiece" in said.lower():
                remedy = "its tokenizer needs the package sentencepiece: pip install sentencepiece"
            raise UserError(f"model {settings.id} cannot be loaded ({said}): {remedy}") from error

    def _network(self, model_class: Any) -> Any:
        """The weights in the folder as a transformers class; UserError for another architecture or missing weights."""
        settings = self.settings
        found = json.loads((self.folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if self.model_types and found not in self.model_types:
            raise UserError(f"model {settings.id} is of type {found!r}, its adapter needs "
                            f"{' or '.join(self.model_types)}: change the adapter or the id in the preset")
        loaded, info = model_class.from_pretrained(
            self.folder, dtype=self.dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            attn_implementation=None if settings.attention == "auto" else settings.attention, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise UserError(f"model {settings.id} lacks {len(missing)} weights of {model_class.__name__} (such as "
                            f"{missing[0]}): wrong or damaged checkpoint")
        return loaded.to(self.device).eval().requires_grad_(False)

    def _processor(self, processor_class: Any) -> Any:
        """A processor; the PIL backend gives the same pixels on every machine."""
        return processor_class.from_pretrained(self.folder, backend="pil", local_files_only=True, trust_remote_code=False)

    def _run(self, n: int, work: Callable[[slice], T], multiple: int = 1) -> list[T]:
        """Results of ``work(slice)`` over ``range(n)`` in batches, which are halved for good when memory runs out.

        multiple: a batch holds whole groups of that many rows, if it holds one at all.
        """
        results: list[T] = []
        start = 0
        while start < n:
            size = self._batch_size - (self._batch_size % multiple if self._batch_size > multiple else 0)
            rows = slice(start, min(start + size, n))
            try:
                results.append(work(rows))
                start = rows.stop
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                shortage = str(error).strip().split("\n")[0][:200]  # not the error: its traceback holds the tensors
            tried = rows.stop - rows.start
            if tried == 1:
                raise UserError(f"model {self.settings.id}: out of memory even with one row ({shortage}): use a smaller "
                                "model, size or dtype, or another device")
            self._batch_size = tried // 2
            log.warning("model %s: out of memory with %d rows, going on with %d", self.settings.id, tried, tried // 2)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results

    def _check_finite(self, values: Any) -> None:
        """Raise UserError where the model overflowed: it must not pass for one that works badly."""
        if not bool(torch.isfinite(torch.as_tensor(values)).all()):
            raise UserError(f"model {self.settings.id} in {self.dtype} gave numbers that are not finite: set dtype = "
                            '"float32" or "bfloat16" in the preset')


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch means that memory ran out (each device words it differently)."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _SHORTAGE)


def check_tokenizer(tokenizer: Any, n_embeddings: int, model_id: str) -> None:
    """Raise UserError where a tokenizer has no words, cannot reach them, or has ids that the model lacks."""
    vocabulary = tokenizer.get_vocab()
    if len(set(vocabulary.values()) - set(tokenizer.all_special_ids)) < 2:
        raise UserError(f"model {model_id} has a tokenizer without a vocabulary, every text would be the same to it: "
                        "add its tokenizer.json (or vocab.json and merges.txt)")
    token, highest = max(vocabulary.items(), key=lambda pair: pair[1])
    if highest >= n_embeddings:
        raise UserError(f"model {model_id} embeds {n_embeddings} tokens, its tokenizer has {token!r} as number "
                        f"{highest}: it belongs to another model, use the model's own tokenizer files")
    # At least one of many whole words must come back as its own token.
    whole = (match for token in vocabulary if (match := re.fullmatch(r"([▁Ġ]?)([a-z]{3,})(</w>)?", token)))
    tried = list(itertools.islice(whole, 500))
    if tried and not any(tokenizer.tokenize((" " if m[1] == "Ġ" else "") + m[2]) == [m[0]] for m in tried):
        raise UserError(f"model {model_id} has a tokenizer that never uses the words of its vocabulary: add its "
                        "merges.txt or tokenizer.json")


def check_end_token(used: int | None, tokenizer: Any, model_id: str, name: str = "eos_token_id") -> None:
    """Raise UserError where a model's end token is not its tokenizer's."""
    if used != getattr(tokenizer, name):
        raise UserError(f"model {model_id} takes token {used} for the end of a text, its tokenizer's is "
                        f"{getattr(tokenizer, name)}: set {name} in its config.json, or use the model's own tokenizer")


def check_text_tower(config: Any, tokenizer: Any, model_id: str) -> None:
    """Raise UserError where a text tower and its tokenizer do not fit; CLIP's also pools at the end token."""
    check_tokenizer(tokenizer, config.vocab_size, model_id)
    if config.model_type.startswith("clip"):
        # Where old configurations state 2, transformers takes the token with the highest number in a text.
        old = config.eos_token_id == 2
        check_end_token(max(tokenizer.get_vocab().values()) if old else config.eos_token_id, tokenizer, model_id)
