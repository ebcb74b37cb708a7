"""Small comparisons shared by the test files."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Equal up to the rounding of `dtype`: 1e-10 in float64, 1e-5 in float32. NaN is never equal.

    Near 0 the measure is the largest entry, because a difference of large numbers rounds as they do.
    """
    tight = dtype == torch.float64
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    right = expected.detach().double()
    largest = max(1.0, float(right.abs().max())) if right.numel() else 1.0
    torch.testing.assert_close(
        actual.detach().double(),
        right,
        rtol=1e-10 if tight else 1e-5,
        atol=largest * (1e-12 if tight else 2e-6),
    )


def leaf(x: Tensor, needs_grad: bool = True) -> Tensor:
    """A fresh tensor with the same values that can be asked for a gradient."""
    return x.detach().clone().requires_grad_(needs_grad)


def grads(loss: Tensor, leaves: Sequence[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """Gradients, zeros where a leaf is not reached; `loss` must be connected to a graph."""
    found = torch.autograd.grad(loss, leaves, upstream, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def all_zero(x: Tensor) -> bool:
    """Exactly 0 everywhere: NaN is not, and neither is a tiny number."""
    return bool((x == 0).all())


def _bytes(x: Tensor) -> Tensor:
    # A copy, because a tensor of one element is contiguous whatever its strides are.
    flat = x.detach().clone(memory_format=torch.contiguous_format).view(-1)
    return flat.view(torch.uint8)


@contextmanager
def untouched(*tensors: Tensor | None) -> Iterator[None]:
    """The tensors keep their bytes and were not written to in between (`_version`)."""
    known = [x for x in tensors if x is not None]
    before = [(x.detach().clone(), x._version) for x in known]
    yield
    for x, (copy, version) in zip(known, before, strict=True):
        assert x._version == version, "an input was written to"
        if x.numel():  # bytes, because NaN is not equal to itself
            raw, kept = (_bytes(y) for y in (x, copy))
            assert torch.equal(raw, kept), "an input changed"


def error_against(truth: Tensor, x: Tensor) -> float:
    """The largest absolute error against a float64 truth."""
    return float((x.double() - truth).detach().abs().max()) if x.numel() else 0.0


def subsets(count: int) -> list[tuple[bool, ...]]:
    """Every choice of which of `count` tensors require a gradient."""
    return [tuple(bool(n >> i & 1) for i in range(count)) for n in range(2**count)]


Builder = Callable[..., Tensor]


def of_predictions(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cross entropy belongs to predictions; a `[batch seq]` one is that of a single head."""

    def call(scores: Tensor, valid: Tensor, **options: Any) -> Tensor:
        if scores.dim() != 2:
            return build(scores, valid, **options)
        return build(scores[..., None], valid[..., None], **options)[..., 0]

    return call


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that was live at once while `work` ran, by the profiler."""
    # Not `torch.profiler.profile`: it makes something of every event, which takes ten times as long.
    watch: Any = torch.autograd.profiler.profile(profile_memory=True)
    with watch:
        work()
    live = peak = 0
    for event in sorted(watch.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def operations(work: Callable[[], object]) -> int:
    """How many multiplications and additions the matrix products take, inside custom operators too."""
    watch: Any = torch.autograd.profiler.profile(record_shapes=True)
    with watch:
        work()
    total = 0
    for event in watch.kineto_results.events():
        if event.name() in ("aten::mm", "aten::addmm", "aten::addmm_"):
            # With what is added to before the two, or memory for the result behind them.
            shapes = event.shapes()
            a, b = shapes[:2] if event.name() == "aten::mm" else shapes[1:3]
            total += 2 * a[0] * a[1] * b[1]
    return total


def load_script(path: Path) -> Any:
    """A script as a module: its folder need not be a package."""
    spec = importlib.util.spec_from_file_location(f"wmtp_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OnGpu(Tensor):
    """A tensor that says it is on a GPU, and so is treated like one there."""

    is_cuda = True  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]


def addmm_of_a_gpu(
    total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, beta: float, alpha: float, out: Tensor
) -> Tensor:  # fmt: skip
    """What `torch.addmm` does on CUDA with narrow matrices and a wide sum, and what it asks for."""
    assert a.dtype == b.dtype
    assert a.dtype in (torch.bfloat16, torch.float16)
    assert out.dtype == total.dtype == out_dtype == torch.float32
    assert out.shape == total.shape == (len(a), b.shape[1])
    # Of a total that counts nothing, not even NaN is read.
    old = torch.zeros_like(total) if beta == 0 else beta * total
    return out.copy_(old + alpha * (a.float() @ b.float()))
