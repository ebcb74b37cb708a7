"""One normalisation for every weight: mean one, inside its bounds, with enough effective samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.helpers import all_zero, close, untouched
from tests.strategies import JUNK, LAYOUTS, SEEDS, Scored, relayout, scored, special_rows, spoiled
from wmtp import normalize_weights


CLIPS = st.sampled_from([(0.1, 3.0), (0.5, 1.5), (0.0, 2.0), (1.0, 1.0), (0.9, 50.0)])
SCOPES = ["sequence", "batch", "all"]


def means(weights: Tensor, valid: Tensor, scope: str) -> list[float]:
    return [
        float(sum(weights[i].double() for i in group)) / len(group)
        for group in oracle.groups(valid, scope)
    ]


def ess(weights: Tensor, group: list[oracle.Index]) -> float:
    w = [float(weights[i]) for i in group]
    return sum(w) ** 2 / (len(w) * sum(x * x for x in w))


@given(scored(), st.sampled_from(["mean_one", "none"]))
def test_normalized_weights_follow_the_oracle(case: Scored, mode: str) -> None:
    weights = case.weights()
    actual = normalize_weights(weights, case.valid, mode=mode, scope=case.scope)
    if mode == "none" and any(
        weights[tuple(zip(*g, strict=True))].max() == 0
        for g in oracle.groups(case.valid, case.scope)
    ):
        return
    assert actual.dtype == case.dtype
    close(
        actual,
        oracle.normalize_weights(weights, case.valid, mode=mode, scope=case.scope),
        case.dtype,
    )


@given(scored(), CLIPS)
def test_clipped_weights_follow_the_oracle(case: Scored, clip: tuple[float, float]) -> None:
    weights = case.weights(scale=2.0)
    actual = normalize_weights(weights, case.valid, clip=clip, scope=case.scope)
    expected = oracle.normalize_weights(weights, case.valid, clip=clip, scope=case.scope)
    close(actual, expected, case.dtype)


@given(scored(), CLIPS, st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_clip_and_mean_one_both_hold(case: Scored, clip: tuple[float, float], zeros: float) -> None:
    weights = case.weights(zeros=zeros, scale=3.0)
    actual = normalize_weights(weights, case.valid, clip=clip, scope=case.scope)
    assert means(actual, case.valid, case.scope) == pytest.approx(
        [1.0] * len(oracle.groups(case.valid, case.scope)), rel=1e-5
    )
    inside = actual[case.valid]
    assert bool(((inside >= clip[0] * (1 - 1e-6)) & (inside <= clip[1] * (1 + 1e-6))).all())
    assert all_zero(actual[~case.valid])


def test_clip_and_mean_one_hold_for_a_subnormal_ratio() -> None:
    weights, valid = torch.tensor([[0.0, 0.0, 0.0, 1e-38, 2.5]]), torch.ones(1, 5).bool()
    for w in (weights, weights.double()):
        actual = normalize_weights(w, valid, clip=(0.1, 3.0))
        assert actual[0].tolist() == pytest.approx([0.1, 0.1, 0.1, 1.7, 3.0], rel=1e-5)
    # The smallest float32 there is has to become 2.4.
    smallest = torch.tensor([[*[0.0] * 6, 2.0**-149, 2.0**-148, 1.0]])
    actual = normalize_weights(smallest, torch.ones(1, 9).bool(), clip=(0.1, 3.0))
    assert actual[0].tolist() == pytest.approx([*[0.1] * 6, 2.4, 3.0, 3.0], rel=1e-5)


def test_a_weight_that_meets_the_upper_bound_counts_as_bounded() -> None:
    weights, valid = torch.tensor([[0.0, 0.0, 2.0, 5.0, 8.0]]), torch.ones(1, 5).bool()
    actual = normalize_weights(weights, valid, clip=(0.1, 2.0))
    assert actual[0].tolist() == pytest.approx([0.1, 0.1, 0.8, 2.0, 2.0], rel=1e-5)


def test_an_upper_bound_may_be_missing() -> None:
    weights, valid = torch.tensor([[0.0, 0.01, 1.0, 98.99]]), torch.ones(1, 4).bool()
    for w in (weights, weights.double()):
        actual = normalize_weights(w, valid, clip=(0.1, math.inf))
        assert actual[0].tolist() == pytest.approx([0.1, 0.1, 0.1, 3.7], rel=1e-6)


def test_weights_that_are_only_masked_are_clamped_too() -> None:
    weights, valid = (
        torch.tensor([[0.25, 1.0, 9.0, 9.0]]),
        torch.tensor([[True, True, True, False]]),
    )
    actual = normalize_weights(weights, valid, mode="none", clip=(0.5, 2.0))
    assert actual.tolist() == [[0.5, 1.0, 2.0, 0.0]]


def test_too_few_positive_weights_sit_at_the_upper_bound() -> None:
    weights, valid = torch.tensor([[7.0, 0.0, 0.0, 0.0, 0.0]]), torch.ones(1, 5).bool()
    actual = normalize_weights(weights, valid, clip=(0.1, 2.0))
    assert actual[0].tolist() == pytest.approx([2.0, 0.75, 0.75, 0.75, 0.75])
    actual = normalize_weights(weights[:, :2], valid[:, :2], clip=(0.1, 1.5))
    assert actual[0].tolist() == pytest.approx([1.5, 0.5])


@given(scored(), st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.sampled_from([None, (0.1, 3.0)]))
def test_min_ess_holds(case: Scored, rho: float, clip: tuple[float, float] | None) -> None:
    weights = case.weights(scale=2.0)
    options: dict[str, Any] = {"clip": clip, "min_ess": rho, "scope": case.scope}
    actual = normalize_weights(weights, case.valid, **options)
    for group in oracle.groups(case.valid, case.scope):
        assert ess(actual, group) >= rho * (1 - 1e-5)
    assert means(actual, case.valid, case.scope) == pytest.approx(
        [1.0] * len(oracle.groups(case.valid, case.scope)), rel=1e-5
    )
    expected = oracle.normalize_weights(weights, case.valid, **options)
    # Where nearly everything is mixed away the small remainder is a difference of large numbers.
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=1e-8 if case.dtype == torch.float64 else 2e-4,
        atol=1e-7 if case.dtype == torch.float64 else 2e-4,
    )


def test_min_ess_leaves_healthy_weights_alone() -> None:
    weights, valid = torch.tensor([[0.9, 1.1, 1.0]]), torch.ones(1, 3).bool()
    assert torch.equal(
        normalize_weights(weights, valid, min_ess=0.5), normalize_weights(weights, valid)
    )


def test_min_ess_is_reached_exactly_when_it_binds() -> None:
    weights, valid = torch.tensor([[4.0, 0.0, 0.0, 0.0]]).double(), torch.ones(1, 4).bool()
    actual = normalize_weights(weights, valid, min_ess=0.5)
    assert ess(actual, [(0, t) for t in range(4)]) == pytest.approx(0.5, rel=1e-9)


@given(scored(), st.sampled_from([1e-30, 1e-3, 7.0, 1e30]))
def test_the_scale_of_the_weights_does_not_matter(case: Scored, scale: float) -> None:
    weights = case.weights()
    expected = normalize_weights(weights, case.valid, scope=case.scope)
    actual = normalize_weights(scale * weights, case.valid, scope=case.scope)
    close(actual, expected.double(), torch.float32)


@given(scored())
def test_ones_stay_exactly_ones(case: Scored) -> None:
    ones = torch.ones(case.shape, dtype=case.dtype)
    actual = normalize_weights(ones, case.valid, clip=(0.1, 3.0), min_ess=0.5, scope=case.scope)
    close(actual, case.valid.double(), case.dtype)


@given(scored(), JUNK)
def test_junk_at_invalid_places_changes_nothing(case: Scored, junk: float) -> None:
    clean, dirty = case.weights(), spoiled(case.weights(), ~case.valid, junk)
    for options in ({}, {"clip": (0.1, 3.0)}, {"min_ess": 0.5}, {"mode": "none"}):
        here = normalize_weights(dirty, case.valid, scope=case.scope, **options)
        assert torch.equal(here, normalize_weights(clean, case.valid, scope=case.scope, **options))
        assert all_zero(here[~case.valid])


@given(special_rows(), st.sampled_from([None, (0.1, 3.0)]), st.sampled_from([None, 0.5]))
def test_whatever_came_in_finite_mean_one_weights_come_out(
    row: Tensor, clip: tuple[float, float] | None, rho: float | None
) -> None:
    valid = torch.ones(row.shape).bool()
    for weights in (row, row.double()):
        actual = normalize_weights(weights, valid, clip=clip, min_ess=rho)
        assert actual.isfinite().all()
        assert (actual >= 0).all()
        assert actual.double().mean().item() == pytest.approx(1.0, rel=1e-5)


def test_nan_and_negative_weights_count_as_zero_and_infinity_as_the_largest() -> None:
    valid = torch.ones(1, 4).bool()
    odd = torch.tensor([[math.nan, -5.0, 1.0, 3.0]])
    assert normalize_weights(odd, valid)[0].tolist() == pytest.approx([0.0, 0.0, 1.0, 3.0])
    huge = torch.tensor([[math.inf, 1.0, 1.0, math.inf]])
    assert normalize_weights(huge, valid)[0].tolist() == pytest.approx([2.0, 0.0, 0.0, 2.0])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2)])
def test_all_zero_weights_become_ones_or_stay_zero(scope: str, shape: tuple[int, ...]) -> None:
    zeros, valid = torch.zeros(shape), torch.ones(shape).bool()
    valid[0, 1] = False
    assert torch.equal(normalize_weights(zeros, valid, scope=scope), valid.float())
    assert torch.equal(normalize_weights(zeros, valid, scope=scope, clip=(0.1, 3.0)), valid.float())
    assert all_zero(normalize_weights(zeros, valid, scope=scope, on_zero="zero"))


def test_a_zero_sequence_is_uniform_without_touching_its_neighbour() -> None:
    weights = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    valid = torch.ones(2, 2).bool()
    actual = normalize_weights(weights, valid, scope="sequence")
    assert actual.tolist() == [[1.0, 1.0], [0.5, 1.5]]


def test_the_batch_scope_works_within_each_head() -> None:
    weights = torch.tensor([[[1.0, 100.0], [3.0, 300.0]]])
    valid = torch.ones(1, 2, 2).bool()
    per_head = normalize_weights(weights, valid, scope="batch")
    assert per_head.tolist() == [[[0.5, 0.5], [1.5, 1.5]]]
    together = normalize_weights(weights, valid, scope="all")
    assert together.mean().item() == pytest.approx(1.0)
    assert together[0, 1, 1] > 100 * together[0, 1, 0] * 0.99


@given(scored(), SEEDS)
def test_mask_equals_removal(case: Scored, seed: int) -> None:
    if len(case.shape) == 3 or case.scope == "sequence":
        return
    weights = case.weights()
    kept = weights[case.valid][None]
    alone = normalize_weights(kept, torch.ones(kept.shape).bool(), clip=(0.1, 3.0))
    close(
        normalize_weights(weights, case.valid, clip=(0.1, 3.0))[case.valid][None],
        alone.double(),
        case.dtype,
    )


@given(scored())
def test_normalizing_twice_changes_nothing(case: Scored) -> None:
    for clip in (None, (0.1, 3.0)):
        once = normalize_weights(case.weights(), case.valid, clip=clip, scope=case.scope)
        twice = normalize_weights(once, case.valid, clip=clip, scope=case.scope)
        close(twice, once.double(), case.dtype)


@given(scored(), LAYOUTS)
def test_the_layout_does_not_matter_and_inputs_are_never_written_to(
    case: Scored, layout: str
) -> None:
    weights, valid = relayout(case.weights(), layout), relayout(case.valid, layout)
    for options in ({}, {"clip": (0.1, 3.0), "min_ess": 0.5}, {"mode": "none"}):
        with untouched(weights, valid):
            here = normalize_weights(weights, valid, scope=case.scope, **options)
        there = normalize_weights(weights.clone(), valid.clone(), scope=case.scope, **options)
        assert here.data_ptr() != weights.data_ptr() or here.numel() == 0
        close(here, there.double(), case.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_become_float32(dtype: torch.dtype) -> None:
    weights, valid = torch.tensor([[1.0, 2.0, 4.0]]).to(dtype), torch.ones(1, 3).bool()
    actual = normalize_weights(weights, valid)
    assert actual.dtype == torch.float32
    close(actual, torch.tensor([[3.0, 6.0, 12.0]]).double() / 7, torch.float32)


def test_weights_come_out_detached() -> None:
    weights = torch.ones(1, 3, requires_grad=True)
    assert not normalize_weights(weights * 2, torch.ones(1, 3).bool()).requires_grad


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 3, 2), (2, 0, 2)])
def test_empty_inputs(shape: tuple[int, ...]) -> None:
    for scope in SCOPES:
        actual = normalize_weights(
            torch.zeros(shape), torch.zeros(shape).bool(), clip=(0.1, 3.0), min_ess=0.5, scope=scope
        )
        assert actual.shape == shape


def test_nothing_valid_gives_zeros() -> None:
    weights, valid = torch.full((2, 3), math.nan), torch.zeros(2, 3).bool()
    for options in ({}, {"clip": (0.1, 3.0)}, {"min_ess": 0.5}, {"mode": "none"}):
        assert all_zero(normalize_weights(weights, valid, **options))


@pytest.mark.parametrize("clip", [(1.5, 3.0), (0.1, 0.9), (-0.1, 2.0), (math.nan, 2.0)])
def test_a_clip_that_cannot_have_mean_one_is_refused(clip: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="clip"):
        normalize_weights(torch.ones(1, 3), torch.ones(1, 3).bool(), clip=clip)


@pytest.mark.parametrize("rho", [-0.1, 0.0, 1.1, math.nan])
def test_an_impossible_min_ess_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match="min_ess"):
        normalize_weights(torch.ones(1, 3), torch.ones(1, 3).bool(), min_ess=rho)


def test_min_ess_of_weights_that_are_only_masked_is_refused() -> None:
    with pytest.raises(ValueError, match="min_ess needs mode='mean_one'"):
        normalize_weights(torch.ones(1, 3), torch.ones(1, 3).bool(), mode="none", min_ess=0.5)


@pytest.mark.parametrize("name", ["mode", "scope", "on_zero"])
def test_an_unknown_choice_is_refused(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        normalize_weights(torch.ones(1, 3), torch.ones(1, 3).bool(), **{name: "token"})


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    weights, valid = torch.ones(2, 3), torch.ones(2, 3).bool()
    with pytest.raises((TypeError, ValueError), match="valid"):
        normalize_weights(weights, valid[:, :2])
    with pytest.raises(TypeError, match="valid"):
        normalize_weights(weights, valid.float())
    with pytest.raises(TypeError, match="weights"):
        normalize_weights(weights.long(), valid)
    with pytest.raises((TypeError, ValueError), match="weights"):
        normalize_weights(weights[0], valid[0])
