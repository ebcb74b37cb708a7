"""Watching the weights."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.helpers import close, untouched
from tests.strategies import JUNK, LAYOUTS, Scored, normal, relayout, scored, spoiled, uniform
from wmtp import WeightStatistics, check_weights, normalize_weights, weight_statistics


NAMES = (
    "weight_mean weight_std weight_min weight_max weight_p25 weight_p50 weight_p75 weight_p95 "
    "weight_entropy effective_sample_ratio zero_fraction nan_weights extreme_weights"
)


def near(actual: WeightStatistics, expected: dict[str, float], dtype: torch.dtype) -> None:
    loose = 1e-9 if dtype == torch.float64 else 2e-5
    found = {name: float(value) for name, value in actual._asdict().items()}
    assert found == pytest.approx(expected, rel=loose, abs=loose)


def test_the_names_are_those_that_dashboards_know() -> None:
    assert set(WeightStatistics._fields) == set(NAMES.split())


@given(scored(), st.sampled_from([1.0, 3.0]), st.sampled_from([0.0, 0.3]))
def test_statistics_follow_the_oracle(case: Scored, scale: float, zeros: float) -> None:
    weights = case.weights(zeros=zeros, scale=scale)
    actual = weight_statistics(weights, case.valid)
    near(actual, oracle.weight_statistics(weights, case.valid), case.dtype)
    assert all(value.shape == () and not value.requires_grad for value in actual)


@given(
    st.lists(st.sampled_from([0.0, 0.5, 2.0, 7.0, math.inf, math.nan]), min_size=1, max_size=7),
    st.sampled_from([0.5, 5.0]),
)
def test_strange_weights_are_counted_and_left_out(row: list[float], extreme: float) -> None:
    weights, valid = torch.tensor([row]), torch.ones(1, len(row)).bool()
    expected = oracle.weight_statistics(weights, valid, extreme=extreme)
    actual = weight_statistics(weights, valid, extreme=extreme)
    counts = {name: expected.pop(name) for name in ("nan_weights", "extreme_weights")}
    assert {name: float(getattr(actual, name)) for name in counts} == counts
    finite = [x for x in row if math.isfinite(x)]
    if sum(finite) == 0:  # the shape of no weight at all has no natural value; it must be finite
        for name in ("weight_entropy", "effective_sample_ratio"):
            expected.pop(name)
            assert math.isfinite(float(getattr(actual, name)))
    found = {name: float(getattr(actual, name)) for name in expected}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(scored(), JUNK)
def test_statistics_never_read_invalid_places(case: Scored, junk: float) -> None:
    dirty = spoiled(case.weights(), ~case.valid, junk)
    here, there = (weight_statistics(w, case.valid) for w in (dirty, case.weights()))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@given(scored(), LAYOUTS)
def test_statistics_are_blind_to_layout_and_never_write(case: Scored, layout: str) -> None:
    weights, valid = relayout(case.weights(), layout), relayout(case.valid, layout)
    with untouched(weights, valid):
        here = weight_statistics(weights, valid)
    for a, b in zip(here, weight_statistics(weights.clone(), valid.clone()), strict=True):
        close(a, b.double(), case.dtype)


def test_uniform_weights_have_entropy_and_sample_ratio_one() -> None:
    statistics = weight_statistics(torch.full((2, 5), 3.0), torch.ones(2, 5).bool())
    assert float(statistics.weight_entropy) == pytest.approx(1.0)
    assert float(statistics.effective_sample_ratio) == pytest.approx(1.0)
    assert float(statistics.weight_std) == 0.0


def test_one_token_that_has_everything() -> None:
    statistics = weight_statistics(torch.tensor([[4.0, 0.0, 0.0, 0.0]]), torch.ones(1, 4).bool())
    assert float(statistics.weight_entropy) == 0.0
    assert float(statistics.effective_sample_ratio) == 0.25
    assert float(statistics.zero_fraction) == 0.75
    assert float(statistics.extreme_weights) == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_the_scale_of_the_weights_changes_neither_entropy_nor_sample_ratio(scale: float) -> None:
    weights, valid = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3).bool()
    here, there = weight_statistics(weights, valid), weight_statistics(scale * weights, valid)
    for name in ("weight_entropy", "effective_sample_ratio"):
        close(getattr(there, name), getattr(here, name).double(), torch.float32)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_weights_that_are_all_zero_have_no_entropy(n: int) -> None:
    statistics = weight_statistics(torch.zeros(1, n), torch.ones(1, n).bool())
    assert float(statistics.weight_entropy) == 0.0
    assert float(statistics.effective_sample_ratio) == 0.0


def test_a_negative_weight_has_no_part_in_the_entropy() -> None:
    statistics = weight_statistics(torch.tensor([[-1.0, 0.5]]), torch.ones(1, 2).bool())
    assert float(statistics.weight_entropy) == 0.0


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 2, 2), (2, 3), (2, 3, 2)])
def test_nothing_valid_gives_zeros(shape: tuple[int, ...]) -> None:
    statistics = weight_statistics(torch.full(shape, math.nan), torch.zeros(shape).bool())
    assert [float(x) for x in statistics] == [0.0] * len(statistics)


def test_low_precision_weights_are_counted_in_float32() -> None:
    weights, valid = (10 * uniform(0, 2, 50)).bfloat16(), torch.ones(2, 50).bool()
    near(
        weight_statistics(weights, valid),
        oracle.weight_statistics(weights, valid),
        torch.float32,
    )


def test_quantiles_are_exact_where_torchs_quantile_gives_up() -> None:
    n = 2**24 + 1024
    weights = (torch.arange(n) % 1024).float()[None]
    statistics = weight_statistics(weights, torch.ones(1, n, dtype=torch.bool))
    # 16385 of each number: the median lies halfway between 511 and 512.
    assert float(statistics.weight_p50) == 511.5
    assert float(statistics.weight_p25) == 255.75
    assert float(statistics.weight_p75) == 767.25


def test_statistics_go_straight_to_a_logger() -> None:
    statistics = weight_statistics(torch.ones(1, 3), torch.ones(1, 3).bool())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logged = {name: float(value) for name, value in statistics._asdict().items()}
    assert set(logged) == set(NAMES.split())


@given(scored())
def test_normalized_weights_pass_the_gate(case: Scored) -> None:
    weights = normalize_weights(case.weights(), case.valid, clip=(0.1, 3.0), scope=case.scope)
    assert check_weights(weights, case.valid) is None


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (math.nan, "must not be NaN"),
        (math.inf, "must not be infinite"),
        (-0.5, "must not be negative"),
        (9.0, "must not be above 5.0"),
    ],
)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2)])
def test_the_gate_names_what_is_wrong_and_where(
    bad: float, named: str, shape: tuple[int, ...]
) -> None:
    weights, valid = torch.ones(shape), torch.ones(shape).bool()
    place = (1, 2, 1)[: len(shape)]
    weights[place] = bad
    with pytest.raises(ValueError, match=named) as caught:
        check_weights(weights, valid)
    digits = [str(i) for i in place]
    assert ", ".join(digits) in str(caught.value)


def test_the_gate_looks_at_valid_places_only() -> None:
    weights = torch.tensor([[math.nan, 1.0, math.inf, -3.0]])
    assert check_weights(weights, torch.tensor([[False, True, False, False]])) is None


def test_the_gate_is_as_wide_as_asked_for() -> None:
    weights, valid = torch.tensor([[9.0, 1.0]]), torch.ones(1, 2).bool()
    assert check_weights(weights, valid, extreme=10.0) is None
    with pytest.raises(ValueError, match="5"):
        check_weights(weights, valid)
    assert check_weights(weights, valid, extreme=9.0) is None
    assert check_weights(weights / 10, valid, extreme=0.9) is None


def test_the_gate_refuses_weights_that_train_nothing() -> None:
    weights, valid = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[True, True, False]])
    with pytest.raises(ValueError, match="must not be all 0, got 0 at each of 2 valid entries"):
        check_weights(weights, valid)
    assert check_weights(weights, torch.zeros(1, 3).bool()) is None
    assert check_weights(weights / 9, torch.ones(1, 3).bool()) is None


@pytest.mark.parametrize("watch", [weight_statistics, check_weights])
def test_watching_refuses_what_does_not_fit(watch: object) -> None:
    assert callable(watch)
    weights, valid = torch.ones(2, 3), torch.ones(2, 3).bool()
    with pytest.raises((TypeError, ValueError), match="valid"):
        watch(weights, valid[:1])
    with pytest.raises(TypeError, match="valid"):
        watch(weights, valid.float())
    with pytest.raises(TypeError, match="weights"):
        watch(weights.long(), valid)
    for extreme in (-1.0, math.nan):
        with pytest.raises(ValueError, match="extreme"):
            watch(weights, valid, extreme=extreme)


def test_statistics_do_not_depend_on_the_order_of_tokens() -> None:
    weights: Tensor = torch.exp(normal(0, 2, 9))
    valid = torch.ones(2, 9).bool()
    for a, b in zip(
        weight_statistics(weights, valid), weight_statistics(weights.flip(1), valid), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1.0])
def test_mean_and_deviation_at_any_scale(scale: float) -> None:
    found = weight_statistics(scale * torch.tensor([[1.0, 3.0]]), torch.ones(1, 2).bool())
    assert found.weight_mean.item() == pytest.approx(2 * scale)
    assert found.weight_std.item() == pytest.approx(scale)


def test_the_mean_of_the_largest_weights_is_finite() -> None:
    largest = torch.full((1, 4), 3e38)
    found = weight_statistics(largest, torch.ones(1, 4).bool())
    assert (found.weight_mean, found.weight_std) == (largest[0, 0], 0)
