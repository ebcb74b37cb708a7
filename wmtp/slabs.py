"""The schedule of the linear losses: which slab of logits is computed when, and kept how long.

Two custom operators, opaque to ``torch.compile``: the forward pass over slabs of rows, and its
gradient over slabs of vocabulary. Rows without a target (``target < 0``) enter no product.
"""

from typing import Any

import torch
from torch import Tensor


DEFAULT_SLAB_BYTES = 64 * 2**20
# Slabs of vocabulary narrower than this waste the matrix units; more rows are blocked instead.
_MIN_COLUMNS = 256


def slab_budget(slab_bytes: int | None, vocab: int, dtype: torch.dtype) -> int:
    """Bytes of logits that may be held at once, refused if not even one row fits."""
    if slab_bytes is None:
        return max(DEFAULT_SLAB_BYTES, vocab * _bytes_per_logit(dtype))
    if slab_bytes < vocab * _bytes_per_logit(dtype):
        raise ValueError(
            f"slab_bytes must hold at least one row of logits, "
            f"{vocab * _bytes_per_logit(dtype)} bytes for a vocabulary of {vocab}, got {slab_bytes}"
        )
    return slab_bytes


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bytes_per_logit(dtype: torch.dtype) -> int:
    """A slab holds the product in the input dtype and, if that is narrow, its float32 copy."""
    return dtype.itemsize if dtype.itemsize >= 4 else dtype.itemsize + 4


@torch.library.custom_op("wmtp::linear_ce", mutates_args=())
def linear_ce(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    slab_bytes: int,
    with_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, plain cross entropy, log-sum-exp and top-1 hit of every row.

    Args:
        hidden: ``[rows dim]``.
        unembedding: ``[vocab dim]``, same dtype.
        bias: ``[vocab]`` or ``None``.
        target: ``[rows]`` int64, negative where there is none.
        label_smoothing: see ``Objective``.
        z_loss: see ``Objective``.
        softcap: see ``Objective``; 0 means none.
        slab_bytes: budget for the logits held at once.
        with_correct: whether to look for the most probable token.

    Returns:
        ``loss``, ``ce``, ``lse`` (float32 or wider) and ``correct`` (bool; empty if not asked for),
        each ``[rows]``, 0 where there is no target. Only ``loss`` is differentiable.
    """
    rows, vocab = hidden.shape[0], unembedding.shape[0]
    wide = _wide(hidden.dtype)
    loss, ce, lse = (hidden.new_zeros(rows, dtype=wide) for _ in range(3))
    correct = hidden.new_zeros(rows if with_correct else 0, dtype=torch.bool)
    # One deliberate synchronisation: rows without a target are left out of the products.
    active = (target >= 0).nonzero().squeeze(1)
    step = max(1, slab_bytes // (vocab * _bytes_per_logit(hidden.dtype)))
    slab = hidden.new_empty(min(step, len(active)), vocab)
    for start in range(0, len(active), step):
        block = active[start : start + step]
        logits = _logits(hidden[block], unembedding, bias, softcap, slab[: len(block)])
        wanted = target[block].unsqueeze(1)
        chosen = logits.gather(1, wanted).squeeze(1)
        if with_correct:
            correct[block] = logits.argmax(1, keepdim=True).eq(wanted).squeeze(1)
        mean = logits.mean(1) if label_smoothing else None
        peak = logits.amax(1, keepdim=True)
        # In place, so that the slab is all that is held.
        block_lse = logits.sub_(peak).exp_().sum(1).log_() + peak.squeeze(1)
        block_ce = block_lse - chosen
        block_loss = block_ce
        if mean is not None:
            block_loss = torch.lerp(block_ce, block_lse - mean, label_smoothing)
        if z_loss:
            block_loss = block_loss + z_loss * block_lse.square()
        loss[block], ce[block], lse[block] = block_loss, block_ce, block_lse
    return loss, ce, lse, correct


@linear_ce.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    slab_bytes: int,
    with_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    loss, ce, lse = (hidden.new_empty(rows, dtype=_wide(hidden.dtype)) for _ in range(3))
    return loss, ce, lse, hidden.new_empty(rows if with_correct else 0, dtype=torch.bool)


@torch.library.custom_op("wmtp::linear_ce_backward", mutates_args=())
def linear_ce_backward(
    grad: Tensor,
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    slab_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for hidden states, unembedding and bias; empty where not needed.

    ``dℓ/dz_v = p_v · (1 + 2 · z_loss · lse) − (1 − ε) · [v = y] − ε / V``, times the upstream
    gradient of the row and the slope of the softcap.
    """
    vocab, dim = unembedding.shape
    wide = _wide(hidden.dtype)
    active = ((target >= 0) & (grad != 0)).nonzero().squeeze(1)
    x, upstream = hidden[active], grad[active].to(wide)
    scale = _fp16_scale(upstream) if hidden.dtype == torch.float16 else None
    upstream = upstream if scale is None else upstream / scale
    wanted, row_lse = target[active], lse[active]
    of_softmax = (upstream * (1 + 2 * z_loss * row_lse)).unsqueeze(1)
    of_target = upstream * (1 - label_smoothing)
    of_all = (upstream * (label_smoothing / vocab)).unsqueeze(1)

    of_hidden = x.new_zeros(len(active) if needs[0] else 0, dim, dtype=wide)
    of_unembedding = unembedding.new_empty(unembedding.shape if needs[1] else (0, dim))
    of_bias = unembedding.new_empty(vocab if needs[2] else 0)
    rows, columns = _tile(len(active), vocab, slab_bytes // _bytes_per_logit(hidden.dtype))
    slab = hidden.new_empty(rows * columns)
    for first in range(0, vocab, columns):
        last = min(first + columns, vocab)
        weight = unembedding[first:last]
        part_bias = None if bias is None else bias[first:last]
        total = x.new_zeros(last - first, dim, dtype=wide)
        total_bias = x.new_zeros(last - first, dtype=wide)
        for start in range(0, len(active), max(rows, 1)):
            block = slice(start, min(start + rows, len(active)))
            out = slab[: (block.stop - start) * (last - first)].view(-1, last - first)
            logits = _logits(x[block], weight, part_bias, softcap, out)
            slope = 1 - (logits / softcap).square() if softcap else None
            p = logits.sub_(row_lse[block].unsqueeze(1)).exp_().mul_(of_softmax[block])
            if label_smoothing:
                p.sub_(of_all[block])
            inside = (wanted[block] >= first) & (wanted[block] < last)
            column = torch.where(inside, wanted[block] - first, 0).unsqueeze(1)
            p.scatter_add_(1, column, torch.where(inside, -of_target[block], 0).unsqueeze(1))
            if slope is not None:
                p.mul_(slope)
            if needs[2]:
                total_bias += p.sum(0)
            if not (needs[0] or needs[1]):
                continue
            narrow = p if p.dtype == hidden.dtype else out.copy_(p)
            if needs[1]:
                total += narrow.T @ x[block]
            if needs[0]:
                of_hidden[block] += narrow @ weight
        if needs[1]:
            of_unembedding[first:last] = total if scale is None else total.mul_(scale)
        if needs[2]:
            of_bias[first:last] = total_bias if scale is None else total_bias.mul_(scale)
    scattered = hidden.new_zeros(hidden.shape if needs[0] else (0, dim))
    if needs[0]:
        of_hidden = of_hidden if scale is None else of_hidden.mul_(scale)
        scattered[active] = of_hidden.to(hidden.dtype)
    return scattered, of_unembedding, of_bias


@linear_ce_backward.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(
    grad: Tensor,
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    slab_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    vocab, dim = unembedding.shape
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0, dim)),
        unembedding.new_empty(unembedding.shape if needs[1] else (0, dim)),
        unembedding.new_empty(vocab if needs[2] else 0),
    )


def linear_ce_rows(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``linear_ce``, with a first-order gradient of its loss; the same arguments."""
    return _LinearCE.apply(*inputs)  # pyright: ignore


class _LinearCE(torch.autograd.Function):
    """Honours the whole upstream gradient; skips the products of inputs that need no gradient."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return linear_ce(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, unembedding, bias, target, *options, _ = inputs
        ctx.options = options
        ctx.save_for_backward(hidden, unembedding, bias, target, output[2])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        hidden, unembedding, bias, target, lse = ctx.saved_tensors
        # Dynamo cannot trace a Function inside a backward; compiled double backward fails anyway.
        compiling = torch.compiler.is_compiling()
        gradient: Any = linear_ce_backward if compiling else _LinearCEBackward.apply  # pyright: ignore
        grads: tuple[Tensor, ...] = gradient(
            grad_outputs[0], hidden, unembedding, bias, target, lse, *ctx.options, needs
        )
        wanted = (found if need else None for found, need in zip(grads, needs, strict=True))
        return *wanted, None, None, None, None, None, None


class _LinearCEBackward(torch.autograd.Function):
    """``linear_ce_backward`` with a clear error instead of a gradient of its own."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return linear_ce_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the linear losses have first-order gradients only; for a second backward compute the "
            "logits and call the dense form (mtp_ce_loss, weighted_mtp_loss)"
        )


def _fp16_scale(upstream: Tensor) -> Tensor:
    """A power of two that keeps ``p · upstream`` out of float16's subnormals, 1/N included.

    The upstream gradients, divided by it, sum to at most 2048 in absolute value, so that sums of them
    times hidden states of ordinary size do not overflow either.
    """
    total = upstream.abs().sum()
    return torch.where(total > 0, torch.exp2(torch.floor(torch.log2(total)) - 10), 1)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, out: Tensor) -> Tensor:
    """One slab of logits, float32 or wider, that may be overwritten."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)
    logits = out.to(_wide(x.dtype))
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _tile(rows: int, vocab: int, cells: int) -> tuple[int, int]:
    """Rows and columns of a backward slab: all rows if enough columns are left for them."""
    columns = min(vocab, max(cells // max(rows, 1), min(_MIN_COLUMNS, cells)))
    return min(rows, max(1, cells // max(columns, 1))), max(columns, 1)
