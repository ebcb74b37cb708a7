"""What is refused even where the type checks are off: under `torch.compile`, or by `JAXTYPING_DISABLE=1`.

The functions are called as they are there, without their decorator.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import wmtp
from tests.strategies import normal
from wmtp import _kernels, slab_softmax, target_rows


HIDDEN, UNEMBEDDING = normal(0, 1, 3, 2, 4), normal(1, 5, 4)
LABELS, VALID = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)
VALUES = normal(2, 1, 3)


def unchecked(function: Any) -> Callable[..., Any]:
    return function.__wrapped__


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (
            lambda: unchecked(wmtp.linear_mtp_ce_loss)(HIDDEN, UNEMBEDDING[0], LABELS),
            ValueError,
            r"unembedding must be \[vocab dim\].* got 1 axes",
        ),
        (
            lambda: unchecked(wmtp.linear_mtp_ce_loss)(HIDDEN, UNEMBEDDING[:, :3], LABELS),
            ValueError,
            "same last axis .*got 4 and 3",
        ),
        (
            lambda: unchecked(wmtp.linear_mtp_ce_loss)(HIDDEN, UNEMBEDDING[:0], LABELS),
            ValueError,
            "unembedding must have at least one row",
        ),
        (
            lambda: unchecked(wmtp.linear_weighted_mtp_loss)(
                HIDDEN, UNEMBEDDING, LABELS, normalizer="rows"
            ),
            ValueError,
            "normalizer must be 'weights', 'tokens' or a number, got 'rows'",
        ),
        (
            lambda: unchecked(wmtp.combine_weights)([VALUES, LABELS], VALID),
            TypeError,
            r"weights\[1\] must be floating point, got torch.int64",
        ),
        (
            lambda: unchecked(wmtp.mtp_targets)(LABELS.to(torch.uint8), 2),
            TypeError,
            "labels must be torch.int64, got torch.uint8",
        ),
        (
            lambda: unchecked(wmtp.linear_mtp_ce_loss)(HIDDEN, UNEMBEDDING, LABELS.bool()),
            TypeError,
            "labels must be torch.int64, got torch.bool",
        ),
        (
            lambda: unchecked(wmtp.pairwise_ranking_loss)(
                VALUES, VALUES.expand(2, 3), VALID, VALID.expand(2, 3)
            ),
            ValueError,
            "same number of pairs, got 1 and 2",
        ),
    ],
)
def test_what_would_be_broadcast_or_misread_is_refused(
    call: Callable[[], Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        call()


@pytest.mark.parametrize("kind", [TypeError, ValueError])
@pytest.mark.parametrize("checked", [True, False])
def test_a_shape_that_does_not_fit_is_both_errors_whoever_finds_it(
    kind: type[Exception], checked: bool
) -> None:
    for function, arguments in (
        (wmtp.mtp_ce_loss, (HIDDEN, LABELS[:, :2])),
        (wmtp.linear_mtp_ce_loss, (HIDDEN, UNEMBEDDING[0], LABELS)),
        (wmtp.value_loss, (VALUES, VALUES[:, :2], VALID)),
        (wmtp.align_to_heads, (LABELS[0], 2)),
    ):
        call: Callable[..., Any] = function if checked else unchecked(function)
        with pytest.raises(kind):
            call(*arguments)


@pytest.mark.parametrize(
    "call",
    [
        lambda mask: unchecked(wmtp.normalize_weights)(VALUES, mask),
        lambda mask: unchecked(wmtp.top_k_weights)(VALUES, mask, keep=0.5),
        lambda mask: unchecked(wmtp.td_deltas)(VALUES, mask),
        lambda mask: unchecked(wmtp.value_loss)(VALUES, VALUES, mask),
        lambda mask: unchecked(wmtp.weighted_mean)(VALUES[..., None], None, mask[..., None]),
        lambda mask: unchecked(wmtp.pairwise_ranking_loss)(VALUES, VALUES, mask, VALID),
        lambda mask: unchecked(wmtp.pairwise_ranking_loss)(VALUES, VALUES, VALID, mask),
        lambda mask: unchecked(wmtp.update_statistics)(None, VALUES, mask),
        lambda mask: unchecked(wmtp.weight_statistics)(VALUES, mask),
        lambda mask: unchecked(wmtp.check_weights)(VALUES.abs(), mask),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_a_mask_of_numbers_is_refused(call: Callable[[Any], Any], dtype: torch.dtype) -> None:
    """Whoever sums it or joins it with another bit by bit would count 255 times, or never."""
    call(VALID)
    with pytest.raises(TypeError, match=rf"valid must be torch.bool, got {dtype}"):
        call(VALID.to(dtype))


def test_a_generator_of_another_device_is_refused() -> None:
    weights, valid = torch.rand(1, 3, device="meta"), torch.ones(1, 3, device="meta").bool()
    with pytest.raises(ValueError, match="generator must be on the weights' device meta, got cpu"):
        wmtp.shuffled_weights(weights, valid, generator=torch.Generator())


def test_numbers_on_other_devices_are_not_read() -> None:
    """They would cost a synchronisation, and a meta tensor has none."""
    meta = {"device": "meta"}
    bounds = torch.zeros(2, dtype=torch.int64, **meta)
    labels = torch.zeros(1, 3, dtype=torch.int64, **meta)
    assert wmtp.mtp_targets(labels, 2, cu_seqlens=bounds).shape == (1, 3, 2)
    spans, valid = torch.full((1, 3), 7, **meta), torch.ones(1, 3, **meta).bool()
    weights = wmtp.span_weights(spans, torch.ones(2, **meta), valid)
    assert (weights.shape, weights.device.type) == ((1, 3), "meta")


@pytest.mark.parametrize(
    ("module", "name"), [(slab_softmax, "triton_softmax"), (target_rows, "triton_target_rows")]
)
def test_the_kernels_are_for_cuda_and_where_triton_is(
    module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(dtype: torch.dtype, is_cuda: bool = True) -> Any:
        _kernels._loaded.cache_clear()
        return module._kernels(SimpleNamespace(is_cuda=is_cuda, dtype=dtype))

    installed = importlib.util.find_spec("triton") is not None
    assert (asked(torch.bfloat16) is not None) == installed
    if installed:
        assert asked(torch.bfloat16).__name__ == f"wmtp.{name}"
    assert asked(torch.float64) is None
    assert asked(torch.bfloat16, is_cuda=False) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert asked(torch.bfloat16) is None
    _kernels._loaded.cache_clear()


def test_statistics_without_whitening_are_refused() -> None:
    statistics = wmtp.update_statistics(None, VALUES, VALID)
    with pytest.raises(ValueError, match="statistics are for whitening"):
        wmtp.exp_weights(VALUES, VALID, whiten=False, statistics=statistics)
