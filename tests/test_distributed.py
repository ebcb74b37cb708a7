"""Weights over two ranks with `group=` equal the weights of one process that has all rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import wmtp
from tests.helpers import close, leaf
from tests.strategies import IGNORE, integers, mask, normal, uniform
from wmtp.slab_rows import corrected_rows


ROWS, SEQ, HEADS = 5, 7, 2
Call = Callable[[Any, slice], Tensor]

# Which rows a rank has: some each, all on one, and the second rank's own valid tokens removed.
SPLITS = {
    "uneven": [slice(0, 2), slice(2, 5)],
    "a rank without rows": [slice(0, 5), slice(5, 5)],
    "a rank without valid tokens": [slice(0, 2), slice(2, 5)],
}


def valid_for(split: str, *shape: int) -> Tensor:
    valid = mask(1, 0.7, *shape)
    if split == "a rank without valid tokens":
        valid[2:] = False
    return valid


def cases(split: str) -> dict[str, Call]:
    """Every function with `group=`, on the rows of one rank."""
    flat, deep = valid_for(split, ROWS, SEQ), valid_for(split, ROWS, SEQ, HEADS)
    w2, w3 = 0.1 + uniform(2, ROWS, SEQ), torch.exp(2 * normal(3, ROWS, SEQ, HEADS))
    s2, s3 = normal(4, ROWS, SEQ), normal(5, ROWS, SEQ, HEADS)
    ce, reference = uniform(6, ROWS, SEQ, HEADS), uniform(7, ROWS, SEQ)
    # The groups of rewards live on one rank each, as whole prompts do.
    rewards, ids = normal(8, ROWS), torch.tensor([0, 0, 1, 1, 1])
    spans, span_values = integers(9, 3, ROWS, SEQ), uniform(10, 3)
    w = wmtp
    return {
        "normalize": lambda g, r: w.normalize_weights(w2[r], flat[r], group=g),
        "normalize heads": lambda g, r: w.normalize_weights(w3[r], deep[r], group=g),
        "normalize all": lambda g, r: w.normalize_weights(w3[r], deep[r], scope="all", group=g),
        "normalize sequence": lambda g, r: w.normalize_weights(
            w3[r], deep[r], scope="sequence", group=g
        ),
        "normalize clip": lambda g, r: w.normalize_weights(
            w3[r], deep[r], clip=(0.2, 2.0), group=g
        ),
        "normalize ess": lambda g, r: w.normalize_weights(w3[r], deep[r], min_ess=0.8, group=g),
        "normalize zero": lambda g, r: w.normalize_weights(0 * w3[r], deep[r], group=g),
        "normalize mostly zero": lambda g, r: w.normalize_weights(
            w2[r] * (w2[r] > 1.0), flat[r], clip=(0.1, 2.0), group=g
        ),
        "softmax": lambda g, r: w.softmax_weights(s2[r], flat[r], temperature=0.5, group=g),
        "softmax heads": lambda g, r: w.softmax_weights(s3[r], deep[r], group=g),
        "softmax far apart": lambda g, r: w.softmax_weights(
            s2[r] + 1e4 * torch.arange(ROWS)[r, None], flat[r], group=g
        ),
        "top_k": lambda g, r: w.top_k_weights(s2[r], flat[r], keep=0.4, group=g),
        "top_k heads": lambda g, r: w.top_k_weights(s3[r], deep[r], keep=0.4, group=g),
        "top_k all": lambda g, r: w.top_k_weights(s3[r], deep[r], scope="all", group=g),
        "top_k sequence": lambda g, r: w.top_k_weights(s3[r], deep[r], scope="sequence", group=g),
        "top_k infinities": lambda g, r: w.top_k_weights(
            torch.where(s2[r] > 1, torch.inf, torch.where(s2[r] < 0, -torch.inf, s2[r])),
            flat[r],
            keep=0.9,
            group=g,
        ),
        "exp": lambda g, r: w.exp_weights(s2[r], flat[r], group=g),
        "exp heads": lambda g, r: w.exp_weights(s3[r], deep[r], clip=None, group=g),
        "exp raw": lambda g, r: w.exp_weights(3 * s3[r], deep[r], whiten=False, group=g),
        "statistics": lambda g, r: torch.stack(
            list(w.update_statistics(None, s3[r], deep[r], group=g))
        ),
        "rho1": lambda g, r: w.rho1_weights(ce[r], deep[r], reference[r], group=g),
        "rho1 softmax": lambda g, r: w.rho1_weights(
            ce[r], deep[r], reference[r], mode="softmax", group=g
        ),
        "critic": lambda g, r: w.critic_delta_weights(s2[r], flat[r], group=g),
        "critic softmax": lambda g, r: w.critic_delta_weights(
            s2[r], flat[r], mode="softmax", group=g
        ),
        "critic top_k": lambda g, r: w.critic_delta_weights(s2[r], flat[r], mode="top_k", group=g),
        "dft": lambda g, r: w.dft_weights(ce[r], deep[r], group=g),
        "focal": lambda g, r: w.focal_weights(ce[r], deep[r], group=g),
        "entropy": lambda g, r: w.entropy_weights(ce[r], deep[r], group=g),
        "el2n": lambda g, r: w.el2n_weights(ce[r], deep[r], power=2.0, group=g),
        "score": lambda g, r: w.score_weights(w2[r], flat[r], clip=(0.5, 1.5), group=g),
        "span": lambda g, r: w.span_weights(spans[r], span_values, flat[r], group=g),
        "mixture": lambda g, r: w.combine_weights([w2[r], w2[r] ** 2], flat[r], group=g),
        "product": lambda g, r: w.combine_weights([w2[r], w2[r]], flat[r], mode="product", group=g),
        "intersection": lambda g, r: w.combine_weights(
            [w2[r], (w2[r] > 0.5).double()], flat[r], mode="intersection", group=g
        ),
        "groups of rewards": lambda g, r: w.group_relative_weights(
            rewards[r], ids[r], flat[r], group=g
        ),
    }


def tied(split: str) -> tuple[Tensor, Tensor]:
    return integers(11, 3, ROWS, SEQ, HEADS).double(), valid_for(split, ROWS, SEQ, HEADS)


def by_themselves(split: str, rows: slice, group: Any) -> Tensor:
    """Weights of one rank whose group holds nobody else."""
    scores, valid = (x[rows] for x in tied(split))
    builders = (wmtp.top_k_weights, wmtp.softmax_weights)
    return torch.stack([build(scores, valid, group=group) for build in builders])


def shares(rows: slice) -> Tensor:
    """What some rows add to losses that one count over all rows divides: dense, linear."""
    hidden, unembedding = normal(12, ROWS, SEQ, HEADS, 3)[rows], normal(13, 6, 3)
    labels, weights = integers(14, 6, ROWS, SEQ)[rows], uniform(15, ROWS, SEQ)[rows]
    dense = wmtp.weighted_mtp_loss(hidden @ unembedding.T, labels, weights, normalizer=17)
    linear = wmtp.linear_weighted_mtp_loss(hidden, unembedding, labels, weights, normalizer=17)
    return torch.stack([dense, linear])


def selection(split: str, rows: slice, group: Any) -> Tensor:
    """What some rows add to Rho-1's loss, and its gradient of the unembedding."""
    hidden, unembedding = normal(12, ROWS, SEQ, HEADS, 3)[rows], leaf(normal(13, 6, 3))
    targets = integers(14, 6, ROWS, SEQ, HEADS)
    targets = targets.masked_fill(~valid_for(split, ROWS, SEQ, HEADS), IGNORE)[rows]
    reference = 2 * uniform(16, ROWS, SEQ, HEADS)[rows]
    loss = wmtp.linear_weighted_mtp_loss(
        hidden, unembedding, targets,
        partial(wmtp.rho1_weights, reference_nll=reference, keep=0.5, group=group),
        normalizer=17, head_weights=[1.0, 0.3], slab_bytes=20 * 6 * 8,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, unembedding)
    return torch.cat([loss.detach().view(1), gradient.flatten()])


def selected(split: str, rows: slice, group: Any) -> Tensor:
    """The same, and how many rows were corrected."""
    corrected: list[int] = []

    def watched(asked: Any, guessed: Tensor, factor: Tensor, *rest: Any) -> Any:
        corrected.append(int((~torch.isclose(guessed, factor, rtol=1e-5, atol=0)).sum()))
        return corrected_rows(asked, guessed, factor, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wmtp.operators.corrected_rows", watched)
        found = selection(split, rows, group)
    assert len(corrected) == 1
    return torch.cat([found, torch.tensor(corrected)])


def late(split: str, rows: slice, group: Any) -> Tensor:
    """The same where losses come first and nothing is guessed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wmtp.loss.losses_first", lambda _: True)
        return selection(split, rows, group)


def worker(rank: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    # A rank that leaves out a collective makes the others wait: a failure within seconds, not a hang.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    try:
        group, found = dist.group.WORLD, {}
        alone = [dist.new_group([other]) for other in range(2)][rank]
        for split, ranks in SPLITS.items():
            for name, call in cases(split).items():
                found[split, name] = call(group, ranks[rank])
            scores, valid = tied(split)
            rows = ranks[rank]
            found[split, "ties"] = wmtp.top_k_weights(scores[rows], valid[rows], group=group)
            found[split, "alone"] = by_themselves(split, rows, alone)
            found[split, "shares"] = shares(rows)
            found[split, "selected"] = selected(split, rows, group)
            # The first rank guesses what is selected, the second does not.
            found[split, "late"] = (late if rank else selection)(split, rows, group)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Tensor]]:
    folder: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(str(folder),), nprocs=2)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", cases("uneven"))
def test_two_ranks_equal_one_process(
    ranks: list[dict[tuple[str, str], Tensor]], split: str, name: str
) -> None:
    whole = cases(split)[name](None, slice(None))
    parts = [rank[split, name] for rank in ranks]
    if name == "statistics":  # every rank knows the statistics of all
        for part in parts:
            close(part, whole)
    else:
        close(torch.cat(parts), whole)


@pytest.mark.parametrize("split", SPLITS)
def test_counts_over_ranks_are_exact_under_ties(
    ranks: list[dict[tuple[str, str], Tensor]], split: str
) -> None:
    scores, valid = tied(split)
    whole = wmtp.top_k_weights(scores, valid)
    together = torch.cat([rank[split, "ties"] for rank in ranks])
    assert torch.equal((together > 0).sum((0, 1)), (whole > 0).sum((0, 1)))
    # Among equals the order is that of the ranks, which is that of the rows.
    close(together, whole)


@pytest.mark.parametrize("split", SPLITS)
def test_losses_of_ranks_add_to_the_whole_by_one_count(
    ranks: list[dict[tuple[str, str], Tensor]], split: str
) -> None:
    # Trainers scale by the number of processes; the loss itself must not know it.
    close(sum((rank[split, "shares"] for rank in ranks), torch.zeros(2)), shares(slice(None)))


@pytest.mark.parametrize("split", SPLITS)
def test_a_selection_over_ranks_is_guessed_by_each_alone(
    ranks: list[dict[tuple[str, str], Tensor]], split: str
) -> None:
    found = [rank[split, "selected"] for rank in ranks]
    whole = selected(split, slice(None), None)
    close(found[0][:-1] + found[1][:-1], whole[:-1])
    # A factor that only ranks together know would have made every kept row a wrong guess.
    kept = int(valid_for(split, ROWS, SEQ, HEADS).sum()) / 2
    assert sum(int(x[-1]) for x in found) < kept / 2


@pytest.mark.parametrize("split", SPLITS)
def test_every_rank_may_take_its_own_route(
    ranks: list[dict[tuple[str, str], Tensor]], split: str
) -> None:
    """Which depends on its own sizes: all ask one another equally often, or they would wait for ever."""
    close(ranks[0][split, "late"] + ranks[1][split, "late"], selection(split, slice(None), None))


@pytest.mark.parametrize("split", SPLITS)
def test_a_group_without_the_other_rank_does_not_ask_it(
    ranks: list[dict[tuple[str, str], Tensor]], split: str
) -> None:
    for rank, rows in zip(ranks, SPLITS[split], strict=True):
        close(rank[split, "alone"], by_themselves(split, rows, None))
