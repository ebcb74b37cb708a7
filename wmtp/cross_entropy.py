"""How surprised each head was: cross entropy of every prediction, from logits.

This is the dense path, plain differentiable torch operations on logits that the caller holds. The
same numbers without holding the logits are in ``linear_cross_entropy.py``.
"""

from typing import Literal, NamedTuple, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from wmtp import _checks
from wmtp._dtypes import wide
from wmtp._typing import typed
from wmtp.documents import shift_right
from wmtp.targets import IGNORE_INDEX, Offsets, mtp_targets, resolve_targets


Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = get_args(Reduction)


class Objective(NamedTuple):
    """What is minimised per prediction, beside the plain cross entropy.

    ``ℓ = (1 − ε) · (−log p_y) + ε · mean_v(−log p_v) + z_loss · lse²`` on
    ``softcap · tanh(logits / softcap)``, with ``ε`` the label smoothing.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def checked(self) -> "Objective":
        """Refuse values outside their ranges."""
        _checks.in_range("label_smoothing", self.label_smoothing, 0.0, 1.0)
        _checks.in_range("z_loss", self.z_loss, 0.0, open_high=True)
        if self.softcap is not None:
            _checks.in_range("softcap", self.softcap, 0.0, open_low=True, open_high=True)
        return self

    @property
    def numbers(self) -> tuple[float, float, float]:
        """The three as plain floats; a softcap of 0 means none."""
        return float(self.label_smoothing), float(self.z_loss), float(self.softcap or 0.0)


class Predictions(NamedTuple):
    """What one pass over the logits knows of every prediction, 0 (or false) where there is no target.

    Attributes:
        loss: the objective ``ℓ``, differentiable.
        ce: the plain cross entropy ``−log p_y``, detached.
        correct: whether the target is the first most probable token, or ``None`` if not asked for.
        valid: whether there is a target.
        target: the target, 0 where there is none.
    """

    loss: Float[Tensor, "batch seq heads"]
    ce: Float[Tensor, "batch seq heads"]
    correct: Bool[Tensor, "batch seq heads"] | None
    valid: Bool[Tensor, "batch seq heads"]
    target: Int64[Tensor, "batch seq heads"]


@typed
def mtp_ce_loss(
    logits: Float[Tensor, "batch seq heads vocab"] | Float[Tensor, "batch seq vocab"],
    labels: Int64[Tensor, "batch seq"] | Int64[Tensor, "batch seq heads"],
    *,
    offsets: Offsets | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "batch seq heads"]:
    """Cross entropy of every head at every position, unweighted.

    ``ℓ[b, t, h] = −log softmax(logits[b, t, h])[x[b, t + offsets[h]]]``, with label smoothing as in
    ``F.cross_entropy`` plus ``z_loss · lse²``, after ``softcap · tanh(logits / softcap)``. Computed
    in float32 (float64 for float64 logits) whatever the input dtype, autocast or not.

    Args:
        logits: ``[batch seq heads vocab]``, or ``[batch seq vocab]`` meaning one head. Positions
            without a target may hold anything, NaN included: their gradient is exactly 0.
        labels: ``[batch seq]`` int64, unshifted, aligned here with ``offsets``; or
            ``[batch seq heads]`` as ``mtp_targets`` makes them.
        offsets: which token each head predicts, ``1, …, heads`` by default.
        ignore_index: the label that means "no target".
        label_smoothing: ``ε`` in [0, 1].
        z_loss: coefficient of ``lse²``, at least 0.
        softcap: positive bound of the logits, or ``None``.
        reduction: ``"mean"`` over all valid predictions of all heads (0 if there is none), ``"sum"``,
            or ``"none"`` for ``[batch seq heads]``, exactly 0 where ignored.

    Returns:
        A scalar, or ``[batch seq heads]`` (with ``heads = 1`` for 3-D logits).

    Raises:
        ValueError: shapes that do not fit, numbers out of range, and on the CPU a valid label
            outside the vocabulary (an ``IndexError`` too; under ``torch.compile`` a ``RuntimeError``).
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(1, 4, 2, 8), torch.tensor([[1, 2, 3, 4]])
        >>> mtp_ce_loss(logits, labels)  # log 8
        tensor(2.0794)

    Source: arXiv:2404.19737, equation 2; z-loss: PaLM, arXiv:2204.02311, section 5; softcap:
    Gemma 2, arXiv:2408.00118, section 2.
    """
    objective = Objective(label_smoothing, z_loss, softcap).checked()
    _checks.one_of("reduction", reduction, REDUCTIONS)
    found = predict(logits, labels, offsets, ignore_index, objective)
    return reduce_predictions(found, reduction)


@typed
def token_nll(
    logits: Float[Tensor, "batch seq vocab"],
    labels: Int64[Tensor, "batch seq"],
    *,
    ignore_index: int = IGNORE_INDEX,
    attention_mask: Shaped[Tensor, "batch seq"] | None = None,
    position_ids: Int[Tensor, "batch seq"] | None = None,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch seq"]:
    """Next-token negative log-likelihood, indexed by token: what a reference model is scored with.

    ``out[b, j] = −log p(x_j | x_<j)``, from the logits at position ``j − 1``; 0 where there is none:
    the first token of a row or document, ignored labels, padding.

    Args:
        logits: ``[batch seq vocab]`` of an ordinary next-token model.
        labels: ``[batch seq]`` int64, unshifted.
        ignore_index: the label that means "no target".
        attention_mask: as in ``mtp_targets``, like the other descriptions of documents.
        position_ids: as in ``mtp_targets``.
        segment_ids: as in ``mtp_targets``.
        cu_seqlens: as in ``mtp_targets``.
        softcap: positive bound of the logits, or ``None``.

    Returns:
        ``[batch seq]`` float32 (float64 for float64 logits), in nats, at least 0; differentiable.

    Raises:
        ValueError: as ``mtp_targets`` and ``mtp_ce_loss``, and so are ``RuntimeError``s.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> token_nll(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]))
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
    return shift_right(predict(logits, targets, None, ignore_index, objective).loss[..., 0])


def predict(
    logits: Tensor,
    labels: Tensor,
    offsets: Offsets | None,
    ignore_index: int,
    objective: Objective,
    *,
    with_correct: bool = False,
) -> Predictions:
    """Everything the losses need of the logits."""
    _checks.plain_tensors(logits=logits, labels=labels)
    logits = with_heads("logits", logits, "vocab")
    batch, seq, heads, vocab = logits.shape
    _checks.same_device(logits=logits, labels=labels)
    targets, valid = resolve_targets(labels, offsets, batch, seq, heads, ignore_index)
    _checks.labels_in_range(targets, valid, vocab)

    # Masked before the risky operations, so that whatever stands in an ignored row reaches neither
    # the loss nor, as NaN · 0, the gradient; and masked again after them, for an exact zero.
    rows = rearrange(valid, "batch seq heads -> batch seq heads 1")
    scores = capped(wide(torch.where(rows, logits, 0)), objective.softcap)
    target = torch.where(valid, targets, 0)
    index = rearrange(target, "batch seq heads -> batch seq heads 1")
    log_probs = F.log_softmax(scores, dim=-1)
    ce = -log_probs.gather(-1, index)
    loss = ce
    if objective.label_smoothing:
        smooth = -log_probs.mean(-1, keepdim=True)
        loss = torch.lerp(ce, smooth, objective.label_smoothing)
    if objective.z_loss:
        lse = scores.logsumexp(-1, keepdim=True)
        loss = loss + objective.z_loss * lse.square()
    correct = None
    if with_correct:
        correct = valid & (scores.argmax(-1, keepdim=True) == index)[..., 0]
    return Predictions(
        loss=torch.where(rows, loss, 0)[..., 0],
        ce=torch.where(rows, ce.detach(), 0)[..., 0],
        correct=correct,
        valid=valid,
        target=target,
    )


def reduce_predictions(
    found: Predictions, reduction: Reduction
) -> Float[Tensor, ""] | Float[Tensor, "batch seq heads"]:
    """Mean over the valid predictions, sum, or every prediction by itself."""
    if reduction == "none":
        return found.loss
    total = found.loss.sum()
    return total if reduction == "sum" else total / found.valid.sum().clamp(min=1)


def with_heads(name: str, tensor: Tensor, last: str) -> Tensor:
    """Give a tensor for one head its axis of heads."""
    _checks.rank_in(name, tensor, (3, 4), f"[batch seq heads {last}] or [batch seq {last}]")
    if tensor.shape[-1] == 0:
        raise ValueError(
            f"{name} must have at least one entry on its last axis ({last}), got {list(tensor.shape)}"
        )
    if tensor.dim() == 4 and tensor.shape[2] == 0:
        raise ValueError(f"{name} must have at least one head, got {list(tensor.shape)}")
    return tensor if tensor.dim() == 4 else rearrange(tensor, "batch seq last -> batch seq 1 last")


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Logits bounded to ``(−softcap, softcap)``, smoothly."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
