"""Over which entries, and which ranks, is a mean, a maximum or a threshold taken?

Weights are ``[batch seq]`` or ``[batch seq heads]``. A scope sorts their entries into groups, and all
arithmetic runs on ``[groups entries]``. A process group widens the scopes ``"batch"`` and ``"all"``
to the entries of all ranks; every rank then joins every collective, also one without valid entries.
"""

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from wmtp import _checks


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:
    # torch builds without distributed have no such class; the checker then has nothing to check.
    ProcessGroup = Any

Scope = Literal["sequence", "batch", "all"]

_TO_GROUPS = {
    ("sequence", 2): "b t -> b t",
    ("sequence", 3): "b t h -> (b h) t",
    ("batch", 2): "b t -> 1 (b t)",
    ("batch", 3): "b t h -> h (b t)",
    ("all", 2): "b t -> 1 (b t)",
    ("all", 3): "b t h -> 1 (b t h)",
}


class Scoped:
    """The groups that a scope makes of tensors of one shape, and reductions over them."""

    def __init__(self, like: Tensor, scope: str, group: ProcessGroup | None) -> None:
        _checks.one_of("scope", scope, get_args(Scope))
        _checks.process_group(group)
        self._sizes = dict(zip("bth", like.shape, strict=False))
        self._pattern = _TO_GROUPS[scope, like.dim()]
        # A row is never split over ranks, so there is nothing to ask them.
        self._group = None if scope == "sequence" else group

    def split(self, tensor: Tensor) -> Tensor:
        """``[groups entries]`` in the order of positions."""
        return rearrange(tensor, self._pattern)

    def join(self, grouped: Tensor) -> Tensor:
        """The inverse of ``split``."""
        left, right = self._pattern.split(" -> ")
        return rearrange(grouped, f"{right} -> {left}", **self._sizes)

    def total(self, grouped: Tensor) -> Tensor:
        """Sum over the entries of each group, all ranks: ``[groups 1]``."""
        return self.over_ranks(grouped.sum(-1, keepdim=True))

    def largest(self, grouped: Tensor, default: float) -> Tensor:
        """Largest entry of each group, all ranks, at least ``default``: ``[groups 1]``."""
        floor = grouped.new_full((grouped.shape[0], 1), default)
        peak = torch.cat([grouped, floor], dim=-1).amax(-1, keepdim=True)
        return self._reduce(peak, "MAX")

    def over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum a small tensor over the ranks."""
        return self._reduce(tensor, "SUM")

    def before_this_rank(self, count: Tensor) -> Tensor:
        """Sum of a small tensor over the ranks before this one."""
        if self._group is None:
            return torch.zeros_like(count)
        rank = torch.distributed.get_rank(self._group)
        every = [
            torch.empty_like(count) for _ in range(torch.distributed.get_world_size(self._group))
        ]
        torch.distributed.all_gather(  # pyright: ignore[reportUnknownMemberType]
            every, count.contiguous(), group=self._group
        )
        return torch.stack([torch.zeros_like(count), *every[:rank]]).sum(0)

    def _reduce(self, tensor: Tensor, how: Literal["SUM", "MAX"]) -> Tensor:
        if self._group is not None:
            op = getattr(torch.distributed.ReduceOp, how)
            tensor = tensor.contiguous()
            torch.distributed.all_reduce(  # pyright: ignore[reportUnknownMemberType]
                tensor, op=op, group=self._group
            )
        return tensor
