"""Cross entropy straight from hidden states and unembedding, holding logits within a budget only.

The same numbers as ``cross_entropy.py`` gives on ``hidden @ unembedding.T + bias``. What is computed
when is in ``slab_columns.py`` and ``slab_rows.py``, how autograd and compilers see it in
``operators.py``.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Int64, Shaped
from torch import Tensor

from wmtp import _checks
from wmtp._dtypes import autocasts
from wmtp._typing import typed
from wmtp.cross_entropy import (
    REDUCTIONS,
    Objective,
    Predictions,
    Reduction,
    reduce_predictions,
    with_heads,
)
from wmtp.documents import shift_right
from wmtp.operators import guessed_row_losses, row_losses, weighted_row_sum
from wmtp.problem import NOT_LOCAL, Problem, RowLocal, Rows, slab_budget, targets_of
from wmtp.schedule import losses_first
from wmtp.targets import IGNORE_INDEX, Offsets, mtp_targets, resolve_targets


@typed
def linear_mtp_ce_loss(
    hidden: Float[Tensor, "batch seq heads dim"] | Float[Tensor, "batch seq dim"],
    unembedding: Float[Tensor, "vocab dim"],
    labels: Int64[Tensor, "batch seq"] | Int64[Tensor, "batch seq heads"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    offsets: Offsets | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    slab_bytes: int | None = None,
) -> Float[Tensor, ""] | Float[Tensor, "batch seq heads"]:
    """``mtp_ce_loss`` on ``hidden @ unembedding.T + bias``, with bounded memory.

    Each product is rounded to the dtype of the inputs, as ``F.linear`` rounds it; all that follows
    (softcap, log-sum-exp, cross entropy, the sums of both gradients) is float32, or float64 for
    float64 inputs. Under autocast hidden states, unembedding and bias are cast to its dtype first, as
    ``F.linear`` would.

    A mean and a sum make gradients in the forward pass: three products of the predictions that have a
    target. ``"none"`` takes a fourth, for what each counts is known in the backward pass only, and so do
    narrow dtypes whose float32 sums ``slab_bytes`` does not hold; on CUDA not for logits that are kept.

    Args:
        hidden: ``[batch seq heads dim]``, or ``[batch seq dim]`` meaning one head. Rows without a
            target may hold anything, NaN included, and get a gradient of exactly 0.
        unembedding: ``[vocab dim]``, of the same dtype as ``hidden``.
        labels: as in ``mtp_ce_loss``.
        bias: ``[vocab]``, or ``None``.
        offsets: as in ``mtp_ce_loss``, and so are the next five.
        ignore_index: the label that means "no target".
        label_smoothing: ``ε`` in [0, 1].
        z_loss: coefficient of ``lse²``, at least 0.
        softcap: positive bound of the logits, or ``None``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        slab_bytes: how many bytes to hold beside inputs and gradients, at least one row of logits. By
            default 64 MiB or the unembedding's size, whichever is more, and for bfloat16 and float16
            what float32 sums of both gradients take. On CUDA, in eager mode, logits that fit are kept
            for the backward pass, which is fastest, and the default may hold all of them. For the
            least memory give less, say 0.3 GiB: the same numbers, for up to one product more. What
            comes on top, and what is kept where: see ``slab_layout.py``.

    Returns:
        A scalar, or ``[batch seq heads]`` for ``reduction="none"``. First-order gradients flow to
        hidden states, unembedding and bias, whichever require them; a second backward through the
        gradients themselves raises (use ``mtp_ce_loss`` for that).

    Raises:
        ValueError: as ``mtp_ce_loss``, for a label on a GPU and under ``torch.compile`` too; hidden and
            unembedding of different dims, dtypes or devices; a slab smaller than one row of logits.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> hidden, unembedding = torch.zeros(1, 4, 2, 3), torch.zeros(8, 3)
        >>> linear_mtp_ce_loss(hidden, unembedding, torch.tensor([[1, 2, 3, 4]]))  # log 8
        tensor(2.0794)

    Source: arXiv:2404.19737, equation 2; recomputing in the backward pass as in "Cut Your Losses in
    Large-Vocabulary Language Models", arXiv:2411.09009.
    """
    objective = Objective(label_smoothing, z_loss, softcap).checked()
    _checks.one_of("reduction", reduction, REDUCTIONS)
    problem, valid = linear_problem(
        hidden, unembedding, labels, bias, offsets, ignore_index, objective, slab_bytes
    )
    if reduction == "none" or losses_first(problem):
        found = linear_predict(problem, valid, all_count=reduction != "none")
        return reduce_predictions(found, reduction)
    # What each counts is known, so that gradients are made in the same pass.
    factors = valid.to(problem.wide)
    if reduction == "mean":
        factors = factors / valid.sum().clamp(min=1)
    return linear_weighted_sum(problem, valid, factors)[0]


@typed
def linear_token_nll(
    hidden: Float[Tensor, "batch seq dim"],
    unembedding: Float[Tensor, "vocab dim"],
    labels: Int64[Tensor, "batch seq"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    ignore_index: int = IGNORE_INDEX,
    attention_mask: Shaped[Tensor, "batch seq"] | None = None,
    position_ids: Int[Tensor, "batch seq"] | None = None,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    softcap: float | None = None,
    slab_bytes: int | None = None,
) -> Float[Tensor, "batch seq"]:
    """``token_nll`` on ``hidden @ unembedding.T + bias``, with bounded memory.

    ``out[b, j] = −log p(x_j | x_<j)``, 0 where there is none.

    Args:
        hidden: ``[batch seq dim]``, the last hidden states of an ordinary next-token model.
        unembedding: ``[vocab dim]``, of the same dtype.
        labels: ``[batch seq]`` int64, unshifted.
        bias: ``[vocab]``, or ``None``.
        ignore_index: the label that means "no target".
        attention_mask: as in ``mtp_targets``, like the other descriptions of documents.
        position_ids: as in ``mtp_targets``.
        segment_ids: as in ``mtp_targets``.
        cu_seqlens: as in ``mtp_targets``.
        softcap: positive bound of the logits, or ``None``.
        slab_bytes: how many bytes to hold beside the inputs, as in ``linear_mtp_ce_loss``.

    Returns:
        ``[batch seq]`` float32 (float64 for float64 inputs), in nats, at least 0.

    Raises:
        ValueError: as ``mtp_targets`` and ``linear_mtp_ce_loss``, and so are ``RuntimeError``s.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> linear_token_nll(torch.zeros(1, 3, 2), torch.zeros(4, 2), torch.tensor([[0, 1, 2]]))
        tensor([[0.0000, 1.3863, 1.3863]])

    Source: Rho-1, arXiv:2404.07965, equation 2.
    """
    targets = mtp_targets(
        labels,
        1,
        ignore_index=ignore_index,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
    )
    objective = Objective(softcap=softcap).checked()
    problem, valid = linear_problem(
        hidden, unembedding, targets, bias, None, ignore_index, objective, slab_bytes
    )
    found = linear_predict(problem, valid)
    return shift_right(found.loss[..., 0])


def linear_problem(
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    offsets: Offsets | None,
    ignore_index: int,
    objective: Objective,
    slab_bytes: int | None,
) -> tuple[Problem, Bool[Tensor, "batch seq heads"]]:
    """Checked arguments as rows of one problem, and which predictions have a target."""
    _checks.plain_tensors(hidden=hidden, unembedding=unembedding, bias=bias, labels=labels)
    if slab_bytes is not None:
        _checks.whole("slab_bytes", slab_bytes)
    hidden = with_heads("hidden", hidden, "dim")
    _checks.rank_in("unembedding", unembedding, (2,), "[vocab dim], gathered if sharded")
    batch, seq, heads, dim = hidden.shape
    vocab = unembedding.shape[0]
    if unembedding.shape[1] != dim:
        raise ValueError(
            f"hidden and unembedding must have the same last axis (dim), "
            f"got {dim} and {unembedding.shape[1]}"
        )
    if vocab == 0:
        raise ValueError("unembedding must have at least one row (vocab), got [0, dim]")
    if bias is not None:
        _checks.shape_is("bias", bias, (vocab,), "vocab")
    _checks.same_device(hidden=hidden, unembedding=unembedding, bias=bias, labels=labels)
    targets, valid = resolve_targets(labels, offsets, batch, seq, heads, ignore_index)
    _checks.labels_in_range(targets, valid, vocab)

    wide = torch.float64 in (hidden.dtype, unembedding.dtype)
    if not wide and autocasts(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, unembedding = hidden.to(dtype), unembedding.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _checks.same_dtype(hidden=hidden, unembedding=unembedding, bias=bias)
    rows = rearrange(hidden, "batch seq heads dim -> (batch seq heads) dim")
    target = rearrange(targets_of(targets, valid), "batch seq heads -> (batch seq heads)")
    budget = slab_budget(slab_bytes, rows, unembedding)
    return Problem(rows, unembedding, bias, target, *objective.numbers, budget), valid


def linear_predict(
    problem: Problem,
    valid: Bool[Tensor, "batch seq heads"],
    *,
    with_correct: bool = False,
    guess: Callable[[Tensor, Tensor], Tensor] | None = None,
    all_count: bool = False,
) -> Predictions:
    """Everything the losses need of the predictions, as ``predict`` gives it for logits.

    ``guess(token_ce, seen)`` predicts the upstream gradient of every prediction, up to a common factor,
    from the cross entropy of those seen so far; both arguments and the result are ``[batch seq heads]``.
    Gradients for the non-zero ones are made in the same pass, and wrong guesses are corrected in the
    backward pass, at three products per wrong row. ``all_count``: see ``row_losses``.
    """
    if guess is None:
        rows = row_losses(problem, with_correct, all_count)
    else:

        def of_rows(ce: Tensor, seen: Tensor) -> Tensor:
            return guess(ce.view(valid.shape), seen.view(valid.shape)).flatten()

        rows = guessed_row_losses(problem, of_rows, with_correct)
    return _predictions(rows, problem, valid, with_correct)


def linear_weighted_sum(
    problem: Problem,
    valid: Bool[Tensor, "batch seq heads"],
    factors: Float[Tensor, "batch seq heads"],
    weighting: RowLocal = NOT_LOCAL,
    *,
    with_stats: bool = False,
) -> tuple[Float[Tensor, ""], Predictions, Float[Tensor, "batch seq heads"]]:
    """``Σ factor · weight · ℓ`` for factors that do not depend on ``ℓ``, gradients in the same pass.

    The weight is what ``weighting`` makes of each prediction's own logits, and is given back. The
    predictions are detached, and without ``with_stats`` known only where the factor is not 0.
    """
    flat = rearrange(factors, "batch seq heads -> (batch seq heads)")
    total, rows = weighted_row_sum(problem, flat, with_stats, weighting)
    return total, _predictions(rows, problem, valid, with_stats), rows.weight.view(valid.shape)


def _predictions(rows: Rows, problem: Problem, valid: Tensor, with_correct: bool) -> Predictions:
    return Predictions(
        loss=rows.loss.view(valid.shape),
        ce=rows.ce.detach().view(valid.shape),
        correct=rows.correct.view(valid.shape) if with_correct else None,
        valid=valid,
        target=problem.target.clamp(min=0).view(valid.shape),
    )
