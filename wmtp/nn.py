"""Thin modules: they store arguments and parameters and call the functions."""

from collections.abc import Callable
from typing import Any, Self

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from wmtp import _checks
from wmtp._dtypes import autocasts
from wmtp._typing import typed
from wmtp.cross_entropy import Objective
from wmtp.denominators import HeadWeights, Normalizer
from wmtp.loss import Weights, linear_weighted_mtp_loss, weighted_mtp_loss
from wmtp.targets import IGNORE_INDEX, MOST_HEADS, Offsets, resolve_offsets


# Wider hidden states are a mistake in the arguments.
_WIDEST = 2**24


class MTPHeads(nn.Module):
    """Turn one hidden state into one per head, so that any causal LM can be trained with H heads.

    Head 0 is the trunk's own state, ``z_0 = x``; head ``h ≥ 1`` adds a residual block,
    ``z_h = x + W2_h · silu(W1_h · norm(x))``. ``W2`` starts at 0: every head starts as the trunk, and
    the model's next-token predictions are untouched. All heads share the model's unembedding. One head
    has no parameters.

    Args:
        dim: size of the hidden state.
        heads: number of heads ``H``, the next-token head included; at most 2^16.
        hidden_dim: width of the residual blocks, ``dim`` by default.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Shapes:
        ``[batch seq dim] -> [batch seq heads dim]``.

    Raises:
        ValueError: sizes below 1 or above 2^24, an input of another dim.

    Example:
        >>> import torch
        >>> MTPHeads(16, 4)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 4, 16])

    Source: the residual heads of Medusa, arXiv:2401.10774, section 2.1.1, on the parallel heads of
    arXiv:2404.19737, section 2.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        hidden_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.whole("dim", dim, 1, _WIDEST)
        _checks.whole("heads", heads, 1, MOST_HEADS)
        width = dim if hidden_dim is None else hidden_dim
        _checks.whole("hidden_dim", width, 1, _WIDEST)
        _checks.placement(device, dtype)
        self.dim, self.heads, self.hidden_dim = dim, heads, width
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if heads == 1:
            # Not empty ones, nor any that get no gradient: data parallelism takes neither.
            for name in ("norm", "inner", "outer"):
                self.register_parameter(name, None)
            return
        self.norm = nn.RMSNorm(dim, **factory)
        self.inner = nn.Parameter(torch.empty(heads - 1, width, dim, **factory))
        self.outer = nn.Parameter(torch.empty(heads - 1, dim, width, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start every head as the trunk."""
        if self.heads == 1:
            return
        self.norm.reset_parameters()
        nn.init.normal_(self.inner, std=self.dim**-0.5)
        nn.init.zeros_(self.outer)

    @typed
    def forward(
        self, hidden: Float[Tensor, "batch seq dim"]
    ) -> Float[Tensor, "batch seq heads dim"]:
        """``[batch seq dim] -> [batch seq heads dim]``."""
        _checks.shape_is("hidden", hidden, (*hidden.shape[:2], self.dim), "batch seq dim")
        trunk = rearrange(hidden, "b t d -> b t 1 d")
        if self.heads == 1:
            return trunk.clone()  # new, as it is with more heads
        _checks.same_device(hidden=hidden, parameters=self.inner)
        kinds = {hidden.dtype, self.inner.dtype}
        # The products need one dtype; autocast casts to it, but no float64.
        if len(kinds) > 1 and (torch.float64 in kinds or not autocasts(hidden)):
            _checks.same_dtype(hidden=hidden, parameters=self.inner)
        inside = einsum(self.norm(hidden), self.inner, "b t d, h w d -> b t h w")
        change = einsum(F.silu(inside), self.outer, "b t h w, h d w -> b t h d")
        return torch.cat([trunk, trunk + change], dim=2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, hidden_dim={self.hidden_dim}"


class ValueHead(nn.Module):
    """A critic's head: one value per token from its hidden state, ``V = w · x + b``.

    Computed in float32 whatever the dtype of the hidden states, for in bfloat16 small differences of
    values vanish. Starts at 0.

    Args:
        dim: size of the hidden state.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Shapes:
        ``[batch seq dim] -> [batch seq]``.

    Raises:
        ValueError: ``dim`` below 1 or above 2^24, an input of another dim.

    Example:
        >>> import torch
        >>> ValueHead(16)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5])

    Source: Stiennon et al., "Learning to summarize from human feedback", arXiv:2009.01325.
    """

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.whole("dim", dim, 1, _WIDEST)
        _checks.placement(device, dtype)
        self.dim = dim
        self.weight = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        # Of one axis: FSDP shards no scalar.
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    @typed
    def forward(self, hidden: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq"]:
        """``[batch seq dim] -> [batch seq]``, float32 or wider."""
        _checks.shape_is("hidden", hidden, (*hidden.shape[:2], self.dim), "batch seq dim")
        _checks.same_device(hidden=hidden, parameters=self.weight)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # Elementwise, because autocast would take a matrix product back to bfloat16.
        return (hidden.to(dtype) * self.weight.to(dtype)).sum(-1) + self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class _StoredOptions(nn.Module):
    """The options of a loss; tensors among them move with the module, and keep their dtype."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        objective = (options[name] for name in ("label_smoothing", "z_loss", "softcap"))
        Objective(*objective).checked()
        if options["offsets"] is not None:
            resolve_offsets(options["offsets"])
        _checks.whole("ignore_index", options["ignore_index"])
        self.options = options

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # No buffers: a count in float16 is infinite, and data parallelism would give one rank's to all.
        for name, value in self.options.items():
            if isinstance(value, Tensor):
                self.options[name] = value.to(fn(value).device)
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class WeightedMTPLoss(_StoredOptions):
    """``weighted_mtp_loss`` with its options stored; see there for what they mean.

    Tensors among them move with the module and keep their dtype; they are not in its ``state_dict``.

    Args:
        offsets: which token each head predicts.
        head_weights: ``λ``, one per head.
        normalizer: ``"weights"``, ``"tokens"`` or a count.
        ignore_index: the label that means "no target".
        label_smoothing: ``ε`` in [0, 1].
        z_loss: coefficient of ``lse²``.
        softcap: positive bound of the logits, or ``None``.

    Raises:
        ValueError: offsets, label smoothing, z-loss or softcap out of range; the other options are
            checked when the loss is called.

    Example:
        >>> import torch
        >>> loss = WeightedMTPLoss(head_weights=(1.0, 0.3))
        >>> loss(torch.zeros(1, 4, 2, 8), torch.tensor([[1, 2, 3, 4]]))  # 2 · log 8 · (3 + 0.3 · 2) / 5
        tensor(2.9944)

    Source: as ``weighted_mtp_loss``.
    """

    def __init__(
        self,
        *,
        offsets: Offsets | None = None,
        head_weights: HeadWeights = None,
        normalizer: Normalizer = "weights",
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(
            offsets=offsets,
            head_weights=head_weights,
            normalizer=normalizer,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
        )

    def forward(
        self,
        logits: Float[Tensor, "batch seq heads vocab"] | Float[Tensor, "batch seq vocab"],
        labels: Int64[Tensor, "batch seq"] | Int64[Tensor, "batch seq heads"],
        weights: Weights = None,
    ) -> Float[Tensor, ""]:
        """Call ``weighted_mtp_loss``."""
        return weighted_mtp_loss(logits, labels, weights, **self.options)


class LinearWeightedMTPLoss(_StoredOptions):
    """``linear_weighted_mtp_loss`` with its options stored; see there for what they mean.

    Args:
        offsets: as in ``WeightedMTPLoss``, and so are all that follow but the last.
        head_weights: ``λ``, one per head.
        normalizer: ``"weights"``, ``"tokens"`` or a count.
        ignore_index: the label that means "no target".
        label_smoothing: ``ε`` in [0, 1].
        z_loss: coefficient of ``lse²``.
        softcap: positive bound of the logits, or ``None``.
        slab_bytes: how many bytes to hold beside inputs and gradients.

    Raises:
        ValueError: as ``WeightedMTPLoss``, and ``slab_bytes`` below 1.

    Example:
        >>> import torch
        >>> loss = LinearWeightedMTPLoss(slab_bytes=2**20)
        >>> loss(torch.zeros(1, 4, 2, 3), torch.zeros(8, 3), torch.tensor([[1, 2, 3, 4]]))
        tensor(2.0794)

    Source: as ``linear_weighted_mtp_loss``.
    """

    def __init__(
        self,
        *,
        offsets: Offsets | None = None,
        head_weights: HeadWeights = None,
        normalizer: Normalizer = "weights",
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        slab_bytes: int | None = None,
    ) -> None:
        super().__init__(
            offsets=offsets,
            head_weights=head_weights,
            normalizer=normalizer,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            slab_bytes=slab_bytes,
        )
        if slab_bytes is not None:
            _checks.whole("slab_bytes", slab_bytes, 1)

    def forward(
        self,
        hidden: Float[Tensor, "batch seq heads dim"] | Float[Tensor, "batch seq dim"],
        unembedding: Float[Tensor, "vocab dim"],
        labels: Int64[Tensor, "batch seq"] | Int64[Tensor, "batch seq heads"],
        weights: Weights = None,
        *,
        bias: Float[Tensor, " vocab"] | None = None,
    ) -> Float[Tensor, ""]:
        """Call ``linear_weighted_mtp_loss``."""
        return linear_weighted_mtp_loss(
            hidden, unembedding, labels, weights, bias=bias, **self.options
        )
