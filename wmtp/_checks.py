"""Checks that hold where the type checker is off: under ``torch.compile`` or ``JAXTYPING_DISABLE``.

Each says which argument is wrong, what was expected, what came and, where it helps, what to do.
Shapes are known without looking at the data, and data is looked at where that is free, so no check here
synchronises a device.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor


_DTENSOR_MODULE = "torch.distributed.tensor"
# A traced number may be symbolic.
_INTS = (int, torch.SymInt)
_NUMBERS = (float, torch.SymFloat, *_INTS)


class LabelRangeError(ValueError, IndexError):
    """A label outside the vocabulary; an ``IndexError`` too, as ``F.cross_entropy`` raises."""


class ArgumentError(TypeError, ValueError):
    """An argument of a wrong shape or type: who catches either of the two means this."""


def same_shape(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Require two tensors of one shape, so that nothing is broadcast by accident."""
    if tensor.shape != like.shape:
        raise ArgumentError(
            f"{name} must have the shape of {like_name}, {_shape(like)}, got {_shape(tensor)}"
        )


def masks(name: str, mask: Tensor, like_name: str, like: Tensor) -> None:
    """Require a mask of a tensor. As a number a byte would count more than once."""
    dtype_is(name, mask, torch.bool)
    same_shape(name, mask, like_name, like)


def dtype_is(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Require one dtype."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def shape_is(name: str, tensor: Tensor, expected: Sequence[int], axes: str) -> None:
    """Require an exact shape, shown to the reader with the names of its axes."""
    if tuple(tensor.shape) != tuple(expected):
        raise ArgumentError(f"{name} must be [{axes}] = {list(expected)}, got {_shape(tensor)}")


def rank_in(name: str, tensor: Tensor, ranks: Sequence[int], axes: str) -> None:
    """Require one of a few numbers of axes."""
    if tensor.dim() not in ranks:
        raise ArgumentError(f"{name} must be {axes}, got {tensor.dim()} axes, {_shape(tensor)}")


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
    is_number(name, value)
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"
        raise ValueError(f"{name} must lie in {left}{low}, {high}{right}, got {value}")


def is_number(name: str, value: object) -> None:
    """Require a Python number, and of a whole one that torch can take it: 64 bits."""
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    # A traced int would be guarded, and a huge one fails in tracing.
    if torch.compiler.is_compiling() or not isinstance(value, int):
        return
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got an int of {value.bit_length()} bits")


def whole(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Require an int in an interval; ``True`` is none, although Python says so."""
    if isinstance(value, bool) or not isinstance(value, _INTS):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}")
    in_range(name, cast(float, value), low, high)


def fits(name: str, value: float, dtype: torch.dtype) -> None:
    """Require a number that a dtype holds; what is infinite or NaN is left to the float dtypes."""
    is_number(name, value)
    if dtype.is_complex:
        return
    if dtype == torch.bool:
        if value not in (0, 1):
            raise ValueError(f"{name} must be 0 or 1 for torch.bool, got {value}")
        return
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        if value != value or abs(value) == math.inf:
            return
    else:
        limits = torch.iinfo(dtype)
    in_range(name, value, limits.min, limits.max)
    if not dtype.is_floating_point and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{name} must be a whole number for {dtype}, got {value}")


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Require one of the documented strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def same_device(**tensors: Tensor | None) -> None:
    """Require all tensors on one device."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.device for tensor in present.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in present.items())
        raise ValueError(f"all tensors must be on one device, got {places}")


def same_dtype(**tensors: Tensor | None) -> None:
    """Require all tensors in one dtype, as the products do."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.dtype for tensor in present.values()}) > 1:
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in present.items())
        raise ValueError(
            f"dtypes must agree, got {dtypes}; cast them to one dtype, or call under torch.autocast "
            "(which leaves float64 alone)"
        )


def not_bytes(name: str, values: object) -> None:
    """Refuse bytes where numbers are wanted: to Python they are a sequence of ints."""
    if isinstance(values, bytes):
        raise TypeError(f"{name} must be numbers, got bytes")


def process_group(group: object) -> None:
    """Require a process group or none, also where nothing is asked of the other ranks."""
    if group is None:
        return
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}"
        )


def float_tensor(name: str, value: object) -> None:
    """Require a tensor of floats where annotations do not reach, as in a sequence."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    ordinary(**{name: value})


def placement(device: object, dtype: object) -> None:
    """Require a device and a dtype that parameters can be made with."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    given: Any = device
    try:
        torch.empty(0, device=given)
    except TypeError as error:
        raise TypeError(
            f"device must be a torch.device, its name or None, got {device!r}"
        ) from error
    except (RuntimeError, AssertionError, OverflowError, ValueError) as error:
        raise ValueError(
            f"device must be one of this machine's, got {device!r}: {error}"
        ) from error


def ordinary(**tensors: Tensor | None) -> None:
    """Refuse what has no plain rows of numbers: sparse, nested, quantized, or floats of 8 bits."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.is_nested or tensor.layout != torch.strided:
            kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{name} must be a dense tensor (torch.strided), got {kind}")
        if tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype.itemsize == 1):
            raise TypeError(f"{name} must be of a dtype to compute in, got {tensor.dtype}; cast it")


def plain_tensors(**tensors: Tensor | None) -> None:
    """Refuse what is not ``ordinary``, and a sharded tensor (a ``DTensor``).

    The softmax of a sharded one would run over one rank's share.

    Asks ``sys.modules``, because importing the class would cost everybody what few need; a
    ``DTensor`` cannot exist before its module does, and Dynamo can trace this.
    """
    ordinary(**tensors)
    if _DTENSOR_MODULE not in sys.modules:
        return
    kind = sys.modules[_DTENSOR_MODULE].DTensor
    given: dict[str, Any] = dict(tensors)
    for name, tensor in given.items():
        if isinstance(tensor, kind):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor of shape {_shape(tensor)}, "
                f"placements {tensor.placements}; gather it first: for an FSDP parameter unshard() the "
                f"module that owns it; under tensor parallelism alone {name}.full_tensor(), whose "
                "gradient is not summed over data-parallel ranks"
            )


def labels_in_range(targets: Tensor, valid: Tensor, vocab: int) -> None:
    """Refuse a valid target outside ``[0, vocab)``, where looking is free."""
    if not may_look(targets):
        return
    wrong = valid & (targets != targets.clamp(0, vocab - 1))
    if wrong.any():
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise label_outside(vocab, int(targets[where]), f"at {where}")


def label_outside(vocab: int, label: int | str, where: str) -> LabelRangeError:
    """What is to be raised for a label that does not exist."""
    return LabelRangeError(
        f"labels must lie in [0, {vocab}) where they are not ignore_index, "
        f"got {label} as the target {where}"
    )


def holds(condition: Tensor, words: str) -> None:
    """Have the device refuse what may not be looked at, without waiting for it: a ``RuntimeError``.

    Only where it can: of other backends than these not all have such an assertion.
    """
    if condition.device.type in ("cpu", "cuda"):
        torch._assert_async(condition, words)  # pyright: ignore


def may_look(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read for free: on the CPU, outside compiler and transforms."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" and has_values(tensor)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read: no fake or meta tensor, no transform."""
    if tensor.is_meta:
        return False
    # A subclass that leaves the dispatch alone holds its values itself.
    kind: Any = type(tensor)
    plain: Any = Tensor
    if kind.__torch_dispatch__ is not plain.__torch_dispatch__:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # pyright: ignore
        return False
    # One of several upstream gradients that `is_grads_batched` hands to a backward pass.
    return not torch._C._functorch.is_legacy_batchedtensor(tensor)  # pyright: ignore


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
