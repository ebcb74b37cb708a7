"""One number: the weighted multi-token prediction loss.

The dense losses take logits, the linear ones hidden states and the unembedding; they share all else.
What each prediction counts, and the formula: see ``denominators.py``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from wmtp import _checks
from wmtp._typing import typed
from wmtp.cross_entropy import Objective, Predictions, predict
from wmtp.denominators import (
    HeadWeights,
    Normalizer,
    factors_of,
    head_weights_of,
    reciprocal,
    weighted_mean,
)
from wmtp.guesses import asks_ranks, check_rho1_offsets, early_rho1
from wmtp.linear_cross_entropy import linear_predict, linear_problem, linear_weighted_sum
from wmtp.problem import Problem
from wmtp.row_local import (
    RowLocalWeights,
    as_operator_takes,
    needs_whole_rows,
    weights_from_ce,
    weights_from_logits,
)
from wmtp.schedule import losses_first
from wmtp.targets import IGNORE_INDEX, Offsets, align_to_heads, known_offsets, offsets_for


WeightFunction = Callable[[Tensor, Tensor], Tensor]
Weights = (
    Float[Tensor, "batch seq"]
    | Float[Tensor, "batch seq heads"]
    | WeightFunction
    | RowLocalWeights
    | None
)


class MTPLossStats(NamedTuple):
    """What one pass of a loss knows, detached: sums and counts, so that ranks and micro-batches add.

    Attributes:
        token_ce: ``[batch seq heads]`` plain cross entropy in nats, 0 where there is no target.
        head_loss: ``[heads]``, ``Σ w · ℓ``; divide by ``weight_sum``.
        head_accuracy: ``[heads]``, how many targets were the most probable token; divide by
            ``token_count``.
        weight_sum: ``[heads]``, ``Σ w`` over valid predictions.
        token_count: ``[heads]``, how many predictions were valid.
    """

    token_ce: Float[Tensor, "batch seq heads"]
    head_loss: Float[Tensor, " heads"]
    head_accuracy: Float[Tensor, " heads"]
    weight_sum: Float[Tensor, " heads"]
    token_count: Float[Tensor, " heads"]


@typed
def weighted_mtp_loss(
    logits: Float[Tensor, "batch seq heads vocab"] | Float[Tensor, "batch seq vocab"],
    labels: Int64[Tensor, "batch seq"] | Int64[Tensor, "batch seq heads"],
    weights: Weights = None,
    *,
    offsets: Offsets | None = None,
    head_weights: HeadWeights = None,
    normalizer: Normalizer = "weights",
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Weighted multi-token prediction loss from logits.

    ``loss = Σ_h λ_h Σ_{b,t} w[b,t,h] ℓ[b,t,h] / Z`` where ``ℓ[b,t,h]`` is the cross entropy of head
    ``h`` at position ``t`` on token ``x[b, t + offsets[h]]``. With one head and no weights it is
    ``F.cross_entropy``'s mean.

    Args:
        logits: ``[batch seq heads vocab]``, or ``[batch seq vocab]`` meaning one head. Positions
            without a target may hold anything, NaN included: their gradient is exactly 0.
        labels: ``[batch seq]`` int64, unshifted: entry ``j`` is token ``x_j``, aligned here with
            ``offsets``; or ``[batch seq heads]`` from ``mtp_targets``, which packed rows need.
        weights: ``None`` (ones); ``[batch seq]``, indexed by token and aligned here with ``offsets``
            (for labels of ``mtp_targets`` give the offsets that it was given);
            ``[batch seq heads]``, aligned with the logits; or a function
            ``(token_ce, valid) -> [batch seq heads]``, called with the detached plain cross entropy,
            such as ``partial(rho1_weights, reference_nll=nll)``; or ``RowLocalWeights("dft")`` and its
            like. Tensors that require grad get one.
        offsets: which token each head predicts, ``1, …, heads`` by default.
        head_weights: ``λ``, one per head, at least 0, used as given: with ``(1, 0.1, 0.1, 0.1)`` a
            prediction of an extra head counts a tenth of a next-token one. ``1 / heads`` each by
            default. All heads share ``Z``; for a mean of each head by itself, as Megatron takes it,
            divide each ``λ`` by its head's count and give ``normalizer=1``.
        normalizer: the denominator ``Z``. ``"weights"``: a weighted mean, the scale of ``w`` is
            immaterial. ``"tokens"``: the number of valid predictions per head. A number or 0-d tensor,
            such as ``num_items_in_batch``: one count over the whole accumulation window and all
            ranks, so that micro-batches add up to the gradient of the whole; 0, where there was
            nothing to count, gives 0, and what has no reciprocal is refused. Signed weights need one
            of the last two. Tensors given here or as ``head_weights`` are not checked: reading them
            would synchronise.
        ignore_index: the label that means "no target".
        label_smoothing: ``ε`` in [0, 1], as in ``F.cross_entropy``.
        z_loss: coefficient of ``lse²``, at least 0.
        softcap: positive bound of the logits, ``softcap · tanh(logits / softcap)``, or ``None``.

    Returns:
        A scalar, float32 (float64 for float64 logits). 0, connected to the graph, with gradients of 0
        where the denominator is 0: nothing valid, or all weights 0.

    Raises:
        ValueError: shapes that do not fit, numbers out of range, and on the CPU a valid label
            outside the vocabulary (an ``IndexError`` too; under ``torch.compile`` a ``RuntimeError``).
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 4, 2, 8, requires_grad=True)
        >>> labels = torch.tensor([[1, 2, 3, 4]])
        >>> loss = weighted_mtp_loss(logits, labels, torch.tensor([[0.0, 1.0, 2.0, 0.5]]))
        >>> loss.backward()
        >>> loss  # log 8
        tensor(2.0794, grad_fn=<SumBackward0>)

    Source: multi-token prediction: arXiv:2404.19737, equation 2; token weights: Rho-1,
    arXiv:2404.07965, equation 4.
    """
    objective = Objective(label_smoothing, z_loss, softcap).checked()
    found = predict(logits, labels, offsets, ignore_index, objective)
    if isinstance(weights, RowLocalWeights):
        weights = weights_from_logits(weights, logits, found, objective)
    steps = known_offsets(offsets, labels, found.valid.shape[2])
    return _weigh(found, weights, steps, head_weights, normalizer)[0]


@typed
def linear_weighted_mtp_loss(
    hidden: Float[Tensor, "batch seq heads dim"] | Float[Tensor, "batch seq dim"],
    unembedding: Float[Tensor, "vocab dim"],
    labels: Int64[Tensor, "batch seq"] | Int64[Tensor, "batch seq heads"],
    weights: Weights = None,
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    offsets: Offsets | None = None,
    head_weights: HeadWeights = None,
    normalizer: Normalizer = "weights",
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    slab_bytes: int | None = None,
) -> Float[Tensor, ""]:
    """``weighted_mtp_loss`` on ``hidden @ unembedding.T + bias``, with bounded memory.

    One call covers all heads and gives one gradient of the unembedding. Predictions without a target
    enter no product; in the backward pass neither do those of weight 0.

    Weights that are known, ``RowLocalWeights``, and a ``functools.partial`` of ``rho1_weights`` (top-k,
    not under ``torch.compile``, with a default ``slab_bytes`` or enough) make gradients in the forward
    pass. The last is asked several times, as the cross entropy comes in, which predictions it would
    keep; what it says when it knows all is what counts, and rows that were guessed wrong are corrected
    in the backward pass. Any other function is called once, and the logits of what it keeps are made
    twice. On CUDA, in eager mode, logits that are kept (see ``slab_bytes``) are made once whatever the
    weights.

    Args:
        hidden: ``[batch seq heads dim]``, or ``[batch seq dim]`` meaning one head.
        unembedding: ``[vocab dim]``, of the same dtype.
        labels: as in ``weighted_mtp_loss``, and so are all that follow but the next and the last.
        weights: ``None``, ``[batch seq]``, ``[batch seq heads]``, a function or ``RowLocalWeights``.
        bias: ``[vocab]``, or ``None``.
        offsets: which token each head predicts.
        head_weights: ``λ``.
        normalizer: ``"weights"``, ``"tokens"`` or a count.
        ignore_index: the label that means "no target".
        label_smoothing: ``ε`` in [0, 1].
        z_loss: coefficient of ``lse²``.
        softcap: positive bound of the logits, or ``None``.
        slab_bytes: how many bytes to hold beside inputs and gradients, at least one row of logits. What
            it is by default, and what of the logits is kept on CUDA: as in ``linear_mtp_ce_loss``.

    Returns:
        A scalar as ``weighted_mtp_loss`` gives it, with first-order gradients for hidden states,
        unembedding, bias and weights, whichever require them.

    Raises:
        ValueError: as ``weighted_mtp_loss`` and ``linear_mtp_ce_loss``.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> hidden, unembedding = torch.zeros(1, 4, 2, 3), torch.zeros(8, 3)
        >>> linear_weighted_mtp_loss(hidden, unembedding, torch.tensor([[1, 2, 3, 4]]))  # log 8
        tensor(2.0794)

    Source: as ``weighted_mtp_loss``; the schedule: arXiv:2411.09009, section 4.
    """
    objective = Objective(label_smoothing, z_loss, softcap).checked()
    problem, valid = linear_problem(
        hidden, unembedding, labels, bias, offsets, ignore_index, objective, slab_bytes
    )
    steps = known_offsets(offsets, labels, valid.shape[2])
    return _weigh_linear(problem, valid, weights, steps, head_weights, normalizer)[0]


@typed
def weighted_mtp_loss_and_stats(
    logits: Float[Tensor, "batch seq heads vocab"] | Float[Tensor, "batch seq vocab"],
    labels: Int64[Tensor, "batch seq"] | Int64[Tensor, "batch seq heads"],
    weights: Weights = None,
    *,
    offsets: Offsets | None = None,
    head_weights: HeadWeights = None,
    normalizer: Normalizer = "weights",
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Float[Tensor, ""], MTPLossStats]:
    """``weighted_mtp_loss`` and what the same pass knows of every head.

    Args:
        logits: as in ``weighted_mtp_loss``, and so are the others.
        labels: ``[batch seq]`` or ``[batch seq heads]``.
        weights: ``None``, ``[batch seq]``, ``[batch seq heads]``, a function or ``RowLocalWeights``.
        offsets: which token each head predicts.
        head_weights: ``λ``.
        normalizer: ``"weights"``, ``"tokens"`` or a count.
        ignore_index: the label that means "no target".
        label_smoothing: ``ε`` in [0, 1].
        z_loss: coefficient of ``lse²``.
        softcap: positive bound of the logits, or ``None``.

    Returns:
        The loss and ``MTPLossStats``: detached sums and counts, to be added over micro-batches and
        ranks before dividing.

    Raises:
        ValueError: as ``weighted_mtp_loss``.
        TypeError: as ``weighted_mtp_loss``.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[0, 0, 0, 1]])
        >>> loss, stats = weighted_mtp_loss_and_stats(torch.zeros(1, 4, 2, 8), labels)
        >>> stats.head_accuracy / stats.token_count  # ties go to the first token, 0
        tensor([0.6667, 0.5000])

    Source: as ``weighted_mtp_loss``.
    """
    objective = Objective(label_smoothing, z_loss, softcap).checked()
    found = predict(logits, labels, offsets, ignore_index, objective, with_correct=True)
    if isinstance(weights, RowLocalWeights):
        weights = weights_from_logits(weights, logits, found, objective)
    steps = known_offsets(offsets, labels, found.valid.shape[2])
    loss, used = _weigh(found, weights, steps, head_weights, normalizer)
    return loss, _stats(found, used)


@typed
def linear_weighted_mtp_loss_and_stats(
    hidden: Float[Tensor, "batch seq heads dim"] | Float[Tensor, "batch seq dim"],
    unembedding: Float[Tensor, "vocab dim"],
    labels: Int64[Tensor, "batch seq"] | Int64[Tensor, "batch seq heads"],
    weights: Weights = None,
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    offsets: Offsets | None = None,
    head_weights: HeadWeights = None,
    normalizer: Normalizer = "weights",
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    slab_bytes: int | None = None,
) -> tuple[Float[Tensor, ""], MTPLossStats]:
    """``linear_weighted_mtp_loss`` and what the same pass knows of every head.

    Args:
        hidden: as in ``linear_weighted_mtp_loss``, and so are the others.
        unembedding: ``[vocab dim]``.
        labels: ``[batch seq]`` or ``[batch seq heads]``.
        weights: ``None``, ``[batch seq]``, ``[batch seq heads]``, a function or ``RowLocalWeights``.
        bias: ``[vocab]``, or ``None``.
        offsets: which token each head predicts.
        head_weights: ``λ``.
        normalizer: ``"weights"``, ``"tokens"`` or a count.
        ignore_index: the label that means "no target".
        label_smoothing: ``ε`` in [0, 1].
        z_loss: coefficient of ``lse²``.
        softcap: positive bound of the logits, or ``None``.
        slab_bytes: how many bytes to hold beside inputs and gradients.

    Returns:
        The loss and ``MTPLossStats``, as ``weighted_mtp_loss_and_stats``.

    Raises:
        ValueError: as ``linear_weighted_mtp_loss``.
        TypeError: as ``linear_weighted_mtp_loss``.

    Example:
        >>> import torch
        >>> hidden, unembedding = torch.zeros(1, 4, 2, 3), torch.zeros(8, 3)
        >>> labels = torch.tensor([[1, 2, 3, 4]])
        >>> loss, stats = linear_weighted_mtp_loss_and_stats(hidden, unembedding, labels)
        >>> stats.token_count
        tensor([3., 2.])

    Source: as ``linear_weighted_mtp_loss``.
    """
    objective = Objective(label_smoothing, z_loss, softcap).checked()
    problem, valid = linear_problem(
        hidden, unembedding, labels, bias, offsets, ignore_index, objective, slab_bytes
    )
    steps = known_offsets(offsets, labels, valid.shape[2])
    loss, used, found = _weigh_linear(
        problem, valid, weights, steps, head_weights, normalizer, with_stats=True
    )
    return loss, _stats(found, used)


def _weigh(
    found: Predictions,
    weights: Tensor | WeightFunction | None,
    offsets: Offsets | None,
    head_weights: HeadWeights,
    normalizer: Normalizer,
) -> tuple[Tensor, Tensor | None]:
    """The loss of predictions, and the weights it used."""
    if callable(weights):
        check_rho1_offsets(weights, offsets, found.valid.shape[2])
        used = _call_weights(weights, found)
    else:
        used = _align_weights(weights, found.valid, offsets)
    loss = weighted_mean(
        found.loss, used, found.valid, head_weights=head_weights, normalizer=normalizer
    )
    return loss, used


def _weigh_linear(
    problem: Problem,
    valid: Tensor,
    weights: Tensor | WeightFunction | RowLocalWeights | None,
    offsets: Offsets | None,
    head_weights: HeadWeights,
    normalizer: Normalizer,
    *,
    with_stats: bool = False,
) -> tuple[Tensor, Tensor | None, Predictions]:
    """The loss of a linear problem, the weights it used, and what was found on the way.

    Weights that are known, or that a row determines, make gradients in the forward pass, three
    products in all; so do weights that can be guessed while the cross entropy of some rows is awaited.
    Others that wait for it need a fourth, to recompute the logits of what they leave.
    """
    if losses_first(problem) and not needs_whole_rows(weights):
        if asks_ranks(weights):
            # Nothing is guessed here, but on another rank, whose sizes differ, there may be a guess. It
            # adds counts up over the ranks, and every rank must join every collective.
            early_rho1(weights, valid, problem.wide)
        return _weigh_late(
            problem, valid, weights, offsets, head_weights, normalizer, with_stats=with_stats
        )
    if isinstance(weights, RowLocalWeights):
        # The weights are not known yet, and neither is a denominator made of them.
        by_weights = normalizer == "weights"
        factors = factors_of(
            None, valid, head_weights, 1.0 if by_weights else normalizer, problem.wide
        )
        loss, found, used = linear_weighted_sum(
            problem, valid, factors, as_operator_takes(weights), with_stats=with_stats
        )
        if by_weights:
            whole = torch.where(valid, used, 0).sum() / valid.shape[2]
            # Less than this has no reciprocal: every probability underflowed.
            least = torch.finfo(problem.wide).tiny
            loss = loss * reciprocal(torch.where(whole < least, 0, whole))
        return loss, used, found
    if callable(weights):
        guess = None
        # An operator cannot call back into what a compiler traces.
        if not torch.compiler.is_compiling():
            early = early_rho1(weights, valid, problem.wide)
            guess = None if early is None else _guess(*early, valid, head_weights, normalizer)
        found = linear_predict(problem, valid, with_correct=with_stats, guess=guess)
        return *_weigh(found, weights, offsets, head_weights, normalizer), found
    used = _align_weights(weights, valid, offsets)
    factors = factors_of(used, valid, head_weights, normalizer, problem.wide)
    loss, found, _ = linear_weighted_sum(problem, valid, factors, with_stats=with_stats)
    return loss, used, found


def _weigh_late(
    problem: Problem,
    valid: Tensor,
    weights: Tensor | WeightFunction | RowLocalWeights | None,
    offsets: Offsets | None,
    head_weights: HeadWeights,
    normalizer: Normalizer,
    *,
    with_stats: bool,
) -> tuple[Tensor, Tensor | None, Predictions]:
    """The same where it costs nothing to know the losses before what they count.

    One product for all that may count, and two for those that do, whatever determines it.
    """
    count = None
    if isinstance(weights, Tensor | None):
        weights = _align_weights(weights, valid, offsets)
        if not with_stats:
            count = _counted(weights, valid, head_weights, problem.wide)
    if count is not None:
        problem = problem.only(count.flatten())
    # By a denominator that may be 0 it is not known that any of these counts.
    may_be_0 = isinstance(normalizer, Tensor) or normalizer == 0
    all_count = count is not None and not may_be_0
    found = linear_predict(problem, valid, with_correct=with_stats, all_count=all_count)
    if isinstance(weights, RowLocalWeights):
        weights = weights_from_ce(weights, found.ce)
    return *_weigh(found, weights, offsets, head_weights, normalizer), found


def _counted(
    weights: Tensor | None, valid: Tensor, head_weights: HeadWeights, dtype: torch.dtype
) -> Bool[Tensor, "batch seq heads"] | None:
    """Which predictions count in the loss; ``None`` if a gradient wants to know it of the others."""
    count = valid
    lambdas = None if head_weights is None else head_weights_of(head_weights, valid.to(dtype))
    for weight in (weights, lambdas):
        if weight is not None:
            if weight.requires_grad and torch.is_grad_enabled():
                return None
            count = count & (weight != 0)
    return count


def _guess(
    select: Callable[[Tensor, Tensor], Tensor],
    kept: Tensor,
    valid: Tensor,
    head_weights: HeadWeights,
    normalizer: Normalizer,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that predicts each prediction's factor in the loss from the cross entropy so far.

    The selection among the predictions seen stands for the selection among all. Only which ones are kept
    is guessed: the factor of a kept one is known beforehand.
    """
    # The weights have mean one, so their sum is the number of predictions.
    count = "tokens" if normalizer == "weights" else normalizer
    factors = factors_of(kept, valid, head_weights, count, kept.dtype).detach()

    def guess(token_ce: Tensor, seen: Tensor) -> Tensor:
        return torch.where(select(token_ce, valid & seen) > 0, factors, 0)

    return guess


def _call_weights(function: WeightFunction, found: Predictions) -> Tensor:
    # Copies: the statistics and the loss's mask are not the function's to change.
    made = function(found.ce.clone(), found.valid.clone())
    if not isinstance(made, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"the weights function must return a tensor, got {type(made).__name__}")
    _checks.shape_is("the weights function's result", made, found.valid.shape, "batch seq heads")
    return made


def _align_weights(weights: Tensor | None, valid: Tensor, offsets: Offsets | None) -> Tensor | None:
    """Weights of predictions from weights of tokens, or as they are."""
    if weights is None:
        return None
    _checks.plain_tensors(weights=weights)
    _checks.rank_in("weights", weights, (2, 3), "[batch seq] or [batch seq heads]")
    _checks.same_device(predictions=valid, weights=weights)
    if weights.dim() == 3:
        _checks.shape_is("weights", weights, valid.shape, "batch seq heads")
        return weights
    _checks.shape_is("weights", weights, valid.shape[:2], "batch seq")
    return align_to_heads(weights, offsets_for(offsets, valid.shape[2], "the predictions"))


def _stats(found: Predictions, weights: Tensor | None) -> MTPLossStats:
    valid = found.valid
    loss = found.loss.detach()
    used = valid.to(loss.dtype)
    if weights is not None:
        used = torch.where(valid, weights.detach().to(loss.dtype), 0)
    assert found.correct is not None
    sums = rearrange(
        [
            torch.where(used != 0, used * loss, 0),
            found.correct.to(loss.dtype),
            used,
            valid.to(loss.dtype),
        ],
        "quantity batch seq heads -> quantity heads (batch seq)",
    ).sum(-1)
    return MTPLossStats(found.ce, sums[0], sums[1], sums[2], sums[3])
