"""What autograd and the compiler may expect of the operators, beyond the numbers."""

import pytest
import torch
from torch import Tensor

from tests.helpers import leaf
from tests.strategies import integers, normal
from wmtp import group_advantages, linear_weighted_mtp_loss, predictive_entropy, weighted_mtp_loss


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
    inputs = (hidden, unembedding, None, target, 0.1, 0.01, 5.0, slab_bytes)
    every = [True, True, False]
    torch.library.opcheck(torch.ops.wmtp.row_losses.default, (*inputs, True))
    factor = normal(3, 10)
    torch.library.opcheck(
        torch.ops.wmtp.weighted_row_sum.default, (*inputs, factor, kind, 1.0, True, True, every)
    )
    base, log_sum = normal(4, 10), normal(5, 10)
    torch.library.opcheck(
        torch.ops.wmtp.row_losses_backward.default, (factor, base, log_sum, *inputs, every)
    )


def test_a_second_derivative_through_the_weights_is_refused() -> None:
    hidden, unembedding = leaf(normal(0, 1, 5, 2, 4)), leaf(normal(1, 7, 4))
    weights = leaf(normal(2, 1, 5).abs())
    loss = linear_weighted_mtp_loss(hidden, unembedding, integers(3, 7, 1, 5), weights)
    (of_weights,) = torch.autograd.grad(loss, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
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
