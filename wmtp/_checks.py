"""Checks that hold where the type checker is off: under ``torch.compile`` or ``JAXTYPING_DISABLE``.

Each says which argument is wrong, what was expected, what came and, where it helps, what to do.
Shapes are known without looking at the data, so no check here synchronises a device, except
``labels_in_range``, which looks only where looking is free: on the CPU, in eager mode.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


_DTENSOR_MODULE = "torch.distributed.tensor"


class LabelRangeError(ValueError, IndexError):
    """A label outside the vocabulary; an ``IndexError`` too, as ``F.cross_entropy`` raises."""


def same_shape(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Require two tensors of one shape, so that nothing is broadcast by accident."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {_shape(like)}, got {_shape(tensor)}"
        )


def shape_is(name: str, tensor: Tensor, expected: Sequence[int], axes: str) -> None:
    """Require an exact shape, shown to the reader with the names of its axes."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must be [{axes}] = {list(expected)}, got {_shape(tensor)}")


def rank_in(name: str, tensor: Tensor, ranks: Sequence[int], axes: str) -> None:
    """Require one of a few numbers of axes."""
    if tensor.dim() not in ranks:
        raise ValueError(f"{name} must be {axes}, got {tensor.dim()} axes, {_shape(tensor)}")


def in_range(
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Require a Python number in an interval; NaN is in none."""
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"
        raise ValueError(f"{name} must lie in {left}{low}, {high}{right}, got {value}")


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Require one of the documented strings."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def same_device(**tensors: Tensor | None) -> None:
    """Require all tensors on one device."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.device for tensor in present.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in present.items())
        raise ValueError(f"all tensors must be on one device, got {places}")


def same_dtype(hint: str, **tensors: Tensor | None) -> None:
    """Require all tensors in one dtype."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.dtype for tensor in present.values()}) > 1:
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in present.items())
        raise ValueError(f"dtypes must agree, got {dtypes}; {hint}")


def plain_tensors(**tensors: Tensor | None) -> None:
    """Refuse a sharded tensor (a ``DTensor``): its softmax would run over one rank's share.

    Asks ``sys.modules``, because importing the class would cost everybody what few need; a
    ``DTensor`` cannot exist before its module does, and Dynamo can trace this.
    """
    if _DTENSOR_MODULE not in sys.modules:
        return
    kind = sys.modules[_DTENSOR_MODULE].DTensor
    given: dict[str, Any] = dict(tensors)
    for name, tensor in given.items():
        if isinstance(tensor, kind):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor of shape {_shape(tensor)}, "
                f"placements {tensor.placements}; gather it first: {name}.full_tensor(), or for an "
                "FSDP parameter unshard() the module that owns it"
            )


def labels_in_range(targets: Tensor, valid: Tensor, vocab: int) -> None:
    """Refuse a valid target outside ``[0, vocab)`` on the CPU; elsewhere it would cost a sync."""
    if torch.compiler.is_compiling() or not is_plain_cpu(targets):
        return
    wrong = valid & ((targets < 0) | (targets >= vocab))
    if wrong.any():
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise LabelRangeError(
            f"labels must lie in [0, {vocab}) where they are not ignore_index, "
            f"got {int(targets[where])} as the target at {where}"
        )


def is_plain_cpu(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read for free: a real CPU tensor outside any transform."""
    return tensor.device.type == "cpu" and is_plain(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read: no fake tensor or other subclass, no transform."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
