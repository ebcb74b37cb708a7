"""Several weightings as one."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp import _checks
from wmtp._dtypes import wide
from wmtp._typing import typed
from wmtp.normalize import check_weight_shapes, normalize_weights
from wmtp.scopes import ProcessGroup, Scope
from wmtp.weights import softmax_weights


@typed
def combine_weights(
    weights: Sequence[Tensor],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    mode: Literal["mixture", "product", "intersection"] = "mixture",
    coefficients: Sequence[float] | None = None,
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"]:
    """Combine weightings of the same entries; the result has mean one again.

    * ``"mixture"``: ``Σ_i c_i w_i / Σ_i c_i``, every ``w_i`` made mean one first.
    * ``"product"``: ``Π_i w_i^{c_i}``.
    * ``"intersection"``: 1 where every ``w_i`` is positive, else 0.

    Args:
        weights: one or more tensors, all of the shape of ``valid``. Align token weights with
            ``align_to_heads`` first if others are per prediction.
        valid: ``[batch seq]`` or ``[batch seq heads]``, marks the entries that count.
        mode: see above.
        coefficients: ``c_i ≥ 0``, one per member and not all 0, 1 by default; not for
            ``"intersection"``.
        scope: as in ``normalize_weights``.
        group: as in ``normalize_weights``.

    Returns:
        The shape of ``valid``; uniform where nothing is left.

    Raises:
        ValueError: no member, shapes that do not fit, bad coefficients.
        TypeError: arguments of another type, or a member that is not a floating-point tensor.

    Example:
        >>> import torch
        >>> valid = torch.ones(1, 2, dtype=torch.bool)
        >>> first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> combine_weights([first, second], valid)
        tensor([[1.5000, 0.5000]])

    Source: the intersection is that of Rho-1, arXiv:2404.07965, table 3.
    """
    _checks.one_of("mode", mode, ("mixture", "product", "intersection"))
    if len(weights) == 0:
        raise ValueError("weights must hold at least one tensor, got none")
    for i, member in enumerate(weights):
        _checks.float_tensor(f"weights[{i}]", member)
        check_weight_shapes(f"weights[{i}]", member, valid)
    shares = _check_coefficients(coefficients, len(weights), mode)
    if mode == "intersection":
        agreed = torch.stack([member > 0 for member in weights]).all(0)
        raw = agreed.to(wide(weights[0]).dtype)
    else:
        # A member that is 0 everywhere has nothing to say in a mixture, and the last word in a product.
        on_zero = "uniform" if mode == "mixture" else "zero"
        even = [
            normalize_weights(member, valid, scope=scope, group=group, on_zero=on_zero)
            for member in weights
        ]
        pairs = zip(shares, even, strict=True)
        if mode == "product":
            # A softmax of the logarithms is the normalised product, which by itself could underflow.
            logs = torch.stack([c * w.log() for c, w in pairs if c > 0]).sum(0)
            return softmax_weights(logs, valid, scope=scope, group=group)
        # Relative to the largest, which cancels: what float32 does not hold would be lost.
        largest = max(shares)
        raw = torch.stack([c / largest * w for c, w in pairs]).sum(0)
    return normalize_weights(raw, valid, scope=scope, group=group)


def _check_coefficients(
    coefficients: Sequence[float] | None, members: int, mode: str
) -> tuple[float, ...]:
    if coefficients is None:
        return (1.0,) * members
    if mode == "intersection":
        raise ValueError("coefficients have no meaning for mode='intersection', leave them out")
    _checks.not_bytes("coefficients", coefficients)
    if len(coefficients) != members:
        raise ValueError(
            f"coefficients must be one for each of the {members} weights, got {len(coefficients)}"
        )
    for c in coefficients:
        _checks.in_range("coefficients", c, 0.0, open_high=True)
        if mode == "product":
            _checks.fits("coefficients", c, torch.float32)
    if sum(coefficients) == 0:
        raise ValueError(f"coefficients must not all be 0, got {list(coefficients)}")
    return tuple(coefficients)
