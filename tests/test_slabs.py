"""The schedules over slabs: what they cost, and what they find where one slab is not all."""

from __future__ import annotations

import functools
import math
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from tests.helpers import OnGpu, grads, leaf, operations, peak_bytes
from tests.loss_forms import held_logits, layout_of_all
from tests.strategies import integers, mask, normal, uniform
from wmtp import (
    linear_mtp_ce_loss,
    linear_token_nll,
    linear_weighted_mtp_loss,
    operators,
    rho1_weights,
    schedule,
    slab_columns,
    slab_layout,
    slab_rows,
    slab_softmax,
)
from wmtp.problem import NOT_LOCAL, Problem, RowLocal, Rows, slab_budget
from wmtp.schedule import gradient_dtype
from wmtp.slab_columns import backward_columns, backward_held, forward_columns, forward_held
from wmtp.slab_rows import corrected_rows, forward_backward_rows, forward_guessing_rows


ROWS, DIM = 64, 8
NEEDS = [list(needs) for needs in product((False, True), repeat=2) if any(needs)]


def problem(
    x: Tensor, unembedding: Tensor, target: Tensor, *, slab_bytes: int = 2**20, softcap: float = 0.0
) -> Problem:
    return Problem(x, unembedding, None, target, 0.0, 0.0, softcap, slab_bytes)


def both_ways(asked: Problem, factor: Tensor) -> tuple[tuple[Rows, Rows], tuple[Tensor, Tensor]]:
    """What slabs of vocabulary and slabs of rows find, and their gradients for the unembedding."""
    needs = [False, True, False]
    found = forward_columns(asked, False)
    rows, known = forward_backward_rows(asked, factor, NOT_LOCAL, False, False, needs)
    later = backward_columns(asked, factor, found.base, found.log_sum, needs)
    return (found, rows), (later.unembedding, known.unembedding)


# ------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("active", [0, 16, 48, 64])
@pytest.mark.parametrize("needs", NEEDS)
def test_rows_that_do_not_count_enter_no_product(
    dtype: torch.dtype, active: int, needs: list[bool]
) -> None:
    vocab = 600
    x, unembedding = normal(0, ROWS, DIM).to(dtype), normal(1, vocab, DIM).to(dtype)
    target, counts = integers(2, vocab, ROWS), torch.arange(ROWS) % ROWS < active
    unit = 2 * active * vocab * DIM
    masked = problem(x, unembedding, torch.where(counts, target, -1))
    weighted, factor = problem(x, unembedding, target), uniform(3, ROWS).float() * counts
    wanted, dft = [*needs, False], RowLocal("dft", 1.0)

    def forward_backward(asked: Problem, weighting: RowLocal) -> int:
        return operations(
            lambda: forward_backward_rows(asked, factor, weighting, False, False, wanted)
        )

    assert operations(lambda: forward_columns(masked, True)) == unit
    assert forward_backward(weighted, NOT_LOCAL) == unit * (1 + sum(needs))
    assert forward_backward(masked, dft) == unit * (1 + sum(needs))
    sums = torch.zeros(ROWS), torch.zeros(ROWS)
    backward = operations(lambda: backward_columns(weighted, factor, *sums, wanted))
    assert backward == unit * (1 + sum(needs))


def test_rows_of_factor_zero_cost_one_product_where_statistics_want_them() -> None:
    vocab = 600
    asked = problem(normal(0, ROWS, DIM), normal(1, vocab, DIM), integers(2, vocab, ROWS))
    factor = (torch.arange(ROWS) < 16).double()
    needs = [True, True, False]
    cost = operations(lambda: forward_backward_rows(asked, factor, NOT_LOCAL, True, True, needs))
    assert cost == 2 * vocab * DIM * (3 * 16 + 48)


@pytest.mark.parametrize("needs", NEEDS)
def test_only_the_gradients_that_are_asked_for_take_memory(needs: list[bool]) -> None:
    vocab = 600
    x, unembedding = normal(0, ROWS, DIM), normal(1, vocab, DIM)
    asked = problem(x, unembedding, integers(2, vocab, ROWS))
    factor, sums = torch.ones(ROWS).double(), [torch.zeros(ROWS).double()] * 2
    for made in (
        forward_backward_rows(asked, factor, NOT_LOCAL, False, False, [*needs, False])[1],
        backward_columns(asked, factor, *sums, [*needs, False]),
        forward_guessing_rows(asked, lambda ce, _: ce, False, [*needs, False])[1],
    ):
        for gradient, like, needed in zip(made[:2], (x, unembedding), needs, strict=True):
            assert gradient.shape == (like.shape if needed else (0,))
        assert made.bias.shape == (0,)


# --------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_smoothed_loss_is_summed_in_float32(dtype: torch.dtype) -> None:
    # With a single dimension logits are the unembedding: nothing is rounded before the loss.
    unembedding, target, share = 3 * normal(1, 600, 1).to(dtype) + 5, integers(2, 600, 20), 0.3
    asked = problem(torch.ones(20, 1, dtype=dtype), unembedding, target, slab_bytes=1200)
    found = forward_columns(asked._replace(label_smoothing=share), False)
    expected = F.cross_entropy(
        unembedding.double().T.expand(20, -1), target, reduction="none", label_smoothing=share
    )
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("trained", "normalizer", "large"),
    [
        *((t, n, 1.0) for t in ((True, False), (False, True), (True, True)) for n in (1e7, 1e-3)),
        # The unembedding's gradient would be as small as the hidden states.
        ((True, False), 1.0, 3e4),
    ],
)
def test_narrow_float16_gradients_keep_their_range(
    trained: tuple[bool, bool], normalizer: float, large: float
) -> None:
    shapes = (2, 9, 2, 16), (40, 16)
    # One operand is large and the other small: their logits are ordinary.
    scales = 0.3 / large, large / 4
    held = [
        (s * normal(n, *shape)).half()
        for n, (s, shape) in enumerate(zip(scales, shapes, strict=True))
    ]
    labels = integers(2, 40, 2, 9)
    scale = 2.0 ** round(math.log2(normalizer / large))

    def gradients(tensors: list[Tensor]) -> list[Tensor]:
        loss = linear_weighted_mtp_loss(*tensors, labels, normalizer=normalizer, slab_bytes=16 * 80)
        wanted = [x for x in tensors if x.requires_grad]
        return list(torch.autograd.grad(loss, wanted, torch.tensor(scale, dtype=loss.dtype)))

    got = gradients(
        [x.clone().requires_grad_(needed) for x, needed in zip(held, trained, strict=True)]
    )
    true = gradients(
        [x.double().requires_grad_(needed) for x, needed in zip(held, trained, strict=True)]
    )
    for x, y in zip(got, true, strict=True):
        assert x.isfinite().all()
        assert float((x.double() - y).norm() / y.norm()) < 2e-3


def test_guessed_gradients_wait_in_float32() -> None:
    x, unembedding = normal(0, ROWS, DIM).bfloat16(), normal(1, 50, DIM).bfloat16()
    asked = problem(x, unembedding, integers(2, 50, ROWS))._replace(bias=unembedding[:, 0])
    _, made, guessed = forward_guessing_rows(asked, lambda ce, _: ce, False, [True] * 3)
    assert {part.dtype for part in (*made[:3], guessed)} == {torch.float32}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_large_hidden_states_are_those_that_are_larger_than_others(scale: float) -> None:
    x, unembedding = scale * normal(0, ROWS, DIM), normal(1, 50, DIM) / scale
    x[3] *= 100
    asked = problem(x, unembedding, integers(2, 50, ROWS))
    guessed = forward_guessing_rows(asked, lambda ce, _: torch.ones_like(ce), False, [True] * 3)[2]
    assert (guessed == 0).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("columns", [False, True])
def test_a_target_that_is_barred_costs_infinitely_much(columns: bool) -> None:
    """Also where everything that is known of its slab of vocabulary is barred."""
    vocab, rows = 600, 100
    bias = normal(0, vocab).float()
    bias[-270:] = -math.inf
    asked = problem(torch.zeros(rows, 1), torch.zeros(vocab, 1), torch.full((rows,), vocab - 1))
    asked = asked._replace(bias=bias, slab_bytes=rows * vocab)
    if columns:
        found = forward_columns(asked, True)
    else:
        factor, needs = torch.ones(rows), [True, False, False]
        found = forward_backward_rows(asked, factor, NOT_LOCAL, True, False, needs)[0]
    assert found.loss.isposinf().all()
    torch.testing.assert_close(found.base + found.log_sum, bias.logsumexp(0).expand(rows))


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("large", [1.0, 2e3, 2e4])
def test_float16_products_neither_overflow_nor_underflow(rows: int, large: float) -> None:
    vocab, dim = 600, 128
    x, unembedding = normal(0, rows, dim).half() / 16, normal(1, vocab, dim).half()
    # Multiplied with nothing but 0: it bounds the hidden states' gradient, and changes no logit.
    x[:, 0], unembedding[:, 0] = 0, large
    asked = problem(x, unembedding, integers(2, vocab, rows), slab_bytes=3 * rows * vocab)
    wide = asked._replace(slab_bytes=2**20)
    needs, factor = [True, True, False], torch.full((rows,), 1.0 / rows)
    p = (x.double() @ unembedding.double().T).softmax(1) - F.one_hot(asked.target, vocab)
    expected = (p @ unembedding.double(), p.T @ x.double())
    found, held = forward_backward_rows(wide, factor, NOT_LOCAL, False, False, needs)
    narrow = forward_backward_rows(asked, factor, NOT_LOCAL, False, False, needs)[1]
    later = backward_columns(asked, factor, found.base, found.log_sum, needs)
    assert (held.hidden.dtype, narrow.hidden.dtype) == (torch.float32, torch.float16)
    for gradients in (held, narrow, later):
        for made, true in zip(gradients, expected, strict=False):
            error = made.double() * gradients.unit.double() * rows - true
            assert error.isfinite().all()
            assert float(error[:, 1:].norm() / true[:, 1:].norm()) < 5e-3


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
# Gradients of an ordinary size; rows that z-loss makes large; with an unembedding that is large too.
@pytest.mark.parametrize(("z_loss", "large"), [(1e-4, 1.0), (0.5, 1.0), (0.5, 2e3)])
def test_z_loss_does_not_make_float16_products_overflow(
    z_loss: float, large: float, label_smoothing: float
) -> None:
    vocab, dim, rows = 300, 128, 24
    x, unembedding = normal(0, rows, dim).half() / 8, normal(1, vocab, dim).half()
    x[: rows // 2] *= 50
    # Multiplied with nothing but 0: it bounds the hidden states' gradient, and changes no logit.
    x[:, 0], unembedding[:, 0] = 0, large
    leaves = [t.double().requires_grad_() for t in (x, unembedding)]
    logits, target = leaves[0] @ leaves[1].T, integers(2, vocab, rows)
    lse = logits.logsumexp(1)
    true = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    expected = torch.autograd.grad(true + z_loss * lse.square().mean(), leaves)
    wide = problem(x, unembedding, target)._replace(label_smoothing=label_smoothing, z_loss=z_loss)
    needs, factor = [True, True, False], torch.full((rows,), 1.0 / rows)
    found, held = forward_backward_rows(wide, factor, NOT_LOCAL, False, False, needs)
    narrow = wide._replace(slab_bytes=3 * 2 * vocab)
    assert gradient_dtype(narrow, needs, NOT_LOCAL) == torch.float16
    _, guessed, some = forward_guessing_rows(wide, lambda ce, _: ce / ce, False, needs)
    for gradients in (
        held,
        forward_backward_rows(narrow, factor, NOT_LOCAL, False, False, needs)[1],
        forward_backward_rows(narrow, factor, NOT_LOCAL, False, False, [True, False, False])[1],
        backward_columns(wide, factor, found.base, found.log_sum, needs),
        corrected_rows(wide, some, torch.ones(rows), guessed, needs)._replace(
            unit=torch.tensor(1 / rows)
        ),
    ):
        for made, right in zip(gradients, expected, strict=False):
            if made.numel():
                error = made.double() * gradients.unit.double() - right
                assert error.isfinite().all()
                # The first column is the sum of all probabilities, what is left of which is rounding.
                assert float(error[:, 1:].norm() / right[:, 1:].norm()) < 5e-3


def test_float16_rows_of_no_weight_have_no_gradient() -> None:
    unembedding = torch.tensor([[0.0], [-200.0]]).half()
    asked = problem(torch.ones(3, 1).half(), unembedding, torch.ones(3, dtype=torch.long))
    needs, dft = [True, True, False], RowLocal("dft", 1.0)
    found, made = forward_backward_rows(asked, torch.ones(3), dft, False, False, needs)
    assert torch.equal(found.ce, torch.full((3,), 200.0))
    for gradient in (found.weight, made.hidden, made.unembedding):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def far_apart(vocab: int) -> dict[str, Tensor]:
    """Rows of logits that a sum of exponentials must be told of by the right column."""
    start, middle, end = (torch.zeros(vocab) for _ in range(3))
    start[0], middle[vocab // 2], end[-1] = 60.0, 60.0, 60.0
    barred, none_early = 3 * normal(0, vocab).float(), 3 * normal(1, vocab).float()
    barred[::2], none_early[: vocab // 2] = -math.inf, -math.inf
    large_late = none_early + 1e4
    return {
        "peak in the first slab": start,
        "peak in the middle": middle,
        "peak at the end": end,
        "a gap of 1e4": 1e4 * (torch.arange(vocab) % 7 == 5).float(),
        "near the limit": torch.linspace(-25.0, 0.0, vocab),
        "all equal": torch.full((vocab,), -7.0),
        "every other one barred": barred,
        "a slab of barred ones": none_early,
        "large ones after a slab of barred ones": large_late,
    }


@pytest.mark.parametrize("softcap", [0.0, 40.0])
@pytest.mark.parametrize("kind", far_apart(8))
@pytest.mark.parametrize("slab_rows", [1, 1000])
def test_logits_far_apart_give_exact_losses_and_gradients(
    kind: str, softcap: float, slab_rows: int
) -> None:
    vocab = 600
    logits = far_apart(vocab)[kind]
    # The likely, the unlikely and whatever is between them.
    target = torch.tensor([vocab - 1, vocab - 2, vocab // 2 + 1, 1, 7])
    target = torch.where(logits[target].isfinite(), target, vocab - 1)
    factor = torch.tensor([0.3, 1.0, 0.7, 0.2, 0.5])
    ones = torch.ones(len(target), 1)
    asked = problem(
        ones, logits[:, None], target, softcap=softcap, slab_bytes=slab_rows * vocab * 4
    )  # fmt: skip
    exact = logits.double().requires_grad_()
    z = softcap * (exact / softcap).tanh() if softcap else exact
    expected = F.cross_entropy(z.expand(len(target), -1), target, reduction="none")
    lse = z.logsumexp(0).expand(len(target))
    (gradient,) = torch.autograd.grad((expected * factor.double()).sum(), exact)

    found, gradients = both_ways(asked, factor)
    for these in found:
        torch.testing.assert_close(these.loss.double(), expected.detach(), rtol=1e-6, atol=2e-6)
        told = (these.base.double() + these.log_sum.double()).detach()
        torch.testing.assert_close(told, lse.detach(), rtol=1e-6, atol=2e-6)
    for made in gradients:
        torch.testing.assert_close(made[:, 0].double(), gradient, rtol=3e-6, atol=3e-7)


def test_a_scaled_sum_rounds_once_where_that_is_relied_on() -> None:
    bits, z = 30 * normal(0, 40, 1).float(), 20 * normal(1, 40, 45).float()
    found = torch.add(-bits, z, alpha=1.4426950408889634)
    scale = torch.tensor(1.4426950408889634).double()
    exact = (scale * z.double() - bits.double()).float()
    assert slab_softmax._rounds_once(z.device) == torch.equal(found, exact)


@pytest.mark.parametrize("shift", [0, 100, -100, 3000, -3000, 4095, 5000, -(2**17)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("slab_rows", [3, 100])
@pytest.mark.parametrize("fused", [True, False])
def test_a_shift_of_all_logits_shifts_their_log_sum_exp_alone(
    shift: int, z_loss: float, slab_rows: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(slab_softmax, "_rounds_once", lambda _: False)
    rows, vocab = 40, 300
    # Multiples of 1/64: every logit is exact, and so is what the shift leaves of it.
    x, unembedding = torch.eye(rows), integers(0, 640, vocab, rows).float() / 64 - 5
    target, factor = integers(1, vocab, rows), uniform(2, rows).float()
    # A target so improbable that it cannot tell the log-sum-exp of its row; in every tile.
    unembedding[target[::3], torch.arange(rows)[::3]] = -100
    asked = problem(x, unembedding, target, slab_bytes=slab_rows * vocab * 4)
    asked = asked._replace(bias=torch.full((vocab,), float(shift)), z_loss=z_loss)
    exact = unembedding.double().requires_grad_()
    logits = exact.T + shift
    ce, lse = F.cross_entropy(logits, target, reduction="none"), logits.logsumexp(1)
    loss = ce + z_loss * lse.square()
    (gradient,) = torch.autograd.grad((factor.double() * loss).sum(), exact)
    found, gradients = both_ways(asked, factor)
    for these in found:
        torch.testing.assert_close(these.ce.double(), ce.detach(), rtol=3e-7, atol=6e-7)
        told = these.base.double() + these.log_sum.double()
        torch.testing.assert_close(told, lse.detach(), rtol=1e-7, atol=6e-7)
    largest = 3e-7 * float(gradient.abs().max())
    for made in gradients:
        torch.testing.assert_close(made.double(), gradient, rtol=2e-6, atol=largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_hidden_states_of_rows_that_count_much_do_not_overflow(
    dtype: torch.dtype, softcap: float, sign: int
) -> None:
    # The others have e^-60 of the probability, or a saturated softcap no slope.
    x = torch.full((2, 1), sign * 1e20).to(dtype)
    unembedding = torch.tensor([[1.0], [-1.0], [1.0]] if softcap else [[0.0]] * 3).to(dtype)
    asked = problem(x, unembedding, torch.zeros(2).long(), softcap=softcap)
    if not softcap:
        asked = asked._replace(bias=torch.tensor([60.0, 0.0, 0.0]).to(dtype))
    factor, needs = torch.full((2,), 1e20), [False, True, False]
    found = forward_columns(asked, False)
    made = backward_columns(asked, factor, found.base, found.log_sum, needs).unembedding
    other = 0.0 if softcap else sign * 2 * math.exp(-60) * 1e40
    assert bool(made.isfinite().all())
    torch.testing.assert_close(
        made[1:, 0].double(), torch.tensor([other] * 2).double(), rtol=0.02, atol=0
    )


def test_large_factors_of_rows_that_z_loss_multiplies_do_not_overflow() -> None:
    # The others have e^-60 of the probability, and z-loss a slope of some 400,000.
    asked = problem(torch.ones(2, 1), torch.zeros(3, 1), torch.zeros(2).long())
    asked = asked._replace(bias=torch.tensor([4000.0, 3940.0, 3940.0]), z_loss=50.0)
    other = 2 * 1e34 * 400_001 * math.exp(-60)
    for made in both_ways(asked, torch.full((2,), 1e34))[1]:
        torch.testing.assert_close(
            made[1:, 0].double(), torch.full((2,), other).double(), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("vocab", [16, 100, 300, 1000, 4096, 32768])
@pytest.mark.parametrize("rows", [1, 100, 4096])
@pytest.mark.parametrize("slab_bytes", [2**17, 2**20, 2**26])
def test_rows_of_a_slab_of_vocabulary_lie_no_power_of_two_apart(
    vocab: int, rows: int, slab_bytes: int
) -> None:
    asked = problem(torch.empty(rows, 1), torch.empty(vocab, 1), torch.ones(rows).long())
    asked = asked._replace(slab_bytes=slab_bytes)
    height, width = slab_layout.column_slab(asked, rows, 0)
    assert width == vocab or (width % 16 == 0 and width // 16 % 2)
    assert height * width * 4 <= slab_bytes or width <= 256
    assert 1 <= width <= vocab


@pytest.mark.parametrize("rows", [1, 1000, 5000])
@pytest.mark.parametrize("slab_bytes", [2**20, 2**24, 2**28, 2**32])
@pytest.mark.parametrize("beside", [0, 2**19, 2**23, 2**27, 2**32])
def test_a_slab_of_vocabulary_on_a_gpu_leaves_room_for_what_is_beside_it(
    rows: int, slab_bytes: int, beside: int
) -> None:
    vocab = 50257
    x = torch.empty(rows, 1, dtype=torch.bfloat16)
    asked = problem(x.as_subclass(OnGpu), torch.empty(vocab, 1), torch.ones(rows).long())
    height, width = slab_layout.column_slab(asked._replace(slab_bytes=slab_bytes), rows, beside)
    room = max(slab_bytes - beside, slab_bytes // 4)
    taken = height * slab_layout.row_stride(asked, width) * 2
    assert isinstance(height, int)
    assert isinstance(width, int)
    assert width % 64 == 0 or width == vocab
    # But for the narrowest slab of all, and what aligns the rows.
    assert taken <= max(room, 256 * 2)
    assert taken <= 2**29
    # Little is left unused unless rows or vocabulary are at their end.
    assert taken >= 0.5 * min(room, 2**29) or height >= rows


@pytest.mark.parametrize("missing", [0, 3])
def test_copied_hidden_states_are_told_from_the_slab(
    missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def noted(*arguments: Any) -> Any:
        told.append(arguments[2])
        return slab_layout.column_slab(*arguments)

    monkeypatch.setattr(slab_columns, "column_slab", noted)
    target = integers(2, 10, 20).index_fill(0, torch.arange(missing), -1)
    asked = problem(normal(0, 20, DIM), normal(1, 10, DIM), target)
    found = forward_columns(asked, False)
    upstream = torch.ones(20).double()
    backward_columns(asked, upstream, found.base, found.log_sum, [True, True, False])
    copied, summed = (20 - missing) * DIM * 8 if missing else 0, (20 - missing) * DIM * 8
    assert told == [copied, copied + summed]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("slab_bytes", [2**13, 2**20])
def test_rows_of_a_slab_may_lie_further_apart(
    dtype: torch.dtype, slab_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = 333
    x, unembedding = normal(0, ROWS, DIM).to(dtype), normal(1, vocab, DIM).to(dtype)
    asked = problem(x, unembedding, integers(2, vocab, ROWS), slab_bytes=slab_bytes)
    factor = uniform(3, ROWS).to(asked.wide)
    needs = [True, True, False]

    def guess(ce: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen & (torch.arange(ROWS) % 2 == 0), factor, 0)

    def found() -> list[Tensor]:
        rows, gradients = both_ways(asked, factor)
        guessed = forward_guessing_rows(asked, guess, True, needs)
        made = corrected_rows(asked, guessed[2], factor, guessed[1], needs)
        return [*rows[0], *rows[1], *gradients, *guessed[0], *made[:2]]

    alone = found()
    monkeypatch.setattr(slab_layout, "_ALIGNED_COLUMNS_GPU", 40)
    for module in (slab_columns, slab_layout):
        monkeypatch.setattr(module, "row_stride", lambda _, columns: columns + -columns % 40)
    rounding = 1e-12 if dtype == torch.float64 else 2**-7
    for one, other in zip(found(), alone, strict=True):
        size = float(other.double().abs().max())
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding * 0.2 * size)


@pytest.mark.parametrize(("columns", "apart"), [(1, 64), (64, 64), (50257, 50304)])
def test_rows_are_aligned_on_a_gpu(columns: int, apart: int) -> None:
    x, target = torch.zeros(1, DIM), torch.zeros(1, dtype=torch.int64)
    asked = problem(x, x, target)
    assert slab_layout.row_stride(asked, columns) == columns
    there = asked._replace(hidden=x.as_subclass(OnGpu))
    assert slab_layout.row_stride(there, columns) == apart
    slab = slab_layout.laid_out(there, torch.empty(2 * apart), 2, columns)
    assert slab.shape == (2, columns)
    assert slab.stride() == (apart, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [-0.97, 0.3, 17.0, -40.0])
@pytest.mark.parametrize("slab_rows", [1, 1000])
def test_the_only_token_there_is_costs_exactly_nothing(
    dtype: torch.dtype, bias: float, slab_rows: int
) -> None:
    rows = 500
    x, unembedding = 3 * normal(0, rows, 3).to(dtype), normal(1, 2, 3).to(dtype)
    asked = problem(x, unembedding, torch.zeros(rows).long(), slab_bytes=slab_rows * 16)
    asked = asked._replace(bias=torch.tensor([bias, -math.inf], dtype=dtype))
    factor, needs = torch.ones(rows).double(), [True, True, True]
    found = forward_columns(asked, False)
    assert bool((found.ce == 0).all())
    other, made = forward_backward_rows(asked, factor, NOT_LOCAL, False, False, needs)
    assert bool((other.ce == 0).all())
    late = backward_columns(asked, factor, found.base, found.log_sum, needs)
    for gradient in (*made[:3], *late[:3]):
        assert bool((gradient == 0).all())


def test_no_loss_is_below_zero() -> None:
    x, unembedding = 15 * uniform(0, 2000, 2).float(), torch.zeros(50, 2)
    unembedding[0] = 1
    bias = torch.full((50,), -60.0)
    bias[0] = 0
    asked = problem(x, unembedding, torch.zeros(2000).long())._replace(bias=bias)
    assert float(forward_columns(asked, False).ce.min()) >= 0


@pytest.mark.parametrize(
    ("factor", "of_x", "shift"),
    [
        *((factor, 1.0, shift) for factor in (1e-30, 1.0, 1e30) for shift in (-31.0, 0.0, 31.0)),
        (1.0, 1e30, -31.0),
        (1.0, 1e30, 31.0),
        (1.0, 1e-30, -31.0),
    ],
)
def test_factors_and_hidden_states_of_any_size(factor: float, of_x: float, shift: float) -> None:
    x, unembedding = normal(0, 9, 4), normal(1, 11, 4)
    target, needs = integers(2, 11, 9), [True, True, True]
    exact = problem(of_x * x, unembedding / of_x, target)._replace(bias=torch.full((11,), shift))
    exact = exact._replace(bias=exact.bias.double())  # pyright: ignore[reportOptionalMemberAccess]
    short = exact._replace(**{
        name: getattr(exact, name).float() for name in ("hidden", "unembedding", "bias")
    })  # fmt: skip
    factors = factor * uniform(3, 9)
    right = forward_backward_rows(exact, factors, NOT_LOCAL, False, False, needs)[1]
    seen = forward_columns(short, False)
    for made in (
        forward_backward_rows(short, factors.float(), NOT_LOCAL, False, False, needs)[1],
        backward_columns(short, factors.float(), seen.base, seen.log_sum, needs),
    ):
        for found, expected in zip(made[:3], right[:3], strict=True):
            assert float((found.double() - expected).norm() / expected.norm()) < 2e-5


def test_sums_over_blocks_of_rows_are_not_rounded_between() -> None:
    # Equal rows have equal gradients: only the sum over them can differ with the size of the blocks.
    rows, vocab, factor = 1000, 300, 0.3
    asked = Problem(
        torch.full((rows, 1), 0.5).bfloat16(), normal(0, vocab, 1).bfloat16(), normal(1, vocab).bfloat16(),
        torch.zeros(rows, dtype=torch.long), 0.0, 0.0, 0.0, 2**30,
    )  # fmt: skip
    found = forward_columns(asked, False)
    upstream = torch.full((rows,), factor)

    def bias(slab_bytes: int) -> Tensor:
        some = asked._replace(slab_bytes=slab_bytes)
        needs = [False, False, True]
        return backward_columns(some, upstream, found.base, found.log_sum, needs).bias

    assert torch.equal(bias(2 * 2 * vocab), bias(2**30))


def test_a_hidden_state_may_be_wider_than_the_vocabulary() -> None:
    x, unembedding = normal(0, 5, 64).bfloat16(), (normal(1, 4, 64) / 8).bfloat16()
    asked, factor = problem(x, unembedding, integers(2, 4, 5)), torch.ones(5)
    needs = [True, True, False]
    assert gradient_dtype(asked, needs, NOT_LOCAL) == torch.float32
    _, made = forward_backward_rows(asked, factor, NOT_LOCAL, False, False, needs)
    p = (x.double() @ unembedding.double().T).softmax(1) - F.one_hot(asked.target, 4)
    torch.testing.assert_close(made.unembedding.double(), p.T @ x.double(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("every_row", [True, False])
def test_without_room_for_wide_sums_rows_are_found_and_cost_the_same(every_row: bool) -> None:
    vocab = 600
    x, unembedding = normal(0, ROWS, DIM).bfloat16(), normal(1, vocab, DIM).bfloat16()
    asked = problem(x, unembedding, integers(2, vocab, ROWS), slab_bytes=2 * vocab)
    factor = torch.tensor([0.0, 1.0, 0.5, 2.0]).repeat(ROWS // 4)
    counted = torch.ones_like(factor) if every_row else factor != 0
    needs = [True, True, False]
    assert gradient_dtype(asked, needs, NOT_LOCAL) == torch.bfloat16
    found, made = forward_backward_rows(asked, factor, NOT_LOCAL, False, every_row, needs)
    logits = x.double() @ unembedding.double().T
    expected = F.cross_entropy(logits, asked.target, reduction="none") * counted
    torch.testing.assert_close(found.ce.double(), expected, rtol=0.02, atol=0.02)
    assert torch.equal(found.weight, counted.float())
    assert made.hidden.dtype == torch.bfloat16
    cost = operations(
        lambda: forward_backward_rows(asked, factor, NOT_LOCAL, False, every_row, needs)
    )
    # The forward pass over what is to be known, and three products over what counts.
    assert cost == 2 * vocab * DIM * (int(counted.sum()) + 3 * int((factor != 0).sum()))


@pytest.mark.parametrize(("rows", "products"), [(16, 3), (32, 4)])
def test_without_room_for_wide_sums_a_single_slab_is_not_made_twice(
    rows: int, products: int
) -> None:
    vocab, dim = 600, 2 * DIM
    x, unembedding = normal(0, rows, dim).bfloat16(), normal(1, vocab, dim).bfloat16()
    # Sixteen rows and their scratch.
    asked = problem(x, unembedding, integers(2, vocab, rows), slab_bytes=18 * 2 * vocab)
    # Only in float16 does z-loss ask for more.
    asked, needs = asked._replace(z_loss=0.1), [True, True, False]
    assert gradient_dtype(asked, needs, NOT_LOCAL) == torch.bfloat16
    cost = operations(
        lambda: forward_backward_rows(asked, torch.ones(rows), NOT_LOCAL, False, False, needs)
    )
    assert cost == 2 * vocab * dim * rows * products


def test_a_budget_beyond_the_cache_is_cut() -> None:
    rows, vocab = 2100, 8200
    asked = problem(
        torch.zeros(rows, 1), normal(0, vocab, 1).float(), torch.ones(rows).long(), slab_bytes=2**26
    )
    found = forward_columns(asked, False)
    torch.testing.assert_close(found.ce, torch.full((rows,), math.log(vocab)))


@pytest.mark.parametrize("wanted", [0, 5, 768])
def test_a_last_slab_of_a_single_column(wanted: int) -> None:
    vocab = 769
    x, unembedding = normal(0, ROWS, DIM), normal(1, vocab, DIM)
    asked = problem(x, unembedding, torch.full((ROWS,), wanted), slab_bytes=8 * vocab)
    found = forward_columns(asked, False)
    expected = F.cross_entropy(x @ unembedding.T, asked.target, reduction="none")
    torch.testing.assert_close(found.ce, expected)
    upstream = uniform(2, ROWS)
    made = backward_columns(asked, upstream, found.base, found.log_sum, [False, True, False])
    p = (x @ unembedding.T).softmax(1) - F.one_hot(asked.target, vocab)
    torch.testing.assert_close(made.unembedding, (p * upstream[:, None]).T @ x)


# ------------------------------------------------------------------------- the most probable token


def first_of_the_best(logits: Tensor) -> Tensor:
    return (logits == logits.amax(1, keepdim=True)).long().argmax(1)


def correct(asked: Problem, *, columns: bool) -> Tensor:
    if columns:
        return forward_columns(asked, True).correct
    factor = torch.ones(len(asked.hidden), dtype=asked.wide)
    return forward_backward_rows(asked, factor, NOT_LOCAL, True, True, [True, False, False])[
        0
    ].correct


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("slab_rows", [1, 7, 1000])
def test_of_tied_tokens_the_first_is_the_prediction(slab_rows: int, columns: bool) -> None:
    vocab = 600
    # Small whole numbers: products are exact, and ties are everywhere.
    x, unembedding = integers(0, 5, ROWS, 3) - 2.0, integers(1, 5, vocab, 3) - 2.0
    best = first_of_the_best(x @ unembedding.T)
    last = (vocab - 1) - first_of_the_best((x @ unembedding.T).flip(1))
    target = torch.where(mask(2, 0.5, ROWS), best, last)
    asked = problem(x, unembedding, target, slab_bytes=slab_rows * vocab * 4)
    expected = target == best
    assert 0 < expected.sum() < ROWS
    assert torch.equal(correct(asked, columns=columns), expected)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_the_best_of_two_slabs_is_told_in_float32(first: bool, columns: bool) -> None:
    vocab, low, high = 600, 2.0, 2.015625
    # The cap brings the two nearer to each other than bfloat16 can say.
    assert torch.tensor([low, high]).tanh().bfloat16().unique().numel() == 1
    unembedding = torch.zeros(vocab, 1).bfloat16()
    unembedding[3], unembedding[590] = (high, low) if first else (low, high)
    asked = problem(
        torch.ones(1, 1).bfloat16(), unembedding, torch.tensor([3 if first else 590]),
        softcap=1.0, slab_bytes=vocab * 2,
    )  # fmt: skip
    assert bool(correct(asked, columns=columns).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_target", ["all", "some"])
@pytest.mark.parametrize("counting", ["none", "few", "most", "all"])
# As one slab; and by slabs some of which the unembedding's gradient lends memory to: more rows than that
# has columns, as many, fewer.
@pytest.mark.parametrize(("form", "dim"), [("held", DIM), ("lent", 25), ("lent", 64), ("lent", 99)])
def test_held_logits_give_the_gradients_of_those_that_are_made_anew(
    form: str, dim: int, counting: str, with_target: str, dtype: torch.dtype
) -> None:
    """Rows that count come together; those with a target may be all there are."""
    vocab, needs = 50, [True, True, True]
    x, unembedding = normal(0, ROWS, dim).to(dtype), normal(1, vocab, dim).to(dtype)
    unembedding = unembedding / math.sqrt(dim)
    target = integers(2, vocab, ROWS) - (0 if with_target == "all" else 9)
    asked = problem(x, unembedding, target)._replace(bias=unembedding[:, 0])
    share = {"none": 0.0, "few": 0.3, "most": 0.7, "all": 1.0}[counting]
    upstream = uniform(3, ROWS).to(asked.wide) * mask(4, share, ROWS)
    found = forward_columns(asked, True)
    right = backward_columns(asked, upstream, found.base, found.log_sum, needs)
    with held_logits(form):
        kept, held = forward_held(asked, needs, True, False)
        assert (len(held.lent) > 0) == (form == "lent")
        for one, other in zip(told(kept), told(found), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        used = backward_held(asked, upstream, kept.base, kept.log_sum, needs, held, False)
        rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
        for one, other in zip(used, right, strict=True):
            torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)
        if counting == "all":
            held = forward_held(asked, needs, True, True)[1]
            again = backward_held(asked, upstream, kept.base, kept.log_sum, needs, held, True)
            assert all(torch.equal(one, other) for one, other in zip(again, used, strict=True))


def told(found: Rows) -> tuple[Tensor, ...]:
    """What rows say, whatever their base."""
    return found.loss, found.ce, found.base + found.log_sum, found.correct


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("vocab", [1, 2, 5, 9, 14])
def test_no_slab_that_is_kept_is_written_over_before_it_is_used(
    rows: int, vocab: int, dim: int
) -> None:
    """And of the unembedding's gradient as much is lent as can be."""
    asked = problem(torch.empty(rows, dim), torch.empty(vocab, dim), torch.zeros(rows).long())
    for columns in range(1, vocab + 1):
        slabs = -(-vocab // columns)

        def is_safe(own: int, lent: int, columns: int = columns) -> bool:
            """With memory for whole slabs at the end, written by slices from the start, in order."""
            start = vocab * dim - lent * rows * columns
            for number in range(own + lent - 1 if lent else 0):
                written = min(vocab, (number + 1) * columns) * dim
                if written > start + max(0, number + 1 - own) * rows * columns:
                    return False
            return start >= 0

        for own in range(1, slabs + 1):
            found = slab_layout.most_lent(asked, rows, columns, own)
            assert found == max(n for n in range(slabs - own + 1) if is_safe(own, n))


@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 20), st.data())
def test_kept_slabs_are_those_that_were_made(
    rows: int, vocab: int, dim: int, data: st.DataObject
) -> None:
    """Each has its own place, and is what it was when all gradients before it have been written."""
    # Few columns, so that there are many slabs.
    columns = data.draw(st.integers(1, min(vocab, 5)))
    slabs = -(-vocab // columns)
    own = data.draw(st.integers(1, slabs))
    asked = problem(
        torch.empty(rows, dim), torch.empty(vocab, dim), torch.zeros(rows).long()
    )._replace(hidden=torch.empty(rows, dim).double())
    lent = slab_layout.most_lent(asked, rows, columns, own)
    layout = slab_layout.HeldLayout(columns, own, lent, slabs)
    held = slab_layout.held_for(
        asked, torch.arange(rows), rows + data.draw(st.integers(0, 3)), layout
    )
    # A hook for saved tensors may give memory that starts anywhere.
    behind = data.draw(st.integers(0, 40))
    held = held._replace(lent=torch.empty(behind + len(held.lent)).double()[behind:])
    widths = [min(columns, vocab - first) for first in range(0, vocab, columns)]
    for number, width in reversed([*enumerate(widths)]):
        slab = slab_layout.held_slab(asked, held, number, width)
        assert (slab is None) == (number >= own + lent)
        if slab is not None:
            slab.fill_(number)
    for number, width in enumerate(widths):
        part = slice(number * columns, number * columns + width)
        slab = slab_layout.used_slab(asked, held, number, part)
        assert (slab is None) == (number >= own + lent)
        if slab is not None:
            assert slab.shape == (rows, width)
            if lent:
                held.lent.view(vocab, dim)[part] = -1.0
            assert torch.equal(slab, torch.full_like(slab, number))


@pytest.mark.parametrize(
    ("count", "room"), [(80, 80), (71, 80), (70, 70), (61, 70), (1, 10), (0, 0)]
)
@pytest.mark.parametrize("all_count", [True, False])
def test_what_is_kept_has_few_sizes_however_many_rows_there_are(
    count: int, room: int, all_count: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocator that keeps what is freed has the memory of the last batch for the next."""
    told: list[tuple[int, bool]] = []

    def layout(asked: Any, rows: int, needs: object, all_count: bool) -> Any:
        told.append((rows, all_count))
        return layout_of_all(asked, rows, [True, True], all_count)

    monkeypatch.setattr(slab_columns, "held_layout", layout)
    target = torch.where(torch.randperm(80, generator=torch.Generator()) < count, 1, -1)
    asked = problem(normal(0, 80, DIM), normal(1, 50, DIM), target)
    _, held = forward_held(asked, [True, True, False], False, all_count)
    assert len(held.own) == room * 50
    # Hidden states are copied where some rows have no target.
    assert told == [(room, all_count and count == 80)]


def test_no_row_at_all_is_no_label_that_does_not_exist() -> None:
    asked = problem(normal(0, 0, DIM), normal(1, 50, DIM), integers(2, 50, 0))
    found, held = forward_held(asked, [True, True, False], False, True)
    assert len(found.loss) == len(held.own) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_sums_the_gradient_of_a_bias_without_a_wide_copy(dtype: torch.dtype) -> None:
    asked = problem(normal(0, ROWS, DIM), normal(1, 333, DIM), integers(2, 333, ROWS))
    logits, total = normal(3, ROWS, 333).to(dtype), normal(4, 333).float()
    for scale in (None, normal(5, ROWS).float()):
        factor = 1.0 if scale is None else scale.double().unsqueeze(1)
        wanted = total + (factor * logits.double()).sum(0).float()
        for there in (logits, logits.as_subclass(OnGpu)):
            found = total.clone()
            slab_columns.add_to_bias(asked, found, there, scale)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    if dtype == torch.bfloat16:
        # Without a scale nothing is widened by parts.
        with mock.patch.object(slab_columns, "parts", side_effect=AssertionError):
            slab_columns.add_to_bias(asked, total, logits.as_subclass(OnGpu), None)


def test_a_slab_is_gone_before_the_gradient_of_the_hidden_states_is_asked_for() -> None:
    rows, size, needs = 1008, 2**20, [True, False, False]
    x, unembedding = normal(0, rows, 64).float(), normal(1, 4000, 64).float()
    asked = problem(x, unembedding, integers(2, 4000, rows), slab_bytes=size)
    found = forward_columns(asked, False)
    known = uniform(3, rows).float(), found.base, found.log_sum
    peak = peak_bytes(lambda: backward_columns(asked, *known, needs))
    # A sum as large as the hidden states, the slab and its scratch; or that, the gradient and a part.
    assert peak < 4 * x.numel() + 1.1 * size + 4 * rows * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_only_statistics_want_have_the_memory_of_the_others_slab(
    dtype: torch.dtype,
) -> None:
    rows, size, needs = 1024, 2**22, [True, True, False]
    x, unembedding = normal(0, rows, 64).to(dtype), normal(1, 4000, 64).to(dtype)
    asked = problem(x, unembedding, integers(2, 4000, rows), slab_bytes=size)
    factor = uniform(3, rows).float() * (torch.arange(rows) % 2)

    def walk(every_row: bool) -> object:
        return forward_backward_rows(asked, factor, NOT_LOCAL, False, every_row, needs)

    without, with_them = (peak_bytes(lambda w=wanted: walk(w)) for wanted in (False, True))
    gradients = dtype.itemsize * (x.numel() + unembedding.numel())
    assert max(without, with_them) <= 1.1 * (gradients + size)


def test_a_float16_unit_is_found_without_a_copy() -> None:
    weight, factor = normal(0, 4096, 64).half(), torch.full((10,), 1e-6)
    negative, unit = -200 * weight.abs(), []
    peak = peak_bytes(lambda: unit.append(slab_columns.unit_of(factor, weight, negative)))
    assert peak < 2 * weight.numel()
    # The largest number is taken by its size.
    assert slab_columns.unit_of(factor, -negative) == unit[0] > slab_columns.unit_of(factor, weight)


@pytest.mark.parametrize(("kept", "of"), [(1, 1), (3, 5), (4, 5), (5, 5)])
@pytest.mark.parametrize("needs", NEEDS)
def test_only_logits_that_are_not_kept_are_made_anew(
    kept: int, of: int, needs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, columns = 100, 100 // of
    layout = slab_layout.HeldLayout(columns, own=1, lent=kept - 1, slabs=of)
    monkeypatch.setattr(slab_columns, "held_layout", lambda *_: layout)
    x, unembedding = normal(0, ROWS, 256), normal(1, vocab, 256)
    asked = problem(x, unembedding, integers(2, vocab, ROWS))
    upstream = (torch.arange(ROWS) < 16).double()
    found, held = forward_held(asked, [*needs, False], False, False)

    made: list[Tensor] = []

    def backward() -> None:
        wanted = [*needs, False]
        made.extend(backward_held(asked, upstream, found.base, found.log_sum, wanted, held, False))

    assert operations(backward) == 2 * 16 * 256 * (vocab * sum(needs) + columns * (of - kept))
    # What was lent becomes the gradient.
    if len(held.lent):
        assert (made[1].data_ptr() == held.lent.data_ptr()) == needs[1]


# More and fewer rows than the unembedding's gradient has columns.
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("every_row", [True, False])
@pytest.mark.parametrize("form", ["held", "lent"])
def test_without_room_for_wide_sums_logits_are_kept_where_they_may_be(
    form: str, every_row: bool, rows: int
) -> None:
    """On a GPU, inside the operator."""
    vocab, dim, needs = 600, 32, [True, True, False]
    x, unembedding = normal(0, rows, dim).bfloat16(), normal(1, vocab, dim).bfloat16() / 8
    asked = problem(x, unembedding, integers(2, vocab, rows), slab_bytes=4 * 2 * vocab)
    factor = uniform(3, rows).float() * (torch.arange(rows) % 4 > 0)

    def made() -> Any:
        return forward_backward_rows(asked, factor, NOT_LOCAL, True, every_row, needs)

    right, wanted = made()
    with held_logits(form), mock.patch.object(slab_rows, "can_hold", return_value=True):
        found, gradients = made()
        cost = operations(made)
    for one, other in zip(told(found), told(right), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients[:2], wanted[:2], strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6)
    least = 2 * vocab * dim * ((rows if every_row else rows * 3 // 4) + 2 * rows * 3 // 4)
    most = least + 2 * vocab * dim * rows * 3 // 4
    assert cost == least if form == "held" else least <= cost < most


@pytest.mark.parametrize("weighting", [NOT_LOCAL, RowLocal("dft", 1.0)])
def test_the_compiler_is_told_in_which_dtype_gradients_wait(weighting: RowLocal) -> None:
    """Of the GPU, that has room for all logits, and of another problem."""
    mode = FakeTensorMode()

    def there(dtype: torch.dtype, *shape: int) -> Tensor:
        return FakeTensor(
            mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cuda")
        )

    for rows in (8192, 16384):
        x, unembedding = (there(torch.bfloat16, size, 4096) for size in (rows, 128256))
        budget = slab_budget(None, x, unembedding)
        asked = problem(x, unembedding, there(torch.int64, rows), slab_bytes=budget)
        needs = [True, True, False]
        with mode:
            told = operators._weighted_row_sum(
                *asked, there(torch.float32, rows), *weighting, False, False, needs
            )
        wide = rows == 16384 or weighting != NOT_LOCAL
        assert gradient_dtype(asked, needs, weighting) == told[7].dtype == told[8].dtype
        assert told[8].dtype == (torch.float32 if wide else torch.bfloat16)


def test_sizes_that_a_compiler_has_left_open_stay_open() -> None:
    """Also on a GPU, whose budget counts what is beside a slab."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def there(dtype: torch.dtype, *shape: int) -> Tensor:
        sized = mode.from_tensor(torch.empty(shape, dtype=dtype), static_shapes=False)
        with in_kernel_invocation_manager(mode):
            meta = torch.empty(sized.shape, dtype=dtype, device="meta")
        return FakeTensor(mode, meta, torch.device("cuda"))

    x, unembedding = there(torch.bfloat16, 80, 64), there(torch.bfloat16, 1000, 64)
    target, factor = there(torch.int64, 80), there(torch.float32, 80)
    with mode:
        budget = slab_budget(None, x, unembedding)
        asked = problem(x, unembedding, target, slab_bytes=budget)
        told = operators._weighted_row_sum(
            *asked, factor, *NOT_LOCAL, False, False, [True, True, False]
        )
    assert told[7].dtype == torch.bfloat16
    assert not any(isinstance(size, int) for size in (*told[7].shape, *told[8].shape))


@pytest.mark.parametrize("count", [[], [0], [1], [0, 0], [1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 1]])
def test_rows_that_count_are_moved_together_from_behind(count: list[int]) -> None:
    kept = torch.tensor(count, dtype=torch.bool)
    size = int(kept.sum())
    source = slab_columns._moved_together(kept, kept.sum())[:size].tolist()
    assert sorted(source) == [place for place, one in enumerate(count) if one]
    assert all(at == place or at >= size for place, at in enumerate(source))


def test_all_logits_are_held_on_a_gpu_where_they_fit_with_what_is_beside_them() -> None:
    x, needs = torch.zeros(6, DIM, dtype=torch.bfloat16), [True, False, False]
    asked = problem(x.as_subclass(OnGpu), x[:5], torch.zeros(6, dtype=torch.int64))
    # Rows of 64 logits, a copy of the hidden states, a float32 sum of them.
    size = 6 * 64 * 2 + 6 * DIM * (2 + 4)
    assert schedule.can_hold(asked._replace(slab_bytes=size), needs)
    assert not schedule.can_hold(asked._replace(slab_bytes=size - 1), needs)
    assert not schedule.can_hold(asked._replace(slab_bytes=size), [False] * 3)
    assert not schedule.can_hold(asked._replace(slab_bytes=size, hidden=x), needs)
    # A bias lets no space between the rows.
    with_bias = asked._replace(bias=x[0, :5], slab_bytes=6 * 5 * 2 + 6 * DIM * (2 + 4))
    assert schedule.can_hold(with_bias, needs)


@pytest.mark.parametrize("needs", [True, False])
def test_what_counts_is_asked_late_on_a_gpu(needs: bool) -> None:
    x, target = leaf(normal(0, 6, DIM)), torch.zeros(6, dtype=torch.int64)
    with torch.set_grad_enabled(needs):
        there = problem(x.as_subclass(OnGpu), x[:5], target)
        assert schedule.losses_first(there)
        assert schedule.keeps_logits(there) == needs
        # Where they do not fit, known weights make gradients in the forward pass.
        assert schedule.losses_first(there._replace(slab_bytes=5 * 8)) != needs
        assert not schedule.losses_first(problem(x, x[:5], target))


@pytest.mark.parametrize("loss", ["none", "token nll"])
def test_held_rows_whose_loss_nobody_uses_enter_no_product_of_the_backward_pass(loss: str) -> None:
    vocab, used = 50, 7
    x, unembedding = leaf(normal(0, 1, 20, DIM)), leaf(normal(1, vocab, DIM))
    labels = integers(2, vocab, 1, 20)
    with held_logits():
        if loss == "none":
            found = linear_mtp_ce_loss(x, unembedding, labels, offsets=[0], reduction="none")
        else:
            found = linear_token_nll(x, unembedding, labels)
        cost = operations(found.flatten()[1 : 1 + used].sum().backward)
    assert cost == 2 * used * vocab * DIM * 2


@pytest.mark.parametrize("form", ["held", "used up", "lent"])
def test_several_upstream_gradients_at_once_use_no_held_logits_up(form: str) -> None:
    x, unembedding = leaf(normal(0, 1, 6, 99)), leaf(normal(1, 50, 99))
    upstreams = normal(3, 3, 1, 6, 1)

    def loss() -> Tensor:
        return linear_mtp_ce_loss(
            x, unembedding, integers(2, 50, 1, 6), offsets=[0], reduction="none"
        )

    with held_logits(form):
        if form == "held":
            found = torch.autograd.grad(loss(), [x, unembedding], upstreams, is_grads_batched=True)
        else:
            with mock.patch.object(operators, "_graph_is_kept", return_value=False):
                found = torch.autograd.grad(
                    loss(), [x, unembedding], upstreams, is_grads_batched=True
                )
    for number, upstream in enumerate(upstreams):
        for many, one in zip(found, grads(loss(), [x, unembedding], upstream), strict=True):
            torch.testing.assert_close(many[number], one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_of_all_rows_does_not_ask_which_count(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask is to wait for a GPU, and takes a copy of the hidden states."""
    seen: list[bool] = []

    def noted(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return backward_held(*arguments)

    monkeypatch.setattr(operators, "backward_held", noted)
    x, unembedding = leaf(normal(0, 1, 6, DIM)), normal(1, 5, DIM)
    with held_logits():
        loss = linear_mtp_ce_loss(x, unembedding, integers(2, 5, 1, 6), reduction=reduction)
        loss.sum().backward()
    assert seen == [reduction != "none"]


def test_gradients_in_lent_memory_may_be_changed_in_place() -> None:
    x, unembedding = leaf(normal(0, 1, 6, 99)), leaf(normal(1, 50, 99))
    with held_logits("lent"), mock.patch.object(operators, "_graph_is_kept", return_value=False):
        loss = linear_mtp_ce_loss(x, unembedding, integers(2, 50, 1, 6))
        (gradient,) = torch.autograd.grad(loss, unembedding)
    expected = 2 * gradient
    assert torch.equal(gradient.mul_(unembedding / unembedding * 2), expected)
    assert torch.equal(gradient.detach_(), expected)


@pytest.mark.parametrize("better", [True, False])
def test_logits_are_kept_for_weights_that_are_known_where_that_is_better(
    better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a loss of each prediction always: there is no way with fewer products."""
    kept: list[bool] = []

    def noted(*arguments: Any) -> Any:
        kept.append(True)
        return forward_held(*arguments)

    x, unembedding = leaf(normal(0, 1, 6, DIM)), leaf(normal(1, 50, DIM))
    labels = integers(2, 50, 1, 6)
    with held_logits():
        monkeypatch.setattr(schedule, "holds_better", lambda *_: better)
        monkeypatch.setattr(operators, "forward_held", noted)
        linear_weighted_mtp_loss(x, unembedding, labels, uniform(3, 1, 6)).backward()
        assert kept == [True] * better
        linear_mtp_ce_loss(x, unembedding, labels, reduction="none").sum().backward()
        assert kept == [True] * (1 + better)


def test_held_rows_that_a_selection_leaves_enter_no_product_of_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it could be guessed, but for the memory."""
    vocab = 50
    x, unembedding = leaf(normal(0, 1, 20, DIM)), leaf(normal(1, vocab, DIM))
    reference = uniform(3, 1, 20)
    selection = functools.partial(rho1_weights, reference_nll=reference, keep=0.5)
    monkeypatch.setattr(operators, "can_guess", lambda *_: False)
    with held_logits():
        monkeypatch.setattr(schedule, "holds_better", lambda *_: False)
        loss = linear_weighted_mtp_loss(x, unembedding, integers(2, vocab, 1, 20), selection)
        cost = operations(loss.backward)
    assert cost == 2 * 10 * vocab * DIM * 2


@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)])
def test_memory_is_lent_of_the_gradients_that_are_asked_for(trained: tuple[bool, bool]) -> None:
    told: list[list[bool]] = []

    def noted(asked: Problem, needs: Any, *arguments: Any) -> Any:
        told.append(list(needs))
        return forward_held(asked, needs, *arguments)

    x, unembedding = normal(0, 1, 6, DIM), normal(1, 50, DIM)
    leaves = [t.requires_grad_(need) for t, need in zip((x, unembedding), trained, strict=True)]
    with held_logits(), mock.patch.object(operators, "forward_held", noted):
        linear_mtp_ce_loss(*leaves, integers(2, 50, 1, 6))
    assert told == [[*trained, False]]
