"""The device, the number type and the size of batches, by what the hardware has."""

from __future__ import annotations

import logging

import pytest
import torch

from lib.errors import UserError
from lib.hardware import Batches, pick_device, pick_dtype


def test_out_of_memory_halves_and_goes_on(caplog):
    tried = []

    def work(rows):
        tried.append(rows.stop - rows.start)
        if rows.stop - rows.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(rows.start, rows.stop))

    batches = Batches(8, "captioner x")
    with caplog.at_level(logging.WARNING):
        assert [row for part in batches.run(10, work) for row in part] == list(range(10))
    assert tried[:3] == [8, 4, 2] and batches.size == 2 and "going on with 4" in caplog.text
    with pytest.raises(UserError, match="one row"):
        Batches(1, "x").run(1, lambda rows: (_ for _ in ()).throw(MemoryError("out of memory")))
    with pytest.raises(RuntimeError, match="shapes"):
        Batches(2, "x").run(1, lambda rows: (_ for _ in ()).throw(RuntimeError("shapes")))


def test_device_and_dtype(monkeypatch):
    assert pick_device("cpu").type == "cpu"
    assert pick_dtype("auto", torch.device("cpu"), True) is torch.float32
    assert pick_dtype("auto", torch.device("mps"), True) is torch.float16
    assert pick_dtype("bfloat16", torch.device("cpu"), False) is torch.bfloat16
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, n=native: n)
        card, better = torch.device("cuda"), torch.bfloat16 if native else torch.float16
        assert pick_dtype("auto", card, True) is better and pick_dtype("auto", card, False) is torch.float32
        assert pick_dtype("auto", card, True, may_overflow=False) is torch.float16
    with pytest.raises(UserError, match="abacus"):
        pick_device("abacus")
    absent = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
    with pytest.raises(UserError, match=f"{absent}.* cannot be reached by torch"):
        pick_device(absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1") and pick_device().type == "cuda"
    with pytest.raises(UserError, match="'cuda:2' cannot be reached"):
        pick_device("cuda:2")
