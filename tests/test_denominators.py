"""What a prediction counts: the weighted mean, and counts that a caller gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracle
from tests.helpers import all_zero, close, grads, leaf
from tests.loss_forms import NORMALIZERS
from tests.strategies import JUNK, SEEDS, WIDE_DTYPES, mask, normal, sizes, spoiled, uniform
from wmtp import weighted_mean
from wmtp.denominators import count_of


@given(
    seed=SEEDS,
    batch=sizes(3),
    seq=sizes(5),
    heads=st.integers(1, 3),
    dtype=WIDE_DTYPES,
    weighted=st.booleans(),
    shared=st.booleans(),
    normalizer=NORMALIZERS,
)
def test_the_weighted_mean_follows_the_oracle(
    seed: int,
    batch: int,
    seq: int,
    heads: int,
    dtype: torch.dtype,
    weighted: bool,
    shared: bool,
    normalizer: str | float,
) -> None:
    shape = (batch, seq, heads)
    ce, valid = leaf(normal(seed, *shape).to(dtype)), mask(seed + 1, 0.7, *shape)
    weights = leaf((0.1 + uniform(seed + 2, *shape)).to(dtype)) if weighted else None
    share = [1.0 / (h + 1) for h in range(heads)] if shared else None
    options: dict[str, Any] = {"head_weights": share, "normalizer": normalizer}
    mean = weighted_mean(ce, weights, valid, **options)
    expected, to_ce, to_weights = oracle.weighted_mean(ce, weights, valid, **options)
    assert mean.dtype == dtype
    close(mean, expected, dtype)
    close(grads(mean, [ce])[0], to_ce, dtype)
    if weights is not None:
        close(grads(mean, [weights])[0], to_weights, dtype)


@given(seed=SEEDS, junk=JUNK, normalizer=NORMALIZERS)
def test_the_weighted_mean_never_reads_invalid_places(
    seed: int, junk: float, normalizer: str | float
) -> None:
    valid = mask(seed + 1, 0.6, 2, 4, 2)
    clean = [leaf(x) for x in (normal(seed, 2, 4, 2), 0.1 + uniform(seed + 2, 2, 4, 2))]
    dirty = [leaf(spoiled(x, ~valid, junk)) for x in clean]
    here, there = (weighted_mean(*x, valid, normalizer=normalizer) for x in (clean, dirty))
    assert torch.equal(here, there)
    for a, b in zip(grads(there, dirty), grads(here, clean), strict=True):
        assert torch.equal(a, b)
        assert all_zero(a[~valid])


def test_the_weighted_mean_refuses_what_does_not_fit() -> None:
    ce, valid = normal(0, 1, 3, 2), torch.ones(1, 3, 2).bool()
    with pytest.raises((TypeError, ValueError), match="weights"):
        weighted_mean(ce, normal(1, 1, 3, 1), valid)
    with pytest.raises((TypeError, ValueError), match="valid"):
        weighted_mean(ce, None, valid[:, :2])
    with pytest.raises((TypeError, ValueError), match="head_weights"):
        weighted_mean(ce, None, valid, head_weights=[1.0])
    with pytest.raises((TypeError, ValueError), match="normalizer"):
        weighted_mean(ce, None, valid, normalizer="mean")  # type: ignore[arg-type]


def test_a_count_on_the_host_goes_to_a_device_without_a_copy_that_is_waited_for() -> None:
    mode, seen = FakeTensorMode(allow_non_fake_inputs=True), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if any(isinstance(x, Tensor) and x.device.type == "cpu" for x in args):
                seen.append((str(func), out.device.type))
            return out

    like = FakeTensor(mode, torch.empty(2, device="meta"), torch.device("cuda"))
    with mode, Watch():
        found = count_of(torch.tensor(7), like)
    assert found.device.type == "cuda"
    assert found.dtype == torch.float32
    assert [name for name, device in seen if device == "cuda"] == ["aten.mul.Tensor"]
