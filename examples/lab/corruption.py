"""Noise for some of the training documents, so that there is something to select."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import CorruptionConfig
from .corpus import Document
from .seeds import derive_seed, generator


PRINTABLE = (32, 127)  # noise is drawn from and put on printable ASCII: layout survives


def corrupt(documents: Sequence[Document], config: CorruptionConfig, seed: int) -> list[Document]:
    """Corrupt `config.share` of the documents; the other ones come back as they were."""
    ranked = sorted(documents, key=lambda d: derive_seed("corrupt", seed, d.name))
    chosen = {d.name for d in ranked[: round(config.share * len(documents))]}
    return [_corrupt_one(d, config, seed) if d.name in chosen else d for d in documents]


def _corrupt_one(document: Document, config: CorruptionConfig, seed: int) -> Document:
    """Replace each printable byte with probability `config.rate`; remember which ones changed."""
    rng = generator("noise", seed, document.name)
    data = torch.frombuffer(bytearray(document.data), dtype=torch.uint8).long()
    low, high = PRINTABLE
    printable = (data >= low) & (data < high)
    hit = printable & (torch.rand(len(data), generator=rng) < config.rate)
    if config.kind == "random":
        # a non-zero step around the ring of printable bytes: never the byte that was there
        step = torch.randint(1, high - low, data.shape, generator=rng)
        noise = low + (data - low + step) % (high - low)
    else:
        noise = _substitution(seed)[data]
    noisy = torch.where(hit, noise, data)
    return Document(document.name, bytes(noisy.tolist()), noisy != data)


def _substitution(seed: int) -> Tensor:
    """One fixed exchange of printable bytes for the whole corpus, each to a different byte."""
    low, high = PRINTABLE
    table = torch.arange(256)
    ring = low + torch.randperm(high - low, generator=generator("substitution", seed))
    table[ring] = ring.roll(1)  # a single cycle has no fixed point
    return table
