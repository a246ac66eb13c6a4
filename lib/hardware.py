"""Which device and number type a model runs on, and in batches of what size."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable
from typing import TypeVar

import torch

from lib.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, else that of $COMPENDIUM_DEVICE, else CUDA, Apple MPS or the CPU.

    Raises UserError for a device that torch does not know or cannot reach.
    """
    device = device or os.environ.get("COMPENDIUM_DEVICE") or None
    present = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
               "mps": int(torch.backends.mps.is_available())}
    if device is not None:
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise UserError(f"device {device!r} is unknown: use cuda, mps or cpu") from error
        if (chosen.index or 0) >= present.get(chosen.type, math.inf):
            raise UserError(f"device {device!r} cannot be reached by torch {torch.__version__}: check the "
                            "driver and that this torch was built for it, or unset COMPENDIUM_DEVICE")
        return chosen
    return torch.device(next((name for name, there in present.items() if there), "cpu"))


def pick_dtype(name: str, device: torch.device, half_on_gpu: bool, may_overflow: bool = True) -> torch.dtype:
    """The number type asked for; "auto": float32, or half precision on a GPU if that is wished.

    Of the two halves bfloat16 cannot overflow, and float16 rounds eight times as finely: it is taken
    on older GPUs, which lack the other, and for networks that were published in it.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and half_on_gpu:
        native = may_overflow and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.float16 if device.type == "mps" and half_on_gpu else torch.float32


class Batches:
    """Runs work in batches and halves them, for good, when the device runs out of memory.

    what: who works, for messages; rows: what the batch counts; nested: whether these batches are made
    inside others, which shall be halved in turn where not even one row fits.
    """

    def __init__(self, size: int, what: str, rows: str = "row", nested: bool = False) -> None:
        self.size = size
        self._what, self._rows, self._nested = what, rows, nested

    def run(self, n: int, work: Callable[[slice], T]) -> list[T]:
        """Call ``work(slice)`` over ``range(n)`` in order; return the results, one a batch."""
        results: list[T] = []
        start = 0
        while start < n:
            rows = slice(start, min(start + self.size, n))
            failure = None
            try:
                results.append(work(rows))
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = first_line(error)  # keep no reference: a traceback holds the tensors
            if failure is None:
                start = rows.stop
            else:
                self._halve(rows.stop - rows.start, failure)
        return results

    def _halve(self, tried: int, failure: str) -> None:
        """Halve the batch size after a failure at ``tried`` rows, and say so."""
        if tried <= 1:
            if self._nested:
                raise MemoryError(failure)
            raise UserError(f"{self._what}: out of memory even with one {self._rows} ({failure}): use a "
                            "smaller model, size or dtype, or another device")
        self.size = tried // 2
        log.warning("%s: out of memory with %d %ss, going on with %d", self._what, tried, self._rows,
                    self.size)
        gc.collect()  # an error's traceback may sit in a cycle and hold the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch means that memory ran out (each device words it differently)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in (
        "out of memory", "can't allocate memory", "not enough memory",
        "status_alloc_failed",  # cuBLAS and cuDNN
        "invalid buffer size"))  # Metal


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
