"""The controls: the same weights, their meaning taken away."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests import oracle
from tests.helpers import all_zero, close, untouched
from tests.strategies import JUNK, LAYOUTS, Scored, generator, relayout, scored, spoiled, uniform
from wmtp import controls, random_matched_weights, shuffled_weights


CONTROLS = pytest.mark.parametrize("control", [shuffled_weights, random_matched_weights])
Control = Callable[..., Tensor]


def multisets(weights: Tensor, valid: Tensor) -> list[list[float]]:
    return [sorted(float(weights[i]) for i in group) for group in oracle.groups(valid, "sequence")]


@given(scored())
def test_shuffled_weights_keep_the_multiset_of_every_sequence_and_head(case: Scored) -> None:
    weights = case.weights()
    shuffled = shuffled_weights(weights, case.valid, generator=generator(case.seed))
    assert shuffled.dtype == case.dtype
    assert multisets(shuffled, case.valid) == multisets(weights, case.valid)


@given(scored())
def test_random_matched_weights_come_from_their_own_sequence_and_head(case: Scored) -> None:
    weights = case.weights()
    drawn = random_matched_weights(weights, case.valid, generator=generator(case.seed))
    assert drawn.dtype == case.dtype
    pairs = zip(multisets(drawn, case.valid), multisets(weights, case.valid), strict=True)
    assert all(set(here) <= set(there) for here, there in pairs)


@CONTROLS
@given(case=scored(), junk=JUNK)
def test_invalid_places_take_no_part(control: Control, case: Scored, junk: float) -> None:
    clean, dirty = case.weights(), spoiled(case.weights(), ~case.valid, junk)
    here = control(dirty, case.valid, generator=generator(1))
    assert torch.equal(here, control(clean, case.valid, generator=generator(1)))
    assert all_zero(here[~case.valid])


@CONTROLS
def test_a_prompts_zeros_do_not_wander_into_the_answer(control: Control) -> None:
    weights = torch.tensor([[0.0, 0.0, 0.0, 1.0, 2.0, 3.0]]).expand(50, 6)
    out = control(weights, weights > 0, generator=generator(0))
    assert (out[:, 3:] > 0).all()
    assert all_zero(out[:, :3])


@CONTROLS
def test_a_seed_decides_and_a_generator_moves_on(control: Control) -> None:
    weights, valid = uniform(0, 3, 8), torch.ones(3, 8).bool()
    source = generator(5)
    first, second = (control(weights, valid, generator=source) for _ in range(2))
    assert torch.equal(first, control(weights, valid, generator=generator(5)))
    assert not torch.equal(first, second)


@CONTROLS
def test_the_global_random_state_is_left_alone(control: Control) -> None:
    before = torch.get_rng_state()
    control(uniform(0, 3, 8), torch.ones(3, 8).bool(), generator=generator(5))
    assert torch.equal(torch.get_rng_state(), before)


@CONTROLS
def test_rows_and_heads_are_mixed_independently(control: Control) -> None:
    weights = torch.arange(8.0)[None, :, None].expand(4, 8, 3)
    out = control(weights, torch.ones(4, 8, 3).bool(), generator=generator(0))
    orders = {tuple(out[b, :, h].tolist()) for b in range(4) for h in range(3)}
    assert len(orders) == 12


def frequencies(control: Control, rows: int) -> Tensor:
    """How often the weight of place `i` ends at place `j`, over many rows of four places."""
    weights = torch.arange(4.0).expand(rows, 4)
    out = control(weights, torch.ones(rows, 4).bool(), generator=generator(0))
    return torch.stack([(out == i).double().mean(0) for i in range(4)])


@CONTROLS
def test_every_weight_is_equally_likely_at_every_place(control: Control) -> None:
    rows = 20_000
    spread = math.sqrt(0.25 * 0.75 / rows)
    assert float((frequencies(control, rows) - 0.25).abs().max()) < 5 * spread


def test_random_matched_weights_are_drawn_with_replacement() -> None:
    weights = torch.arange(4.0).expand(5000, 4)
    out = random_matched_weights(weights, torch.ones(5000, 4).bool(), generator=generator(0))
    different = (out.sort(1).values == weights).all(1).double().mean()
    # A draw of four with replacement is a permutation in 4! / 4^4 of the cases.
    assert float(different) == pytest.approx(24 / 256, abs=0.02)
    assert float(out.mean()) == pytest.approx(1.5, abs=0.05)


def test_the_numbers_behind_a_control_are_finer_than_those_of_float32() -> None:
    drawn = controls._uniform(torch.ones(1, 8), generator(0)) * 2**24  # pyright: ignore
    assert (drawn != drawn.floor()).any()


@CONTROLS
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 3, 2), (2, 0, 2)])
def test_empty_inputs(control: Control, shape: tuple[int, ...]) -> None:
    out = control(torch.zeros(shape), torch.zeros(shape).bool(), generator=generator(0))
    assert out.shape == shape


@CONTROLS
def test_one_valid_place_keeps_its_weight(control: Control) -> None:
    weights, valid = torch.tensor([[3.0, 5.0, 7.0]]), torch.tensor([[False, True, False]])
    assert control(weights, valid, generator=generator(0)).tolist() == [[0.0, 5.0, 0.0]]


@CONTROLS
@given(case=scored(), layout=LAYOUTS)
def test_controls_are_detached_new_and_blind_to_layout(
    control: Control, case: Scored, layout: str
) -> None:
    weights = relayout(case.weights(), layout).requires_grad_()
    valid = relayout(case.valid, layout)
    with untouched(weights, valid):
        out = control(weights, valid, generator=generator(3))
        assert not out.requires_grad
        copy = control(weights.clone(), valid.clone(), generator=generator(3))
        close(out, copy.double(), case.dtype)
        out.fill_(7.0)


@CONTROLS
def test_controls_refuse_what_does_not_fit(control: Control) -> None:
    weights, valid = torch.ones(2, 3), torch.ones(2, 3).bool()
    with pytest.raises((TypeError, ValueError), match="valid"):
        control(weights, valid[:1], generator=generator(0))
    with pytest.raises(TypeError, match="valid"):
        control(weights, valid.float(), generator=generator(0))
    with pytest.raises(TypeError, match="generator"):
        control(weights, valid)
    with pytest.raises(TypeError, match="generator"):
        control(weights, valid, generator=0)
