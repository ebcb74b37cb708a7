"""Randomness as a function of names, never of what ran before."""

import hashlib

import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the parts, the same in every process (unlike `hash`)."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A fresh generator for one named purpose, so that resuming needs no saved state."""
    return torch.Generator().manual_seed(derive_seed(*parts))
