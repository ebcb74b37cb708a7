"""Batches that any process can make again: batch `k` is a function of the seed and `k`."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp import mtp_targets

from .corpus import IGNORE, Packed
from .seeds import generator


class Batch(NamedTuple):
    """What one step reads; `rows` says which rows of the packed corpus they are."""

    rows: Tensor
    tokens: Tensor
    segment_ids: Tensor
    corrupted: Tensor
    targets: Tensor


def batch_rows(total: int, size: int, seed: int, step: int) -> Tensor:
    """The rows of batch `step`: a fresh permutation for every pass over the corpus."""
    places = range(step * size, (step + 1) * size)
    picked = [_permutation(total, seed, place // total)[place % total] for place in places]
    return torch.tensor(picked)


@lru_cache(maxsize=4)
def _permutation(total: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(total, generator=generator("epoch", seed, epoch)).tolist()


def take(packed: Packed, rows: Tensor, heads: int) -> Batch:
    """Read the rows; no prediction crosses a document, whichever head makes it."""
    segments = packed.segment_ids[rows]
    targets = mtp_targets(packed.labels[rows], heads, ignore_index=IGNORE, segment_ids=segments)
    return Batch(rows, packed.tokens[rows], segments, packed.corrupted[rows], targets)
