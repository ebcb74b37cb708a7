"""The type checks leave a caller's world as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import wmtp
from tests.strategies import normal
from wmtp.loss import Weights


# A kind of call is checked once in a process: sizes that no other test has, an own one for each test.
HEADS, VOCAB = 3, 37


def inputs(seq: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(0, 1, seq, HEADS, 5), normal(1, VOCAB, 5), torch.zeros(1, seq, dtype=torch.long)


def drawing(ce: Tensor, valid: Tensor) -> Tensor:
    random.random()
    return wmtp.dft_weights(ce, valid)


def refused() -> None:
    hidden, unembedding, labels = inputs(41)
    for wrong in ([1.0, 1.0, "1"], 3):
        with pytest.raises(TypeError):
            wmtp.linear_weighted_mtp_loss(hidden, unembedding, labels, head_weights=wrong)  # type: ignore


def losses(seq: int, weights: Weights = None) -> None:
    hidden, unembedding, labels = inputs(seq)
    wmtp.mtp_targets(labels, list(range(HEADS)))
    wmtp.weighted_mtp_loss(hidden @ unembedding.T, labels, weights)
    wmtp.linear_weighted_mtp_loss(hidden, unembedding, labels, weights)


@pytest.mark.parametrize(
    ("call", "draws"),
    [(partial(losses, 43), 0), (partial(losses, 47, drawing), 2), (refused, 0)],
    ids=["losses", "weights that draw", "wrong arguments"],
)
def test_pythons_random_numbers_are_the_callers(call: Callable[[], None], draws: int) -> None:
    """A resumed run, and one whose type checks are off, see the same order of data."""
    random.seed(7)
    call()
    found = random.random()
    random.seed(7)
    for _ in range(draws):
        random.random()
    assert found == random.random()
