"""Randomness as a function of what it is for: one seed from a name, a seed and a step."""

import hashlib

import torch


def mix(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts`, and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed(*parts: int | str) -> None:
    """Start all of torch's generators from `mix(*parts)`, in microseconds (`torch.manual_seed`,
    which asks every kind of device there might be, takes 170)."""
    value = mix(*parts)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # until then nothing is drawn there
        torch.cuda.manual_seed_all(value)
