"""Seeds that depend on names, never on order: the root of the repeatability contract."""

from __future__ import annotations

import hashlib

MASK_63_BITS = (1 << 63) - 1


def stable_seed(*parts: str | int) -> int:
    """Hash the parts to a seed in ``[0, 2**63)`` that is the same on every machine.

    The first 8 bytes (big-endian) of the SHA-256 of the parts joined by the unit separator,
    masked to 63 bits so that both ``torch.Generator`` and a signed Parquet column take it.
    """
    joined = "\x1f".join(str(part) for part in parts)
    digest = hashlib.sha256(joined.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") & MASK_63_BITS
