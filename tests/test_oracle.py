"""The oracle against torch's own functions, and its gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests import oracle
from tests.helpers import close
from tests.strategies import SEEDS, Batch, Scored, batches, integers, mask, normal, scored


@given(batches(options=None))
def test_oracle_cross_entropy_is_torchs(case: Batch) -> None:
    targets = case.labels
    if targets.dim() == 2:
        targets = oracle.mtp_targets(targets, oracle.offset_list(case.offsets, case.heads))
    for smoothing in (0.0, 0.2):
        logits = case.logits().requires_grad_()
        expected = F.cross_entropy(
            logits.reshape(-1, case.vocab),
            targets.reshape(-1),
            reduction="none",
            label_smoothing=smoothing,
        ).reshape(case.shape)
        value, grad = oracle.mtp_ce_loss(
            logits,
            case.labels,
            offsets=case.offsets,
            label_smoothing=smoothing,
            reduction="none",
            upstream=case.upstream(),
        )
        close(value, expected)
        (there,) = torch.autograd.grad(expected, logits, case.upstream())
        close(grad, there)


@given(batches(min_batch=1, min_seq=2))
def test_oracle_loss_gradients_are_slopes(case: Batch) -> None:
    weights = case.weights("prediction")
    assert weights is not None

    def value(hidden: torch.Tensor, unembedding: torch.Tensor, w: torch.Tensor) -> float:
        loss, _ = oracle.linear_weighted_mtp_loss(
            hidden, unembedding, case.labels, w, offsets=case.offsets, **case.options
        )
        return float(loss)

    at = [case.hidden(), case.unembedding(), weights]
    _, gradients = oracle.linear_weighted_mtp_loss(
        at[0], at[1], case.labels, at[2], offsets=case.offsets, **case.options
    )
    for n, name in enumerate(["hidden", "unembedding", "weights"]):
        direction = normal(case.seed + 20 + n, *at[n].shape)
        step = 1e-5
        ahead, behind = list(at), list(at)
        ahead[n], behind[n] = at[n] + step * direction, at[n] - step * direction
        slope = (value(*ahead) - value(*behind)) / (2 * step)
        claimed = float((gradients[name] * direction).sum())
        assert slope == pytest.approx(claimed, rel=1e-5, abs=1e-7)


@given(SEEDS, st.integers(1, 3), st.integers(1, 6))
def test_oracle_value_losses_are_torchs(seed: int, batch: int, seq: int) -> None:
    values, valid = normal(seed, batch, seq, scale=2.0), torch.ones(batch, seq).bool()
    targets = torch.sigmoid(normal(seed + 1, batch, seq))
    expected = {
        "mse": F.mse_loss(values, targets),
        "huber": F.huber_loss(values, targets, delta=0.5),
        "bce": F.binary_cross_entropy_with_logits(values, targets),
    }
    for kind, there in expected.items():
        x = values.clone().requires_grad_()
        close(oracle.value_loss(x, targets, valid, kind=kind, delta=0.5)[0], there)
    there = F.huber_loss(x, targets, delta=0.5)
    (slope,) = torch.autograd.grad(there, x)
    close(oracle.value_loss(x, targets, valid, kind="huber", delta=0.5)[1], slope)


@given(SEEDS, st.integers(1, 4))
def test_oracle_ranking_is_torchs(seed: int, batch: int) -> None:
    chosen = normal(seed, batch, 3).requires_grad_()
    rejected = normal(seed + 1, batch, 4).requires_grad_()
    there = -F.logsigmoid(chosen.mean(1) - rejected.mean(1) - 0.3).mean()
    here, up, down = oracle.pairwise_ranking_loss(
        chosen,
        rejected,
        torch.ones(batch, 3).bool(),
        torch.ones(batch, 4).bool(),
        pool="mean",
        margin=0.3,
    )
    close(here, there)
    for claimed, slope in zip(
        (up, down), torch.autograd.grad(there, [chosen, rejected]), strict=True
    ):
        close(claimed, slope)


@given(scored(min_batch=1, min_seq=1))
def test_oracle_statistics_are_torchs(case: Scored) -> None:
    weights = case.weights().double()
    there = weights[case.valid]
    if there.numel() == 0:
        return
    here = oracle.weight_statistics(weights, case.valid)
    assert here["weight_mean"] == pytest.approx(float(there.mean()))
    assert here["weight_std"] == pytest.approx(float(there.std(correction=0)))
    for q in (25, 50, 75, 95):
        assert here[f"weight_p{q}"] == pytest.approx(float(torch.quantile(there, q / 100)))


@given(scored(min_batch=1, min_seq=1))
def test_oracle_softmax_and_top_k_are_torchs(case: Scored) -> None:
    scores, everything = case.scores().double(), torch.ones(case.shape).bool()
    flat = scores.flatten()
    expected = torch.softmax(flat, 0) * flat.numel()
    close(oracle.softmax_weights(scores, everything, scope="all").flatten(), expected)
    k = math.ceil(0.4 * flat.numel())
    chosen = set(torch.topk(flat, k).indices.tolist())
    ours = oracle.top_k_weights(scores, everything, keep=0.4, scope="all").flatten()
    assert set(torch.nonzero(ours).flatten().tolist()) == chosen


@given(SEEDS, st.integers(1, 8))
def test_oracle_advantages_are_discounted_sums(seed: int, seq: int) -> None:
    values, rewards = normal(seed, 1, seq), normal(seed + 1, 1, seq)
    valid = torch.ones(1, seq).bool()
    options = {"rewards": rewards, "gamma": 0.9, "initial_value": 0.2}
    delta = oracle.td_deltas(values, valid, **options)[0].tolist()
    expected = [sum((0.9 * 0.7) ** (k - j) * delta[k] for k in range(j, seq)) for j in range(seq)]
    actual = oracle.gae(values, valid, lam=0.7, **options)
    close(actual[0], torch.tensor(expected, dtype=torch.float64))


@given(SEEDS, st.integers(1, 8))
def test_oracle_advantage_and_return_agree(seed: int, seq: int) -> None:
    # With V_{j−1} read at j, A_j + V_{j−1} is the λ-return of r_j.
    values, rewards = normal(seed, 1, seq), normal(seed + 1, 1, seq)
    valid = torch.ones(1, seq).bool()
    advantage = oracle.gae(values, valid, rewards=rewards, lam=0.8, initial_value=0.0)
    before = torch.cat([torch.zeros(1, 1, dtype=torch.float64), values[:, :-1]], 1)
    returns = oracle.lambda_returns(before, rewards, valid, gamma=1.0, lam=0.8)
    close(returns, advantage + before)


@given(scored(min_batch=1, min_seq=1), st.sampled_from([(0.1, 3.0), (0.5, 1.5), (0.0, 2.0)]))
def test_oracle_projection_holds_both(case: Scored, clip: tuple[float, float]) -> None:
    w = oracle.normalize_weights(case.weights(), case.valid, clip=clip, scope=case.scope)
    for group in oracle.groups(case.valid, case.scope):
        entries = [float(w[i]) for i in group]
        assert sum(entries) == pytest.approx(len(entries), rel=1e-12)
        assert min(entries) >= clip[0]
        assert max(entries) <= clip[1]


@given(SEEDS, st.integers(2, 8))
def test_oracle_group_advantages_are_torchs(seed: int, n: int) -> None:
    rewards, ids = normal(seed, n), integers(seed, 3, n)
    expected = torch.zeros(n, dtype=torch.float64)
    for g in range(3):
        here = ids == g
        if here.sum() > 1:
            expected[here] = (rewards[here] - rewards[here].mean()) / (rewards[here].std() + 1e-6)
    close(oracle.group_advantages(rewards, ids), expected)


@given(SEEDS, st.integers(1, 9))
def test_oracle_moments_merge_to_the_whole(seed: int, seq: int) -> None:
    x, valid = normal(seed, 2, seq), mask(seed, 0.7, 2, seq)
    halves = [oracle.moments(x[b : b + 1], valid[b : b + 1]) for b in range(2)]
    merged = oracle.merged_moments(*halves)
    assert merged[0] == pytest.approx(oracle.moments(x, valid)[0], rel=1e-12, abs=1e-12)
