"""How many floating-point operations the models spend: counted by torch, a pass of each kind once.

A meter stands in front of a model's networks. The first pass of each shape is played under torch's
``FlopCounterMode`` (matrix products and convolutions, 2 x multiply-add); every later pass of that
shape adds the known number, so that counting costs a run next to nothing. What is counted is what
was computed: rows that fill up a batch and the unconditional half of guidance included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOP of fused attention from the shapes (B, heads, L, d) of its inputs."""
    return sdpa_flop_count(query, key, value)


# torch knows the fused attention of CUDA only; without these an attention on other devices is free.
_ATTENTION = {getattr(torch.ops.aten, name): _attention_flop for name in (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable") if hasattr(torch.ops.aten, name)}


def count(work: Callable[[], Any]) -> tuple[Any, int]:
    """Do some work of torch; what it gives and its FLOP (2 x multiply-add)."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        result = work()
    return result, counter.get_total_flops()


class Meter:
    """Passes and FLOP of a model by network; one pass is one row through the network once."""

    def __init__(self) -> None:
        self.passes: Counter[str] = Counter()
        self.flop: Counter[str] = Counter()
        self._a_row: dict[Hashable, float] = {}  # FLOP of one row, by network and shapes
        self._busy = False  # inside a watched network: what it calls is counted with it

    @classmethod
    def of(cls, model: Any, networks: Mapping[str, tuple[str, ...]]) -> Meter | None:
        """A meter on networks of a model or pipeline: name -> parts.

        A part is a dotted name; "" is the model itself, "model.*" every part of its part "model".
        Parts that the model lacks are passed over; None where it has none of them. Only the first
        part of a network counts passes. Watch after ``Module.compile``, which would undo it.
        """
        meter = cls()
        for name, parts in networks.items():
            found = [part for path in parts for part in _find(model, path)]
            for position, part in enumerate(found):
                meter._watch(name, part, counts_passes=position == 0)
            if found:
                meter.passes[name] += 0
        return meter if meter.passes else None

    def _watch(self, name: str, module: torch.nn.Module, counts_passes: bool) -> None:
        """Put the meter in front of a module, compiled or not.

        The attribute is where ``Module.__call__`` looks for a compiled call. Wrapping the call and
        not ``forward`` keeps the meter out of what is compiled, and ``forward``'s signature as it is.
        """
        compiled, label = module._compiled_call_impl, (name, id(module))

        def call(*args: Any, **kwargs: Any) -> Any:
            run = compiled or module._call_impl
            if self._busy:
                return run(*args, **kwargs)
            rows, shapes = _shapes(args, kwargs)
            self._busy = True
            try:
                known = self._a_row.get((label, shapes))
                if known is None and compiled is None:
                    result, flop = count(lambda: run(*args, **kwargs))
                    known = flop / rows
                else:
                    if known is None:  # compiled code hides its products: count the plain code once
                        with torch.compiler.set_stance("force_eager"):
                            known = count(lambda: module._call_impl(*args, **kwargs))[1] / rows
                    result = run(*args, **kwargs)
            finally:
                self._busy = False
            self._a_row[label, shapes] = known
            self.flop[name] += round(known * rows)
            self.passes[name] += rows if counts_passes else 0
            return result

        module._compiled_call_impl = call


def _find(model: Any, path: str) -> list[torch.nn.Module]:
    """The modules of a model that a dotted name means; none where it has no such module."""
    found: Any = model
    for name in path.removesuffix("*").split("."):
        found = getattr(found, name, None) if name else found
    if not isinstance(found, torch.nn.Module):
        return []
    return list(found.children()) if path.endswith("*") else [found]


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, Hashable]:
    """Rows of a call and what decides the FLOP of one of them.

    Rows: the first axis of the first tensor. It is taken out of the shape of each tensor that has
    it, so that a smaller last batch needs no count of its own.
    """
    described = [*_describe("", args), *_describe("", kwargs)]
    rows = next((value[0] for _, value in described if isinstance(value, torch.Size) and value), 1)
    shapes = tuple((name, tuple(value[1:]) if isinstance(value, torch.Size) and value[:1] == (rows,)
                    else value) for name, value in described)
    return max(1, rows), shapes


def _describe(name: str, value: Any) -> list[tuple[str, Hashable]]:
    """Shapes of tensors, lengths of key-value caches and plain values, by place."""
    if isinstance(value, torch.Tensor):
        return [(name, value.shape)]
    if isinstance(value, Mapping):
        return [line for key, part in value.items() for line in _describe(f"{name}.{key}", part)]
    if isinstance(value, list | tuple):
        return [line for i, part in enumerate(value) for line in _describe(f"{name}.{i}", part)]
    if hasattr(value, "get_seq_length"):
        return [(name, int(value.get_seq_length()))]
    return [(name, value)] if isinstance(value, bool | int | float | str | None) else []
