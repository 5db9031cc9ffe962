"""Seeds that have an owner: derived from what they are for, never from a global generator or from the order of work.

Equal parts give an equal seed on every machine, so shards, rows, batches and the number of workers may change.
"""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from its purpose and its owners, such as ("crop", seed, uid, k).

    >>> derived_seed("crop", 0, "ab", 1)
    1163392359446609341
    >>> derived_seed("crop", 0, "ab1") == derived_seed("crop", 0, "ab", 1)
    False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def derived_share(*parts: int | str) -> float:
    """A number in [0, 1) from its owners, for decisions by hash.

    >>> round(derived_share("weight", "ab", 3), 6)
    0.690076
    """
    return (derived_seed(*parts) >> 10) / 2**53  # 53 bits: more would round up to 1.0
