"""What autograd and the compiler may expect of the operators, beyond the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import OnGpu, leaf
from tests.strategies import integers, normal
from wmtp import (
    group_advantages,
    linear_weighted_mtp_loss,
    operators,
    predictive_entropy,
    weighted_mtp_loss,
)
from wmtp.problem import Problem


def problem(layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows in several layouts, unembedding, targets of which one is missing."""
    hidden = {
        "contiguous": normal(0, 10, 4),
        "transposed": normal(0, 4, 10).T,
        "strided": normal(0, 20, 8)[::2, ::2],
    }[layout]
    target = integers(2, 7, 10)
    target[3] = -1
    return leaf(hidden) if layout == "contiguous" else hidden, leaf(normal(1, 7, 4)), target


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("slab_bytes", [7 * 8, 10_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "dft"])
def test_fakes_and_schemas_say_the_truth(
    layout: str, slab_bytes: int, dtype: torch.dtype, kind: str
) -> None:
    hidden, unembedding, target = (x.detach() for x in problem(layout))
    hidden, unembedding = hidden.to(dtype), unembedding.to(dtype)
    bias = normal(6, 7).to(dtype) if layout == "strided" else None
    inputs = (hidden, unembedding, bias, target, 0.1, 0.01, 5.0, slab_bytes)
    every = [True, True, bias is not None]
    torch.library.opcheck(torch.ops.wmtp.row_losses.default, (*inputs, True))
    factor = normal(3, 10)
    torch.library.opcheck(
        torch.ops.wmtp.weighted_row_sum.default, (*inputs, factor, kind, 1.0, True, True, every)
    )
    base, log_sum = normal(4, 10), normal(5, 10)
    torch.library.opcheck(
        torch.ops.wmtp.row_losses_backward.default, (factor, base, log_sum, *inputs, every)
    )


@pytest.mark.parametrize("name", ["row_losses", "row_losses_backward", "weighted_row_sum"])
def test_no_cuda_graph_is_made_of_an_operator_that_asks_for_numbers(name: str) -> None:
    """`mode="reduce-overhead"` leaves out what says so."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.wmtp, name).default.tags


class Watched:
    """What the operators ask of the schedules."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, Tensor, tuple[Any, ...]]] = []
        for name in ("forward_columns", "forward_backward_rows", "backward_columns"):
            patch.setattr(operators, name, self._noting(name, getattr(operators, name)))

    def _noting(self, name: str, schedule: Callable[..., Any]) -> Callable[..., Any]:
        def run(problem: Problem, *arguments: Any) -> Any:
            self.asked.append((name, problem.target, arguments))
            return schedule(problem, *arguments)

        return run


@pytest.mark.parametrize("known", [True, False])
def test_without_gradients_nothing_is_made_for_them(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    hidden, unembedding, labels = (
        leaf(normal(0, 1, 5, 2, 4)),
        leaf(normal(1, 7, 4)),
        integers(3, 7, 1, 5),
    )
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0, 1.0]])
    with torch.no_grad():
        linear_weighted_mtp_loss(
            hidden, unembedding, labels, weights if known else lambda ce, valid: valid.double()
        )
    ((name, target, _),) = watched.asked
    assert name == "forward_columns"
    # Of the predicted tokens those of weight zero are left out.
    assert int((target >= 0).sum()) == (5 if known else 7)


@pytest.mark.parametrize("trained", list(itertools.product((True, False), repeat=3)))
def test_only_the_gradients_that_are_wanted_are_asked_for(
    trained: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    made = (normal(0, 1, 5, 2, 4), normal(1, 7, 4), normal(2, 7))
    hidden, unembedding, bias = (x.requires_grad_(t) for x, t in zip(made, trained, strict=True))
    labels, weights = integers(3, 7, 1, 5), torch.ones(1, 5)
    linear_weighted_mtp_loss(hidden, unembedding, labels, weights, bias=bias)
    if not any(trained):
        assert [name for name, *_ in watched.asked] == ["forward_columns"]
        return
    ((name, _, (*_, every_row, needs)),) = watched.asked
    assert (name, every_row, needs) == ("forward_backward_rows", False, list(trained))
    watched.asked.clear()
    linear_weighted_mtp_loss(hidden, unembedding, labels, weights.requires_grad_(), bias=bias)
    ((_, _, (*_, every_row, needs)),) = watched.asked
    assert (every_row, needs) == (True, list(trained))


def test_only_the_losses_are_differentiable() -> None:
    hidden, unembedding, target = problem("contiguous")
    asked = Problem(hidden, unembedding, None, target, 0.0, 0.0, 0.0, 10_000)
    rows = operators.row_losses(asked, True, False)
    assert [x.requires_grad for x in rows] == [True] + 5 * [False]
    total, rows = operators.weighted_row_sum(asked, torch.ones(10).double(), True)
    assert total.requires_grad
    assert not any(x.requires_grad for x in rows)


def test_gradients_that_nobody_asked_for_are_empty() -> None:
    hidden, unembedding, target = (x.detach() for x in problem("contiguous"))
    inputs = (hidden, unembedding, None, target, 0.0, 0.0, 0.0, 10_000)
    total, *rest = torch.ops.wmtp.weighted_row_sum(
        *inputs, torch.ones(10).double(), "none", 1.0, False, False, [False] * 3
    )
    *rows, of_hidden, of_unembedding, of_bias, unit = rest
    torch.testing.assert_close(total, rows[0].sum())
    assert [of_hidden.shape, of_unembedding.shape, of_bias.shape] == [(0,)] * 3
    assert unit == 1


# Dynamo makes an instance of an autograd.Function while it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_weights_alone_get_their_gradient_from_a_compiled_step() -> None:
    hidden, unembedding, labels = normal(0, 1, 5, 2, 4), normal(1, 7, 4), integers(3, 7, 1, 5)
    weights = leaf(normal(2, 1, 5).abs())

    def loss(weights: Tensor) -> Tensor:
        return linear_weighted_mtp_loss(hidden, unembedding, labels, weights)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(weights), weights)
    (expected,) = torch.autograd.grad(loss(weights), weights)
    torch.testing.assert_close(found, expected)


def test_a_second_derivative_through_the_weights_is_refused() -> None:
    hidden, unembedding = leaf(normal(0, 1, 5, 2, 4)), leaf(normal(1, 7, 4))
    weights = leaf(normal(2, 1, 5).abs())
    loss = linear_weighted_mtp_loss(hidden, unembedding, integers(3, 7, 1, 5), weights)
    plain = torch.autograd.grad(loss, weights, retain_graph=True)
    (of_weights,) = torch.autograd.grad(loss, weights, create_graph=True)
    torch.testing.assert_close(of_weights.detach(), *plain)
    text = (
        r"^the linear losses have first-order gradients only; for a second backward compute the "
        r"logits and call the dense form \(mtp_ce_loss, weighted_mtp_loss\)$"
    )
    with pytest.raises(RuntimeError, match=text):
        of_weights.square().sum().backward()


@pytest.mark.parametrize("known", [True, False])
def test_large_float16_hidden_states_do_not_overflow_where_the_gradient_fits(known: bool) -> None:
    hidden = torch.full((1, 3, 2), 400.0).half()
    unembedding = leaf(torch.zeros(4, 2).half())
    labels = torch.ones(1, 3, dtype=torch.long)
    weights = None if known else (lambda _, valid: valid.float())
    linear_weighted_mtp_loss(hidden, unembedding, labels, weights, normalizer=1.01).backward()
    assert unembedding.grad is not None
    # Two predictions of probability 1/4 each: 2 · 400 / 1.01 · (1/4 − [v = 1]).
    expected = 2 * 400 / 1.01 * (0.25 - (torch.arange(4) == 1).double())
    torch.testing.assert_close(unembedding.grad[:, 0].double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e20, 3e38])
def test_the_scale_of_the_weights_is_immaterial_to_the_last_float(scale: float) -> None:
    logits, labels = normal(0, 1, 4, 2, 6).float(), integers(1, 6, 1, 4)
    plain = weighted_mtp_loss(logits, labels)
    torch.testing.assert_close(weighted_mtp_loss(logits, labels, torch.full((1, 4), scale)), plain)


def test_an_infinite_loss_of_weight_zero_counts_nothing() -> None:
    logits = torch.zeros(1, 3, 1, 4)
    logits[0, 0, 0, 2] = -torch.inf
    labels = torch.tensor([[0, 2, 1]])
    weights = torch.tensor([[1.0, 0.0, 1.0]])
    expected = torch.tensor(4.0).log()
    torch.testing.assert_close(weighted_mtp_loss(logits, labels, weights), expected)
    linear = linear_weighted_mtp_loss(torch.eye(4)[None, :3], torch.zeros(4, 4), labels, weights)
    torch.testing.assert_close(linear, expected)


def test_scores_have_finite_gradients_at_the_edges() -> None:
    logits = leaf(torch.tensor([[[0.0, -200.0, 1.0], [0.0, -torch.inf, 1.0]]]))
    predictive_entropy(logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    rewards = leaf(torch.tensor([1.0, 0.0, 5.0]))
    group_advantages(rewards, torch.tensor([7, 7, 8])).square().sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.isfinite().all()


class Unlooked(OnGpu):
    """One that nobody waits for."""

    def __bool__(self) -> bool:
        raise AssertionError


@pytest.mark.parametrize("number", [1.0, 0.3])
def test_what_a_gpu_must_round_is_scaled_without_a_look_at_the_scale(number: float) -> None:
    wide = [normal(0, 7, 3).float(), normal(1, 5, 3).float(), normal(2, 0).float()]
    scale = torch.tensor(number)
    wanted = [(part * number).bfloat16() for part in wide]
    for there in (scale, scale.as_subclass(Unlooked)):
        found = operators._scale_(there, torch.bfloat16, wide)
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == torch.bfloat16
            assert torch.equal(one, other)
    # What need not be rounded is left alone where the scale is 1, and that must be known.
    with pytest.raises(AssertionError):
        operators._scale_(scale.as_subclass(Unlooked), torch.float32, wide)
    made = [part.clone() for part in wide]
    for one, other in zip(operators._scale_(scale, torch.float32, made), made, strict=True):
        assert one is other
    for one, other in zip(made, wide, strict=True):
        assert torch.equal(one, other * number)
