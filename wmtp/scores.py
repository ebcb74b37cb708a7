"""How much does each token matter? Scores from a reference, a critic, rewards or the model itself.

A score is signed and has no scale; ``weights.py`` turns it into a weight. Nothing here is detached:
the functions are differentiable where their formula is, and the weight builders detach.
"""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Int64, Shaped
from torch import Tensor

from wmtp import _checks
from wmtp._dtypes import wide
from wmtp._typing import typed
from wmtp.cross_entropy import Objective, capped, predict, with_heads
from wmtp.documents import shift_right
from wmtp.scans import Trajectories, find_trajectories, scan_trained
from wmtp.targets import IGNORE_INDEX, Offsets, align_to_heads, offsets_for


InitialValue = Literal["first"] | float


@typed
def excess_loss(
    token_ce: Float[Tensor, "batch seq heads"],
    reference_nll: Float[Tensor, "batch seq"] | Float[Tensor, "batch seq heads"],
    *,
    offsets: Offsets | None = None,
) -> Float[Tensor, "batch seq heads"]:
    """How much worse the model is than a reference, signed: what is left to learn.

    ``score[b, t, h] = CE_h[b, t] − nll_ref[b, t + offsets[h]]``. Not the absolute value: a token that
    the model predicts better than the reference has nothing left to teach.

    Args:
        token_ce: ``[batch seq heads]`` cross entropy of the model, in nats.
        reference_nll: ``[batch seq]`` next-token NLL of the reference, indexed by token, as
            ``token_nll`` gives it, aligned here; or ``[batch seq heads]``, the reference's own
            multi-token cross entropy, used as it is.
        offsets: which token each head predicts, ``1, …, heads`` by default.

    Returns:
        ``[batch seq heads]`` float32 or wider, in nats. Past the end of a row the reference counts 0.

    Raises:
        ValueError: shapes or offsets that do not fit.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> excess_loss(torch.ones(1, 3, 1), torch.tensor([[0.0, 0.25, 2.0]]))[0, :, 0]
        tensor([ 0.7500, -1.0000,  1.0000])

    Source: Rho-1, arXiv:2404.07965, equation 3.
    """
    _checks.rank_in("token_ce", token_ce, (3,), "[batch seq heads]")
    _checks.rank_in("reference_nll", reference_nll, (2, 3), "[batch seq] or [batch seq heads]")
    _checks.same_device(token_ce=token_ce, reference_nll=reference_nll)
    steps = offsets_for(offsets, token_ce.shape[2], "token_ce")
    if reference_nll.dim() == 2:
        _checks.shape_is("reference_nll", reference_nll, token_ce.shape[:2], "batch seq")
        reference_nll = align_to_heads(reference_nll, steps)
    _checks.same_shape("reference_nll", reference_nll, "token_ce", token_ce)
    return wide(token_ce) - wide(reference_nll)


@typed
def td_deltas(
    values: Float[Tensor, "batch seq"],
    valid: Bool[Tensor, "batch seq"],
    *,
    rewards: Float[Tensor, "batch seq"] | None = None,
    gamma: float = 1.0,
    initial_value: InitialValue = "first",
    attention_mask: Shaped[Tensor, "batch seq"] | None = None,
    position_ids: Int[Tensor, "batch seq"] | None = None,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """How much each token moved a critic's value.

    ``δ_j = r_j + γ V_j − V_{j−1}`` where ``V_j`` is the value of the prefix that ends with token
    ``x_j``, so that token ``x_j`` moves ``V_{j−1}`` to ``V_j``. With rewards, the state after the last
    trained token of a document is worth 0: ``δ_last = r_last − V_{last−1}``. At ``γ = 1`` the deltas
    telescope: over a document whose trained tokens follow each other their sum is ``R − V_init``,
    without rewards ``V_last − V_init``. (Where ``V_init`` is the first trained token's own value, that
    token has no δ, and a reward at it is not in ``R``.)

    Args:
        values: ``[batch seq]``, any float dtype; computed in float32 or wider, for at bfloat16 small
            deltas vanish.
        valid: ``[batch seq]`` marks the trained tokens. Prompt, padding and tool output carry no δ
            and no reward; the value at the last prompt token is the first trained one's
            ``V_{j−1}``.
        rewards: ``[batch seq]``, entry ``j`` earned by token ``x_j``; ``None`` for a critic's values
            alone.
        gamma: discount in [0, 1].
        initial_value: ``V_{−1}``, for a trained token that is the first of its document. ``"first"``
            makes that token's δ exactly 0, which fits critics whose level means nothing (pairwise
            ranking); a float is used as it is, such as 0.5 for a calibrated probability.
        attention_mask: as in ``mtp_targets``, like the other descriptions of documents. Needed for rows
            padded on the left without a prompt: ``valid`` alone cannot tell padding from prompt.
        position_ids: as in ``mtp_targets``.
        segment_ids: as in ``mtp_targets``.
        cu_seqlens: as in ``mtp_targets``.

    Returns:
        ``[batch seq]``, 0 where not valid; differentiable.

    Raises:
        ValueError: shapes that do not fit, ``gamma`` outside [0, 1].
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> valid = torch.tensor([[False, True, True]])
        >>> td_deltas(torch.tensor([[0.5, 0.75, 0.25]]), valid)
        tensor([[ 0.0000,  0.2500, -0.5000]])

    Source: Sutton and Barto, "Reinforcement Learning", 2nd edition, equation 6.5.
    """
    tracks = find_trajectories(
        values,
        valid,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
    )
    return _deltas(values, rewards, gamma, initial_value, tracks)


@typed
def gae(
    values: Float[Tensor, "batch seq"],
    valid: Bool[Tensor, "batch seq"],
    *,
    rewards: Float[Tensor, "batch seq"] | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    initial_value: InitialValue = "first",
    attention_mask: Shaped[Tensor, "batch seq"] | None = None,
    position_ids: Int[Tensor, "batch seq"] | None = None,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """Generalised advantage estimate of every trained token.

    ``A_j = δ_j + γ λ A_{j'}`` with ``δ`` from ``td_deltas`` and ``j'`` the next trained token of the
    same document: untrained tokens in between are passed over. ``λ = 0`` gives ``δ``. A parallel scan
    in log₂(seq) steps.

    Args:
        values: as in ``td_deltas``, and so are the others.
        valid: ``[batch seq]``, the trained tokens.
        rewards: ``[batch seq]`` or ``None``.
        gamma: discount in [0, 1].
        lam: ``λ`` in [0, 1].
        initial_value: ``"first"`` or ``V_{−1}``.
        attention_mask: ``[batch seq]`` or ``None``.
        position_ids: ``[batch seq]`` or ``None``.
        segment_ids: ``[batch seq]`` or ``None``.
        cu_seqlens: ``[documents + 1]`` or ``None``.

    Returns:
        ``[batch seq]`` float32 or wider, 0 where not valid; differentiable.

    Raises:
        ValueError: shapes that do not fit, ``gamma`` or ``lam`` outside [0, 1].
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> gae(torch.tensor([[0.0, 0.5, 1.0]]), torch.ones(1, 3, dtype=torch.bool), lam=0.5)
        tensor([[0.3750, 0.7500, 0.5000]])

    Source: Schulman et al., arXiv:1506.02438, equation 16.
    """
    tracks = find_trajectories(
        values,
        valid,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
    )
    return advantages(values, rewards, gamma, lam, initial_value, tracks)


def advantages(
    values: Tensor,
    rewards: Tensor | None,
    gamma: float,
    lam: float,
    initial_value: InitialValue,
    tracks: Trajectories,
) -> Float[Tensor, "batch seq"]:
    """``gae`` over trajectories that are known."""
    _checks.in_range("lam", lam, 0.0, 1.0)
    deltas = _deltas(values, rewards, gamma, initial_value, tracks)
    return scan_trained(deltas, gamma * lam, tracks)


@typed
def group_advantages(
    rewards: Float[Tensor, " batch"],
    group_ids: Int[Tensor, " batch"],
    *,
    eps: float = 1e-6,
    correction: int = 1,
) -> Float[Tensor, " batch"]:
    """How much better each answer is than the others to the same question.

    ``A_i = (r_i − mean) / (std + ε)`` within each group; a group of one gives 0.

    Args:
        rewards: ``[batch]``, one per sequence.
        group_ids: ``[batch]``, equal for the answers to one question; any integers in any order.
        eps: ``ε``, at least 0.
        correction: 1 for the standard deviation over ``n − 1``, as ``torch.std`` and GRPO trainers
            take it, 0 for ``n``.

    Returns:
        ``[batch]`` float32 or wider, in standard deviations.

    Raises:
        ValueError: shapes that do not fit, negative ``eps``, ``correction`` other than 0 or 1.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> group_advantages(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([7, 7, 8]))
        tensor([ 0.7071, -0.7071,  0.0000])

    Source: DeepSeekMath (GRPO), arXiv:2402.03300, section 4.1.2.
    """
    _checks.rank_in("rewards", rewards, (1,), "[batch]")
    _checks.same_shape("group_ids", group_ids, "rewards", rewards)
    _checks.same_device(rewards=rewards, group_ids=group_ids)
    _checks.in_range("eps", eps, 0.0, open_high=True)
    _checks.whole("correction", correction, 0, 1)
    rewards = wide(rewards)
    # Each group is numbered by where it starts among the sorted: nobody asks how many there are.
    ids, order = group_ids.long().sort(stable=True)
    group = torch.searchsorted(ids, group_ids.long())

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add(0, group, values)[group]

    # Relative to one of the group: a level that all share would round long sums.
    above = rewards - rewards[order][group]
    count = total(torch.ones_like(rewards))
    centred = above - total(above) / count
    variance = total(centred.square()) / (count - correction).clamp(min=1)
    # A group of equal rewards has no standard deviation, also when their mean rounds.
    alone = total((above != 0).to(count.dtype)) == 0
    return torch.where(alone, 0, centred / (torch.where(alone, 1, variance).sqrt() + eps))


@typed
def target_probability(
    logits: Float[Tensor, "batch seq heads vocab"] | Float[Tensor, "batch seq vocab"],
    labels: Int64[Tensor, "batch seq"] | Int64[Tensor, "batch seq heads"],
    *,
    offsets: Offsets | None = None,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
) -> Float[Tensor, "batch seq heads"]:
    """Probability that the model gives the target: ``p_y``.

    Args:
        logits: as in ``mtp_ce_loss``, and so are the others.
        labels: ``[batch seq]`` or ``[batch seq heads]``.
        offsets: which token each head predicts.
        ignore_index: the label that means "no target".
        softcap: positive bound of the logits, or ``None``.

    Returns:
        ``[batch seq heads]`` in [0, 1], 0 where ignored; float32 or wider.

    Raises:
        ValueError: as ``mtp_ce_loss``.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> target_probability(torch.zeros(1, 2, 4), torch.tensor([[0, 1]]))[0, :, 0]
        tensor([0.2500, 0.0000])

    Source: DFT, arXiv:2508.05629, equation 7.
    """
    objective = Objective(softcap=softcap).checked()
    found = predict(logits, labels, offsets, ignore_index, objective)
    return torch.where(found.valid, torch.exp(-found.loss), 0)


@typed
def predictive_entropy(
    logits: Float[Tensor, "batch seq heads vocab"] | Float[Tensor, "batch seq vocab"],
    *,
    softcap: float | None = None,
) -> Float[Tensor, "batch seq heads"]:
    """Entropy of the predicted distribution: ``H(p) = −Σ_v p_v log p_v``.

    Args:
        logits: ``[batch seq heads vocab]``, or ``[batch seq vocab]`` meaning one head.
        softcap: positive bound of the logits, or ``None``.

    Returns:
        ``[batch seq heads]`` in nats, in [0, log vocab] but for rounding; float32 or wider.

    Raises:
        ValueError: an empty vocabulary, ``softcap`` not positive.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> predictive_entropy(torch.zeros(1, 1, 4))  # log 4
        tensor([[[1.3863]]])

    Source: Wang et al., "Beyond the 80/20 Rule", arXiv:2506.01939, equation 1.
    """
    objective = Objective(softcap=softcap).checked()
    scores = capped(wide(with_heads("logits", logits, "vocab")), objective.softcap)
    log_p = scores.log_softmax(-1)
    p = log_p.exp()
    # Masked before the product: 0 · −inf, and its gradient, would be NaN.
    return -(p * torch.where(p > 0, log_p, 0)).sum(-1)


@typed
def el2n(
    logits: Float[Tensor, "batch seq heads vocab"] | Float[Tensor, "batch seq vocab"],
    labels: Int64[Tensor, "batch seq"] | Int64[Tensor, "batch seq heads"],
    *,
    offsets: Offsets | None = None,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
) -> Float[Tensor, "batch seq heads"]:
    """Length of the gradient with respect to the logits: ``‖p − e_y‖₂``.

    Args:
        logits: as in ``mtp_ce_loss``, and so are the others.
        labels: ``[batch seq]`` or ``[batch seq heads]``.
        offsets: which token each head predicts.
        ignore_index: the label that means "no target".
        softcap: positive bound of the logits, or ``None``.

    Returns:
        ``[batch seq heads]`` in [0, √2], 0 where ignored; float32 or wider. Detached: the norm has no
        gradient at a perfect prediction.

    Raises:
        ValueError: as ``mtp_ce_loss``.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> el2n(torch.zeros(1, 2, 4), torch.tensor([[0, 1]]))[0, :, 0]  # √(3/16 + 9/16)
        tensor([0.8660, 0.0000])

    Source: Paul et al., "Deep Learning on a Data Diet", arXiv:2107.07075, definition 2.2.
    """
    objective = Objective(softcap=softcap).checked()
    logits = with_heads("logits", logits.detach(), "vocab")
    found = predict(logits, labels, offsets, ignore_index, objective)
    p = capped(wide(logits), softcap).softmax(-1)
    others = p.scatter(-1, rearrange(found.target, "b t h -> b t h 1"), 0).square().sum(-1)
    # 1 − p_y from the cross entropy, because 1 − softmax would cancel for confident predictions.
    own = torch.expm1(-found.ce).square()
    return torch.where(found.valid, (others + own).sqrt(), 0)


def _deltas(
    values: Tensor,
    rewards: Tensor | None,
    gamma: float,
    initial_value: InitialValue,
    tracks: Trajectories,
) -> Tensor:
    _checks.in_range("gamma", gamma, 0.0, 1.0)
    values = wide(values)
    if initial_value != "first":
        _checks.fits("initial_value", initial_value, values.dtype)
    first = tracks.trained & ~tracks.continues
    following = tracks.trained & tracks.continues
    before = torch.where(following, shift_right(values), 0)
    if initial_value != "first":
        before = before.masked_fill(first, initial_value)
    after = torch.where(tracks.trained, values, 0)
    earned = torch.zeros_like(after)
    if rewards is not None:
        _checks.same_shape("rewards", rewards, "values", values)
        _checks.same_device(values=values, rewards=rewards)
        after = torch.where(tracks.last(), 0, after)
        earned = torch.where(tracks.trained, wide(rewards), 0)
    deltas = earned + gamma * after - before
    return torch.where(first, 0, deltas) if initial_value == "first" else deltas
