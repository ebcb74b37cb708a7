"""The walks of ``slab_columns.py`` and ``slab_rows.py`` as operators that autograd and compilers know.

Three custom operators, opaque to the compiler and with fake implementations, and two functions with
first-order gradients over them:

* ``row_losses``: the loss of every row, for weights that depend on it or anything else behind it.
* ``weighted_row_sum``: ``Σ factor · loss`` for factors known beforehand, gradients made on the way.

``guessed_row_losses`` does what ``row_losses`` does, in eager mode only, with gradients made on the way
for a guess of the upstream gradient, and corrected where it was wrong.

Which walk each takes: see ``schedule.py``.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from wmtp import _checks
from wmtp.problem import NOT_LOCAL, Gradients, Problem, RowLocal, Rows
from wmtp.products import parts
from wmtp.schedule import can_guess, gradient_dtype, is_eager, keeps_logits, needs_of
from wmtp.slab_columns import backward_columns, backward_held, forward_columns, forward_held
from wmtp.slab_layout import Held
from wmtp.slab_rows import (
    Guess,
    corrected_rows,
    forward_backward_rows,
    forward_guessing_rows,
)


# They ask how many rows there are to do: a CUDA graph would repeat the first answer, if it could be made.
_TAGS = (torch.Tag.cudagraph_unsafe,)
# Gradients are scaled in place by so many rows at a time.
_PART_ROWS = 4096
_ONCE = (
    "the linear losses have first-order gradients only; for a second backward compute the logits "
    "and call the dense form (mtp_ce_loss, weighted_mtp_loss)"
)
_NO_FORWARD = (
    "the linear losses have no forward-mode derivative (jvp); for one compute the logits and call the "
    "dense form (mtp_ce_loss, weighted_mtp_loss)"
)


def row_losses(problem: Problem, with_correct: bool, all_count: bool) -> Rows:
    """Rows of a problem; ``loss`` is differentiable in hidden states, unembedding and bias.

    Args:
        problem: the rows.
        with_correct: see ``Rows``.
        all_count: whether the upstream gradients of rows with a target are only 0 if all are, which
            otherwise are looked at.
    """
    _first_order_only()
    if keeps_logits(problem):
        held: tuple[Tensor, ...] = _HeldRowLosses.apply(*problem, with_correct, all_count)  # pyright: ignore
        return Rows(*held)
    if _compiled_without_gradient(*problem[:3]):
        return Rows(*_row_losses(*problem, with_correct))  # traced by Dynamo
    return Rows(*_RowLosses.apply(*problem, with_correct))  # pyright: ignore


def guessed_row_losses(problem: Problem, guess: Guess, with_correct: bool) -> Rows:
    """``row_losses``, with less to do in the backward pass where the upstream gradient was guessed.

    Args:
        problem: the rows.
        guess: from the cross entropy of all rows and whether each has been seen yet, both ``[rows]``,
            the upstream gradient of each row's loss that can be expected, but for a common factor.
            Called a few times before the cross entropy of all is known.
        with_correct: see ``Rows``.
    """
    needs = needs_of(problem)
    if not (is_eager(problem) and can_guess(problem, needs)):
        return row_losses(problem, with_correct, all_count=False)
    out: tuple[Tensor, ...] = _GuessedRowLosses.apply(*problem, guess, with_correct, needs)  # pyright: ignore
    return Rows(*out[:6])


def weighted_row_sum(
    problem: Problem,
    factor: Tensor,
    with_stats: bool,
    weighting: RowLocal = NOT_LOCAL,
) -> tuple[Tensor, Rows]:
    """``Σ factor · weight · loss``, differentiable in the factor too, and the rows, detached.

    Rows of factor 0 are not computed unless ``with_stats``, or the factor requires grad: its gradient
    is the weighted loss of the row.
    """
    _first_order_only()
    needs = needs_of(problem)
    every_row = with_stats or (torch.is_grad_enabled() and factor.requires_grad)
    inputs = (*problem, factor, *weighting, with_stats, every_row, needs)
    out: Any
    if _compiled_without_gradient(*problem[:3], factor):
        out = _weighted_row_sum(*inputs)
    else:
        out = _WeightedRowSum.apply(*inputs, *_ties(problem))  # pyright: ignore
    total, *rows = cast(tuple[Tensor, ...], out)[:7]
    return total, Rows(*rows)


def _ties(problem: Problem) -> list[Tensor | None]:
    """An empty slice of each operand, which still belongs to the operand's graph.

    The backward pass scales gradients that exist already and does not need the operands. Saving these
    instead keeps a second backward refusable, without holding the operands in memory or forbidding
    changes to them in place.
    """
    if torch.compiler.is_compiling():  # where a second backward pass is refused by Dynamo
        return [None] * 3
    return [None if tensor is None else tensor[:0].clone() for tensor in problem[:3]]


def _first_order_only() -> None:
    """Refuse under a compiler what would be taken for 0 there: tangents, and second derivatives.

    Dynamo cuts a Function's backward pass off from what is outside the innermost transform, and an
    operator drops tangents; neither tells anybody. In eager mode the Functions are asked, and raise.
    """
    if torch.compiler.is_compiling():
        _no_tangents()
        if _layers() > 1:
            raise RuntimeError(_ONCE)


def _layers() -> int:
    """How many of ``torch.func``'s transforms there are around a call."""
    return torch._C._functorch.get_dynamic_layer_stack_depth()  # pyright: ignore


def _in_forward_mode() -> bool:
    """Whether tensors may have tangents: ``torch.func.jvp``, ``forward_ad.dual_level``."""
    return forward_ad._current_level >= 0  # pyright: ignore


# What ``torch.compiler.assume_constant_result`` does, without importing the compiler: Dynamo asks when it
# traces, and guards that the transforms are the same.
_layers._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
_in_forward_mode._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _no_tangents() -> None:
    """Refuse forward mode; in an operator too, which may have been compiled before, or exported."""
    if _in_forward_mode():
        raise NotImplementedError(_NO_FORWARD)


def _compiled_without_gradient(*tensors: Tensor | None) -> bool:
    """Whether Dynamo traces a call that needs no gradient: it cannot trace a Function then.

    In eager mode the Function stays, because it refuses forward-mode differentiation, where the
    operator would drop the tangents.
    """
    if not torch.compiler.is_compiling():
        return False
    wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return not (torch.is_grad_enabled() and wanted)


@torch.library.custom_op("wmtp::row_losses", mutates_args=(), tags=_TAGS)
def _row_losses(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    slab_bytes: int,
    with_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _no_tangents()
    problem = Problem(
        hidden, unembedding, bias, target, label_smoothing, z_loss, softcap, slab_bytes
    )
    return forward_columns(problem, with_correct)


@torch.library.custom_op("wmtp::row_losses_backward", mutates_args=(), tags=_TAGS)
def _row_losses_backward(
    upstream: Tensor,
    base: Tensor,
    log_sum: Tensor,
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    slab_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(
        hidden, unembedding, bias, target, label_smoothing, z_loss, softcap, slab_bytes
    )
    return _in_units(backward_columns(problem, upstream, base, log_sum, needs))


@torch.library.custom_op("wmtp::weighted_row_sum", mutates_args=(), tags=_TAGS)
def _weighted_row_sum(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    slab_bytes: int,
    factor: Tensor,
    kind: str,
    power: float,
    with_correct: bool,
    every_row: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _no_tangents()
    problem = Problem(
        hidden, unembedding, bias, target, label_smoothing, z_loss, softcap, slab_bytes
    )
    weighting = RowLocal(kind, power)
    if any(needs) or weighting != NOT_LOCAL:
        rows, gradients = forward_backward_rows(
            problem, factor, weighting, with_correct, every_row, needs
        )
    else:
        rows = forward_columns(problem if every_row else problem.only(factor != 0), with_correct)
        one = rows.loss.new_ones(())
        gradients = Gradients(one.new_empty(0), one.new_empty(0), one.new_empty(0), unit=one)
    # A row of factor 0 counts nothing, whatever it holds.
    weighted = factor.to(rows.loss.dtype) * rows.weight
    total = torch.where(weighted != 0, weighted * rows.loss, 0).sum()
    return total, *rows, *gradients  # pyright: ignore[reportReturnType]


@_row_losses.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(*inputs: Any) -> Rows:
    return Problem(*inputs[:8]).empty_rows()


@_row_losses_backward.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(
    upstream: Tensor, base: Tensor, log_sum: Tensor, hidden: Tensor, unembedding: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _fake_gradients(hidden, unembedding, rest[-1], hidden.dtype)


@_weighted_row_sum.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(*inputs: Any) -> tuple[Tensor, ...]:
    problem, needs = Problem(*inputs[:8]), inputs[-1]
    weighting = RowLocal(*inputs[9:11])
    total = problem.hidden.new_empty((), dtype=problem.wide)
    dtype = gradient_dtype(problem, needs, weighting)
    gradients = _fake_gradients(problem.hidden, problem.unembedding, needs, dtype)
    return total, *problem.empty_rows(), *gradients, torch.empty_like(total)


def _fake_gradients(
    hidden: Tensor, unembedding: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, unembedding.shape, unembedding.shape[:1])
    asked = (shape if need else (0,) for shape, need in zip(shapes, needs, strict=True))
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in asked)


def _in_units(gradients: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients multiplied by their unit, in the dtype of the inputs."""
    *made, unit = gradients
    if made[0].dtype == torch.float16:
        made = _scale_(unit, torch.float16, made)
    of_hidden, of_unembedding, of_bias = made
    return of_hidden, of_unembedding, of_bias


class _Once(torch.autograd.Function):
    """What a backward pass computes, where another one through it raises."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> None:
        raise RuntimeError(_ONCE)


class _RowLosses(torch.autograd.Function):
    """Honours the whole upstream gradient; skips the products of inputs that need no gradient."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _row_losses(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, smoothing, z_loss, softcap, slab_bytes, _ = inputs
        ctx.options = (smoothing, z_loss, softcap, slab_bytes)
        ctx.save_for_backward(*output[2:4], *tensors)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if grad_outputs[0] is None:
            return (None,) * 9
        needs = list(ctx.needs_input_grad[:3])
        gradients = _recomputed(grad_outputs[0], ctx.saved_tensors, ctx.options, needs)
        return *gradients, *[None] * 6


def _recomputed(
    upstream: Tensor, saved: Sequence[Tensor | None], options: Sequence[Any], needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients that are asked for, from base, log-sum and the four tensors of the problem."""
    inputs = (upstream, *saved, *options, needs)
    # Dynamo cannot trace a Function inside a backward; it refuses double backward by itself.
    if torch.compiler.is_compiling():
        gradients: Any = _row_losses_backward(*inputs)  # traced by Dynamo
    else:
        gradients = _RowLossesBackward.apply(*inputs)  # pyright: ignore
    return _asked_for(gradients, needs)


class _RowLossesBackward(_Once):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _row_losses_backward(*inputs)


class _HeldRowLosses(torch.autograd.Function):
    """Keeps the logits that the forward pass has made, for the first backward pass to use up.

    Not for tensors under a transform, so it does without ``setup_context``, which costs a look at its
    signature in every call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *problem, with_correct, all_count = inputs
        needs = ctx.needs_input_grad[:3]
        rows, held = forward_held(Problem(*problem), needs, with_correct, all_count)
        *kept, ctx.layout = held
        ctx.options, ctx.all_count = problem[4:], all_count
        ctx.save_for_backward(*rows[2:4], *problem[:4], *kept)
        ctx.mark_non_differentiable(*rows[1:])
        ctx.set_materialize_grads(False)
        return rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if grad_outputs[0] is None:
            return (None,) * 10
        upstream, saved = grad_outputs[0], ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        # Another backward pass will want the logits too, or there are several upstream gradients.
        odd = torch.compiler.is_compiling() or not _checks.has_values(upstream)
        if odd or torch.is_grad_enabled() or _graph_is_kept():
            return *_recomputed(upstream, saved[:6], ctx.options, needs), *[None] * 7
        base, log_sum, *tensors, rows, own, lent = saved
        gradients = backward_held(
            Problem(*tensors, *ctx.options),
            upstream,
            base,
            log_sum,
            needs,
            Held(rows, own, lent, ctx.layout),
            ctx.all_count,
        )
        return *_asked_for(_in_units(gradients), needs), *[None] * 7


class _GuessedRowLosses(torch.autograd.Function):
    """Gradients made in the forward pass for a guess, corrected when the upstream gradient is known."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *problem, guess, with_correct, needs = inputs
        rows, gradients, guessed = forward_guessing_rows(
            Problem(*problem), guess, with_correct, needs
        )
        return *rows, *gradients[:3], guessed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.made_for = inputs[4:8], inputs[10]
        ctx.save_for_backward(*output[2:4], *inputs[:4], *output[6:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if grad_outputs[0] is None:
            return (None,) * 11
        upstream, saved = grad_outputs[0], ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if torch.compiler.is_compiling() or not _checks.has_values(upstream):
            # Several upstream gradients at once, or one that is no number yet.
            return *_recomputed(upstream, saved[:6], ctx.options, needs), *[None] * 8
        inputs = (upstream, *saved[2:], *ctx.options, ctx.made_for)
        made: Any = _GuessedRowLossesBackward.apply(*inputs)  # pyright: ignore
        return *_asked_for(made, needs), *[None] * 8


class _GuessedRowLossesBackward(_Once):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        upstream, hidden, unembedding, bias, target, *made, guessed = inputs[:9]
        *options, needs = inputs[9:]
        problem = Problem(hidden, unembedding, bias, target, *options)
        common = _common_factor(upstream, guessed)
        if _graph_is_kept():
            made = [gradient.clone() for gradient in made]
        one = torch.ones_like(common)
        corrected = corrected_rows(
            problem, guessed, upstream / common, Gradients(*made, unit=one), needs
        )
        return _scale_(common, hidden.dtype, corrected[:3])


def _common_factor(upstream: Tensor, guessed: Tensor) -> Tensor:
    """The upstream gradient over what was guessed of it, for most of the rows that have both, or 1."""
    both = (guessed != 0) & (upstream != 0)
    common = torch.where(both, upstream / guessed, torch.nan).nanmedian()
    return torch.where(common.isfinite() & (common != 0), common, 1)


class _WeightedRowSum(torch.autograd.Function):
    """Gradients made in the forward pass, to be scaled by the upstream gradient of the sum."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _weighted_row_sum(*inputs[:-3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, loss, _, _, _, _, weight, *gradients_and_unit = output
        ctx.dtype = inputs[0].dtype
        ctx.save_for_backward(*inputs[-3:], inputs[8], loss, weight, *gradients_and_unit)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if grad_outputs[0] is None:
            return (None,) * 17
        saved = ctx.saved_tensors  # once: a checkpoint makes them anew
        ties, (factor, loss, weight), gradients, unit = saved[:3], saved[3:6], saved[6:9], saved[9]
        needs = ctx.needs_input_grad
        upstream = grad_outputs[0]
        scale, values = upstream * unit, weight * loss
        scaled: Any
        if torch.compiler.is_compiling():  # traced by Dynamo
            scaled = (*_scaled(scale, ctx.dtype, gradients), upstream * values)
        elif torch.is_grad_enabled():
            scaled = _Scale.apply(ctx.dtype, upstream, scale, values, *gradients, *ties, factor)  # pyright: ignore
        else:
            # Handed on uncopied only where the graph is not kept: the receiver may add in place.
            in_place = _checks.has_values(scale) and not _graph_is_kept()
            scale_all = _scale_ if in_place else _scaled
            scaled = (*scale_all(scale, ctx.dtype, gradients), upstream * values)
        *of_inputs, of_factor = cast(tuple[Tensor, ...], scaled)
        wanted = of_factor.to(factor.dtype) if needs[8] else None
        nothing: list[Tensor | None] = [None] * 3
        if torch.compiler.is_compiling():  # compiled autograd adds up what it is given
            nothing = [None if tie is None else torch.zeros_like(tie) for tie in ties]
        return *_asked_for(of_inputs, needs[:3]), *[None] * 5, wanted, *[None] * 5, *nothing


class _Scale(_Once):
    """Products with the upstream gradient; tied to the inputs so that a second backward raises."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        dtype, upstream, scale, values, *gradients = inputs[:7]
        return *_scaled(scale, dtype, gradients), upstream * values


def _scaled(scale: Tensor, dtype: torch.dtype, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Products in the wide dtype, rounded once."""
    return tuple((gradient * scale[None]).to(dtype) for gradient in gradients)


def _scale_(scale: Tensor, dtype: torch.dtype, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same in place if the dtype is right, and by parts: no temporary of a gradient's size."""
    # What a GPU must round it multiplies on the way; to look would be to wait for it.
    look = not scale.is_cuda or any(gradient.dtype == dtype for gradient in gradients)
    as_they_are = look and bool(scale == 1)
    found: list[Tensor] = []
    for gradient in gradients:
        right = gradient.dtype == dtype
        out = gradient if right else torch.empty_like(gradient, dtype=dtype)
        for some in parts(0 if right and as_they_are else len(gradient), _PART_ROWS):
            part, into = gradient[some], out[some]
            into.copy_(part) if as_they_are else torch.mul(part, scale[None], out=into)
        found.append(out)
    return tuple(found)


def _graph_is_kept() -> bool:
    """Whether this backward pass may be followed by another; yes where torch does not tell."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # pyright: ignore
    return tell is None or tell()


def _asked_for(gradients: Any, needs: Any) -> tuple[Tensor | None, ...]:
    return tuple(found if need else None for found, need in zip(gradients, needs, strict=True))
