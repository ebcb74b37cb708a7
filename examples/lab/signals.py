"""Numbers per training byte that are computed once and kept on disk, with what they belong to."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import differences, read_tensors, write_tensors
from .corpus import TOKENIZER, Packed
from .errors import LabError


def corpus_identity(packed: Packed) -> dict[str, Any]:
    """Which bytes, in which order, cut how, and read by which tokenizer."""
    rows, length = packed.tokens.shape
    return {
        "corpus": packed.fingerprint(),
        "tokenizer": TOKENIZER,
        "packing": f"{rows} rows of {length}",
    }


def key_of(identity: dict[str, Any]) -> str:
    """A short name for an identity, for a folder of its own."""
    text = json.dumps(identity, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()[:10]


def save_signal(path: Path, values: Tensor, identity: dict[str, Any]) -> None:
    """Keep `values [rows, seq]` together with its identity."""
    write_tensors(path, {"values": values.contiguous()}, identity)


def load_signal(path: Path, identity: dict[str, Any], packed: Packed) -> Tensor:
    """The values, refused unless everything in `identity` is the same as when they were made."""
    advice = "remove it to have it computed again, or give the file that belongs to this run"
    if not path.exists():
        raise LabError(
            f"no file {path}; correct rho1.reference_nll, or leave it empty to have one trained"
        )
    tensors, stored = read_tensors(path, advice=advice)
    if found := differences({key: stored.get(key, "nothing") for key in identity}, identity):
        raise LabError(f"{path} belongs to something else: {found}; {advice}")
    values = tensors.get("values")
    if values is None or values.shape != packed.tokens.shape or not values.is_floating_point():
        raise LabError(
            f"{path}: expected a float tensor 'values' of shape {tuple(packed.tokens.shape)}, one "
            f"number per training byte; {advice}"
        )
    if not torch.isfinite(values).all():
        raise LabError(f"{path} holds NaN or infinite values; {advice}")
    return values
