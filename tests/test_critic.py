"""Stage 1: training the critic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests import oracle
from tests.helpers import all_zero, close, grads, leaf, untouched
from tests.strategies import (
    JUNK,
    LAYOUTS,
    SEEDS,
    WIDE_DTYPES,
    Documents,
    Trajectories,
    mask,
    normal,
    packings,
    relayout,
    sizes,
    spoiled,
    trajectories,
    uniform,
)
from wmtp import gae, lambda_returns, pairwise_ranking_loss, td_deltas, value_loss


KINDS = st.sampled_from(["mse", "huber", "bce"])
POOLS = st.sampled_from(["last", "mean"])


def rewards_of(case: Trajectories) -> Tensor:
    if case.rewards is not None:
        return case.rewards
    return normal(3, *case.values.shape).to(case.values.dtype)


# ----------------------------------------------------------------------------------------- λ-returns


@given(trajectories())
def test_returns_follow_the_oracle(case: Trajectories) -> None:
    options: dict[str, Any] = {"gamma": case.gamma, "lam": case.lam, **case.documents}
    actual = lambda_returns(case.values, rewards_of(case), case.valid, **options)
    assert actual.dtype == case.values.dtype
    assert all_zero(actual[~case.valid])
    expected = oracle.lambda_returns(case.values, rewards_of(case), case.valid, **options)
    close(actual, expected, case.values.dtype)


def test_returns_of_a_hand_made_row() -> None:
    values = torch.tensor([[0.5, 0.25, 8.0, 0.75]])
    rewards = torch.tensor([[1.0, 2.0, 9.0, 4.0]])
    valid = torch.tensor([[True, True, False, True]])
    # G_3 = 4; G_1 = 2 + ½(½·0.75 + ½·4) = 3.1875; G_0 = 1 + ½(½·0.25 + ½·3.1875).
    returns = lambda_returns(values, rewards, valid, gamma=0.5, lam=0.5)
    assert returns.tolist() == [[1.859375, 3.1875, 0.0, 4.0]]


@given(SEEDS, sizes(8, 1))
def test_returns_at_the_ends_of_lambda(seed: int, seq: int) -> None:
    values, rewards = normal(seed, 2, seq), normal(seed + 1, 2, seq)
    valid = torch.ones(2, seq).bool()
    to_go = rewards.flip(1).cumsum(1).flip(1)
    close(lambda_returns(values, rewards, valid, lam=1.0), to_go)
    one_step = rewards + F.pad(values[:, 1:], (0, 1))
    close(lambda_returns(values, rewards, valid, lam=0.0), one_step)


@given(SEEDS, sizes(8, 1), st.sampled_from([0.0, 0.8, 1.0]))
def test_returns_are_advantages_plus_the_value_they_started_from(
    seed: int, seq: int, lam: float
) -> None:
    values, rewards = normal(seed, 2, seq), normal(seed + 1, 2, seq)
    valid = torch.ones(2, seq).bool()
    advantage = gae(values, valid, rewards=rewards, lam=lam, initial_value=0.0)
    before = F.pad(values[:, :-1], (1, 0))
    close(lambda_returns(before, rewards, valid, lam=lam), advantage + before)


@given(packings(), SEEDS)
def test_packed_equals_separate_documents(packing: Documents, seed: int) -> None:
    shape = (packing.batch, packing.seq)
    values, rewards = normal(seed, *shape), normal(seed + 1, *shape)
    valid = mask(seed + 2, 0.7, *shape)
    packed = lambda_returns(values, rewards, valid, gamma=0.9, segment_ids=packing.segment_ids)
    for b, piece in packing.pieces():
        inner = (slice(b, b + 1), piece)
        close(packed[inner], lambda_returns(values[inner], rewards[inner], valid[inner], gamma=0.9))


@given(SEEDS, sizes(6, 1), st.integers(1, 3), JUNK)
def test_left_and_right_padding_equal_no_padding(
    seed: int, seq: int, padding: int, junk: float
) -> None:
    values, rewards, valid = normal(seed, 2, seq), normal(seed + 1, 2, seq), mask(seed, 0.7, 2, seq)
    expected = lambda_returns(values, rewards, valid)
    for pads in ((padding, 0), (0, padding)):
        actual = lambda_returns(
            F.pad(values, pads, value=junk),
            F.pad(rewards, pads, value=junk),
            F.pad(valid, pads, value=False),
            attention_mask=F.pad(torch.ones(2, seq), pads),
        )
        close(actual, F.pad(expected, pads))


@given(trajectories(dtype=torch.float64), JUNK)
def test_returns_never_read_untrained_places(case: Trajectories, junk: float) -> None:
    values, rewards = (spoiled(x, ~case.valid, junk) for x in (case.values, rewards_of(case)))
    with untouched(values, rewards, case.valid):
        actual = lambda_returns(values, rewards, case.valid, gamma=0.9, **case.documents)
    expected = lambda_returns(
        case.values, rewards_of(case), case.valid, gamma=0.9, **case.documents
    )
    close(actual, expected)


def test_targets_are_detached_and_wide() -> None:
    values, valid = normal(0, 1, 4).bfloat16().requires_grad_(), torch.ones(1, 4).bool()
    rewards = normal(1, 1, 4).bfloat16()
    targets = lambda_returns(values, rewards, valid)
    assert not targets.requires_grad
    assert targets.dtype == torch.float32
    close(targets, oracle.lambda_returns(values, rewards, valid), torch.float32)


def test_a_long_row_neither_overflows_nor_drifts() -> None:
    values, rewards, valid = normal(0, 1, 3000), normal(1, 1, 3000), mask(2, 0.8, 1, 3000)
    options: dict[str, Any] = {"gamma": 0.97, "lam": 0.9}
    close(
        lambda_returns(values, rewards, valid, **options),
        oracle.lambda_returns(values, rewards, valid, **options),
    )


def test_returns_refuse_what_does_not_fit() -> None:
    values, rewards, valid = normal(0, 2, 3), normal(1, 2, 3), torch.ones(2, 3).bool()
    with pytest.raises((TypeError, ValueError), match="rewards"):
        lambda_returns(values, rewards[:, :2], valid)
    with pytest.raises((TypeError, ValueError), match="valid"):
        lambda_returns(values, rewards, valid[:1])
    with pytest.raises(TypeError, match="valid"):
        lambda_returns(values, rewards, valid.float())
    with pytest.raises((TypeError, ValueError), match="segment_ids"):
        lambda_returns(values, rewards, valid, segment_ids=torch.zeros(2, 2).long())
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="gamma"):
            lambda_returns(values, rewards, valid, gamma=bad)
        with pytest.raises(ValueError, match="lam"):
            lambda_returns(values, rewards, valid, lam=bad)


# ---------------------------------------------------------------------------------------- value loss


@given(SEEDS, sizes(3), sizes(6), KINDS, WIDE_DTYPES, st.sampled_from([0.7, 0.0, 1.0]))
def test_value_loss_and_gradient_follow_the_oracle(
    seed: int, batch: int, seq: int, kind: str, dtype: torch.dtype, share: float
) -> None:
    values = leaf(normal(seed, batch, seq, scale=2.0).to(dtype))
    targets = torch.sigmoid(normal(seed + 1, batch, seq)).to(dtype)
    valid = mask(seed + 2, share, batch, seq)
    loss = value_loss(values, targets, valid, kind=kind, delta=0.7)
    expected, gradient = oracle.value_loss(values, targets, valid, kind=kind, delta=0.7)
    assert loss.dtype == dtype
    assert loss.requires_grad
    close(loss, expected, dtype)
    close(grads(-2.5 * loss, [values])[0], -2.5 * gradient, dtype)


def test_every_sequence_counts_the_same_however_long() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
    valid = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    loss = value_loss(values, torch.zeros(3, 4), valid)
    assert loss.item() == (1.0 + 9.0) / 2


@given(SEEDS, KINDS, JUNK)
def test_value_loss_never_reads_invalid_places(seed: int, kind: str, junk: float) -> None:
    values, targets = normal(seed, 2, 5), torch.sigmoid(normal(seed + 1, 2, 5))
    valid = mask(seed + 2, 0.5, 2, 5)
    clean, dirty = leaf(values), leaf(spoiled(values, ~valid, junk))
    here = value_loss(clean, targets, valid, kind=kind)
    there = value_loss(dirty, spoiled(targets, ~valid, junk), valid, kind=kind)
    assert torch.equal(here, there)
    (found,) = grads(there, [dirty])
    assert torch.equal(found, grads(here, [clean])[0])
    assert all_zero(found[~valid])


@pytest.mark.parametrize("kind", ["mse", "huber", "bce"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_value_loss_of_nothing_is_a_connected_zero(kind: str, shape: tuple[int, int]) -> None:
    values = leaf(torch.full(shape, math.nan))
    loss = value_loss(values, torch.full(shape, math.nan), torch.zeros(shape).bool(), kind=kind)
    assert all_zero(loss)
    assert loss.requires_grad
    assert all_zero(grads(loss, [values])[0])


def test_extreme_logits_of_a_binary_critic_stay_finite() -> None:
    values = leaf(torch.tensor([[1e4, -1e4]]))
    loss = value_loss(values, torch.tensor([[0.0, 1.0]]), torch.ones(1, 2).bool(), kind="bce")
    assert loss.item() == 1e4
    assert grads(loss, [values])[0].tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_value_loss_of_low_precision_is_float32(dtype: torch.dtype) -> None:
    values, valid = normal(0, 2, 6).to(dtype), mask(1, 0.8, 2, 6)
    targets = normal(2, 2, 6).float()
    loss = value_loss(values, targets, valid)
    assert loss.dtype == torch.float32
    close(loss, oracle.value_loss(values, targets, valid)[0], torch.float32)


@given(SEEDS, LAYOUTS)
def test_value_loss_is_blind_to_layout_and_never_writes(seed: int, layout: str) -> None:
    values, targets = relayout(normal(seed, 3, 4), layout), relayout(normal(seed + 1, 3, 4), layout)
    valid = relayout(mask(seed, 0.6, 3, 4), layout)
    with untouched(values, targets, valid):
        here = value_loss(values, targets, valid)
    close(here, value_loss(values.clone(), targets.clone(), valid.clone()))


def test_the_targets_get_no_gradient() -> None:
    values, targets = leaf(normal(0, 1, 3)), leaf(normal(1, 1, 3))
    loss = value_loss(values, targets, torch.ones(1, 3).bool())
    assert all_zero(grads(loss, [targets])[0])


def test_the_huber_loss_turns_linear_at_one_by_default() -> None:
    loss = value_loss(
        torch.tensor([[3.0]]), torch.zeros(1, 1), torch.ones(1, 1).bool(), kind="huber"
    )
    assert loss.item() == 2.5


def test_value_loss_refuses_what_does_not_fit() -> None:
    values, targets, valid = normal(0, 2, 3), normal(1, 2, 3), torch.ones(2, 3).bool()
    with pytest.raises((TypeError, ValueError), match="targets"):
        value_loss(values, targets[:1], valid)
    with pytest.raises((TypeError, ValueError), match="valid"):
        value_loss(values, targets, valid[:, :1])
    with pytest.raises((TypeError, ValueError), match="kind"):
        value_loss(values, targets, valid, kind="mae")  # type: ignore[arg-type]
    for delta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="delta"):
            value_loss(values, targets, valid, kind="huber", delta=delta)


@pytest.mark.parametrize("counted", [float, int, torch.tensor])
@given(SEEDS, st.sampled_from(["mse", "huber", "bce"]))
def test_losses_of_micro_batches_add_up_to_that_of_the_whole(
    counted: Any, seed: int, kind: Any
) -> None:
    values, targets = leaf(normal(seed, 5, 4)), uniform(seed + 1, 5, 4)
    other, valid = leaf(normal(seed + 2, 5, 4)), mask(seed + 3, 0.4, 5, 4)
    cuts = [slice(0, 2), slice(2, 2), slice(2, 3), slice(3, 5)]

    def value(cut: slice, **options: Any) -> Tensor:
        return value_loss(values[cut], targets[cut], valid[cut], kind=kind, **options)

    def ranking(cut: slice, **options: Any) -> Tensor:
        masks = valid[cut], valid.flip(0)[cut]
        return pairwise_ranking_loss(values[cut], other[cut], *masks, **options)

    for loss, some in ((value, valid), (ranking, valid & valid.flip(0).any(1, keepdim=True))):
        count = counted(int(some.any(1).sum()))
        whole = loss(slice(0, 5))
        parts = sum((loss(cut, normalizer=count) for cut in cuts), torch.zeros(()).double())
        close(parts, whole)
        for here, there in zip(
            grads(parts, [values, other]), grads(whole, [values, other]), strict=True
        ):
            close(here, there)


def test_counts_that_are_none_are_refused() -> None:
    values, valid = normal(0, 2, 3), torch.ones(2, 3).bool()
    for count in (-1, math.nan, "tokens"):
        with pytest.raises((TypeError, ValueError), match="normalizer"):
            value_loss(values, values, valid, normalizer=count)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError), match="normalizer"):
            pairwise_ranking_loss(values, values, valid, valid, normalizer=count)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- ranking


@given(SEEDS, sizes(3), sizes(5), sizes(5), POOLS, WIDE_DTYPES, st.sampled_from([0.0, 0.5]))
def test_ranking_loss_and_gradients_follow_the_oracle(
    seed: int, batch: int, seq: int, other: int, pool: str, dtype: torch.dtype, margin: float
) -> None:
    chosen = leaf(normal(seed, batch, seq, scale=2.0).to(dtype))
    rejected = leaf(normal(seed + 1, batch, other, scale=2.0).to(dtype))
    masks = mask(seed + 2, 0.6, batch, seq), mask(seed + 3, 0.6, batch, other)
    options: dict[str, Any] = {"pool": pool, "margin": margin}
    loss = pairwise_ranking_loss(chosen, rejected, *masks, **options)
    expected, up, down = oracle.pairwise_ranking_loss(chosen, rejected, *masks, **options)
    assert loss.dtype == dtype
    close(loss, expected, dtype)
    found = grads(3.0 * loss, [chosen, rejected])
    close(found[0], 3.0 * up, dtype)
    close(found[1], 3.0 * down, dtype)


def test_ranking_pools_the_last_valid_token_by_default() -> None:
    chosen, rejected = torch.tensor([[9.0, 2.0, 7.0]]), torch.tensor([[1.0, 5.0]])
    up, down = torch.tensor([[True, True, False]]), torch.tensor([[True, False]])
    loss = pairwise_ranking_loss(chosen, rejected, up, down)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)))
    mean = pairwise_ranking_loss(chosen, rejected, up, down, pool="mean")
    assert mean.item() == pytest.approx(math.log1p(math.exp(-4.5)))


@given(SEEDS, POOLS, JUNK)
def test_ranking_never_reads_invalid_places_and_never_writes(
    seed: int, pool: str, junk: float
) -> None:
    values, masks = (
        [normal(seed + n, 3, 4) for n in range(2)],
        [mask(seed + 2 + n, 0.5, 3, 4) for n in range(2)],
    )
    clean = [leaf(x) for x in values]
    dirty = [leaf(spoiled(x, ~ok, junk)) for x, ok in zip(values, masks, strict=True)]
    here = pairwise_ranking_loss(clean[0], clean[1], *masks, pool=pool)
    with untouched(*dirty, *masks):
        there = pairwise_ranking_loss(dirty[0], dirty[1], *masks, pool=pool)
    assert torch.equal(here, there)
    for found, known, ok in zip(grads(there, dirty), grads(here, clean), masks, strict=True):
        assert torch.equal(found, known)
        assert all_zero(found[~ok])


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_ranking_of_nothing_is_a_connected_zero(pool: str, shape: tuple[int, int]) -> None:
    chosen, rejected = leaf(torch.full(shape, math.nan)), leaf(torch.full(shape, math.nan))
    nothing = torch.zeros(shape).bool()
    loss = pairwise_ranking_loss(chosen, rejected, nothing, nothing, pool=pool)
    assert all_zero(loss)
    assert loss.requires_grad
    assert all(all_zero(g) for g in grads(loss, [chosen, rejected]))


def test_a_pair_with_one_empty_side_does_not_count() -> None:
    values, everything = normal(0, 2, 3), torch.ones(2, 3).bool()
    one_side = everything.clone()
    one_side[1] = False
    loss = pairwise_ranking_loss(values, -values, everything, one_side)
    alone = pairwise_ranking_loss(values[:1], -values[:1], everything[:1], everything[:1])
    close(loss, alone)


def test_a_wide_gap_stays_finite() -> None:
    gap, ok = leaf(torch.tensor([[-1e4]])), torch.ones(1, 1).bool()
    loss = pairwise_ranking_loss(gap, torch.zeros(1, 1), ok, ok)
    assert loss.item() == 1e4
    assert grads(loss, [gap])[0].item() == -1.0


def test_ranking_of_low_precision_is_float32() -> None:
    chosen, rejected = normal(0, 3, 4).bfloat16(), normal(1, 3, 4).bfloat16()
    ok = mask(2, 0.8, 3, 4)
    loss = pairwise_ranking_loss(chosen, rejected, ok, ok, pool="mean")
    assert loss.dtype == torch.float32
    expected, _, _ = oracle.pairwise_ranking_loss(chosen, rejected, ok, ok, pool="mean")
    close(loss, expected, torch.float32)


def test_ranking_refuses_what_does_not_fit() -> None:
    values, ok = normal(0, 2, 3), torch.ones(2, 3).bool()
    with pytest.raises((TypeError, ValueError), match="rejected_values"):
        pairwise_ranking_loss(values, values[:1], ok, ok[:1])
    with pytest.raises((TypeError, ValueError), match="chosen_valid"):
        pairwise_ranking_loss(values, values, ok[:, :1], ok)
    with pytest.raises((TypeError, ValueError), match="rejected_valid"):
        pairwise_ranking_loss(values, values, ok, ok[:, :1])
    with pytest.raises((TypeError, ValueError), match="pool"):
        pairwise_ranking_loss(values, values, ok, ok, pool="max")  # type: ignore[arg-type]
    for margin in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match="margin"):
            pairwise_ranking_loss(values, values, ok, ok, margin=margin)


def test_values_on_another_device_are_called_values() -> None:
    values, valid = torch.zeros(1, 3), torch.ones(1, 3).bool()
    with pytest.raises(ValueError, match="got values on cpu, segment_ids on meta"):
        td_deltas(values, valid, segment_ids=torch.zeros(1, 3, device="meta").long())
