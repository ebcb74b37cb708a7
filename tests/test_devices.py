"""Tensors on two devices are refused, by name; the meta device stands for the other one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import wmtp
from wmtp.documents import find_documents


LOGITS, HIDDEN = torch.zeros(1, 3, 2, 5), torch.zeros(1, 3, 2, 4)
UNEMBEDDING, BIAS = torch.zeros(5, 4), torch.zeros(5)
LABELS, FLAT = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3)
DEEP, IDS = torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.long)
VALID, VALID_DEEP = torch.ones(1, 3).bool(), torch.ones(1, 3, 2).bool()
REWARDS, GROUPS = torch.zeros(3), torch.zeros(3, dtype=torch.long)
BOUNDS = torch.tensor([0, 3])

# What is called with what; each tensor in turn goes to the other device.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "mtp_targets": (
        wmtp.mtp_targets,
        {
            "labels": LABELS,
            "attention_mask": IDS,
            "position_ids": IDS,
            "segment_ids": IDS,
            "cu_seqlens": BOUNDS,
            "offsets": 2,
        },
    ),
    "mtp_ce_loss": (wmtp.mtp_ce_loss, {"logits": LOGITS, "labels": LABELS}),
    "linear_mtp_ce_loss": (
        wmtp.linear_mtp_ce_loss,
        {"hidden": HIDDEN, "unembedding": UNEMBEDDING, "labels": LABELS, "bias": BIAS},
    ),
    "weighted_mtp_loss": (wmtp.weighted_mtp_loss, {"logits": LOGITS, "labels": LABELS}),
    "weighted_mtp_loss, token weights": (
        lambda weights: wmtp.weighted_mtp_loss(LOGITS, LABELS, weights),
        {"weights": FLAT},
    ),
    "weighted_mtp_loss, a function's weights": (
        lambda weights: wmtp.weighted_mtp_loss(LOGITS, LABELS, lambda ce, valid: weights),
        {"weights": DEEP},
    ),
    "weighted_mtp_loss, head weights": (
        lambda head_weights: wmtp.weighted_mtp_loss(LOGITS, LABELS, head_weights=head_weights),
        {"head_weights": torch.ones(2)},
    ),
    "weighted_mtp_loss, normalizer": (
        lambda normalizer: wmtp.weighted_mtp_loss(LOGITS, LABELS, normalizer=normalizer),
        {"normalizer": torch.tensor(3.0)},
    ),
    "linear_weighted_mtp_loss, weights": (
        lambda weights: wmtp.linear_weighted_mtp_loss(HIDDEN, UNEMBEDDING, LABELS, weights),
        {"weights": DEEP},
    ),
    "weighted_mean": (
        wmtp.weighted_mean,
        {"token_ce": DEEP, "weights": DEEP, "valid": VALID_DEEP},
    ),
    "excess_loss": (wmtp.excess_loss, {"token_ce": DEEP, "reference_nll": FLAT}),
    "td_deltas": (wmtp.td_deltas, {"values": FLAT, "valid": VALID, "rewards": FLAT}),
    "lambda_returns": (wmtp.lambda_returns, {"values": FLAT, "valid": VALID, "rewards": FLAT}),
    "value_loss": (wmtp.value_loss, {"values": FLAT, "targets": FLAT, "valid": VALID}),
    "pairwise_ranking_loss": (
        wmtp.pairwise_ranking_loss,
        {
            "chosen_values": FLAT,
            "rejected_values": FLAT,
            "chosen_valid": VALID,
            "rejected_valid": VALID,
        },
    ),
    "group_advantages": (wmtp.group_advantages, {"rewards": REWARDS, "group_ids": GROUPS}),
    "normalize_weights": (wmtp.normalize_weights, {"weights": FLAT, "valid": VALID}),
    "softmax_weights": (wmtp.softmax_weights, {"scores": FLAT, "valid": VALID}),
    "top_k_weights": (wmtp.top_k_weights, {"scores": FLAT, "valid": VALID}),
    "exp_weights": (wmtp.exp_weights, {"scores": FLAT, "valid": VALID}),
    "update_statistics": (
        wmtp.update_statistics,
        {"statistics": None, "scores": FLAT, "valid": VALID},
    ),
    "span_weights": (
        wmtp.span_weights,
        {"span_ids": IDS, "span_values": FLAT[0], "valid": VALID},
    ),
    "entropy_weights": (wmtp.entropy_weights, {"entropy": FLAT, "valid": VALID}),
    "el2n_weights": (wmtp.el2n_weights, {"el2n": FLAT, "valid": VALID}),
    "group_relative_weights": (
        wmtp.group_relative_weights,
        {"rewards": REWARDS[:1], "group_ids": GROUPS[:1], "valid": VALID},
    ),
    "shuffled_weights": (
        wmtp.shuffled_weights,
        {"weights": FLAT, "valid": VALID, "generator": torch.Generator()},
    ),
    "random_matched_weights": (
        wmtp.random_matched_weights,
        {"weights": FLAT, "valid": VALID, "generator": torch.Generator()},
    ),
    "weight_statistics": (wmtp.weight_statistics, {"weights": FLAT, "valid": VALID}),
    "check_weights": (wmtp.check_weights, {"weights": FLAT + 1, "valid": VALID}),
}


@pytest.mark.parametrize(
    ("call", "moved"),
    [
        (call, name)
        for call, (_, arguments) in CALLS.items()
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    ],
)
def test_a_tensor_on_another_device_is_named(call: str, moved: str) -> None:
    function, arguments = CALLS[call]
    function(**arguments)
    with pytest.raises(ValueError, match=rf"on one device, got .*\b{moved} on meta"):
        function(**arguments | {moved: arguments[moved].to("meta")})


def test_documents_stay_on_the_device_of_the_labels() -> None:
    labels, bounds = LABELS.to("meta"), BOUNDS.to("meta")
    for told in ({}, {"cu_seqlens": bounds}):
        documents = find_documents(labels, **told)
        assert {x.device.type for x in (documents.real, *documents.ids)} == {"meta"}
