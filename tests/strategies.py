"""Hypothesis draws structure (sizes, masks, documents, layouts) and a seed; torch draws values.

Hypothesis does not drive torch's generator, and shrinking a thousand floats helps nobody. Single
elements are drawn only where the interesting cases are particular numbers (`special_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


IGNORE = -100
SEEDS = st.integers(0, 2**31 - 1)
WIDE_DTYPES = st.sampled_from([torch.float64, torch.float32])
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "expanded", "offset"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def integers(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=generator(seed))


def mask(seed: int, share: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator(seed)) < share


def relayout(x: Tensor, layout: str) -> Tensor:
    """The same shape in another memory layout. `expanded` repeats the first entry of axis 0."""
    if layout == "contiguous" or x.dim() == 0 or x.numel() == 0:
        return x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    flat = torch.cat([x.new_zeros(3), x.reshape(-1)])
    return flat[3:].view(x.shape)


@st.composite
def sizes(draw: st.DrawFn, high: int, low: int = 0) -> int:
    """Mostly ordinary sizes: a search over sixty examples must not spend half of them on nothing."""
    # Hypothesis favours the ends of a range, so the rare case is one in its middle.
    rare = draw(st.integers(0, 6)) == 3
    return draw(st.integers(low if rare else min(max(low, 2), high), high))


# The share of places that count. Nothing at all stands in the middle for the same reason.
SHARES = st.sampled_from([0.7, 0.5, 0.9, 0.0, 0.7, 1.0, 0.6])


def _boundaries(draw: st.DrawFn, seq: int) -> list[int]:
    cuts = draw(st.sets(st.integers(1, seq - 1), max_size=3)) if seq > 1 else set()
    return [0, *sorted(cuts), seq]


@st.composite
def offset_sets(draw: st.DrawFn, heads: int) -> int | tuple[int, ...] | None:
    """Default, the same spelled as an int, shifted labels, extra heads only, leaps."""
    kind = draw(st.sampled_from(["default", "int", "shifted", "extra", "leap"]))
    if kind == "default":
        return None
    if kind == "int":
        return heads
    if kind == "shifted":
        return tuple(range(heads))
    if kind == "extra":
        return tuple(range(2, heads + 2))
    steps = draw(st.lists(st.integers(1, 3), min_size=heads, max_size=heads))
    return tuple(sum(steps[: h + 1]) for h in range(heads))


@dataclass(frozen=True)
class Documents:
    """One packing, told in every way a caller may have it."""

    batch: int
    seq: int
    bounds: list[list[int]]

    @property
    def segment_ids(self) -> Tensor:
        out = torch.zeros(self.batch, self.seq, dtype=torch.int64)
        for b, bounds in enumerate(self.bounds):
            for d, start in enumerate(bounds[:-1]):
                out[b, start : bounds[d + 1]] = d + 1
        return out

    @property
    def position_ids(self) -> Tensor:
        out = torch.zeros(self.batch, self.seq, dtype=torch.int64)
        for b, bounds in enumerate(self.bounds):
            for d, start in enumerate(bounds[:-1]):
                out[b, start : bounds[d + 1]] = torch.arange(bounds[d + 1] - start)
        return out

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor(self.bounds[0])

    def pieces(self) -> list[tuple[int, slice]]:
        return [
            (b, slice(start, bounds[d + 1]))
            for b, bounds in enumerate(self.bounds)
            for d, start in enumerate(bounds[:-1])
            if bounds[d + 1] > start
        ]


@st.composite
def packings(draw: st.DrawFn, *, max_batch: int = 3, max_seq: int = 8) -> Documents:
    batch = draw(st.integers(1, max_batch))
    seq = draw(sizes(max_seq, 1))
    return Documents(batch, seq, [_boundaries(draw, seq) for _ in range(batch)])


@dataclass(frozen=True)
class Batch:
    """A multi-head problem: sizes, labels and a seed for every floating tensor."""

    batch: int
    seq: int
    heads: int
    vocab: int
    dim: int
    offsets: int | tuple[int, ...] | None
    labels: Tensor
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.seq, self.heads

    def logits(self, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> Tensor:
        return normal(self.seed, *self.shape, self.vocab, scale=scale).to(dtype)

    def hidden(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return normal(self.seed + 1, *self.shape, self.dim).to(dtype)

    def unembedding(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return normal(self.seed + 2, self.vocab, self.dim).to(dtype)

    def bias(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return normal(self.seed + 3, self.vocab).to(dtype)

    def weights(self, form: str, dtype: torch.dtype = torch.float64) -> Tensor | None:
        """`none`, `token` or `prediction`; a fifth of them is exactly 0."""
        if form == "none":
            return None
        shape = self.shape[:2] if form == "token" else self.shape
        weights = 0.1 + uniform(self.seed + 4, *shape)
        return weights.masked_fill(mask(self.seed + 6, 0.2, *shape), 0.0).to(dtype)

    def upstream(self) -> Tensor:
        return normal(self.seed + 5, *self.shape)


LOSS_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "label_smoothing": st.sampled_from([0.0, 0.1, 0.5]),
        "z_loss": st.sampled_from([0.0, 1e-3, 0.2]),
        "softcap": st.sampled_from([None, 0.7, 30.0]),
    },
)


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    min_batch: int = 0,
    min_seq: int = 0,
    max_seq: int = 6,
    min_heads: int = 1,
    max_heads: int = 3,
    max_vocab: int = 7,
    label_dims: tuple[int, ...] = (2, 3),
    default_offsets: bool = False,
    options: st.SearchStrategy[dict[str, Any]] | None = LOSS_OPTIONS,
) -> Batch:
    """Rows shorter than the number of heads, one-word vocabularies, nothing valid: all here."""
    batch, seq = draw(sizes(3, min_batch)), draw(sizes(max_seq, min_seq))
    heads, vocab = draw(st.integers(min_heads, max_heads)), draw(sizes(max_vocab, 1))
    dim, seed = draw(st.integers(1, 4)), draw(SEEDS)
    ignored = 1 - draw(SHARES)
    offsets = None if default_offsets else draw(offset_sets(heads))
    shape = (batch, seq) if draw(st.sampled_from(label_dims)) == 2 else (batch, seq, heads)
    labels = integers(seed, vocab, *shape).masked_fill(mask(seed + 9, ignored, *shape), IGNORE)
    # Labels that are aligned already leave the offsets to token-indexed weights alone.
    return Batch(
        batch,
        seq,
        heads,
        vocab,
        dim,
        offsets,
        labels,
        seed,
        draw(options) if options is not None else {},
    )


@dataclass(frozen=True)
class Scored:
    """Scores over valid places, `[batch seq]` or `[batch seq heads]`."""

    shape: tuple[int, ...]
    valid: Tensor
    seed: int
    dtype: torch.dtype
    scope: str

    def scores(self, scale: float = 1.0) -> Tensor:
        return normal(self.seed, *self.shape, scale=scale).to(self.dtype)

    def tied_scores(self) -> Tensor:
        return integers(self.seed, 3, *self.shape).to(self.dtype)

    def weights(self, zeros: float = 0.2, scale: float = 1.0) -> Tensor:
        w = torch.exp(normal(self.seed + 1, *self.shape, scale=scale))
        return w.masked_fill(mask(self.seed + 2, zeros, *self.shape), 0.0).to(self.dtype)

    def cross_entropies(self) -> Tensor:
        return (3 * uniform(self.seed + 3, *self.shape)).to(self.dtype)

    @property
    def tolerance(self) -> dict[str, float]:
        return tolerance(self.dtype)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    if dtype == torch.float64:
        return {"rtol": 1e-10, "atol": 1e-12}
    return {"rtol": 1e-5, "atol": 1e-6}


@st.composite
def scored(
    draw: st.DrawFn,
    *,
    dims: tuple[int, ...] = (2, 3),
    min_batch: int = 0,
    min_seq: int = 0,
    max_seq: int = 8,
) -> Scored:
    shape = (draw(sizes(3, min_batch)), draw(sizes(max_seq, min_seq)))
    if draw(st.sampled_from(dims)) == 3:
        shape = (*shape, draw(st.integers(1, 3)))
    seed, share = draw(SEEDS), draw(SHARES)
    scope = draw(st.sampled_from(["sequence", "batch", "all"]))
    return Scored(shape, mask(seed + 9, share, *shape), seed, draw(WIDE_DTYPES), scope)


@st.composite
def special_rows(draw: st.DrawFn, *, max_size: int = 6) -> Tensor:
    """One row of the numbers that break things, `[1 seq]`."""
    element = st.sampled_from(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 1e-38, 2.5]
    )
    return torch.tensor([draw(st.lists(element, min_size=1, max_size=max_size))])


@dataclass(frozen=True)
class Trajectories:
    """Values and rewards over packed, possibly padded rows with prompts and tool output."""

    values: Tensor
    rewards: Tensor | None
    valid: Tensor
    documents: dict[str, Tensor]
    initial_value: float | str
    gamma: float
    lam: float


@st.composite
def trajectories(draw: st.DrawFn, *, dtype: torch.dtype | None = None) -> Trajectories:
    batch, seq, seed = draw(sizes(3)), draw(sizes(8)), draw(SEEDS)
    dtype = draw(WIDE_DTYPES) if dtype is None else dtype
    valid = mask(seed + 9, draw(SHARES), batch, seq)
    told: dict[str, Tensor] = {}
    ways: list[tuple[str, ...]] = [
        (), (), ("segment_ids",), ("position_ids",), ("attention_mask",), ("segment_ids", "position_ids"),
    ]  # fmt: skip
    if batch == 1:
        ways += [("cu_seqlens",), ("cu_seqlens",)]
    way = draw(st.sampled_from(ways)) if seq > 0 else ()
    packing = Documents(batch, seq, [_boundaries(draw, seq) if way else [0] for _ in range(batch)])
    for name in way:
        # Some collators number the documents in the mask.
        told[name] = getattr(packing, "segment_ids" if name == "attention_mask" else name)
    if "cu_seqlens" in told and draw(st.booleans()):  # what is behind the last is in no document
        told["cu_seqlens"] = told["cu_seqlens"][: max(1, len(told["cu_seqlens"]) - 1)]
    side = draw(st.sampled_from(["none", "left", "right"]))
    if side != "none":
        lengths = integers(seed + 8, seq + 1, batch)
        place = torch.arange(seq).expand(batch, seq)
        attention = place < lengths[:, None]
        if side == "left":
            attention = place >= seq - lengths[:, None]
        valid = valid & attention
        told["attention_mask"] = attention * told.get("attention_mask", torch.ones(()).long())
    rewards = normal(seed + 1, batch, seq).to(dtype) if draw(st.booleans()) else None
    return Trajectories(
        normal(seed, batch, seq).to(dtype),
        rewards,
        valid,
        told,
        draw(st.sampled_from(["first", 0.0, 0.5])),
        draw(st.sampled_from([0.97, 1.0, 0.5])),
        draw(st.sampled_from([0.95, 0.3, 1.0, 0.0])),
    )


JUNK = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30, -1e30])


def spoiled(x: Tensor, where: Tensor, junk: float) -> Tensor:
    """`x` with junk at the places (leading axes) that nobody may read."""
    where = where.reshape(*where.shape, *[1] * (x.dim() - where.dim()))
    return x.masked_fill(where, junk)
