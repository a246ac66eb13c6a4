"""Which device and number type a model runs on, and in batches of what size."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable
from typing import TypeVar

import torch

from lib.base import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
# How torch, cuBLAS, cuDNN and Metal say that memory ran out.
_SHORTAGE = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "invalid buffer size")


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device asked for, else that of $COMPENDIUM_DEVICE, else CUDA, Apple MPS or the CPU.

    Raises UserError for a device that torch does not know or cannot reach.
    """
    device = device or os.environ.get("COMPENDIUM_DEVICE", "").strip() or None
    present = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
               "mps": int(torch.backends.mps.is_available())}
    if device is None:
        return torch.device(next((name for name, there in present.items() if there), "cpu"))
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is unknown: use cuda, mps or cpu") from error
    if (chosen.index or 0) >= present.get(chosen.type, math.inf):
        raise UserError(f"device {device!r} cannot be reached by torch {torch.__version__}: check the driver and "
                        "that this torch was built for it, or unset COMPENDIUM_DEVICE")
    return chosen


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


class Batches:
    """Runs work in batches of at most ``size`` rows; halves them, for good, when memory runs out."""

    def __init__(self, size: int, what: str) -> None:
        self.size, self.what = size, what

    def run(self, n: int, work: Callable[[slice], T], multiple: int = 1) -> list[T]:
        """Return the results of ``work(slice)`` over ``range(n)``, in order.

        multiple: a batch holds whole groups of that many rows, if it holds one at all.
        Raises UserError where not even one row fits.
        """
        results: list[T] = []
        start = 0
        while start < n:
            size = self.size - (self.size % multiple if self.size > multiple else 0)
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
                raise UserError(f"{self.what}: out of memory even with one row ({shortage}): use a smaller model, "
                                "size or dtype, or another device")
            self.size = tried // 2
            log.warning("%s: out of memory with %d rows, going on with %d", self.what, tried, self.size)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch means that memory ran out (each device words it differently)."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _SHORTAGE)
