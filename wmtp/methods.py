"""The named weightings of the literature: each is a score and a rule from ``weights.py``.

What is said there of all weights holds here. Those whose first two arguments are
``(token_ce, valid)`` can be handed to a loss as they are: ``weights=dft_weights``,
``weights=partial(rho1_weights, reference_nll=nll)``.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from wmtp import _checks
from wmtp._dtypes import wide
from wmtp._typing import typed
from wmtp.normalize import Clip, check_bounds, check_weight_shapes, normalize_weights
from wmtp.scans import find_trajectories
from wmtp.scopes import ProcessGroup, Scope
from wmtp.scores import InitialValue, advantages, excess_loss, group_advantages
from wmtp.targets import Offsets
from wmtp.weights import (
    check_share,
    check_temperature,
    check_whitening,
    exp_weights,
    softmax_weights,
    top_k_weights,
)
from wmtp.whitening import WhiteningStatistics


Mode = Literal["mean_one", "none"]


@typed
def rho1_weights(
    token_ce: Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq heads"],
    reference_nll: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    *,
    keep: float = 0.6,
    mode: Literal["top_k", "softmax"] = "top_k",
    temperature: float = 1.0,
    scope: Scope = "batch",
    offsets: Offsets | None = None,
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq heads"]:
    """Selective language modelling: weight what the model still has to learn from a reference.

    The score is ``excess_loss``, ranked within each head. ``"top_k"`` keeps the best ``keep`` share,
    ``"softmax"`` weights all by ``exp(excess / T)``. Hand it to a linear loss as the ``partial`` that
    the example shows, not in a function of your own: the loss then knows what it does, and is faster.

    Args:
        token_ce: ``[batch seq heads]`` cross entropy of the model; a loss hands it in.
        valid: ``[batch seq heads]``, whether there is a target; a loss hands it in.
        reference_nll: ``[batch seq]`` next-token NLL of the reference, indexed by token
            (``token_nll``), or ``[batch seq heads]``, the reference's own for every head. One
            next-token NLL for all heads asks far heads for what a near one knows: it ranks them by
            themselves, but their excess says less. NaN, an unscored token, ranks last.
        keep: share in (0, 1] for ``"top_k"``.
        mode: ``"top_k"`` or ``"softmax"``.
        temperature: ``T > 0`` for ``"softmax"``.
        scope: ``"batch"`` or ``"sequence"`` (both within each head), or ``"all"`` heads together. The
            paper has both of the first two; by sequence the choice does not depend on the batch.
        offsets: which token each head predicts, ``1, …, heads`` by default.
        group: process group whose ranks share the scope.

    Returns:
        ``[batch seq heads]``, mean one.

    Raises:
        ValueError: shapes or offsets that do not fit, ``keep`` or ``temperature`` out of range.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from wmtp import weighted_mtp_loss
        >>> nll = torch.tensor([[0.0, 1.0, 9.0, 1.0]])
        >>> weights = partial(rho1_weights, reference_nll=nll, keep=0.5)
        >>> weighted_mtp_loss(torch.zeros(1, 4, 2, 8), torch.tensor([[1, 2, 3, 4]]), weights)
        tensor(2.0794)

    Source: Rho-1, arXiv:2404.07965, equations 3 to 5.
    """
    _checks.one_of("mode", mode, ("top_k", "softmax"))
    check_share("keep", keep)
    check_temperature("temperature", temperature)
    scores = excess_loss(token_ce.detach(), reference_nll.detach(), offsets=offsets)
    if mode == "top_k":
        return top_k_weights(scores, valid, keep=keep, scope=scope, group=group)
    return softmax_weights(scores, valid, temperature=temperature, scope=scope, group=group)


@typed
def critic_delta_weights(
    values: Float[Tensor, "batch seq"],
    valid: Bool[Tensor, "batch seq"],
    *,
    rewards: Float[Tensor, "batch seq"] | None = None,
    gamma: float = 1.0,
    lam: float = 0.0,
    mode: Literal["exp", "softmax", "top_k"] = "exp",
    beta: float = 1.0,
    clip: Clip = (0.1, 3.0),
    keep: float = 0.6,
    temperature: float = 1.0,
    whiten: bool = True,
    statistics: WhiteningStatistics | None = None,
    initial_value: InitialValue = "first",
    attention_mask: Shaped[Tensor, "batch seq"] | None = None,
    position_ids: Int[Tensor, "batch seq"] | None = None,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq"]:
    """Weight each token by how much it raised a critic's value.

    The score is ``gae`` with ``lam``; at the default ``lam = 0`` it is the temporal difference
    ``δ_j = r_j + γ V_j − V_{j−1}``. The critic gets no gradient through the weights.

    Args:
        values: ``[batch seq]`` critic values, indexed by token.
        valid: ``[batch seq]``, the trained tokens.
        rewards: as in ``td_deltas``, and so are ``gamma``, ``initial_value`` and the descriptions of
            documents.
        gamma: discount in [0, 1].
        lam: ``λ`` of ``gae`` in [0, 1].
        mode: ``"exp"`` (``exp_weights`` with ``beta``, ``clip``, ``whiten``, ``statistics``),
            ``"softmax"`` (with ``temperature``) or ``"top_k"`` (with ``keep``).
        beta: as in ``exp_weights``.
        clip: as in ``exp_weights``.
        keep: as in ``top_k_weights``.
        temperature: as in ``softmax_weights``.
        whiten: as in ``exp_weights``.
        statistics: as in ``exp_weights``.
        initial_value: ``"first"`` or ``V_{−1}``.
        attention_mask: ``[batch seq]`` or ``None``; padding has weight 0.
        position_ids: ``[batch seq]`` or ``None``.
        segment_ids: ``[batch seq]`` or ``None``.
        cu_seqlens: ``[documents + 1]`` or ``None``; tokens behind the last have weight 0.
        scope: as in the function that ``mode`` names.
        group: process group whose ranks share the scope.

    Returns:
        ``[batch seq]``, indexed by token, mean one.

    Raises:
        ValueError: as the functions named above.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> valid = torch.ones(1, 4, dtype=torch.bool)
        >>> critic_delta_weights(torch.tensor([[0.0, 0.5, 0.5, 0.0]]), valid, clip=None)
        tensor([[0.6293, 2.5884, 0.6293, 0.1530]])

    Source: AWR, arXiv:1910.00177, equation 7, on the temporal difference of Sutton and Barto,
    "Reinforcement Learning", 2nd edition, equation 6.5.
    """
    _checks.one_of("mode", mode, ("exp", "softmax", "top_k"))
    check_share("keep", keep)
    check_temperature("temperature", temperature)
    check_temperature("beta", beta)
    check_bounds(clip)
    check_whitening(whiten, statistics, values)
    tracks = find_trajectories(
        values,
        valid,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
    )
    scores = advantages(
        values.detach(),
        rewards,
        gamma,
        lam,
        initial_value,
        tracks,
    )
    # What is in no document has no score, and takes nobody's place.
    valid = tracks.trained
    if mode == "top_k":
        return top_k_weights(scores, valid, keep=keep, scope=scope, group=group)
    if mode == "softmax":
        return softmax_weights(scores, valid, temperature=temperature, scope=scope, group=group)
    return exp_weights(
        scores,
        valid,
        beta=beta,
        clip=clip,
        whiten=whiten,
        statistics=statistics,
        scope=scope,
        group=group,
    )


@typed
def dft_weights(
    token_ce: Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq heads"],
    *,
    mode: Mode = "mean_one",
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq heads"]:
    """Dynamic fine-tuning: weight by the target's own probability, ``w = p_y = exp(−CE)``.

    Args:
        token_ce: ``[batch seq heads]``; a loss hands it in.
        valid: ``[batch seq heads]``; a loss hands it in.
        mode: ``"mean_one"``, or ``"none"`` for the paper's unscaled ``p_y``.
        scope: as in ``normalize_weights``.
        group: as in ``normalize_weights``.

    Returns:
        ``[batch seq heads]``.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> ce, valid = torch.tensor([[[0.0], [0.6931]]]), torch.ones(1, 2, 1, dtype=torch.bool)
        >>> dft_weights(ce, valid, mode="none")[0, :, 0]
        tensor([1.0000, 0.5000])

    Source: DFT, arXiv:2508.05629, equation 9.
    """
    if mode == "mean_one":
        # The same numbers, but where every probability of a scope underflows.
        return softmax_weights(-token_ce, valid, scope=scope, group=group)
    raw = torch.exp(-wide(token_ce.detach()))
    return normalize_weights(raw, valid, mode=mode, scope=scope, group=group)


@typed
def focal_weights(
    token_ce: Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq heads"],
    *,
    gamma: float = 2.0,
    mode: Mode = "mean_one",
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq heads"]:
    """Focal weights, ``w = (1 − p_y)^γ``: the less probable the target, the more it counts.

    Args:
        token_ce: ``[batch seq heads]``; a loss hands it in.
        valid: ``[batch seq heads]``; a loss hands it in.
        gamma: ``γ ≥ 0``; 0 is uniform.
        mode: ``"mean_one"``, or ``"none"`` for the paper's unscaled weights.
        scope: as in ``normalize_weights``.
        group: as in ``normalize_weights``.

    Returns:
        ``[batch seq heads]``; detached, where the paper differentiates through the factor too.

    Raises:
        ValueError: shapes that do not fit, negative ``gamma``.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> ce, valid = torch.tensor([[[0.0], [0.6931]]]), torch.ones(1, 2, 1, dtype=torch.bool)
        >>> focal_weights(ce, valid, mode="none")[0, :, 0]
        tensor([0.0000, 0.2500])

    Source: Lin et al., "Focal Loss for Dense Object Detection", arXiv:1708.02002, equation 4.
    """
    _checks.in_range("gamma", gamma, 0.0, open_high=True)
    # expm1 keeps 1 − p for confident predictions, where 1 − exp(−CE) would cancel.
    raw = (-torch.expm1(-wide(token_ce.detach()))).clamp(min=0).pow(gamma)
    return normalize_weights(raw, valid, mode=mode, scope=scope, group=group)


@typed
def entropy_weights(
    entropy: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    power: float = 1.0,
    mode: Mode = "mean_one",
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"]:
    """Weight by the model's own uncertainty, ``w = H^α``.

    For "only the fifth with the highest entropy" use ``top_k_weights(entropy, valid, keep=0.2)``.

    Args:
        entropy: ``predictive_entropy``, in nats, at least 0.
        valid: same shape, marks the entries that count.
        power: ``α ≥ 0``.
        mode: as in ``normalize_weights``.
        scope: as in ``normalize_weights``.
        group: as in ``normalize_weights``.

    Returns:
        The shape of ``entropy``.

    Raises:
        ValueError: shapes that do not fit, negative ``power``.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> valid = torch.ones(1, 2, dtype=torch.bool)
        >>> entropy_weights(torch.tensor([[1.0, 3.0]]), valid)
        tensor([[0.5000, 1.5000]])

    Source: EAFT, arXiv:2601.02151, equation 3.
    """
    return _power_weights("entropy", entropy, valid, power, mode, scope, group)


@typed
def el2n_weights(
    el2n: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    power: float = 1.0,
    mode: Mode = "mean_one",
    scope: Scope = "batch",
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"]:
    """Weight by the length of the logits' gradient, ``w = ‖p − e_y‖^α``.

    Args:
        el2n: the score of that name, at least 0.
        valid: same shape, marks the entries that count.
        power: ``α ≥ 0``.
        mode: as in ``normalize_weights``.
        scope: as in ``normalize_weights``.
        group: as in ``normalize_weights``.

    Returns:
        The shape of ``el2n``.

    Raises:
        ValueError: shapes that do not fit, negative ``power``.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> valid = torch.ones(1, 2, dtype=torch.bool)
        >>> el2n_weights(torch.tensor([[0.5, 1.5]]), valid)
        tensor([[0.5000, 1.5000]])

    Source: Paul et al., "Deep Learning on a Data Diet", arXiv:2107.07075, definition 2.2.
    """
    return _power_weights("el2n", el2n, valid, power, mode, scope, group)


@typed
def group_relative_weights(
    rewards: Float[Tensor, " batch"],
    group_ids: Int[Tensor, " batch"],
    valid: Bool[Tensor, "batch seq"] | Bool[Tensor, "batch seq heads"],
    *,
    beta: float = 1.0,
    clip: Clip = (0.1, 3.0),
    group: ProcessGroup | None = None,
) -> Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"]:
    """Weight whole sequences by how much better they are than the others of their group.

    ``w ∝ exp(A / β)`` with ``A`` from ``group_advantages``, the same for every valid token of a
    sequence, bounded by ``clip``, with mean one over the batch.

    Args:
        rewards: ``[batch]``, one per sequence.
        group_ids: ``[batch]``, equal for the answers to one question; a group stands on one rank.
        valid: ``[batch seq]`` or ``[batch seq heads]``, marks the entries that count.
        beta: temperature above 0, in standard deviations of a group.
        clip: ``(lo, hi)`` with ``0 ≤ lo ≤ 1 ≤ hi``, or ``None``.
        group: process group whose ranks share the batch.

    Returns:
        The shape of ``valid``.

    Raises:
        ValueError: shapes that do not fit, ``beta`` not positive, bounds out of range.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> valid = torch.ones(2, 2, dtype=torch.bool)
        >>> group_relative_weights(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), valid)
        tensor([[1.6089, 1.6089],
                [0.3911, 0.3911]])

    Source: GRPO, arXiv:2402.03300, section 4.1.2, in the weights of AWR, arXiv:1910.00177, equation 7.
    """
    _checks.rank_in("valid", valid, (2, 3), "[batch seq] or [batch seq heads]")
    _checks.shape_is("rewards", rewards, valid.shape[:1], "batch")
    _checks.same_device(rewards=rewards, valid=valid)
    advantages = group_advantages(rewards.detach(), group_ids)
    scores = advantages.reshape(-1, *[1] * (valid.dim() - 1)).expand(valid.shape)
    return exp_weights(scores, valid, beta=beta, clip=clip, whiten=False, group=group)


def _power_weights(
    name: str,
    scores: Tensor,
    valid: Tensor,
    power: float,
    mode: Mode,
    scope: Scope,
    group: ProcessGroup | None,
) -> Tensor:
    check_weight_shapes(name, scores, valid)
    _checks.in_range("power", power, 0.0, open_high=True)
    raw = wide(scores.detach()).clamp(min=0).pow(power)
    return normalize_weights(raw, valid, mode=mode, scope=scope, group=group)
