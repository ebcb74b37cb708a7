"""A long run of random shapes through every path: memory stays flat, the paths do not drift apart.

    python -m tests.soak --steps 10000

Every step draws sizes, dtype and options and sends them through the dense and the linear form of the
weighted loss (no weights, known ones, a function, row-local) or of the plain cross entropy, forward
and backward, and compares the two; three steps of ten also go through the critic's path, the scores,
the builders, the controls and the modules.

What must hold, after a warm-up of four tenths of the steps in which caches and the allocator fill:

* the number of live tensors is the same at every sample: one that a step leaves behind shows;
* the resident memory at the end is within ``RSS_SLACK`` of where it was after the warm-up, comparing
  the medians of the first and the last quarter of the samples: a kilobyte and a half lost per step shows;
* the largest difference between linear and dense, relative and per dtype, is within ``TOLERANCE`` at
  every step, and its mean over the second half of the run within a factor of ``TREND`` of the first.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import wmtp


# So many random cases, drawn again and again in a random order. A matrix library keeps a kernel for
# every shape that it meets (3,000 bfloat16 products of new shapes take a gigabyte by themselves, with
# nothing of this package): cases that never come again would hide a leak behind that.
CASES = 500
WARM_UP = 0.4
RSS_SLACK = 5 * 2**20
TREND = 1.5
# Relative to the largest entry. In float32 the sums run in another order; in bfloat16 the linear
# path rounds each product, the dense one the logits and its gradient's terms as well.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 4e-2}


class Sample(NamedTuple):
    step: int
    rss: int
    tensors: int


class Case(NamedTuple):
    """One step's tensors and options."""

    hidden: Tensor
    unembedding: Tensor
    bias: Tensor | None
    labels: Tensor
    options: dict[str, Any]
    slab_bytes: int | None
    generator: torch.Generator

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, seq, heads = self.hidden.shape[:3]
        return batch, seq, heads

    def draw(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)


def draw_case(r: random.Random) -> Case:
    generator = torch.Generator().manual_seed(r.randrange(2**31))
    batch, seq, heads = r.randint(0, 3), r.randint(0, 12), r.randint(1, 4)
    vocab, dim = r.randint(1, 40), r.randint(1, 12)
    dtype = r.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64))
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    hidden = normal(batch, seq, heads, dim).to(dtype)
    unembedding = (normal(vocab, dim) / dim**0.5).to(dtype)
    bias = normal(vocab).to(dtype) if r.random() < 0.5 else None
    labels = torch.randint(vocab, (batch, seq), generator=generator)
    labels[torch.rand(batch, seq, generator=generator) < r.choice((0.0, 0.3, 1.0))] = -100
    if r.random() < 0.5:
        segments = torch.arange(seq).expand(batch, seq) // r.randint(1, 6)
        labels = wmtp.mtp_targets(labels, heads, segment_ids=segments)
    options = {
        "label_smoothing": r.choice((0.0, 0.0, 0.1)),
        "z_loss": r.choice((0.0, 1e-3)),
        "softcap": r.choice((None, None, 5.0)),
    }
    row = vocab * dtype.itemsize
    slab = r.choice((None, row, 3 * row, 40 * row))
    return Case(hidden, unembedding, bias, labels, options, slab, generator)


def leaves_of(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fresh leaves, so that no gradient is kept from one path to the next."""
    hidden, unembedding = (x.clone().requires_grad_() for x in (case.hidden, case.unembedding))
    bias = None if case.bias is None else case.bias.clone().requires_grad_()
    return hidden, unembedding, bias


def logits_of(hidden: Tensor, unembedding: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, unembedding, bias)


def results(loss: Tensor, leaves: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The loss and its gradients, detached."""
    held = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(loss, held)
    return [loss.detach(), *grads]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry of each tensor; NaN is infinite."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel():
            wide = b.double()
            gap = (a.double() - wide).abs().max() / wide.abs().max().clamp(min=1e-2)
            worst = max(worst, float(torch.nan_to_num(gap, nan=torch.inf)))
    return worst


def weighted_paths(case: Case, r: random.Random) -> float:
    """Dense against linear, for one of the kinds of weights, with gradients."""
    batch, seq, heads = case.shape
    reference = case.draw(batch, seq) * 3
    rho1 = partial(wmtp.rho1_weights, reference_nll=reference, mode="softmax", temperature=2.0)
    kinds: list[Any] = [
        None,
        case.draw(batch, seq),
        case.draw(batch, seq, heads),
        wmtp.dft_weights,
        rho1,
        wmtp.RowLocalWeights(r.choice(("dft", "focal", "entropy", "el2n")), r.choice((1.0, 2.0))),
    ]
    weights = r.choice(kinds)
    common: dict[str, Any] = {
        **case.options,
        "normalizer": r.choice(("weights", "tokens", 7.5)),
        "head_weights": r.choice((None, [1.0] * heads)),
    }
    dense_leaves, linear_leaves = leaves_of(case), leaves_of(case)
    dense, stats = wmtp.weighted_mtp_loss_and_stats(
        logits_of(*dense_leaves), case.labels, weights, **common
    )
    linear, other = wmtp.linear_weighted_mtp_loss_and_stats(
        *linear_leaves[:2], case.labels, weights, bias=linear_leaves[2],
        slab_bytes=case.slab_bytes, **common,
    )  # fmt: skip
    wmtp.weight_statistics(stats.token_ce, stats.token_ce > 0)
    found = results(dense, dense_leaves), results(linear, linear_leaves)
    # Which token is the most probable one may turn over with a rounding, so it is left out.
    for values, one in zip(found, (stats, other), strict=True):
        values += [one.token_ce, one.head_loss, one.weight_sum, one.token_count]
    return difference(found[1], found[0])


def plain_paths(case: Case, r: random.Random) -> float:
    """`mtp_ce_loss`, `token_nll` and their linear forms."""
    reduction = r.choice(("mean", "sum", "none"))
    dense_leaves, linear_leaves = leaves_of(case), leaves_of(case)
    dense = wmtp.mtp_ce_loss(
        logits_of(*dense_leaves), case.labels, reduction=reduction, **case.options
    )
    linear = wmtp.linear_mtp_ce_loss(
        *linear_leaves[:2], case.labels, bias=linear_leaves[2], reduction=reduction,
        slab_bytes=case.slab_bytes, **case.options,
    )  # fmt: skip
    found = results(dense.sum(), dense_leaves), results(linear.sum(), linear_leaves)
    if case.labels.dim() == 2:
        hidden = case.hidden[:, :, 0]
        logits = logits_of(hidden, case.unembedding, case.bias)
        found[0].append(wmtp.token_nll(logits, case.labels))
        found[1].append(
            wmtp.linear_token_nll(hidden, case.unembedding, case.labels, bias=case.bias)
        )
    return difference(found[1], found[0])


def other_paths(case: Case, r: random.Random) -> None:
    """The critic, the scores, the builders and the controls: nothing to compare, all to leak."""
    batch, seq, heads = case.shape
    valid, values = case.draw(batch, seq) < 0.7, case.draw(batch, seq).requires_grad_()
    rewards, marked = case.draw(batch, seq), case.draw(batch, seq, heads) < 0.7
    scope = r.choice(("sequence", "batch", "all"))
    targets = wmtp.lambda_returns(values, rewards, valid)
    critic = wmtp.value_loss(values, targets, valid, kind=r.choice(("mse", "huber")))
    ranking = wmtp.pairwise_ranking_loss(values, values * 0.5, valid, valid)
    torch.autograd.grad(critic + ranking + wmtp.gae(values, valid, rewards=rewards).sum(), values)
    wmtp.critic_delta_weights(values, valid, mode=r.choice(("exp", "softmax", "top_k")))
    scores = case.draw(batch, seq, heads) - 0.5
    running = wmtp.update_statistics(None, scores, marked)
    made = [
        wmtp.exp_weights(scores, marked, statistics=running, scope=scope),
        wmtp.softmax_weights(scores, marked, scope=scope),
        wmtp.top_k_weights(scores, marked, keep=0.4, scope=scope),
        wmtp.score_weights(scores, marked, clip=(0.1, 3.0), min_ess=0.3, scope=scope),
        wmtp.group_relative_weights(case.draw(batch), torch.zeros(batch).long(), marked),
    ]
    mixed = wmtp.combine_weights(made, marked, mode=r.choice(("mixture", "product")))
    for control in (wmtp.shuffled_weights, wmtp.random_matched_weights):
        wmtp.weight_statistics(control(mixed, marked, generator=case.generator), marked)
    spans = torch.randint(-1, 2, (batch, seq), generator=case.generator)
    wmtp.span_weights(spans, case.draw(2), valid)
    logits = logits_of(case.hidden, case.unembedding, case.bias)
    entropy, length = wmtp.predictive_entropy(logits), wmtp.el2n(logits, case.labels)
    wmtp.entropy_weights(entropy, marked)
    wmtp.el2n_weights(length, marked)
    wmtp.focal_weights(length, marked)
    trunk = case.hidden[:, :, 0].requires_grad_()
    grown = wmtp.MTPHeads(trunk.shape[2], heads, dtype=trunk.dtype)(trunk)
    wmtp.ValueHead(trunk.shape[2])(trunk).sum().add(grown.sum()).backward()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


Step = Callable[[random.Random], tuple[torch.dtype, float]]


def one_step(r: random.Random) -> tuple[torch.dtype, float]:
    """Some of the paths, each often in a long run; the dtype and the largest difference."""
    case = draw_case(r)
    if r.random() < 0.3:
        other_paths(case, r)
    paths = r.choice((weighted_paths, weighted_paths, plain_paths))
    return case.dtype, paths(case, r)


class Soak(NamedTuple):
    """What a run found: samples after the warm-up, and differences per dtype in order."""

    samples: list[Sample]
    differences: dict[torch.dtype, list[float]]
    seconds: float


def soak(steps: int, every: int, seed: int = 0, step: Step = one_step) -> Soak:
    r = random.Random(seed)
    samples: list[Sample] = []
    differences: dict[torch.dtype, list[float]] = {dtype: [] for dtype in TOLERANCE}
    began = time.monotonic()
    for done in range(1, steps + 1):
        dtype, worst = step(random.Random(r.randrange(CASES)))
        differences[dtype].append(worst)
        if done >= WARM_UP * steps and done % every == 0:
            samples.append(Sample(done, resident(), live_tensors()))
    return Soak(samples, differences, time.monotonic() - began)


def complaints(found: Soak) -> list[str]:
    """What is not as it must be."""
    said = []
    counts = {sample.tensors for sample in found.samples}
    if len(counts) > 1:
        said.append(f"live tensors vary: {sorted(counts)}")
    quarter = max(1, len(found.samples) // 4)
    early, late = (
        statistics.median(sample.rss for sample in part)
        for part in (found.samples[:quarter], found.samples[-quarter:])
    )
    if late - early > RSS_SLACK:
        said.append(f"resident memory grew by {(late - early) / 2**20:.1f} MiB")
    for dtype, values in found.differences.items():
        if values and max(values) > TOLERANCE[dtype]:
            said.append(
                f"{dtype}: linear and dense differ by {max(values):.2e} at its step "
                f"{values.index(max(values))}, allowed {TOLERANCE[dtype]:.0e}"
            )
        half = len(values) // 2
        if half >= 100:
            first, second = statistics.fmean(values[:half]), statistics.fmean(values[half:])
            if second > TREND * first:
                said.append(f"{dtype}: the difference grew from {first:.2e} to {second:.2e}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = soak(options.steps, options.every, options.seed)
    for sample in found.samples:
        print(f"step {sample.step:6d}  {sample.rss / 2**20:8.1f} MiB  {sample.tensors} tensors")
    for dtype, values in found.differences.items():
        half = len(values) // 2
        means = [statistics.fmean(part) for part in (values[:half], values[half:])]
        print(
            f"{dtype}: {len(values)} steps, largest difference {max(values):.2e}, "
            f"mean {means[0]:.2e} then {means[1]:.2e}"
        )
    said = complaints(found)
    print(f"{options.steps} steps in {found.seconds:.0f} s:", "; ".join(said) or "flat, no drift")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
