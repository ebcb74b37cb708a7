"""Training the critic whose value differences become weights."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from wmtp import _checks
from wmtp._dtypes import wide
from wmtp._typing import typed
from wmtp.denominators import count_of, reciprocal
from wmtp.scans import find_trajectories, next_trained, scan_trained


Count = float | Float[Tensor, ""] | Int[Tensor, ""] | None


@typed
def lambda_returns(
    values: Float[Tensor, "batch seq"],
    rewards: Float[Tensor, "batch seq"],
    valid: Bool[Tensor, "batch seq"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    attention_mask: Shaped[Tensor, "batch seq"] | None = None,
    position_ids: Int[Tensor, "batch seq"] | None = None,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """Targets for a critic: λ-returns, detached, aligned with the values they train.

    ``G_j = r_j + γ [(1 − λ) V_{j'} + λ G_{j'}]``, the target of ``V_j``, with ``j'`` the next trained
    token of the same document, and ``G_last = r_last``. ``λ = 1, γ = 1`` gives the sum of the rewards
    from token ``j`` on: with one reward at the end every target is that reward.

    This is the usual convention of actor-critic code, in which entry ``j``'s value counts entry
    ``j``'s reward. A critic so trained on a reward at the end serves ``td_deltas`` with and without
    ``rewards``; with a reward at every token, give ``td_deltas`` the values alone.

    Args:
        values: ``[batch seq]``, the critic's; no gradient flows back to them.
        rewards: ``[batch seq]``, entry ``j`` earned by token ``x_j``; only trained tokens' count.
        valid: ``[batch seq]`` marks the trained tokens; others are passed over.
        gamma: discount in [0, 1].
        lam: ``λ`` in [0, 1]; 0 is one-step bootstrapping, 1 is Monte Carlo.
        attention_mask: as in ``mtp_targets``, like the other descriptions of documents.
        position_ids: as in ``mtp_targets``.
        segment_ids: as in ``mtp_targets``.
        cu_seqlens: as in ``mtp_targets``.

    Returns:
        ``[batch seq]`` float32 or wider, detached, 0 where not valid.

    Raises:
        ValueError: shapes that do not fit, ``gamma`` or ``lam`` outside [0, 1].
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> values, rewards = torch.tensor([[0.2, 0.4, 0.6]]), torch.tensor([[0.0, 0.0, 1.0]])
        >>> lambda_returns(values, rewards, torch.ones(1, 3, dtype=torch.bool), lam=0.5)
        tensor([[0.6000, 0.8000, 1.0000]])

    Source: Sutton and Barto, "Reinforcement Learning", 2nd edition, equation 12.18.
    """
    _checks.in_range("gamma", gamma, 0.0, 1.0)
    _checks.in_range("lam", lam, 0.0, 1.0)
    _checks.same_shape("rewards", rewards, "values", values)
    _checks.same_device(values=values, rewards=rewards)
    tracks = find_trajectories(
        values,
        valid,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
    )
    ahead = next_trained(wide(values.detach()), tracks)
    return scan_trained(wide(rewards.detach()) + gamma * (1 - lam) * ahead, gamma * lam, tracks)


@typed
def value_loss(
    values: Float[Tensor, "batch seq"],
    targets: Float[Tensor, "batch seq"],
    valid: Bool[Tensor, "batch seq"],
    *,
    kind: Literal["mse", "huber", "bce"] = "mse",
    delta: float = 1.0,
    normalizer: Count = None,
) -> Float[Tensor, ""]:
    """Distance of a critic's values from their targets, every sequence counting the same.

    The mean over the valid tokens of each sequence, then over the sequences that have any. A packed row
    is one sequence.

    Args:
        values: ``[batch seq]``; for ``"bce"`` logits of a probability.
        targets: ``[batch seq]``, no gradient flows to them; for ``"bce"`` in [0, 1].
        valid: ``[batch seq]``; elsewhere values and targets may be anything.
        kind: ``"mse"`` is ``(V − G)²``; ``"huber"`` is half of that up to ``|V − G| = delta`` and
            linear beyond; ``"bce"`` is the binary cross entropy with logits.
        delta: where ``"huber"`` turns linear, above 0.
        normalizer: what the sum over sequences is divided by: how many have a valid token here, or a
            number or 0-d tensor, their count over the whole accumulation window and all ranks; 0 gives 0.

    Returns:
        A scalar, float32 or wider; 0, connected to the graph, if nothing is valid.

    Raises:
        ValueError: shapes that do not fit, an unknown kind, ``delta`` not positive, a negative count.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> values, targets = torch.tensor([[0.0, 1.0], [3.0, 9.0]]), torch.ones(2, 2)
        >>> value_loss(values, targets, torch.tensor([[True, True], [True, False]]))
        tensor(2.2500)

    Source: Sutton and Barto, "Reinforcement Learning", 2nd edition, equation 9.1; Huber, 1964.
    """
    _checks.rank_in("values", values, (2,), "[batch seq]")
    _checks.same_shape("targets", targets, "values", values)
    _checks.masks("valid", valid, "values", values)
    _checks.same_device(values=values, targets=targets, valid=valid)
    _checks.one_of("kind", kind, ("mse", "huber", "bce"))
    _checks.in_range("delta", delta, 0.0, open_low=True, open_high=True)
    # Masked on both sides of the risky operation: see `predict`.
    guess = torch.where(valid, wide(values), 0)
    goal = torch.where(valid, wide(targets.detach()).to(guess.dtype), 0)
    if kind == "mse":
        losses = (guess - goal).square()
    elif kind == "huber":
        losses = F.huber_loss(guess, goal, reduction="none", delta=delta)
    else:
        losses = F.binary_cross_entropy_with_logits(guess, goal, reduction="none")
    count = valid.sum(1)
    per_sequence = torch.where(valid, losses, 0).sum(1) / count.clamp(min=1)
    return _mean(per_sequence, count > 0, normalizer)


@typed
def pairwise_ranking_loss(
    chosen_values: Float[Tensor, "pairs chosen_seq"],
    rejected_values: Float[Tensor, "pairs rejected_seq"],
    chosen_valid: Bool[Tensor, "pairs chosen_seq"],
    rejected_valid: Bool[Tensor, "pairs rejected_seq"],
    *,
    pool: Literal["last", "mean"] = "last",
    margin: float = 0.0,
    normalizer: Count = None,
) -> Float[Tensor, ""]:
    """Train a critic to value the better of two sequences more: Bradley–Terry.

    ``−log σ(s⁺ − s⁻ − margin)``, averaged over the pairs in which both sides have a valid token. It
    fixes differences only; the level of the values stays free.

    Args:
        chosen_values: ``[pairs chosen_seq]``.
        rejected_values: ``[pairs rejected_seq]``; the lengths may differ.
        chosen_valid: ``[pairs chosen_seq]``.
        rejected_valid: ``[pairs rejected_seq]``.
        pool: what a sequence's score ``s`` is: the value at its ``"last"`` valid token, which makes
            values those of prefixes, as deltas need them; or the ``"mean"`` over its valid tokens.
        margin: by how much the better one should lead, in the units of the values.
        normalizer: what the sum over pairs is divided by: how many count here, or a number or 0-d tensor,
            their count over the whole accumulation window and all ranks; 0 gives 0.

    Returns:
        A scalar, float32 or wider; 0, connected to the graph, if no pair counts.

    Raises:
        ValueError: shapes that do not fit, an unknown pool, a margin that is not finite, a negative
            count.
        TypeError: arguments of another type, dtype or number of axes.

    Example:
        >>> import torch
        >>> every = torch.ones(1, 2, dtype=torch.bool)
        >>> pairwise_ranking_loss(torch.zeros(1, 2), torch.zeros(1, 2), every, every)  # log 2
        tensor(0.6931)

    Source: Bradley and Terry, 1952, as in InstructGPT, arXiv:2203.02155, equation 1.
    """
    _checks.rank_in("chosen_values", chosen_values, (2,), "[pairs seq]")
    _checks.rank_in("rejected_values", rejected_values, (2,), "[pairs seq]")
    _checks.masks("chosen_valid", chosen_valid, "chosen_values", chosen_values)
    _checks.masks("rejected_valid", rejected_valid, "rejected_values", rejected_values)
    if len(chosen_values) != len(rejected_values):
        raise ValueError(
            f"chosen_values and rejected_values must hold the same number of pairs, "
            f"got {len(chosen_values)} and {len(rejected_values)}"
        )
    _checks.same_device(
        chosen_values=chosen_values,
        rejected_values=rejected_values,
        chosen_valid=chosen_valid,
        rejected_valid=rejected_valid,
    )
    _checks.one_of("pool", pool, ("last", "mean"))
    _checks.in_range("margin", margin, -torch.inf, torch.inf, open_low=True, open_high=True)
    chosen, chosen_any = _pool(chosen_values, chosen_valid, pool)
    rejected, rejected_any = _pool(rejected_values, rejected_valid, pool)
    both = chosen_any & rejected_any
    losses = F.softplus(rejected - chosen + margin)
    return _mean(torch.where(both, losses, 0), both, normalizer)


def _mean(losses: Tensor, counted: Tensor, normalizer: float | Tensor | None) -> Tensor:
    """The sum of losses over how many are counted here, or over a caller's count."""
    total = losses.sum()
    count = counted.sum().to(total.dtype) if normalizer is None else count_of(normalizer, total)
    return total * reciprocal(count)


def _pool(values: Tensor, valid: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """One score per sequence, and whether it has a valid token at all."""
    counted = valid
    if pool == "last":
        # The last valid token is the one with no valid token from its right neighbour on.
        counted = valid & (valid.flip(1).cumsum(1).flip(1) == 1)
    total = torch.where(counted, wide(values), 0).sum(1)
    return total / counted.sum(1).clamp(min=1), valid.any(1)
