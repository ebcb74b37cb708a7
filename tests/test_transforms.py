"""What PyTorch's transforms make of the losses: the right numbers, or the one error that is documented.

The README's two tables are made here: `python -m tests.test_transforms` prints them.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.compiled_autograd import _enable
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.fx.operator_schemas import normalize_function
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import wmtp
from tests.helpers import close, leaf
from tests.strategies import IGNORE, integers, normal, uniform


ROOT = Path(__file__).parent.parent
BATCH, SEQ, HEADS, DIM, VOCAB = 2, 5, 2, 3, 7
LENGTHS = (5, 6, 7, 8, 9)

# Every loss as a function of the same four tensors: hidden states, unembedding, labels, and a signal
# per token, which is the weights, or the reference for weights that wait for the cross entropy.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def rho1(signal: Tensor) -> Callable[..., Tensor]:
    return partial(wmtp.rho1_weights, reference_nll=signal)


class Column(NamedTuple):
    """A loss, the dense loss that says what its numbers are, and the column of the table it is in."""

    loss: Loss
    dense: Loss
    group: str


GROUPS = {
    "dense": "dense losses",
    "known": "linear, weights `None`, a tensor or `RowLocalWeights`",
    "late": "linear, weights a function; `linear_mtp_ce_loss`",
}


def weighted(h: Tensor, u: Tensor, y: Tensor, weights: Any) -> Tensor:
    return wmtp.weighted_mtp_loss(h @ u.T, y, weights)


def ce(h: Tensor, u: Tensor, y: Tensor, reduction: str) -> Tensor:
    return wmtp.mtp_ce_loss(h @ u.T, y, reduction=reduction)


def linear_ce(h: Tensor, u: Tensor, y: Tensor, reduction: str) -> Tensor:
    return wmtp.linear_mtp_ce_loss(h, u, y, reduction=reduction)


def pair(
    linear: Callable[..., Tensor], dense: Callable[..., Tensor], how: Any, group: str
) -> Column:
    """The same argument for both forms, made of the signal if it depends on it."""
    made = how if callable(how) else lambda _: how
    return Column(
        lambda h, u, y, s: linear(h, u, y, made(s)),
        lambda h, u, y, s: dense(h, u, y, made(s)),
        group,
    )


COLUMNS = {
    "weighted_mtp_loss": pair(weighted, weighted, rho1, "dense"),
    "mtp_ce_loss": pair(ce, ce, "none", "dense"),
    "linear_weighted_mtp_loss None": pair(wmtp.linear_weighted_mtp_loss, weighted, None, "known"),
    "linear_weighted_mtp_loss tensor": pair(
        wmtp.linear_weighted_mtp_loss, weighted, lambda signal: signal, "known"
    ),
    "linear_weighted_mtp_loss row-local": pair(
        wmtp.linear_weighted_mtp_loss, weighted, wmtp.RowLocalWeights("dft"), "known"
    ),
    "linear_weighted_mtp_loss function": pair(
        wmtp.linear_weighted_mtp_loss, weighted, rho1, "late"
    ),
    "linear_mtp_ce_loss mean": pair(linear_ce, ce, "mean", "late"),
    "linear_mtp_ce_loss none": pair(linear_ce, ce, "none", "late"),
}


def tensors(seq: int = SEQ, seed: int = 1) -> Tensors:
    labels = integers(seed, VOCAB, BATCH, seq)
    labels[0, 2] = IGNORE
    hidden, unembedding = normal(seed, BATCH, seq, HEADS, DIM), normal(seed + 1, VOCAB, DIM)
    return hidden, unembedding, labels, uniform(seed + 2, BATCH, seq)


def stacked() -> Tensors:
    """Three problems along a new first axis."""
    hidden, unembedding, labels, signal = zip(*(tensors(seed=n) for n in (1, 2, 3)), strict=True)
    return tuple(torch.stack(x) for x in (hidden, unembedding, labels, signal))  # type: ignore


def number(loss: Loss) -> Loss:
    """One number of every loss, with another upstream gradient for every prediction."""

    def total(*inputs: Tensor) -> Tensor:
        out = loss(*inputs)
        return (out * torch.arange(1, out.numel() + 1).to(out).view(out.shape)).sum()

    return total


def with_gradients(loss: Loss, inputs: Tensors) -> list[Tensor]:
    """The loss as one number, and its gradients for hidden states and unembedding."""
    hidden, unembedding, labels, signal = inputs
    hidden, unembedding = leaf(hidden), leaf(unembedding)
    total = number(loss)(hidden, unembedding, labels, signal)
    total.backward()
    assert hidden.grad is not None
    assert unembedding.grad is not None
    return [total.detach(), hidden.grad, unembedding.grad]


def of(loss: Loss, inputs: Tensors) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as a function of what it is differentiated by."""
    return lambda hidden, unembedding: loss(hidden, unembedding, *inputs[2:])


def all_close(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        close(found, expected)
        return
    for a, b in zip(found, expected, strict=True):
        all_close(a, b)


# ------------------------------------------------------------------------------------------- the rows
#
# Each runs a loss under one transform and gives what is to be the same for the dense loss.


def eager(loss: Loss) -> Any:
    return with_gradients(loss, tensors())


def uncompiled(loss: Loss) -> Any:
    inputs = [leaf(x) for x in tensors()[:2]]
    total = of(number(loss), tensors())(*inputs)
    return [total.detach(), *torch.autograd.grad(total, inputs)]


def functional_grad(loss: Loss) -> Any:
    return torch.func.grad(of(number(loss), tensors()), argnums=(0, 1))(*tensors()[:2])


def pulled(function: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, Callable[..., Any]]:
    found: Any = torch.func.vjp(function, *inputs)
    return found[0], found[1]


def functional_vjp(loss: Loss) -> Any:
    out, pull = pulled(of(loss, tensors()), *tensors()[:2])
    return out, pull(torch.full_like(out, 0.7))


def jvp(loss: Loss) -> Any:
    inputs = tensors()[:2]
    return torch.func.jvp(of(loss, tensors()), inputs, tuple(x.cos() for x in inputs))


def forward_mode(loss: Loss) -> Any:
    hidden, unembedding = tensors()[:2]
    with forward_ad.dual_level():
        out = of(loss, tensors())(forward_ad.make_dual(hidden, hidden.cos()), unembedding)
        tangent = forward_ad.unpack_dual(out).tangent
    assert tangent is not None, "the tangent was dropped"
    return tangent


def vmap(loss: Loss) -> Any:
    return torch.func.vmap(loss)(*stacked())


def vmap_of_grad(loss: Loss) -> Any:
    return torch.func.vmap(torch.func.grad(number(loss)))(*stacked())


def vmap_of_pull(loss: Loss) -> Any:
    out, pull = pulled(of(loss, tensors()), *tensors()[:2])
    return torch.func.vmap(pull)(torch.stack([torch.ones_like(out), torch.full_like(out, 2)]))


def hessian(loss: Loss) -> Any:
    return torch.func.hessian(of(number(loss), tensors()))(*tensors()[:2])


def double_backward(loss: Loss) -> Any:
    found = []
    for first in (0, 1):
        inputs = [leaf(x) for x in tensors()[:2]]
        total = of(number(loss), tensors())(*inputs)
        (once,) = torch.autograd.grad(total, inputs[first], create_graph=True)
        found += torch.autograd.grad(once.square().sum(), inputs)
    return found


def vjp_of_vjp(loss: Loss) -> Any:
    once = torch.func.grad(of(number(loss), tensors()))
    out, pull = pulled(once, *tensors()[:2])
    return pull(out)


def compiled_grad(loss: Loss) -> Any:
    torch._dynamo.reset()
    once = torch.func.grad(of(number(loss), tensors()))
    return torch.compile(once, backend="aot_eager", fullgraph=True)(*tensors()[:2])


def compiled_jvp(loss: Loss) -> Any:
    torch._dynamo.reset()
    function = of(loss, tensors())

    def push(*inputs: Tensor) -> Any:
        return torch.func.jvp(function, inputs, tuple(x.cos() for x in inputs))

    return torch.compile(push, backend="aot_eager")(*tensors()[:2])


def compiled_autograd(loss: Loss) -> Any:
    """A backward pass that is compiled, of a forward pass that is not."""
    torch._dynamo.reset()
    inputs = [leaf(x) for x in tensors()[:2]]
    total = of(number(loss), tensors())(*inputs)
    with _enable(torch.compile(backend="eager")), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler looks for gradients of what is no leaf
        total.backward()
    return [total.detach(), *(x.grad for x in inputs)]


def compiled_before(loss: Loss) -> Any:
    """Forward mode over what was compiled without it."""
    torch._dynamo.reset()
    graph = torch.compile(loss, backend="aot_eager")
    graph(*tensors())
    return forward_mode(graph)


def exported_jvp(loss: Loss) -> Any:
    hidden, unembedding, labels, signal = tensors()
    exportable = Exportable(loss, unembedding).requires_grad_(False)
    program = torch.export.export(exportable, (hidden, labels, signal)).module()
    return torch.func.jvp(lambda h: program(h, labels, signal), (hidden,), (hidden.cos(),))


def compiled_grad_of_grad(loss: Loss) -> Any:
    """As one graph or however many it takes."""
    torch._dynamo.reset()
    once = torch.func.grad(of(number(loss), tensors()))
    twice = torch.func.grad(lambda *x: once(*x).square().sum())
    return torch.compile(twice, backend="aot_eager")(*tensors()[:2])


def jvp_of_vjp(loss: Loss) -> Any:
    once = torch.func.grad(of(number(loss), tensors()))
    return torch.func.jvp(once, tensors()[:2], tensors()[:2])


def vjp_of_vmap(loss: Loss) -> Any:
    hidden, unembedding, labels, signal = stacked()
    run = torch.func.vmap(loss)
    out, pull = pulled(lambda h: run(h, unembedding, labels, signal), hidden)
    return pull(torch.ones_like(out))


def forward_over_backward(loss: Loss) -> Any:
    hidden, unembedding = (leaf(x) for x in tensors()[:2])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, hidden.detach().cos())
        total = of(number(loss), tensors())(dual, unembedding)
        (once,) = torch.autograd.grad(total, hidden)
        return forward_ad.unpack_dual(once).tangent


def vmap_of_jvp_of_vjp(loss: Loss) -> Any:
    once = torch.func.grad(number(loss))

    def push(h: Tensor, u: Tensor, y: Tensor, s: Tensor) -> Any:
        return torch.func.jvp(lambda x: once(x, u, y, s), (h,), (h,))

    return torch.func.vmap(push)(*stacked())


def vmap_of_vjp_of_vjp(loss: Loss) -> Any:
    once = torch.func.grad(number(loss))
    twice = torch.func.grad(lambda *inputs: once(*inputs).square().sum())
    return torch.func.vmap(twice)(*stacked())


def checkpointed(loss: Loss, reentrant: bool) -> Any:
    def run(*inputs: Tensor) -> Tensor:
        return checkpoint(loss, *inputs, use_reentrant=reentrant)  # type: ignore[return-value]

    return with_gradients(run, tensors())


def deterministic(loss: Loss) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        return eager(loss)
    finally:
        torch.use_deterministic_algorithms(False)


def threads(loss: Loss) -> Any:
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(eager(loss))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two), "the numbers depend on the number of threads"
    return found[0]


def compiled(loss: Loss, run: Callable[..., Any], graphs: int, **options: Any) -> Any:
    """What `run` gives of the compiled loss at every length, made with so many graphs at the most."""
    torch._dynamo.reset()
    counters.clear()
    graph = torch.compile(loss, fullgraph=True, **options)
    found = [run(graph, tensors(seq)) for seq in LENGTHS]
    assert counters["stats"]["unique_graphs"] <= graphs
    return found


@pytest.mark.parametrize("name", ["normalizer", "head_weights"])
@pytest.mark.parametrize("linear", [False, True])
def test_a_number_that_changes_from_step_to_step_is_compiled_twice_at_most(
    name: str, linear: bool
) -> None:
    torch._dynamo.reset()
    counters.clear()
    hidden, unembedding, labels, _ = tensors()

    def loss(number: float) -> Tensor:
        option: Any = {name: number if name == "normalizer" else [1.0, number][: hidden.shape[2]]}
        if linear:
            return wmtp.linear_weighted_mtp_loss(hidden, unembedding, labels, **option)
        return wmtp.weighted_mtp_loss(hidden @ unembedding.T, labels, **option)

    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for number in (7.5, 3.25, 1.125, 0.7, 11.0, 2.1, 0.3, 5.0, 9.9, 4.4):
        close(graph(number), loss(number))
    assert counters["stats"]["unique_graphs"] <= 2


class Exportable(torch.nn.Module):
    def __init__(self, loss: Loss, unembedding: Tensor) -> None:
        super().__init__()
        self.loss = loss
        self.unembedding = torch.nn.Parameter(unembedding)

    def forward(self, hidden: Tensor, labels: Tensor, signal: Tensor) -> Tensor:
        return self.loss(hidden, self.unembedding, labels, signal)


# Which sizes of hidden states, labels and signal an exported program leaves open.
ANY_SEQ = ({1: torch.export.Dim("seq", min=3, max=64)},) * 3
ANY_SIZE = tuple(dict.fromkeys(range(axes), torch.export.Dim.AUTO) for axes in (4, 2, 2))


def exported(loss: Loss, dynamic: Any = None) -> Any:
    hidden, unembedding, labels, signal = tensors()
    program = torch.export.export(
        Exportable(loss, unembedding), (hidden, labels, signal), dynamic_shapes=dynamic
    ).module()
    found = []
    for length in LENGTHS if dynamic else (SEQ,):
        hidden, _, labels, signal = tensors(length)
        found.append(program(hidden, labels, signal))
    return found


def exported_backward(loss: Loss) -> Any:
    hidden, unembedding, labels, signal = tensors()
    program = torch.export.export(Exportable(loss, unembedding), (hidden, labels, signal)).module()
    number(lambda h, u, y, s: program(h, y, s))(hidden, unembedding, labels, signal).backward()
    return next(program.parameters()).grad


# What does not compare with the dense loss under the same transform is compared as it says here.


def plainly(loss: Loss, inputs: Tensors) -> Tensor:
    return loss(*inputs)


def values(loss: Loss) -> Any:
    return [loss(*tensors(seq)) for seq in LENGTHS]


def autocast(column: Column) -> None:
    hidden, unembedding, labels, signal = tensors()
    inputs = (hidden.float(), unembedding.float(), labels, signal.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(column.loss, inputs)
    for a, b in zip(found, eager(column.dense), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0.03, atol=0.03 * float(b.abs().max()))


def fake(column: Column, backward: bool) -> None:
    with FakeTensorMode() as mode:
        without_values(column, [mode.from_tensor(x) for x in tensors()], backward)


def on_meta(column: Column) -> None:
    without_values(column, [x.to("meta") for x in tensors()], backward=True)
    # Of what is not float64 it is asked whether autocast casts it.
    narrow = [x.float() if x.is_floating_point() else x for x in tensors()]
    without_values(column, [x.to("meta") for x in narrow], backward=True)


def without_values(column: Column, inputs: Sequence[Tensor], backward: bool) -> None:
    expected = column.dense(*tensors())
    hidden, unembedding, labels, signal = inputs
    leaves = [x.requires_grad_(backward) for x in (hidden, unembedding)]
    out = column.loss(*leaves, labels, signal)
    assert (out.shape, out.dtype) == (expected.shape, hidden.dtype)
    if backward:
        out.sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)


def batched_upstream(loss: Loss) -> Any:
    inputs = [leaf(x) for x in tensors()[:2]]
    out = of(loss, tensors())(*inputs)
    upstream = torch.stack([torch.ones_like(out), torch.full_like(out, 2)])
    return torch.autograd.grad(out, inputs, upstream, is_grads_batched=True)


def without_type_checks(column: Column) -> None:
    name = next(name for name, found in COLUMNS.items() if found is column)
    for found, expected in zip(unchecked_numbers()[name], eager(column.dense), strict=True):
        close(torch.tensor(found, dtype=torch.float64), expected.flatten())


@cache
def unchecked_numbers() -> dict[str, list[list[float]]]:
    """What `eager` gives in a process whose type checks are off."""
    code = """
import json
from tests.test_transforms import COLUMNS, eager
found = {name: eager(column.loss) for name, column in COLUMNS.items()}
print(json.dumps({name: [x.flatten().tolist() for x in each] for name, each in found.items()}))
"""
    environment = {**os.environ, "JAXTYPING_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(done.stdout)


@contextmanager
def one_rank() -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            yield init_device_mesh("cpu", (1,))
        finally:
            dist.destroy_process_group()


def sharded(column: Column) -> None:
    hidden, unembedding, labels, signal = tensors()
    with one_rank() as mesh:
        split = distribute_tensor(unembedding, mesh, [Shard(0)])
        whole = distribute_tensor(
            hidden, mesh, [Replicate()]
        )  # or there is no product with a shard
        column.loss(whole, split, labels, signal)


# ------------------------------------------------------------------------------------------ the tables


class Limit(NamedTuple):
    """The one error that is documented."""

    kind: type[Exception]
    match: str
    text: str


class Row(NamedTuple):
    name: str
    check: Callable[[Column], None]
    limits: dict[str, Limit] = {}  # noqa: RUF012
    note: str = "works"


def same(run: Callable[[Loss], Any], reference: Callable[[Loss], Any] | None = None) -> Any:
    """A check that a loss gives under a transform what the dense loss gives."""

    def check(column: Column) -> None:
        found = run(column.loss)
        all_close(found, (reference or run)(column.dense))

    return check


def linear(limit: Limit) -> dict[str, Limit]:
    return {"known": limit, "late": limit}


FIRST_ORDER = Limit(RuntimeError, "first-order gradients only", "raises: first order only")
NO_VMAP = Limit(RuntimeError, "vmap", "raises: no `vmap`")
NO_FORWARD_MODE = Limit(RuntimeError, r"jvp|forward[- ]mode", "raises: no forward mode")
NO_GRADIENT = Limit(RuntimeError, "no autograd formula", "raises: no gradient")
GATHER = Limit(TypeError, "must be a plain tensor, got a DTensor", "raises: gather first")

ROWS = [
    Row("eager", same(eager)),
    Row(
        "`torch.compile(fullgraph=True)`, five lengths",
        same(
            lambda loss: compiled(loss, with_gradients, 2, backend="aot_eager"),
            lambda loss: [with_gradients(loss, tensors(seq)) for seq in LENGTHS],
        ),
        note="works, at most two graphs",
    ),
    Row(
        "`torch.compile(dynamic=True)`, five lengths",
        same(lambda loss: compiled(loss, plainly, 1, backend="eager", dynamic=True), values),
        note="works, one graph",
    ),
    Row("`torch.export`", same(exported, lambda loss: [loss(*tensors())])),
    Row("`torch.export`, dynamic length", same(lambda loss: exported(loss, ANY_SEQ), values)),
    Row(
        "`torch.export`, every size `Dim.AUTO`", same(lambda loss: exported(loss, ANY_SIZE), values)
    ),
    Row(
        "`torch.export`, then backward",
        same(exported_backward, lambda loss: eager(loss)[2]),
        linear(NO_GRADIENT),
    ),
    Row("`torch.func.grad`", same(functional_grad)),
    Row("`torch.compile` of `func.grad`", same(compiled_grad)),
    Row("compiled autograd", same(compiled_autograd, uncompiled)),
    Row("`torch.func.vjp`", same(functional_vjp)),
    Row("`torch.func.vmap`", same(vmap), linear(NO_VMAP)),
    Row("`vmap` of `grad`", same(vmap_of_grad), linear(NO_VMAP)),
    Row("`torch.func.jvp`", same(jvp), linear(NO_FORWARD_MODE)),
    Row("`torch.compile` of `func.jvp`", same(compiled_jvp), linear(NO_FORWARD_MODE)),
    Row("`func.jvp` of `torch.export`", same(exported_jvp), linear(NO_FORWARD_MODE)),
    Row("forward mode, compiled before", same(compiled_before), linear(NO_FORWARD_MODE)),
    Row("`torch.func.hessian`", same(hessian), linear(NO_VMAP)),
    Row("double backward", same(double_backward), linear(FIRST_ORDER)),
    Row("`func.grad` of `func.grad`", same(vjp_of_vjp), linear(FIRST_ORDER)),
    Row("`torch.compile` of `grad` of `grad`", same(compiled_grad_of_grad), linear(FIRST_ORDER)),
    Row("`autograd.grad(is_grads_batched=True)`", same(batched_upstream)),
    Row("`checkpoint(use_reentrant=False)`", same(lambda loss: checkpointed(loss, False), eager)),
    Row("`checkpoint(use_reentrant=True)`", same(lambda loss: checkpointed(loss, True), eager)),
    Row("autocast to bfloat16, CPU", autocast),
    Row("`FakeTensorMode`, forward", partial(fake, backward=False)),
    Row("`FakeTensorMode`, backward", partial(fake, backward=True)),
    Row("`meta` device, backward", on_meta),
    Row("`use_deterministic_algorithms(True)`", same(deterministic, eager)),
    Row("one thread or two", same(threads, eager), note="works, same bits"),
    Row("`JAXTYPING_DISABLE=1`", without_type_checks),
    Row("sharded unembedding or logits (`DTensor`)", sharded, dict.fromkeys(GROUPS, GATHER)),
]


CELLS = [
    pytest.param(row, column, id=f"{row.name}-{name}")
    for row in ROWS
    for name, column in COLUMNS.items()
]


def passes_or_raises(check: Callable[[Column], None], column: Column, limit: Limit | None) -> None:
    if limit is None:
        check(column)
        return
    with pytest.raises(limit.kind, match=limit.match):
        check(column)


pytestmark = [
    # Tracing an autograd function makes Dynamo itself create an object that it then warns about.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # Torch's forward mode scripts its own rules on first use, and warns about that.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


@pytest.mark.parametrize(("row", "column"), CELLS)
def test_a_transform_gives_the_right_numbers_or_its_documented_error(
    row: Row, column: Column
) -> None:
    limit = row.limits.get(column.group)
    if column is COLUMNS["weighted_mtp_loss"] and "vmap" in row.name and not batches_bits():
        limit = Limit(RuntimeError, "Batching rule not implemented", "raises with torch 2.11")
    passes_or_raises(row.check, column, limit)


def batches_bits() -> bool:
    """Whether this torch batches what a selection needs; 2.11 does not."""
    try:
        torch.func.vmap(lambda x: x.view(torch.int32))(torch.zeros(2, 3))
    except RuntimeError:
        return False
    return True


# What torch's own chunked loss is expected to fail in torch's own tests, version 2.13.0: the list of
# `expectedFailure` at `nn.functional.linear_cross_entropy`, variant "chunked", in
# torch/testing/_internal/common_methods_invocations.py.
TORCH_VERSION = "2.13.0"


def chunked(hidden: Tensor, unembedding: Tensor, labels: Tensor, signal: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=True)
    targets = wmtp.mtp_targets(labels, HEADS).reshape(-1)
    return F.linear_cross_entropy(hidden.reshape(-1, DIM), unembedding, targets, options=options)


TORCH = Column(chunked, COLUMNS["linear_mtp_ce_loss mean"].dense, "torch")
NO_CONTEXT = Limit(RuntimeError, "setup_context", "raises")
DETACHED = Limit(RuntimeError, "does not require grad", "raises")
NO_RULE = Limit(NotImplementedError, "jvp", "raises")
DROPPED = Limit(AssertionError, r"not close|tangent was dropped", "**drops the tangent**")


class Expected(NamedTuple):
    """One of torch's expected failures: what it asks for, and how both losses answer."""

    test: str
    run: Callable[[Loss], Any]
    torch: Limit
    wmtp: Limit | None


EXPECTED = [
    Expected("test_grad", functional_grad, NO_CONTEXT, None),
    Expected("test_vjp", functional_vjp, NO_CONTEXT, None),
    Expected("test_jvp", jvp, DROPPED, NO_FORWARD_MODE),
    Expected("test_jvpvjp", jvp_of_vjp, NO_CONTEXT, NO_FORWARD_MODE),
    Expected("test_vjpvjp", vjp_of_vjp, NO_CONTEXT, FIRST_ORDER),
    Expected("test_vjpvmap", vjp_of_vmap, NO_CONTEXT, NO_VMAP),
    Expected("test_vmapvjp", vmap_of_pull, NO_CONTEXT, NO_VMAP),
    Expected("test_vmapjvpvjp", vmap_of_jvp_of_vjp, NO_CONTEXT, NO_VMAP),
    Expected("test_vmapvjpvjp", vmap_of_vjp_of_vjp, NO_CONTEXT, NO_VMAP),
    Expected("test_vmapvjp_has_batch_rule", vmap_of_grad, NO_CONTEXT, NO_VMAP),
    Expected("test_fn_gradgrad", double_backward, DETACHED, FIRST_ORDER),
    Expected("test_forward_mode_AD", forward_mode, DROPPED, NO_FORWARD_MODE),
    Expected("test_fn_fwgrad_bwgrad", forward_over_backward, NO_RULE, NO_FORWARD_MODE),
]
# The fourteenth asks that torch can write a call's arguments by keyword, for calls in a graph.
NORMALIZE = "test_normalize_operator_exhaustive"


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: case.test)
@pytest.mark.parametrize("name", [name for name in COLUMNS if name.startswith("linear")])
def test_what_torch_fails_at_works_or_raises_its_documented_error(
    case: Expected, name: str
) -> None:
    passes_or_raises(same(case.run), COLUMNS[name], case.wmtp)


@pytest.mark.skipif(
    not torch.__version__.startswith(TORCH_VERSION), reason=f"the table is of torch {TORCH_VERSION}"
)
@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: case.test)
def test_what_the_table_says_of_torch(case: Expected) -> None:
    all_close(eager(TORCH.loss), eager(TORCH.dense))
    passes_or_raises(same(case.run), TORCH, case.torch)


def test_the_operators_have_schemas_by_which_a_graph_is_normalized() -> None:
    hidden, unembedding, labels, _ = tensors()
    recorded = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "wmtp":
                recorded.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        wmtp.linear_mtp_ce_loss(hidden, unembedding, labels)
        wmtp.linear_weighted_mtp_loss(hidden, unembedding, labels)
    assert len(recorded) == 2
    for operator, args in recorded:
        found = normalize_function(operator, args, {}, normalize_to_only_use_kwargs=True)
        assert found is not None
        assert len(found.kwargs) == len(args)


def rendered() -> str:
    """The two tables of the README."""
    lines = [f"| | {' | '.join(GROUPS.values())} |", "|---|---|---|---|"]
    for row in ROWS:
        answers = [row.limits[g].text if g in row.limits else row.note for g in GROUPS]
        lines.append(f"| {row.name} | {' | '.join(answers)} |")
    lines += [
        "",
        f"torch {TORCH_VERSION} lists fourteen of its own tests that its chunked "
        "`F.linear_cross_entropy` is",
        "expected to fail. Run on both:",
        "",
        "| torch's test | torch's chunked loss | wmtp's linear losses |",
        "|---|---|---|",
    ]
    for case in EXPECTED:
        answer = "works" if case.wmtp is None else case.wmtp.text
        lines.append(f"| `{case.test}` | {case.torch.text} | {answer} |")
    lines.append(
        f"| `{NORMALIZE}` | fails: options that have no JIT type | works (the operators) |"
    )
    return "\n".join(lines)


def test_the_readme_holds_these_tables() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rendered() in readme, "print them anew with `python -m tests.test_transforms`"


# ------------------------------------------------------------------------------- shards and errors


@pytest.mark.parametrize("heads", [0, 1, 3])
def test_modules_can_be_sharded(heads: int) -> None:
    module = wmtp.MTPHeads(DIM, heads) if heads else wmtp.ValueHead(DIM)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    twin, hidden = copy.deepcopy(module), leaf(normal(0, 2, 5, DIM).float())
    with one_rank() as mesh:
        fully_shard(module, mesh=mesh)
        module(hidden).square().sum().backward()
        found = [hidden.grad, *(x.grad.full_tensor() for x in module.parameters())]  # type: ignore[union-attr]
    expected = leaf(hidden)
    twin(expected).square().sum().backward()
    for here, there in zip(found, [expected, *twin.parameters()], strict=True):
        assert here is not None
        assert there.grad is not None
        close(here, there.grad, torch.float32)


def test_an_fsdp_parameter_is_refused_until_it_is_gathered() -> None:
    hidden, unembedding, labels, signal = tensors()
    with one_rank() as mesh:
        model = torch.nn.Linear(DIM, VOCAB, bias=False, dtype=torch.float64)
        model.weight.data.copy_(unembedding)
        fully_shard(model, mesh=mesh)
        for compile in (lambda f: f, partial(torch.compile, backend="eager")):
            torch._dynamo.reset()
            loss = compile(wmtp.linear_weighted_mtp_loss)
            with pytest.raises(TypeError, match=r"unembedding must .*gather it first.*unshard"):
                loss(hidden, model.weight, labels, signal)
        model.unshard()
        found = wmtp.linear_weighted_mtp_loss(hidden, model.weight, labels, signal)
    close(found, wmtp.weighted_mtp_loss(hidden @ unembedding.T, labels, signal))


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        *((name, False) for name in ("hidden", "unembedding", "bias", "labels")),
        ("logits", True),
        ("labels", True),
    ],
)
def test_the_argument_that_is_sharded_is_named(name: str, dense: bool) -> None:
    hidden, unembedding, labels, _ = tensors()
    given = {
        "hidden": hidden,
        "unembedding": unembedding,
        "labels": labels,
        "bias": unembedding[:, 0],
    }
    loss: Callable[..., Tensor] = wmtp.linear_mtp_ce_loss
    if dense:
        given = {"logits": hidden @ unembedding.T, "labels": labels}
        loss = wmtp.mtp_ce_loss
    with one_rank() as mesh:
        given[name] = distribute_tensor(given[name], mesh, [Replicate()])
        with pytest.raises(TypeError, match=f"^{name} must be a plain tensor, got a DTensor"):
            loss(**given)
        given[name] = given[name].full_tensor()  # type: ignore[attr-defined]
        found = loss(**given)
    assert torch.isfinite(found)


def test_a_flat_shard_is_refused() -> None:
    hidden, unembedding, labels, _ = tensors()
    with pytest.raises(TypeError, match="unembedding"):
        wmtp.linear_mtp_ce_loss(hidden, unembedding.flatten(), labels)


def test_importing_the_package_does_not_load_sharded_tensors_or_the_compiler() -> None:
    names = ["torch.distributed.tensor", "torch._dynamo"]
    code = f"import sys, wmtp; print(*(name in sys.modules for name in {names}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["False", "False"]


def bad_weights(token_ce: Tensor, valid: Tensor) -> Tensor:
    return token_ce[:1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 2.0}, "label_smoothing must lie in"),
        ({"slab_bytes": 1}, "slab_bytes must hold"),
        ({"weights": bad_weights}, "the weights function's result must be"),
    ],
)
def test_an_error_under_the_compiler_is_the_error_of_eager_mode(
    change: dict[str, Any], message: str
) -> None:
    torch._dynamo.reset()
    hidden, unembedding, labels, _ = tensors()
    graph = torch.compile(wmtp.linear_weighted_mtp_loss, backend="eager")
    for loss in (wmtp.linear_weighted_mtp_loss, graph):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            loss(hidden, unembedding, labels, **change)


@pytest.mark.parametrize("label", [VOCAB, -1, -99, 2**40, -(2**63)])
@pytest.mark.parametrize("way", ["compile", "func.grad"])
def test_a_label_that_does_not_exist_is_refused_where_nobody_could_look_before(
    way: str, label: int
) -> None:
    """One below 0 too: it would pass for "no target", and be counted in the denominator."""
    hidden, unembedding, labels, signal = tensors()
    labels[1, 3] = label
    said = "-2305843009213693952 or less" if label < -(2**61) else label
    message = rf"^labels must lie in \[0, {VOCAB}\) .* got {said} as the target of prediction 13, "
    for loss in (
        partial(linear_ce, reduction="mean"),
        partial(linear_ce, reduction="none"),
        lambda h, u, y: wmtp.linear_weighted_mtp_loss(h, u, y, signal),
        lambda h, u, y: wmtp.linear_weighted_mtp_loss(h, u, y, torch.zeros_like(signal)),
        lambda h, u, y: wmtp.linear_weighted_mtp_loss(h, u, y, wmtp.RowLocalWeights("dft")),
        lambda h, u, y: wmtp.linear_weighted_mtp_loss(h, u, y, rho1(signal)),
        lambda h, u, y: wmtp.linear_weighted_mtp_loss_and_stats(h, u, y, signal)[0],
    ):
        torch._dynamo.reset()
        if way == "compile":
            call = torch.compile(loss, backend="aot_eager", fullgraph=True)
        else:
            call = torch.func.grad(lambda y, h, u, loss=loss: loss(h, u, y).sum(), argnums=1)
            call = partial(lambda h, u, y, call: call(y, h, u), call=call)
        with pytest.raises(ValueError, match=message):
            call(hidden, unembedding, labels)


if __name__ == "__main__":
    print(rendered())
