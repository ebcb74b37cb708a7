"""The soak in short, and that it sees what it is for."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.soak import TOLERANCE, Sample, Soak, complaints, difference, one_step, soak


ROOT = Path(__file__).parent.parent


def test_a_short_soak_leaves_no_tensor_behind_and_stays_together() -> None:
    # In a process of its own: what other tests left in this one is freed at any moment.
    code = """
from tests.soak import TOLERANCE, complaints, soak
found = soak(200, every=40)
assert {dtype for dtype, values in found.differences.items() if values} == set(TOLERANCE)
# A short run only fills the caches: the resident memory is the long one's to judge.
said = [said for said in complaints(found) if "resident" not in said]
assert said == [], said
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_tensor_kept_at_every_step_is_seen() -> None:
    kept: list[Tensor] = []

    def leaky(r: random.Random) -> tuple[torch.dtype, float]:
        kept.append(torch.zeros(1))
        return torch.float32, 0.0

    assert any("live tensors" in said for said in complaints(soak(40, every=10, step=leaky)))


@pytest.mark.parametrize("lost", [0, 1500])
def test_memory_lost_at_every_step_is_seen(lost: int) -> None:
    samples = [Sample(step, 10**9 + lost * step, 3) for step in range(1000, 20_001, 500)]
    said = complaints(Soak(samples, {}, 0.0))
    assert ("resident" in " ".join(said)) == (lost > 0)


def test_a_difference_that_is_too_large_or_grows_is_seen() -> None:
    steady = [1e-6, 3e-6] * 200
    growing = [1e-6 * (1 + n / 200) for n in range(400)]
    wide = [1e-6] * 399 + [1e-3]
    said = [complaints(Soak([Sample(1, 1, 1)], {torch.float32: v}, 0.0)) for v in
            (steady, growing, wide)]  # fmt: skip
    assert said[0] == []
    assert "grew" in said[1][0]
    assert "differ by" in said[2][0]
    assert statistics.fmean(growing) < TOLERANCE[torch.float32]


def test_a_difference_is_relative_to_the_largest_entry_and_nan_is_infinite() -> None:
    one, other = torch.tensor([100.0, 1.0]), torch.tensor([100.0, 2.0])
    assert difference([one], [other]) == pytest.approx(0.01)
    assert difference([one * float("nan")], [one]) == float("inf")


def test_every_step_is_drawn_from_the_seed() -> None:
    assert one_step(random.Random(5)) == one_step(random.Random(5))
