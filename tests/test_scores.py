"""How much does each token matter?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import wmtp
from tests import oracle
from tests.helpers import all_zero, close, grads, leaf, untouched
from tests.strategies import (
    IGNORE,
    JUNK,
    LAYOUTS,
    SEEDS,
    WIDE_DTYPES,
    Batch,
    Documents,
    Trajectories,
    batches,
    integers,
    mask,
    normal,
    offset_sets,
    packings,
    relayout,
    spoiled,
    trajectories,
)
from wmtp import (
    align_to_heads,
    el2n,
    excess_loss,
    gae,
    group_advantages,
    predictive_entropy,
    target_probability,
    td_deltas,
)


def critic(case: Trajectories, **more: Any) -> dict[str, Any]:
    return {
        "rewards": case.rewards,
        "gamma": case.gamma,
        "initial_value": case.initial_value,
        **case.documents,
        **more,
    }


# -------------------------------------------------------------------------------------- excess loss


@given(SEEDS, st.integers(0, 3), st.integers(0, 6), st.integers(1, 3), WIDE_DTYPES, st.data())
def test_excess_loss_follows_the_oracle(
    seed: int, batch: int, seq: int, heads: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    offsets = data.draw(offset_sets(heads))
    ce, reference = (
        normal(seed, batch, seq, heads).to(dtype),
        normal(seed + 1, batch, seq).to(dtype),
    )
    actual = excess_loss(ce, reference, offsets=offsets)
    assert actual.dtype == dtype
    there = align_to_heads(torch.ones(batch, seq), heads if offsets is None else offsets) > 0
    expected = oracle.excess_loss(ce, reference, offsets=offsets)
    close(actual[there], expected[there], dtype)


@given(SEEDS, st.integers(1, 6), st.integers(1, 3))
def test_an_aligned_reference_is_used_as_it_is(seed: int, seq: int, heads: int) -> None:
    ce, reference = normal(seed, 2, seq, heads), normal(seed + 1, 2, seq, heads)
    close(excess_loss(ce, reference), ce - reference)


def test_excess_loss_is_signed_and_shifted_once() -> None:
    ce = torch.tensor([[[5.0], [1.0], [0.0]]])
    reference = torch.tensor([[9.0, 2.0, 4.0]])
    assert excess_loss(ce, reference)[0, :2, 0].tolist() == [3.0, -3.0]


def test_excess_loss_of_low_precision_is_float32() -> None:
    ce, reference = torch.full((1, 2, 1), 300.0).bfloat16(), torch.full((1, 2), 1.0078125)
    assert excess_loss(ce, reference.bfloat16())[0, 0, 0].item() == 300.0 - 1.0078125


def test_excess_loss_refuses_what_does_not_fit() -> None:
    with pytest.raises((TypeError, ValueError), match="reference_nll"):
        excess_loss(normal(0, 1, 3, 2), normal(1, 1, 4))
    with pytest.raises((TypeError, ValueError), match="reference_nll"):
        excess_loss(normal(0, 1, 3, 2), normal(1, 1, 3, 3))
    with pytest.raises((TypeError, ValueError), match="token_ce"):
        excess_loss(normal(0, 1, 3), normal(1, 1, 3))
    with pytest.raises(ValueError, match=r"offsets must .* the 2 heads of token_ce, got 3"):
        excess_loss(normal(0, 1, 3, 2), normal(1, 1, 3), offsets=3)


# ------------------------------------------------------------------------ deltas and advantages


@given(trajectories())
def test_deltas_follow_the_oracle(case: Trajectories) -> None:
    actual = td_deltas(case.values, case.valid, **critic(case))
    assert actual.dtype == case.values.dtype
    close(actual, oracle.td_deltas(case.values, case.valid, **critic(case)), case.values.dtype)
    assert all_zero(actual[~case.valid])


@given(trajectories())
def test_advantages_follow_the_oracle(case: Trajectories) -> None:
    options = critic(case, lam=case.lam)
    actual = gae(case.values, case.valid, **options)
    assert actual.dtype == case.values.dtype
    close(actual, oracle.gae(case.values, case.valid, **options), case.values.dtype)
    assert all_zero(actual[~case.valid])


@given(trajectories())
def test_advantages_at_lambda_zero_are_deltas(case: Trajectories) -> None:
    options = critic(case)
    close(
        gae(case.values, case.valid, lam=0.0, **options),
        td_deltas(case.values, case.valid, **options),
        case.values.dtype,
    )


def test_deltas_of_a_hand_made_row() -> None:
    values = torch.tensor([[0.25, 0.5, 0.125, 1.0]])
    valid = torch.tensor([[False, True, True, True]])
    assert td_deltas(values, valid).tolist() == [[0.0, 0.25, -0.375, 0.875]]
    terminal = torch.tensor([[0.0, 0.0, 0.0, 2.0]])
    # With a reward the state after the last token is worth nothing: 2 − 0.125.
    assert td_deltas(values, valid, rewards=terminal).tolist() == [[0.0, 0.25, -0.375, 1.875]]
    discounted = td_deltas(values, valid, rewards=terminal, gamma=0.5)
    assert discounted.tolist() == [[0.0, 0.0, 0.0625 - 0.5, 1.875]]


@given(SEEDS, st.integers(1, 3), st.integers(1, 8), st.sampled_from([0.0, 0.7]))
def test_deltas_telescope(seed: int, batch: int, seq: int, initial: float) -> None:
    values, valid = normal(seed, batch, seq), torch.ones(batch, seq).bool()
    total = td_deltas(values, valid, initial_value=initial).sum(1)
    close(total, values[:, -1] - initial)
    terminal = F.pad(normal(seed + 1, batch, 1), (seq - 1, 0))
    total = td_deltas(values, valid, rewards=terminal, initial_value=initial).sum(1)
    close(total, terminal[:, -1] - initial)
    first = td_deltas(values, valid)
    assert all_zero(first[:, 0])
    close(first.sum(1), values[:, -1] - values[:, 0])


@given(SEEDS, st.integers(1, 7), st.integers(1, 3))
def test_deltas_after_a_prompt_telescope_from_its_last_value(
    seed: int, answer: int, prompt: int
) -> None:
    values = normal(seed, 2, prompt + answer)
    valid = (torch.arange(prompt + answer) >= prompt).expand(2, -1)
    reward = normal(seed + 1, 2)
    rewards = torch.zeros_like(values)
    rewards[:, -1] = reward
    close(td_deltas(values, valid).sum(1), values[:, -1] - values[:, prompt - 1])
    close(td_deltas(values, valid, rewards=rewards).sum(1), reward - values[:, prompt - 1])


@given(SEEDS, st.integers(2, 8))
def test_the_full_advantage_is_reward_minus_value(seed: int, seq: int) -> None:
    values, valid = normal(seed, 1, seq), torch.ones(1, seq).bool()
    rewards = F.pad(torch.ones(1, 1).double(), (seq - 1, 0))
    advantage = gae(values, valid, rewards=rewards, lam=1.0, initial_value=0.25)
    before = torch.cat([torch.full((1, 1), 0.25).double(), values[:, :-1]], 1)
    close(advantage, 1.0 - before)


@pytest.mark.parametrize("function", [td_deltas, gae])
@given(packing=packings(), seed=SEEDS, with_rewards=st.booleans())
def test_packed_equals_separate_documents(
    function: Any, packing: Documents, seed: int, with_rewards: bool
) -> None:
    shape = (packing.batch, packing.seq)
    values, valid = normal(seed, *shape), mask(seed + 1, 0.7, *shape)
    rewards = normal(seed + 2, *shape) if with_rewards else None
    packed = function(values, valid, rewards=rewards, gamma=0.9, segment_ids=packing.segment_ids)
    for b, piece in packing.pieces():
        alone = function(
            values[b : b + 1, piece],
            valid[b : b + 1, piece],
            rewards=None if rewards is None else rewards[b : b + 1, piece],
            gamma=0.9,
        )
        close(packed[b : b + 1, piece], alone)


@pytest.mark.parametrize("function", [td_deltas, gae])
@given(
    seed=SEEDS,
    seq=st.integers(1, 6),
    padding=st.integers(1, 3),
    junk=JUNK,
    initial=st.sampled_from(["first", 0.5]),
)
def test_left_and_right_padding_equal_no_padding(
    function: Any, seed: int, seq: int, padding: int, junk: float, initial: Any
) -> None:
    values, rewards = normal(seed, 2, seq), normal(seed + 1, 2, seq)
    valid = mask(seed + 2, 0.7, 2, seq)
    expected = function(values, valid, rewards=rewards, initial_value=initial)
    for pads in ((padding, 0), (0, padding)):
        padded = function(
            F.pad(values, pads, value=junk),
            F.pad(valid, pads, value=False),
            rewards=F.pad(rewards, pads, value=junk),
            initial_value=initial,
            attention_mask=F.pad(torch.ones(2, seq), pads),
        )
        close(padded, F.pad(expected, pads))


def test_without_a_mask_a_left_pad_reads_as_a_prompt() -> None:
    values, valid = torch.tensor([[0.5, 2.0]]), torch.tensor([[False, True]])
    assert td_deltas(values, valid).tolist() == [[0.0, 1.5]]
    there = torch.tensor([[0, 1]])
    assert td_deltas(values, valid, attention_mask=there).tolist() == [[0.0, 0.0]]


@given(SEEDS)
def test_tool_output_is_passed_over(seed: int) -> None:
    values, rewards = normal(seed, 1, 6), normal(seed + 1, 1, 6)
    valid = torch.tensor([[True, True, False, False, True, True]])
    delta = td_deltas(values, valid, rewards=rewards)
    advantage = gae(values, valid, rewards=rewards, lam=0.5)
    assert all_zero(delta[:, 2:4])
    close(delta[:, 4], rewards[:, 4] + values[:, 4] - values[:, 3])
    close(advantage[:, 1], delta[:, 1] + 0.5 * advantage[:, 4])


@pytest.mark.parametrize("function", [td_deltas, gae])
@given(case=trajectories(dtype=torch.float64), junk=JUNK)
def test_junk_at_places_that_carry_nothing_changes_nothing(
    function: Any, case: Trajectories, junk: float
) -> None:
    # A value is read if its own token is trained, or the next one of its document is.
    followed = torch.zeros_like(case.valid)
    followed[:, :-1] = case.valid[:, 1:]
    dirty = replace(case, values=spoiled(case.values, ~case.valid & ~followed, junk))
    if case.rewards is not None:
        dirty = replace(dirty, rewards=spoiled(case.rewards, ~case.valid, junk))
    close(
        function(dirty.values, dirty.valid, **critic(dirty)),
        function(case.values, case.valid, **critic(case)),
    )


@pytest.mark.parametrize("function", [td_deltas, gae])
@given(junk=JUNK)
def test_junk_gets_a_gradient_of_exactly_zero(function: Any, junk: float) -> None:
    valid = torch.tensor([[False, False, True, True, False]])
    values = leaf(torch.tensor([[junk, 0.5, 0.25, 1.0, junk]], dtype=torch.float64))
    rewards = leaf(torch.tensor([[junk, junk, 0.25, 1.0, junk]], dtype=torch.float64))
    found = grads(function(values, valid, rewards=rewards).sum(), [values, rewards])
    assert all(g.isfinite().all() for g in found)
    assert all_zero(found[0][:, [0, 4]])
    assert all_zero(found[1][:, [0, 1, 4]])


@pytest.mark.parametrize("function", [td_deltas, gae])
@given(case=trajectories())
def test_scores_never_write_to_their_inputs(function: Any, case: Trajectories) -> None:
    told = critic(case)
    with untouched(case.values, case.valid, *(x for x in told.values() if isinstance(x, Tensor))):
        function(case.values, case.valid, **told)


@pytest.mark.parametrize("function", [td_deltas, gae])
def test_deltas_and_advantages_are_differentiable(function: Any) -> None:
    valid = torch.tensor([[True, True, False, True, True], [False, False, False, True, True]])
    segments = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    assert torch.autograd.gradcheck(
        lambda v, r: function(v, valid, rewards=r, gamma=0.9, segment_ids=segments),
        [leaf(normal(0, 2, 5)), leaf(normal(1, 2, 5))],
    )


@pytest.mark.parametrize("way", ["attention_mask", "position_ids", "cu_seqlens"])
@pytest.mark.parametrize("name", ["td_deltas", "gae", "lambda_returns", "critic_delta_weights"])
@given(packing=packings(max_batch=1), seed=SEEDS)
def test_documents_may_be_told_in_every_way(
    name: str, way: str, packing: Documents, seed: int
) -> None:
    shape = packing.batch, packing.seq
    values, rewards, valid = (
        normal(seed, *shape),
        normal(seed + 1, *shape),
        mask(seed + 2, 0.8, *shape),
    )

    def found(**documents: Tensor) -> Tensor:
        given: dict[str, Any] = {"rewards": rewards, "gamma": 0.9, **documents}
        if name != "td_deltas":
            given["lam"] = 0.8
        return getattr(wmtp, name)(values=values, valid=valid, **given)

    number = "segment_ids" if way == "attention_mask" else way  # which some collators number
    close(found(**{way: getattr(packing, number)}), found(segment_ids=packing.segment_ids))


def test_what_is_in_no_document_takes_no_place_among_a_critics_weights() -> None:
    values, every, whole = normal(0, 1, 6), torch.ones(1, 6).bool(), torch.tensor([0, 2, 4])
    found = wmtp.critic_delta_weights(values, every, mode="top_k", keep=0.5, cu_seqlens=whole)
    assert int((found != 0).sum()) == 2
    assert all_zero(found[:, 4:])


@given(trajectories(), LAYOUTS)
def test_the_layout_does_not_matter(case: Trajectories, layout: str) -> None:
    view, valid = relayout(case.values, layout), relayout(case.valid, layout)
    told = {name: relayout(x, layout) if x.dim() == 2 else x for name, x in case.documents.items()}
    case = replace(case, documents=told)
    told = critic(case, rewards=None)
    close(gae(view, valid, **told), gae(view.clone(), valid.clone(), **told), case.values.dtype)


def test_small_deltas_survive_low_precision() -> None:
    # Spacing of bfloat16 in [0.5, 1) is 0.004: one step up and one down would both vanish.
    values = torch.tensor([[0.5, 0.50390625, 0.5078125]]).bfloat16()
    valid = torch.ones(1, 3).bool()
    for function in (td_deltas, gae):
        out = function(values, valid, gamma=0.999)
        assert out.dtype == torch.float32
        options = {"gamma": 0.999, **({"lam": 0.95} if function is gae else {})}
        expected = getattr(oracle, function.__name__)(values, valid, **options)
        close(out, expected, torch.float32)


def test_a_long_row_neither_overflows_nor_drifts() -> None:
    # Dividing a cumulative sum by (γλ)^t would be infinite here.
    values, rewards = normal(0, 1, 4096), normal(1, 1, 4096)
    valid = mask(2, 0.8, 1, 4096)
    options: dict[str, Any] = {"rewards": rewards, "gamma": 0.97, "lam": 0.9}
    close(gae(values, valid, **options), oracle.gae(values, valid, **options))
    single = {**options, "rewards": rewards.float()}
    drift = gae(values.float(), valid, **single).double() - oracle.gae(values, valid, **options)
    assert float(drift.abs().max()) < 1e-4


def test_the_scan_takes_a_logarithmic_number_of_steps() -> None:
    def operations(seq: int) -> int:
        values, valid = normal(0, 1, seq), torch.ones(1, seq).bool()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
        ) as watch:
            gae(values, valid)
        return sum(event.count for event in watch.key_averages() if "aten::" in event.key)

    short, long = operations(64), operations(4096)
    assert long < 3 * short


@pytest.mark.parametrize("function", [td_deltas, gae])
def test_deltas_refuse_what_does_not_fit(function: Any) -> None:
    values, valid = normal(0, 2, 3), torch.ones(2, 3).bool()
    with pytest.raises((TypeError, ValueError), match="valid"):
        function(values, valid[:, :2])
    with pytest.raises(TypeError, match="valid"):
        function(values, valid.double())
    with pytest.raises((TypeError, ValueError), match="rewards"):
        function(values, valid, rewards=normal(0, 2, 4))
    with pytest.raises((TypeError, ValueError), match="segment_ids"):
        function(values, valid, segment_ids=torch.zeros(1, 3).long())
    with pytest.raises((TypeError, ValueError), match="attention_mask"):
        function(values, valid, attention_mask=torch.zeros(2, 4))
    with pytest.raises((TypeError, ValueError), match="values"):
        function(values[0], valid)
    with pytest.raises((TypeError, ValueError), match="initial_value"):
        function(values, valid, initial_value="last")
    for gamma in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="gamma"):
            function(values, valid, gamma=gamma)


def test_advantages_refuse_an_impossible_lambda() -> None:
    for lam in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="lam"):
            gae(normal(0, 2, 3), torch.ones(2, 3).bool(), lam=lam)


# --------------------------------------------------------------------------------- group advantages


@given(SEEDS, st.integers(0, 9), st.integers(1, 4), WIDE_DTYPES, st.sampled_from([0, 1]))
def test_group_advantages_follow_the_oracle(
    seed: int, n: int, groups: int, dtype: torch.dtype, correction: int
) -> None:
    rewards, ids = normal(seed, n).to(dtype), integers(seed, groups, n) * 1000 - 7
    actual = group_advantages(rewards, ids, correction=correction)
    assert actual.dtype == dtype
    close(actual, oracle.group_advantages(rewards, ids, correction=correction), dtype)


def test_a_group_of_one_and_a_group_of_equals_give_zero() -> None:
    rewards, ids = torch.tensor([5.0, 1.0, 1.0, 1.0]), torch.tensor([3, 8, 8, 8])
    assert group_advantages(rewards, ids).tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("reward", [0.1, 0.7, 1e6 / 3])
@pytest.mark.parametrize("n", [3, 5, 6, 7, 11])
def test_equal_rewards_give_zero_although_their_mean_rounds(reward: float, n: int) -> None:
    assert all_zero(group_advantages(torch.full((n,), reward), torch.zeros(n).long()))


@given(SEEDS, st.sampled_from([1e-6, 0.5]))
def test_the_order_and_the_names_of_groups_do_not_matter(seed: int, eps: float) -> None:
    rewards, ids = normal(seed, 8), integers(seed, 3, 8)
    expected = group_advantages(rewards, ids, eps=eps)
    close(expected, oracle.group_advantages(rewards, ids, eps=eps))
    close(group_advantages(rewards.flip(0), 5 - ids.flip(0), eps=eps).flip(0), expected)


@pytest.mark.parametrize("size", [6, 60_000])
def test_many_answers_cost_no_memory_for_each_pair_and_round_as_torch_does(size: int) -> None:
    n = 60_000
    rewards, order = normal(0, n).float() + 1000, normal(1, n).argsort()
    actual = torch.empty(n)
    actual[order] = group_advantages(rewards[order], order // size)
    groups = rewards.double().view(-1, size)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    close(actual.view(-1, size), expected, torch.float32)


def test_a_bad_reward_stays_in_its_group() -> None:
    rewards = torch.tensor([torch.nan, 1.0, 2.0, torch.inf, 0.0])
    actual = group_advantages(rewards, torch.tensor([0, 1, 1, 0, 2]))
    assert actual[[0, 3]].isnan().all()
    close(actual[[1, 2, 4]], torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0]), torch.float32)


def test_group_advantages_refuse_what_does_not_fit() -> None:
    with pytest.raises((TypeError, ValueError), match="group_ids"):
        group_advantages(normal(0, 3), torch.zeros(4).long())
    with pytest.raises(TypeError, match="group_ids"):
        group_advantages(normal(0, 3), torch.zeros(3))
    for eps in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="eps"):
            group_advantages(normal(0, 3), torch.zeros(3).long(), eps=eps)
    for correction in (-1, 2):
        with pytest.raises(ValueError, match="correction"):
            group_advantages(normal(0, 3), torch.zeros(3).long(), correction=correction)


# ---------------------------------------------------------------------------- from the logits alone


@given(batches(options=None), WIDE_DTYPES, st.sampled_from([None, 1.5]))
def test_scores_of_the_logits_follow_the_oracle(
    case: Batch, dtype: torch.dtype, softcap: float | None
) -> None:
    logits = case.logits(dtype)
    for name, function in {"target_probability": target_probability, "el2n": el2n}.items():
        actual = function(logits, case.labels, offsets=case.offsets, softcap=softcap)
        expected = getattr(oracle, name)(logits, case.labels, offsets=case.offsets, softcap=softcap)
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.double(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-9, atol=3e-7
        )
        valid = oracle.valid_of(case.labels, case.heads, offsets=case.offsets)
        assert all_zero(actual[~valid])
    close(
        predictive_entropy(logits, softcap=softcap),
        oracle.predictive_entropy(logits, softcap=softcap),
        dtype,
    )


@given(batches(min_batch=1, min_seq=1, options=None), JUNK)
def test_scores_of_the_logits_never_read_ignored_rows(case: Batch, junk: float) -> None:
    ignored = ~oracle.valid_of(case.labels, case.heads, offsets=case.offsets)
    dirty = spoiled(case.logits(), ignored, junk)
    for function in (target_probability, el2n):
        assert torch.equal(
            function(dirty, case.labels, offsets=case.offsets),
            function(case.logits(), case.labels, offsets=case.offsets),
        )


def test_entropy_runs_from_zero_to_the_log_of_the_vocabulary() -> None:
    logits = torch.tensor([[[0.0, 0.0, 0.0], [1e4, 0.0, 0.0], [0.0, 0.0, -math.inf]]])
    expected = torch.tensor([[[math.log(3)], [0.0], [math.log(2)]]], dtype=torch.float64)
    close(predictive_entropy(logits), expected, torch.float32)


def test_el2n_runs_from_zero_to_the_root_of_two() -> None:
    logits = torch.tensor([[[1e4, 0.0], [1e4, 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[IGNORE, 0, 1]])
    assert el2n(logits, labels)[0, :, 0].tolist() == pytest.approx([0.0, math.sqrt(2), 0.0])
    assert target_probability(logits, labels)[0, :, 0].tolist() == [1.0, 0.0, 0.0]


def test_a_sure_prediction_keeps_its_small_distance() -> None:
    # √(Σp² − 2p_y + 1) would round to 0 in float32.
    logits = torch.tensor([[[12.0, 0.0], [0.0, 0.0]]])
    expected = math.sqrt(2) / (1 + math.exp(12.0))
    assert el2n(logits, torch.tensor([[0, 0]]))[0, 0, 0].item() == pytest.approx(expected, rel=1e-2)


def test_scores_of_low_precision_logits_are_float32() -> None:
    logits, labels = normal(0, 2, 4, 2, 5).bfloat16(), integers(1, 5, 2, 4)
    for name in ("target_probability", "el2n"):
        actual = {"target_probability": target_probability, "el2n": el2n}[name](logits, labels)
        assert actual.dtype == torch.float32
        close(actual, getattr(oracle, name)(logits, labels), torch.float32)
    close(predictive_entropy(logits), oracle.predictive_entropy(logits), torch.float32)


def test_scores_of_the_logits_refuse_what_does_not_fit() -> None:
    logits, labels = normal(0, 1, 3, 2, 4), integers(0, 4, 1, 3)
    for function in (target_probability, el2n):
        with pytest.raises((TypeError, ValueError), match="labels"):
            function(logits, labels[:, :2])
        with pytest.raises(ValueError, match="softcap"):
            function(logits, labels, softcap=-1.0)
        with pytest.raises((ValueError, IndexError), match="label"):
            function(logits, labels + 4)
    for call in (
        lambda: target_probability(logits[..., :0], labels),
        lambda: el2n(logits[..., :0], labels),
        lambda: predictive_entropy(logits[..., :0]),
    ):
        with pytest.raises(ValueError, match=r"^logits must .* one entry .* \(vocab\)"):
            call()
    with pytest.raises((TypeError, ValueError), match="logits"):
        predictive_entropy(normal(0, 3, 4))
    with pytest.raises(ValueError, match="softcap"):
        predictive_entropy(logits, softcap=0.0)
