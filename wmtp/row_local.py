"""Weights that a prediction's own distribution determines, so that no second pass is needed.

``methods.py`` has the same weightings as functions of a score over a whole batch, where they can be
normalised. Here they are a request to the loss, which makes them where the logits are in hand: the
linear losses then need three matrix products, not four, and the entropy of logits that nobody holds.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp import _checks
from wmtp.cross_entropy import Objective, Predictions
from wmtp.problem import RowLocal
from wmtp.scores import el2n, predictive_entropy
from wmtp.targets import IGNORE_INDEX


Kind = Literal["dft", "focal", "entropy", "el2n"]


class RowLocalWeights(NamedTuple):
    """A weight for every prediction from its own probabilities, made inside the loss.

    ========= ========================= =========================================
    kind      weight                    source
    ========= ========================= =========================================
    dft       ``p_y ** power``          DFT, arXiv:2508.05629, equation 9
    focal     ``(1 − p_y) ** power``    focal loss, arXiv:1708.02002, equation 4
    entropy   ``H(p) ** power``         EAFT, arXiv:2601.02151, equation 3
    el2n      ``‖p − e_y‖₂ ** power``   EL2N, arXiv:2107.07075, definition 2.2
    ========= ========================= =========================================

    A constant to the gradient, and used as it is: with ``normalizer="tokens"`` the loss is the mean
    of ``w · ℓ``, as in these papers; with ``"weights"`` the weighted mean over all heads together.
    With ``mode="mean_one"``, ``weights=dft_weights`` and its like make the mean one within each head
    instead, which takes a linear loss a fourth matrix product, unless it keeps the logits (on a GPU). Where
    every weight underflows to 0, so does the loss.

    Attributes:
        kind: one of the four names.
        power: exponent, at least 0; 0 is uniform.

    Shapes:
        Given to a loss as ``weights``, it stands for ``[batch seq heads]``.

    Raises:
        ValueError: by the loss, for another kind or a power below 0.

    Example:
        >>> import torch
        >>> from wmtp import linear_weighted_mtp_loss
        >>> hidden, unembedding = torch.zeros(1, 3, 2), torch.zeros(4, 2)
        >>> labels = torch.tensor([[0, 1, 2]])
        >>> linear_weighted_mtp_loss(  # 1/4 · log 4
        ...     hidden, unembedding, labels, RowLocalWeights("dft"), normalizer="tokens"
        ... )
        tensor(0.3466)

    Source: the papers in the table.
    """

    kind: Kind
    power: float = 1.0


def as_operator_takes(weights: RowLocalWeights) -> RowLocal:
    """The same, checked."""
    _checks.one_of("weights.kind", weights.kind, get_args(Kind))
    _checks.in_range("weights.power", weights.power, 0.0, open_high=True)
    return RowLocal(weights.kind, float(weights.power))


def needs_whole_rows(weights: object) -> bool:
    """Whether these are weights that the target's probability alone does not determine."""
    return isinstance(weights, RowLocalWeights) and weights.kind not in ("dft", "focal")


def weights_from_ce(
    weights: RowLocalWeights, ce: Float[Tensor, "batch seq heads"]
) -> Float[Tensor, "batch seq heads"]:
    """The weights that the target's probability determines."""
    kind, power = as_operator_takes(weights)
    with torch.no_grad():
        score = torch.exp(-ce) if kind == "dft" else -torch.expm1(-ce)
        return score.clamp(min=0).pow(power)


def weights_from_logits(
    weights: RowLocalWeights, logits: Tensor, found: Predictions, objective: Objective
) -> Float[Tensor, "batch seq heads"]:
    """What the linear losses make slab by slab, from whole logits; anything where there is no target."""
    kind, power = as_operator_takes(weights)
    if not needs_whole_rows(weights):
        return weights_from_ce(weights, found.ce)
    with torch.no_grad():
        if kind == "entropy":
            score = predictive_entropy(logits, softcap=objective.softcap)
        else:
            targets = torch.where(found.valid, found.target, IGNORE_INDEX)
            score = el2n(logits, targets, softcap=objective.softcap)
        return score.clamp(min=0).pow(power)
