"""Randomness as a function of what it is for: one seed from a name, a seed and a step."""

import hashlib


def mix(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts`, and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
