"""How a score becomes a weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import wmtp
from tests import oracle
from tests.helpers import all_zero, close, of_predictions, untouched
from tests.strategies import (
    JUNK,
    LAYOUTS,
    SEEDS,
    WIDE_DTYPES,
    Scored,
    Trajectories,
    integers,
    mask,
    normal,
    offset_sets,
    relayout,
    scored,
    sizes,
    special_rows,
    spoiled,
    tolerance,
    trajectories,
    uniform,
)
from wmtp import WhiteningStatistics, update_statistics


KEEPS = st.sampled_from([0.6, 0.1, 0.3, 0.5, 1.0, 1e-9])
CLIPS = st.sampled_from([(0.1, 3.0), (0.5, 1.5), (0.0, 2.0), None])


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """As `close`, with room for an exponential of a sum in float32."""
    loose = tolerance(dtype) if dtype == torch.float64 else {"rtol": 5e-5, "atol": 1e-5}
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, **loose)


def scope_means(weights: Tensor, valid: Tensor, scope: str) -> list[float]:
    return [
        sum(float(weights[i]) for i in group) / len(group) for group in oracle.groups(valid, scope)
    ]


def ones_of(valid: Tensor, scope: str) -> list[float]:
    return [1.0] * len(oracle.groups(valid, scope))


# One way to call every builder on `[batch seq heads]` or `[batch seq]` scores.
BUILDERS: dict[str, Callable[..., Tensor]] = {
    "softmax_weights": wmtp.softmax_weights,
    "top_k_weights": wmtp.top_k_weights,
    "exp_weights": wmtp.exp_weights,
    "exp_weights without whitening": functools.partial(wmtp.exp_weights, whiten=False),
    "score_weights": wmtp.score_weights,
    "dft_weights": of_predictions(wmtp.dft_weights),
    "focal_weights": of_predictions(wmtp.focal_weights),
    "entropy_weights": wmtp.entropy_weights,
    "el2n_weights": wmtp.el2n_weights,
    "combine_weights": lambda w, valid, **k: wmtp.combine_weights([w, w], valid, **k),
    "product": lambda w, valid, **k: wmtp.combine_weights([w, w], valid, mode="product", **k),
}
ALL_BUILDERS = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


@ALL_BUILDERS
@given(case=scored(), junk=JUNK)
def test_weights_have_mean_one_and_never_read_invalid_places(
    build: Callable[..., Tensor], case: Scored, junk: float
) -> None:
    scores = case.cross_entropies()
    weights = build(scores, case.valid, scope=case.scope)
    assert weights.dtype == case.dtype
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert all_zero(weights[~case.valid])
    means = scope_means(weights, case.valid, case.scope)
    assert means == pytest.approx(ones_of(case.valid, case.scope), rel=1e-5)
    dirty = spoiled(scores, ~case.valid, junk)
    assert torch.equal(build(dirty, case.valid, scope=case.scope), weights)


@ALL_BUILDERS
@given(row=special_rows())
def test_weights_are_finite_and_mean_one_whatever_came_in(
    build: Callable[..., Tensor], row: Tensor
) -> None:
    for scores in (row, row.double(), row[..., None]):
        weights = build(scores, torch.ones(scores.shape).bool())
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        assert weights.double().mean().item() == pytest.approx(1.0, rel=1e-5)


@ALL_BUILDERS
@given(case=scored(), layout=LAYOUTS)
def test_weights_are_detached_new_and_blind_to_layout(
    build: Callable[..., Tensor], case: Scored, layout: str
) -> None:
    scores = relayout(case.cross_entropies(), layout).requires_grad_()
    valid = relayout(case.valid, layout)
    with untouched(scores, valid):
        weights = build(scores, valid, scope=case.scope)
        assert not weights.requires_grad
        close(weights, build(scores.clone(), valid.clone(), scope=case.scope).double(), case.dtype)
        weights.fill_(7.0)


@ALL_BUILDERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores_give_float32_weights(
    build: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    scores, valid = uniform(0, 2, 5).to(dtype), mask(1, 0.8, 2, 5)
    near(build(scores, valid), build(scores.double(), valid), torch.float32)


@ALL_BUILDERS
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 3, 2), (2, 0, 2)])
@pytest.mark.parametrize("scope", ["sequence", "batch", "all"])
def test_empty_inputs_give_empty_weights(
    build: Callable[..., Tensor], shape: tuple[int, ...], scope: str
) -> None:
    assert build(torch.zeros(shape), torch.zeros(shape).bool(), scope=scope).shape == shape


@ALL_BUILDERS
def test_nothing_valid_gives_zeros(build: Callable[..., Tensor]) -> None:
    scores = torch.full((2, 3, 2), math.nan)
    assert all_zero(build(scores, torch.zeros(2, 3, 2).bool()))


@ALL_BUILDERS
def test_heads_are_weighted_by_themselves_unless_all_are_asked_for(
    build: Callable[..., Tensor],
) -> None:
    scores = uniform(0, 2, 4, 3) * torch.tensor([1.0, 2.0, 3.0])
    valid = mask(1, 0.8, 2, 4, 3)
    together = build(scores, valid)
    for h in range(3):
        alone = build(scores[:, :, h], valid[:, :, h])
        close(together[:, :, h], alone)
        assert torch.equal(build(scores[:, :, h], valid[:, :, h], scope="all"), alone)


@ALL_BUILDERS
def test_the_sequence_scope_sees_one_row_at_a_time(build: Callable[..., Tensor]) -> None:
    # Whitening is over the batch by definition, so its exponent is not a row's own affair.
    if build is BUILDERS["exp_weights"]:
        build = functools.partial(build, statistics=stats_of([(10.0, 0.3, 4.0)], ()))
    scores, valid = uniform(0, 3, 5), mask(1, 0.8, 3, 5)
    together = build(scores, valid, scope="sequence")
    for b in range(3):
        close(together[b : b + 1], build(scores[b : b + 1], valid[b : b + 1], scope="sequence"))


def rho1(mode: str) -> Callable[..., Tensor]:
    reference = uniform(7, 1, 5, 2)
    return lambda w, valid, **k: wmtp.rho1_weights(
        w.unsqueeze(2) * torch.ones(2), valid.unsqueeze(2).expand(-1, -1, 2),
        reference.expand(len(w), -1, -1), mode=mode, **k,
    )  # fmt: skip


def critic_delta(mode: str) -> Callable[..., Tensor]:
    return functools.partial(wmtp.critic_delta_weights, mode=mode, whiten=False)


@pytest.mark.parametrize(
    "build",
    [
        *(rho1(mode) for mode in ("top_k", "softmax")),
        *(critic_delta(mode) for mode in ("exp", "softmax", "top_k")),
        lambda w, valid, **k: wmtp.span_weights(torch.tensor([[0, 1, 2, 1, -1]]).expand(len(w), -1),
                                                torch.tensor([0.3, 2.0, 1.1]), valid, **k),
    ],
)  # fmt: skip
def test_the_sequence_scope_of_a_method_sees_one_row_at_a_time(
    build: Callable[..., Tensor],
) -> None:
    scores, valid = uniform(0, 3, 5), torch.ones(3, 5).bool()
    valid[0, :3], valid[1, 4] = False, False
    together = build(scores, valid, scope="sequence")
    for b in range(3):
        close(together[b : b + 1], build(scores[b : b + 1], valid[b : b + 1]))
    assert not torch.equal(together, build(scores, valid))


@ALL_BUILDERS
def test_builders_refuse_what_does_not_fit(build: Callable[..., Tensor]) -> None:
    scores, valid = uniform(0, 2, 3), torch.ones(2, 3).bool()
    with pytest.raises((TypeError, ValueError), match="valid"):
        build(scores, valid[:, :2])
    with pytest.raises(TypeError, match="valid"):
        build(scores, valid.double())
    with pytest.raises((TypeError, ValueError), match="scope"):
        build(scores, valid, scope="token")
    with pytest.raises((TypeError, ValueError)):
        build(scores[0], valid[0])


# ------------------------------------------------------------------------------------------ softmax


@given(scored(), st.sampled_from([1.0, 0.3, 5.0]))
def test_softmax_weights_follow_the_oracle(case: Scored, temperature: float) -> None:
    scores = case.scores(scale=3.0)
    options: dict[str, Any] = {"temperature": temperature, "scope": case.scope}
    near(
        wmtp.softmax_weights(scores, case.valid, **options),
        oracle.softmax_weights(scores, case.valid, **options),
        case.dtype,
    )


@given(special_rows(), st.sampled_from([1.0, 0.1]))
def test_softmax_of_special_numbers_follows_the_oracle(row: Tensor, temperature: float) -> None:
    valid = torch.ones(row.shape).bool()
    near(
        wmtp.softmax_weights(row, valid, temperature=temperature),
        oracle.softmax_weights(row, valid, temperature=temperature),
        torch.float32,
    )


def test_the_lowest_number_is_still_above_minus_infinity() -> None:
    scores = torch.tensor([[-math.inf, torch.finfo(torch.float32).min]])
    assert wmtp.softmax_weights(scores, torch.ones(1, 2).bool()).tolist() == [[0.0, 2.0]]


def test_nan_and_minus_infinity_get_no_softmax_weight() -> None:
    scores = torch.tensor([[math.nan, -math.inf, 0.0, 0.0]])
    weights = wmtp.softmax_weights(scores, torch.ones(1, 4).bool())
    assert weights.tolist() == [[0.0, 0.0, 2.0, 2.0]]


@given(scored(), st.sampled_from([-1000.0, 50.0]))
def test_softmax_ignores_a_common_shift(case: Scored, shift: float) -> None:
    scores = case.scores().double()
    torch.testing.assert_close(
        wmtp.softmax_weights(scores + shift, case.valid, scope=case.scope),
        wmtp.softmax_weights(scores, case.valid, scope=case.scope),
        rtol=1e-9,
        atol=1e-10,
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_softmax_refuses_an_impossible_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"^temperature must"):
        wmtp.softmax_weights(torch.ones(1, 2), torch.ones(1, 2).bool(), temperature=temperature)


# -------------------------------------------------------------------------------------------- top k


@given(scored(), KEEPS, st.booleans())
def test_top_k_weights_follow_the_oracle(case: Scored, keep: float, ties: bool) -> None:
    scores = case.tied_scores() if ties else case.scores()
    options: dict[str, Any] = {"keep": keep, "scope": case.scope}
    close(
        wmtp.top_k_weights(scores, case.valid, **options),
        oracle.top_k_weights(scores, case.valid, **options),
        case.dtype,
    )


@given(special_rows(), KEEPS)
def test_top_k_of_special_numbers_follows_the_oracle(row: Tensor, keep: float) -> None:
    valid = torch.ones(row.shape).bool()
    for scores in (row, row.double()):
        actual = wmtp.top_k_weights(scores, valid, keep=keep)
        close(actual, oracle.top_k_weights(scores, valid, keep=keep), torch.float32)


@given(scored(), KEEPS)
def test_top_k_ranks_float64_scores_beyond_float32(case: Scored, keep: float) -> None:
    # Apart by 1e-12, so equal in float32.
    scores = 1.0 + 1e-12 * case.scores().double()
    actual = wmtp.top_k_weights(scores, case.valid, keep=keep, scope=case.scope)
    close(actual, oracle.top_k_weights(scores, case.valid, keep=keep, scope=case.scope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0.0, 1.0, -1.0, 3e-39, -1e38])
def test_top_k_tells_neighbouring_floats_apart(dtype: torch.dtype, start: float) -> None:
    ladder = [torch.tensor(start, dtype=dtype)]
    for _ in range(40):
        ladder.append(torch.nextafter(ladder[-1], torch.tensor(math.inf, dtype=dtype)))
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    scores, valid = torch.stack(ladder)[order][None], torch.ones(1, 41).bool()
    for kept in range(1, 42):
        weights = wmtp.top_k_weights(scores, valid, keep=(kept - 0.5) / 41)
        assert torch.equal(weights[0] > 0, order >= 41 - kept)


@given(scored(), KEEPS)
def test_top_k_counts_are_exact_under_ties(case: Scored, keep: float) -> None:
    for scores in (torch.zeros(case.shape), case.tied_scores()):
        weights = wmtp.top_k_weights(scores, case.valid, keep=keep, scope=case.scope)
        for group in oracle.groups(case.valid, case.scope):
            chosen = sum(bool(weights[i] > 0) for i in group)
            assert chosen == math.ceil(keep * len(group))


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.3, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("n", [10, 20, 30, 70, 100])
def test_top_k_counts_are_those_of_float64(keep: float, n: int) -> None:
    # ceil(0.1 · 30) is 4 in float64 (0.1 · 30 = 3.0000000000000004) and 3 in float32.
    weights = wmtp.top_k_weights(torch.arange(n).float()[None], torch.ones(1, n).bool(), keep=keep)
    assert int((weights > 0).sum()) == math.ceil(keep * n)


@pytest.mark.parametrize("scope", ["sequence", "batch", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_nan_scores_rank_last(scope: str, dtype: torch.dtype, nan: float) -> None:
    scores = torch.tensor([[nan, -math.inf, 1.0, nan, 0.0]]).to(dtype)
    valid = torch.ones(1, 5).bool()
    for keep, chosen in ((0.6, [1, 2, 4]), (0.8, [0, 1, 2, 4]), (1.0, [0, 1, 2, 3, 4])):
        weights = wmtp.top_k_weights(scores, valid, keep=keep, scope=scope)
        assert torch.nonzero(weights[0]).flatten().tolist() == chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)])
def test_both_zeros_are_a_tie(zeros: tuple[float, float], dtype: torch.dtype) -> None:
    scores = torch.tensor([zeros], dtype=dtype)
    weights = wmtp.top_k_weights(scores, torch.ones(1, 2).bool(), keep=0.5)
    assert weights.tolist() == [[2.0, 0.0]]


@given(scored(min_batch=1, min_seq=1), KEEPS)
def test_invalid_entries_take_no_place(case: Scored, keep: float) -> None:
    if len(case.shape) == 3:
        return
    scores = case.scores().masked_fill(~case.valid, math.inf)
    kept = scores[case.valid][None]
    alone = wmtp.top_k_weights(kept, torch.ones(kept.shape).bool(), keep=keep)
    weights = wmtp.top_k_weights(scores, case.valid, keep=keep)
    assert torch.equal(weights[case.valid][None], alone)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, math.nan])
def test_top_k_refuses_an_impossible_share(keep: float) -> None:
    with pytest.raises(ValueError, match=r"^keep must"):
        wmtp.top_k_weights(torch.ones(1, 2), torch.ones(1, 2).bool(), keep=keep)


# ------------------------------------------------------------------------------ exp and whitening


def stats_of(
    moments: list[tuple[float, float, float]], shape: tuple[int, ...]
) -> WhiteningStatistics:
    columns = torch.tensor(moments, dtype=torch.float64)
    return WhiteningStatistics(*(columns[:, n].reshape(shape) for n in range(3)))


@given(scored(), CLIPS, st.booleans(), st.sampled_from([1.0, 0.5, 3.0]))
def test_exp_weights_follow_the_oracle(
    case: Scored, clip: tuple[float, float] | None, whiten: bool, beta: float
) -> None:
    options: dict[str, Any] = {"beta": beta, "clip": clip, "whiten": whiten, "scope": case.scope}
    near(
        wmtp.exp_weights(case.scores(), case.valid, **options),
        oracle.exp_weights(case.scores(), case.valid, **options),
        case.dtype,
    )


@given(scored(), SEEDS)
def test_exp_weights_whiten_with_the_statistics_they_are_given(case: Scored, seed: int) -> None:
    heads = case.shape[2] if len(case.shape) == 3 else 1
    moments = [
        (5.0 + h, float(normal(seed + h, 1)), 1.0 + float(uniform(seed + h, 1)))
        for h in range(heads)
    ]
    known = stats_of(moments, case.shape[2:])
    known = WhiteningStatistics(*(x.to(case.dtype) for x in known))
    near(
        wmtp.exp_weights(case.scores(), case.valid, statistics=known, scope=case.scope),
        oracle.exp_weights(case.scores(), case.valid, statistics=moments, scope=case.scope),
        case.dtype,
    )


@given(scored(), st.sampled_from([0.01, 1000.0]), st.sampled_from([-3.0, 200.0]))
def test_whitened_weights_ignore_scale_and_shift(case: Scored, scale: float, shift: float) -> None:
    scores = case.scores().double()
    torch.testing.assert_close(
        wmtp.exp_weights(scale * scores + shift, case.valid, scope=case.scope),
        wmtp.exp_weights(scores, case.valid, scope=case.scope),
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize("level", [0.0, 0.1, -1e6, 1e30])
def test_equal_scores_are_weighted_equally(level: float) -> None:
    scores, valid = torch.full((2, 7), level), mask(0, 0.7, 2, 7)
    close(wmtp.exp_weights(scores, valid), valid.double(), torch.float32)


def test_nan_and_minus_infinity_get_nothing_beside_equal_scores() -> None:
    scores = torch.tensor([[0.0, -math.inf, 0.0, math.nan]])
    weights = wmtp.exp_weights(scores, torch.ones(1, 4).bool(), clip=None)
    assert weights.tolist() == [[2.0, 0.0, 2.0, 0.0]]


def test_whitening_loses_nothing_far_from_zero() -> None:
    scores, valid = 2.0**22 + torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.ones(1, 4).bool()
    close(wmtp.exp_weights(scores, valid), wmtp.exp_weights(scores.double(), valid), torch.float32)


def test_statistics_of_a_small_spread_are_used_too() -> None:
    scores, valid = normal(0, 2, 6), mask(1, 0.8, 2, 6)
    known = [(5.0, 0.0, 0.25)]
    close(
        wmtp.exp_weights(scores, valid, statistics=stats_of(known, ())),
        oracle.exp_weights(scores, valid, statistics=known),
    )


def test_the_first_batch_is_whitened_with_its_own_statistics() -> None:
    scores, valid = 100 + 5 * normal(0, 2, 6), mask(1, 0.8, 2, 6)
    own = update_statistics(None, scores, valid)
    close(
        wmtp.exp_weights(scores, valid, statistics=own),
        wmtp.exp_weights(scores, valid),
    )


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1.1, 100.3])
@pytest.mark.parametrize("count", [3, 7, 10, 1000, 65536])
def test_statistics_of_equal_scores_have_no_spread(value: float, count: int) -> None:
    every = torch.ones(1, count, dtype=torch.bool)
    seen = update_statistics(None, torch.full((1, count), value), every)
    seen = update_statistics(seen, torch.full((1, 7), value), torch.ones(1, 7).bool(), decay=0.9)
    assert seen.m2 == 0
    assert seen.mean == torch.tensor(value)
    scores, valid = torch.tensor([[-1.0, 0.0, 1.0]]), torch.ones(1, 3).bool()
    found = wmtp.exp_weights(scores, valid, statistics=seen)
    assert torch.equal(found, wmtp.exp_weights(scores, valid))


def test_one_large_and_one_small_score_are_not_equal() -> None:
    seen = update_statistics(None, torch.tensor([[-2.0, 2.0]]), torch.ones(1, 2).bool())
    assert seen == (2, 0, 8)


def test_statistics_that_differ_by_rounding_only_are_no_scale() -> None:
    valid = torch.ones(1, 3, dtype=torch.bool)
    seen = update_statistics(None, torch.tensor([[100.0, 100.00001, 100.0]]), valid)
    assert seen.m2 > 0
    scores = torch.tensor([[0.0, 5.0, 100.0]])
    found = wmtp.exp_weights(scores, valid, statistics=seen)
    assert torch.equal(found, wmtp.exp_weights(scores, valid))


def test_statistics_of_nothing_yet_whiten_nothing() -> None:
    scores, valid = 100 + 5 * normal(0, 2, 6), mask(1, 0.8, 2, 6)
    blank = update_statistics(None, scores, torch.zeros_like(valid))
    close(
        wmtp.exp_weights(scores, valid, statistics=blank),
        wmtp.exp_weights(scores, valid),
    )


def test_exponents_that_would_overflow_stay_ordered() -> None:
    scores = torch.tensor([[1e4, 2e4, 1e4]])
    weights = wmtp.exp_weights(scores, torch.ones(1, 3).bool(), whiten=False, clip=(0.1, 2.5))
    assert weights[0].tolist() == pytest.approx([0.25, 2.5, 0.25])


@given(scored(), st.sampled_from([1.0, 0.9, 0.0]))
def test_statistics_follow_the_oracle(case: Scored, decay: float) -> None:
    known = oracle.moments(case.scores(), case.valid)
    first = update_statistics(None, case.scores(), case.valid)
    later = 3.0 + 2.0 * normal(case.seed + 7, *case.shape).to(case.dtype)
    second = update_statistics(first, later, case.valid, decay=decay)
    assert first.mean.shape == case.shape[2:]
    shape = case.shape[2:]
    for actual, moments in (
        (first, known),
        (second, oracle.merged_moments(known, oracle.moments(later, case.valid), decay=decay)),
    ):
        for part, column in zip(actual, stats_of(moments, shape), strict=True):
            assert not part.requires_grad
            torch.testing.assert_close(
                part.double(),
                column,
                rtol=1e-9 if case.dtype == torch.float64 else 1e-5,
                atol=1e-9 if case.dtype == torch.float64 else 1e-5,
            )


@given(SEEDS, sizes(8, 1), st.integers(0, 3), st.sampled_from([0.0, 1e4]))
def test_whitening_statistics_over_splits_equal_the_whole(
    seed: int, seq: int, cut: int, level: float
) -> None:
    scores, valid = level + normal(seed, 4, seq), mask(seed + 1, 0.7, 4, seq)
    whole = update_statistics(None, scores, valid)
    split = None
    for part in (slice(0, cut), slice(cut, 3), slice(3, 4)):
        split = update_statistics(split, scores[part], valid[part])
    assert split is not None
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * max(level, 1.0) ** 2)


@given(scored(), JUNK)
def test_statistics_never_read_invalid_places_nor_write(case: Scored, junk: float) -> None:
    scores = spoiled(case.scores(), ~case.valid, junk)
    old = update_statistics(None, case.scores(), case.valid)
    with untouched(scores, case.valid, *old):
        new = update_statistics(old, scores, case.valid)
    for a, b in zip(new, update_statistics(old, case.scores(), case.valid), strict=True):
        assert torch.equal(a, b)


def test_a_single_score_is_its_own_mean() -> None:
    score, valid = torch.tensor([[5.0]]), torch.ones(1, 1).bool()
    blank = update_statistics(None, score, ~valid)
    assert [float(x) for x in update_statistics(blank, score, valid)] == [1.0, 5.0, 0.0]


@pytest.mark.parametrize("decay", [0.25, 0.1, 1e-3])
def test_forgetting_leaves_the_deviation_as_it_is(decay: float) -> None:
    scores, valid = torch.tensor([[1.0, 3.0, 1.0, 3.0]]), torch.ones(1, 4).bool()
    first = update_statistics(None, scores, valid)
    later = update_statistics(first, scores, ~valid, decay=decay)
    close(torch.stack((*later, later.std)), torch.tensor([4 * decay, 2.0, 4 * decay, 1.0]))


def test_the_deviation_of_no_scores_is_zero() -> None:
    statistics = update_statistics(None, torch.ones(1, 2), torch.zeros(1, 2).bool())
    assert [float(x) for x in (*statistics, statistics.std)] == [0.0] * 4


def test_a_nan_score_does_not_poison_the_statistics() -> None:
    scores, valid = torch.tensor([[1.0, math.nan, 3.0]]), torch.ones(1, 3).bool()
    statistics = update_statistics(None, scores, valid)
    assert [float(x) for x in statistics] == [2.0, 2.0, 2.0]


def test_exp_weights_and_statistics_refuse_what_does_not_fit() -> None:
    scores, valid = uniform(0, 1, 3), torch.ones(1, 3).bool()
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^beta must"):
            wmtp.exp_weights(scores, valid, beta=beta)
    with pytest.raises(ValueError, match="clip"):
        wmtp.exp_weights(scores, valid, clip=(2.0, 3.0))
    for decay in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="decay"):
            update_statistics(None, scores, valid, decay=decay)
    three_heads = stats_of([(2.0, 0.0, 1.0)] * 3, (3,))
    with pytest.raises((TypeError, ValueError), match="statistics"):
        wmtp.exp_weights(scores, valid, statistics=three_heads)
    with pytest.raises(ValueError, match=r"^statistics.count must be \[\] = \[\], got \[3\]"):
        update_statistics(three_heads, scores, valid)
    deep = scores[..., None].expand(1, 3, 2), valid[..., None].expand(1, 3, 2)
    with pytest.raises(ValueError, match=r"^statistics.count must be \[heads\] = \[2\], got \[3\]"):
        update_statistics(three_heads, *deep)


# -------------------------------------------------------------------------------------------- rho-1


@given(scored(dims=(3,)), KEEPS, st.sampled_from(["top_k", "softmax"]), st.booleans(), st.data())
def test_rho1_weights_follow_the_oracle(
    case: Scored, keep: float, mode: str, aligned: bool, data: st.DataObject
) -> None:
    shape = case.shape if aligned else case.shape[:2]
    reference = (2 * uniform(case.seed + 4, *shape)).to(case.dtype)
    offsets = None if aligned else data.draw(offset_sets(case.shape[2]))
    steps = oracle.offset_list(offsets, case.shape[2])
    # A prediction past the end is never valid.
    there = oracle.align_to_heads(torch.ones(case.shape[:2]), steps) > 0
    valid = case.valid if aligned else case.valid & there
    options: dict[str, Any] = {
        "keep": keep,
        "mode": mode,
        "temperature": 0.7,
        "scope": case.scope,
        "offsets": offsets,
    }
    near(
        wmtp.rho1_weights(case.cross_entropies(), valid, reference, **options),
        oracle.rho1_weights(case.cross_entropies(), valid, reference, **options),
        case.dtype,
    )


def test_rho1_keeps_what_is_worse_than_the_reference_and_not_what_is_better() -> None:
    ce = torch.tensor([[[3.0], [0.1], [2.0], [0.0]]])
    reference = torch.tensor([[9.0, 1.0, 5.0, 1.9]])
    valid = torch.tensor([[[True], [True], [True], [False]]])
    # Signed excess 2.0, −4.9, 0.1: the large negative one must not be chosen.
    weights = wmtp.rho1_weights(ce, valid, reference, keep=0.6)
    assert weights.flatten().tolist() == [1.5, 0.0, 1.5, 0.0]


@pytest.mark.parametrize("mode", ["top_k", "softmax"])
def test_rho1_compares_with_the_token_that_a_head_predicts(mode: Any) -> None:
    ce, reference, offsets = uniform(0, 2, 6, 2), uniform(1, 2, 6), (2, 3)
    valid = wmtp.align_to_heads(torch.ones(2, 6).bool(), offsets=offsets)
    aligned = wmtp.align_to_heads(reference, offsets=offsets)
    expected = wmtp.rho1_weights(ce, valid, aligned, mode=mode)
    weights = wmtp.rho1_weights(ce, valid, reference, mode=mode, offsets=offsets)
    assert torch.equal(weights, expected)
    assert not torch.equal(weights, wmtp.rho1_weights(ce, valid, reference, mode=mode))


@given(JUNK)
def test_rho1_never_reads_a_reference_that_nobody_predicts(junk: float) -> None:
    ce, valid = uniform(0, 2, 5, 2), oracle.valid_of(integers(0, 4, 2, 5), 2)
    reference = uniform(1, 2, 5)
    dirty = reference.clone()
    dirty[:, 0] = junk
    assert torch.equal(wmtp.rho1_weights(ce, valid, dirty), wmtp.rho1_weights(ce, valid, reference))


def test_rho1_refuses_what_does_not_fit() -> None:
    ce, valid, reference = uniform(0, 1, 3, 2), torch.ones(1, 3, 2).bool(), uniform(1, 1, 3)
    with pytest.raises((TypeError, ValueError), match="reference_nll"):
        wmtp.rho1_weights(ce, valid, reference[:, :2])
    with pytest.raises((TypeError, ValueError), match="mode"):
        wmtp.rho1_weights(ce, valid, reference, mode="abs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^keep must"):
        wmtp.rho1_weights(ce, valid, reference, keep=2.0)
    with pytest.raises(ValueError, match=r"^temperature must"):
        wmtp.rho1_weights(ce, valid, reference, mode="softmax", temperature=0.0)


# ------------------------------------------------------------------------------------------- critic


@given(
    trajectories(),
    st.sampled_from(["exp", "softmax", "top_k"]),
    st.sampled_from(["sequence", "batch", "all"]),
    st.booleans(),
)
def test_critic_delta_weights_follow_the_oracle(
    case: Trajectories, mode: str, scope: str, whiten: bool
) -> None:
    options: dict[str, Any] = {
        "rewards": case.rewards,
        "gamma": case.gamma,
        "lam": case.lam,
        "initial_value": case.initial_value,
        "mode": mode,
        "beta": 0.7,
        "clip": (0.2, 2.0),
        "keep": 0.4,
        "temperature": 0.5,
        "whiten": whiten,
        "scope": scope,
        **case.documents,
    }
    near(
        wmtp.critic_delta_weights(case.values, case.valid, **options),
        oracle.critic_delta_weights(case.values, case.valid, **options),
        case.values.dtype,
    )


def test_critic_delta_weights_are_exponentials_of_deltas_by_default() -> None:
    values, valid = normal(0, 2, 6), mask(1, 0.8, 2, 6)
    statistics = stats_of([(10.0, 0.1, 5.0)], ())
    for known in (None, statistics):
        close(
            wmtp.critic_delta_weights(values, valid, statistics=known),
            wmtp.exp_weights(wmtp.td_deltas(values, valid), valid, statistics=known),
        )


def test_the_critic_gets_no_gradient_from_its_weights() -> None:
    values = normal(0, 2, 6).requires_grad_()
    for mode in ("exp", "softmax", "top_k"):
        weights = wmtp.critic_delta_weights(values, mask(1, 0.8, 2, 6), mode=mode)
        assert not weights.requires_grad


def test_a_bfloat16_critic_keeps_its_small_deltas() -> None:
    values = torch.tensor([[0.5, 0.50390625, 0.5, 0.50390625]]).bfloat16()
    weights = wmtp.critic_delta_weights(values, torch.ones(1, 4).bool(), mode="softmax")
    assert weights.dtype == torch.float32
    assert weights[0, 1] > weights[0, 2]


def test_critic_delta_weights_refuse_what_does_not_fit() -> None:
    values, valid = normal(0, 1, 3), torch.ones(1, 3).bool()
    with pytest.raises((TypeError, ValueError), match="mode"):
        wmtp.critic_delta_weights(values, valid, mode="linear")  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match="rewards"):
        wmtp.critic_delta_weights(values, valid, rewards=normal(0, 1, 2))
    with pytest.raises(ValueError, match="lam"):
        wmtp.critic_delta_weights(values, valid, lam=2.0)
    with pytest.raises(ValueError, match=r"^beta must"):
        wmtp.critic_delta_weights(values, valid, beta=0.0)
    with pytest.raises(ValueError, match=r"^keep must"):
        wmtp.critic_delta_weights(values, valid, mode="top_k", keep=0.0)
    with pytest.raises(ValueError, match=r"^temperature must"):
        wmtp.critic_delta_weights(values, valid, mode="softmax", temperature=0.0)


# ---------------------------------------------------------------------------- from the logits alone


@pytest.mark.parametrize("mode", ["exp", "softmax", "top_k"])
def test_padding_takes_no_place_among_the_critics_weights(mode: Any) -> None:
    values, every = torch.tensor([[0.0, -0.5, -0.6, 0.9]]), torch.ones(1, 4, dtype=torch.bool)
    real = torch.tensor([[1, 1, 1, 0]])
    options: dict[str, Any] = {"mode": mode, "keep": 0.5, "initial_value": 0.3}
    found = wmtp.critic_delta_weights(values, every, attention_mask=real, **options)
    assert found[0, 3] == 0
    known = wmtp.critic_delta_weights(values, real.bool(), attention_mask=real, **options)
    assert torch.equal(found, known)


@given(scored(dims=(3,)), st.sampled_from(["mean_one", "none"]), st.sampled_from([0.0, 1.0, 2.0]))
def test_weights_of_cross_entropies_follow_the_oracle(
    case: Scored, mode: str, gamma: float
) -> None:
    ce = case.cross_entropies()
    options: dict[str, Any] = {"mode": mode, "scope": case.scope}
    near(
        wmtp.dft_weights(ce, case.valid, **options),
        oracle.dft_weights(ce, case.valid, **options),
        case.dtype,
    )
    near(
        wmtp.focal_weights(ce, case.valid, gamma=gamma, **options),
        oracle.focal_weights(ce, case.valid, gamma=gamma, **options),
        case.dtype,
    )


@given(scored(), st.sampled_from(["mean_one", "none"]), st.sampled_from([0.5, 1.0, 2.0]))
def test_weights_of_entropy_and_el2n_follow_the_oracle(
    case: Scored, mode: str, power: float
) -> None:
    scores = case.cross_entropies() + 0.01
    options: dict[str, Any] = {"mode": mode, "power": power, "scope": case.scope}
    expected = oracle.power_weights(scores, case.valid, **options)
    near(wmtp.entropy_weights(scores, case.valid, **options), expected, case.dtype)
    near(wmtp.el2n_weights(scores, case.valid, **options), expected, case.dtype)


@pytest.mark.parametrize(("name", "wrong"), [("scope", "rows"), ("group", 3)])
def test_weights_that_are_not_normalized_check_their_scope_all_the_same(
    name: str, wrong: Any
) -> None:
    unchecked: Any = wmtp.dft_weights
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        unchecked.__wrapped__(
            torch.ones(1, 2, 1), torch.ones(1, 2, 1).bool(), mode="none", **{name: wrong}
        )


def test_dft_and_focal_pull_in_opposite_directions() -> None:
    ce, valid = torch.tensor([[[0.1], [3.0]]]), torch.ones(1, 2, 1).bool()
    dft, focal = wmtp.dft_weights(ce, valid).flatten(), wmtp.focal_weights(ce, valid).flatten()
    assert dft[0] > 1 > dft[1]
    assert focal[0] < 1 < focal[1]


def test_focal_weights_of_sure_tokens_do_not_cancel_to_zero() -> None:
    # 1 − exp(−1e-9) is 0 in float32, −expm1(−1e-9) is not.
    ce, valid = torch.tensor([[[1e-9], [2e-9]]]), torch.ones(1, 2, 1).bool()
    expected = oracle.focal_weights(ce, valid, gamma=1.0)
    close(wmtp.focal_weights(ce, valid, gamma=1.0), expected, torch.float32)


def test_dft_weights_of_hopeless_tokens_keep_their_order() -> None:
    ce, valid = torch.tensor([[[800.0], [801.0]]]), torch.ones(1, 2, 1).bool()
    expected = oracle.softmax_weights(-ce, valid)
    close(wmtp.dft_weights(ce, valid), expected, torch.float32)


@given(scored(), CLIPS, st.sampled_from([None, 0.5]))
def test_score_weights_follow_the_oracle(
    case: Scored, clip: tuple[float, float] | None, rho: float | None
) -> None:
    options: dict[str, Any] = {"clip": clip, "min_ess": rho, "scope": case.scope}
    near(
        wmtp.score_weights(case.weights(), case.valid, **options),
        oracle.score_weights(case.weights(), case.valid, **options),
        case.dtype,
    )


def test_impossible_exponents_are_refused() -> None:
    scores, valid = uniform(0, 1, 3, 1), torch.ones(1, 3, 1).bool()
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^gamma must"):
            wmtp.focal_weights(scores, valid, gamma=bad)
        with pytest.raises(ValueError, match=r"^power must"):
            wmtp.entropy_weights(scores, valid, power=bad)
        with pytest.raises(ValueError, match=r"^power must"):
            wmtp.el2n_weights(scores, valid, power=bad)
    for build in (wmtp.dft_weights, wmtp.focal_weights, wmtp.entropy_weights, wmtp.el2n_weights):
        with pytest.raises((TypeError, ValueError), match="mode"):
            build(scores, valid, mode="sum")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------- groups, spans


@given(SEEDS, sizes(6), sizes(5), WIDE_DTYPES, CLIPS, st.sampled_from([1.0, 0.3]))
def test_group_relative_weights_follow_the_oracle(
    seed: int,
    batch: int,
    seq: int,
    dtype: torch.dtype,
    clip: tuple[float, float] | None,
    beta: float,
) -> None:
    rewards, ids = normal(seed, batch).to(dtype), integers(seed, 2, batch)
    valid = mask(seed + 1, 0.7, batch, seq)
    actual = wmtp.group_relative_weights(rewards, ids, valid, beta=beta, clip=clip)
    expected = oracle.group_relative_weights(rewards, ids, valid, beta=beta, clip=clip)
    near(actual, expected, dtype)
    assert not actual.requires_grad


def test_sequences_are_weighted_the_same_in_every_head() -> None:
    rewards, ids, valid = normal(0, 4), torch.tensor([0, 0, 1, 1]), mask(1, 0.7, 4, 3, 2)
    together = wmtp.group_relative_weights(rewards, ids, valid)
    for h in range(2):
        alone = wmtp.group_relative_weights(rewards, ids, valid[..., h])
        close(together[..., h], alone)


def test_groups_of_one_are_weighted_like_everybody() -> None:
    valid = torch.tensor([[True, True], [True, False]])
    weights = wmtp.group_relative_weights(torch.tensor([5.0, -5.0]), torch.tensor([0, 1]), valid)
    close(weights, valid.double(), torch.float32)


def test_group_relative_weights_refuse_what_does_not_fit() -> None:
    rewards, ids, valid = normal(0, 2), torch.zeros(2).long(), torch.ones(2, 3).bool()
    with pytest.raises((TypeError, ValueError), match="group_ids"):
        wmtp.group_relative_weights(rewards, ids[:1], valid)
    with pytest.raises((TypeError, ValueError), match="valid"):
        wmtp.group_relative_weights(rewards, ids, valid[:1])
    with pytest.raises(ValueError, match=r"^beta must"):
        wmtp.group_relative_weights(rewards, ids, valid, beta=0.0)
    with pytest.raises(ValueError, match="rewards on meta, valid on cpu"):
        wmtp.group_relative_weights(rewards.to("meta"), ids.to("meta"), valid)


@given(scored(dims=(2,)), st.integers(0, 4), CLIPS, st.sampled_from([1.0, 0.0, 2.5]))
def test_span_weights_follow_the_oracle(
    case: Scored, spans: int, clip: tuple[float, float] | None, outside: float
) -> None:
    ids = integers(case.seed, spans + 1, *case.shape) - 1
    values = (uniform(case.seed + 1, spans) * 3).to(case.dtype)
    options: dict[str, Any] = {"outside": outside, "clip": clip, "scope": case.scope}
    actual = wmtp.span_weights(ids, values, case.valid, **options)
    near(actual, oracle.span_weights(ids, values, case.valid, **options), case.dtype)


def test_tokens_outside_every_span_weigh_one() -> None:
    ids, valid = torch.tensor([[-1, 0]]), torch.ones(1, 2).bool()
    assert wmtp.span_weights(ids, torch.tensor([3.0]), valid).tolist() == [[0.5, 1.5]]
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^outside must"):
            wmtp.span_weights(ids, torch.tensor([3.0]), valid, outside=bad)


def test_span_ids_at_invalid_places_may_be_anything() -> None:
    values, valid = torch.tensor([2.0, 6.0]), torch.tensor([[True, True, False, False]])
    weights = wmtp.span_weights(torch.tensor([[0, 1, 99, -7]]), values, valid)
    assert weights.tolist() == [[0.5, 1.5, 0.0, 0.0]]


@pytest.mark.parametrize("stray", [2, -2])
def test_a_span_that_does_not_exist_is_refused(stray: int) -> None:
    with pytest.raises((ValueError, IndexError), match="span_ids"):
        wmtp.span_weights(
            torch.tensor([[0, stray]]), torch.tensor([1.0, 2.0]), torch.ones(1, 2).bool()
        )


@pytest.mark.parametrize("stray", [2, 3, 2**40, -2, -3])
def test_a_span_that_does_not_exist_is_refused_where_nobody_could_look(stray: int) -> None:
    """Under a compiler: it would weigh what tokens outside every span weigh, or read beyond the values."""
    torch._dynamo.reset()
    ids, values = torch.tensor([[0, stray, 1, stray]]), torch.tensor([1.0, 2.0])
    valid = torch.tensor([[True, True, True, False]])
    compiled = torch.compile(wmtp.span_weights, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="span_ids must lie in"):
        compiled(ids, values, valid)
    ids[0, 1] = -1
    torch.testing.assert_close(compiled(ids, values, valid), wmtp.span_weights(ids, values, valid))


# ---------------------------------------------------------------------------------------- combining


@given(
    scored(),
    st.sampled_from(["mixture", "product", "intersection"]),
    st.integers(1, 3),
    st.booleans(),
)
def test_combined_weights_follow_the_oracle(
    case: Scored, mode: str, members: int, with_coefficients: bool
) -> None:
    parts = [
        torch.exp(normal(case.seed + n, *case.shape))
        .masked_fill(mask(case.seed + 50 + n, 0.3, *case.shape), 0.0)
        .to(case.dtype)
        for n in range(members)
    ]
    options: dict[str, Any] = {"mode": mode, "scope": case.scope}
    if with_coefficients and mode == "mixture":
        options["coefficients"] = [0.5, 2.0, 1.5][:members]
    near(
        wmtp.combine_weights(parts, case.valid, **options),
        oracle.combine_weights(parts, case.valid, **options),
        case.dtype,
    )


def test_a_product_with_ones_and_a_mixture_of_equals_change_nothing() -> None:
    w, valid = 0.1 + uniform(0, 2, 5), mask(1, 0.8, 2, 5)
    expected = wmtp.normalize_weights(w, valid)
    close(wmtp.combine_weights([w, torch.ones_like(w)], valid, mode="product"), expected)
    close(wmtp.combine_weights([w, 7 * w, w], valid), expected)


def test_an_intersection_keeps_what_every_member_keeps() -> None:
    first, second = torch.tensor([[1.0, 1.0, 0.0, 5.0]]), torch.tensor([[0.0, 2.0, 1.0, 1.0]])
    weights = wmtp.combine_weights([first, second], torch.ones(1, 4).bool(), mode="intersection")
    assert weights.tolist() == [[0.0, 2.0, 0.0, 2.0]]


@pytest.mark.parametrize("mode", ["product", "intersection"])
def test_what_no_member_agrees_on_is_uniform(mode: str) -> None:
    w, valid = torch.tensor([[1.0, 0.0, 3.0]]), torch.ones(1, 3).bool()
    for other in (torch.zeros(1, 3), torch.tensor([[0.0, 2.0, 0.0]])):
        weights = wmtp.combine_weights([w, other], valid, mode=mode)
        assert weights.tolist() == [[1.0, 1.0, 1.0]]


def test_a_tiny_weight_is_positive_all_the_same() -> None:
    w, valid = torch.tensor([[1e-30, 1e30, 0.0]]), torch.ones(1, 3).bool()
    weights = wmtp.combine_weights([w, w], valid, mode="intersection")
    assert weights.tolist() == [[1.5, 1.5, 0.0]]


def test_a_product_of_tiny_weights_does_not_underflow() -> None:
    w, valid = torch.tensor([[1e-30, 2e-30]]), torch.ones(1, 2).bool()
    weights = wmtp.combine_weights([w, w], valid, mode="product")
    assert weights[0].tolist() == pytest.approx([0.4, 1.6], rel=1e-5)


def test_a_product_that_underflows_everywhere_keeps_its_proportions() -> None:
    first, second = torch.tensor([[1.0, 1e-30]]), torch.tensor([[1e-30, 3.0]])
    actual = wmtp.combine_weights(
        [first, second], torch.ones(1, 2).bool(), mode="product", coefficients=[2.0, 2.0]
    )
    close(actual, torch.tensor([[0.2, 1.8]]), torch.float32)


def test_a_member_without_a_coefficient_has_no_say() -> None:
    w, other = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 2.0]])
    for mode in ("mixture", "product"):
        weights = wmtp.combine_weights(
            [w, other], torch.ones(1, 2).bool(), mode=mode, coefficients=[1.0, 0.0]
        )
        close(weights, torch.tensor([[0.5, 1.5]]), torch.float32)


@pytest.mark.parametrize("scale", [3e38, 1e39, 1e-46, 1e308, 1e-320])
def test_a_mixture_knows_only_ratios_of_coefficients(scale: float) -> None:
    members = [torch.tensor([[2.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0, 2.0]])]
    valid = torch.ones(1, 4, dtype=torch.bool)
    found = wmtp.combine_weights(members, valid, coefficients=(scale, scale))
    assert found.tolist() == [[1.0, 0.5, 1.0, 1.5]]


def test_a_products_exponent_must_fit_into_float32() -> None:
    w = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"coefficients must lie in .* got 1e\+39"):
        wmtp.combine_weights([w], w.bool(), mode="product", coefficients=[1e39])


def test_combining_refuses_what_does_not_fit() -> None:
    w, valid = torch.ones(1, 3), torch.ones(1, 3).bool()
    with pytest.raises(ValueError, match="weights"):
        wmtp.combine_weights([], valid)
    with pytest.raises((TypeError, ValueError), match="weights"):
        wmtp.combine_weights([w, torch.ones(1, 4)], valid)
    with pytest.raises(ValueError, match="coefficients"):
        wmtp.combine_weights([w, w], valid, coefficients=[1.0])
    with pytest.raises(ValueError, match="coefficients have no meaning"):
        wmtp.combine_weights([w, w], valid, mode="intersection", coefficients=[1.0, 1.0])
    for bad in ([-1.0, 2.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]):
        with pytest.raises(ValueError, match="coefficients"):
            wmtp.combine_weights([w, w], valid, coefficients=bad)
    with pytest.raises((TypeError, ValueError), match="mode"):
        wmtp.combine_weights([w], valid, mode="sum")  # type: ignore[arg-type]


def test_the_defaults_are_the_documented_ones() -> None:
    valid, outlier = torch.ones(1, 9).bool(), torch.eye(9)[:1]
    exp = {"beta": 1.0, "clip": (0.1, 3.0)}
    ce, reference = 0.5 + outlier[..., None], torch.zeros(1, 9)
    deep = valid[..., None]
    values = outlier.cumsum(1) + 0.3 * outlier.flip(1)
    rewards, ids = outlier[0], torch.zeros(9).long()
    for build, given_, options in (
        (wmtp.softmax_weights, (outlier, valid), {"temperature": 1.0}),
        (wmtp.exp_weights, (outlier, valid), {**exp, "whiten": True}),
        (wmtp.critic_delta_weights, (values, valid), {**exp, "lam": 0.0, "whiten": True}),
        (wmtp.group_relative_weights, (rewards, ids, valid.T), exp),
        (wmtp.focal_weights, (ce, deep), {"gamma": 2.0}),
        (wmtp.entropy_weights, (1 + outlier, valid), {"power": 1.0}),
        (wmtp.el2n_weights, (1 + outlier, valid), {"power": 1.0}),
    ):
        assert torch.equal(build(*given_), build(*given_, **options))
    assert torch.equal(
        wmtp.rho1_weights(ce, deep, reference, mode="softmax"),
        wmtp.rho1_weights(ce, deep, reference, mode="softmax", temperature=1.0),
    )
    assert torch.equal(
        wmtp.critic_delta_weights(values, valid, mode="softmax"),
        wmtp.critic_delta_weights(values, valid, mode="softmax", temperature=1.0),
    )
