"""A fuzz of every public callable: good calls give what is documented, bad ones a clear error.

    python -m tests.test_fuzz --inputs 100000 --seed 0
    python -m tests.test_fuzz --only weighted_mtp_loss:5171

One or two arguments of a valid call are corrupted. Then the call either raises a ``ValueError``,
``TypeError`` or ``IndexError`` whose message names a corrupted argument and says what came, or it
returns finite tensors of the documented shape; in no case is an input changed. Where the law in
``fuzz_calls`` knows the answer, it is required: what is wrong must be refused (no silent repair),
what is right must be accepted. The command runs the inputs in a child process, so that one that
crashes or hangs the interpreter is found, and named.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import inspect
import json
import math
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

import wmtp
from tests.fuzz_calls import (
    BAD_WEIGHT_FUNCTIONS,
    CALLS,
    ENTRIES,
    SCORES,
    VALID,
    Arguments,
    Call,
    Law,
    Verdict,
    World,
    returns_none,
)
from tests.helpers import untouched
from tests.strategies import relayout
from wmtp import MTPLossStats, RowLocalWeights, WhiteningStatistics


SECONDS = 20  # a call of a few elements that takes longer hangs
ROOM = 2**31  # bytes; an argument of 2**31 must not take the machine's memory with it
DOCUMENTED = (ValueError, TypeError, IndexError)
OTHER_DTYPES = (
    torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
)  # fmt: skip
HUGE = (2**31, 2**62, 2**63, 2**70, -(2**63), -(2**70))


class Wrong(NamedTuple):
    """One corrupted argument: its new value, what was done, and whether others may be named."""

    value: Any
    what: str
    shared: bool = False


# ---------------------------------------------------------------- corruptions of a tensor


def _rank(x: Tensor, r: random.Random) -> Wrong:
    made = [x.unsqueeze(r.randrange(x.dim() + 1)), x.new_zeros(())]
    if x.dim():
        made += [x.sum(r.randrange(x.dim())).to(x.dtype), x.reshape(-1)]
    return Wrong(r.choice(made), "rank", shared=True)


def _size(x: Tensor, r: random.Random) -> Wrong:
    if x.dim() == 0:
        return _rank(x, r)
    axis = r.randrange(x.dim())
    if r.random() < 0.5 and x.shape[axis] > 1:
        return Wrong(x.narrow(axis, 0, x.shape[axis] - 1), "size - 1", shared=True)
    first = x.narrow(axis, 0, min(1, x.shape[axis]))
    return Wrong(torch.cat([x, first], axis), "size + 1", shared=True)


def _empty(x: Tensor, r: random.Random) -> Wrong:
    if x.dim() == 0:
        return Wrong(x.new_zeros(0), "empty", shared=True)
    return Wrong(x.narrow(r.randrange(x.dim()), 0, 0), "empty axis", shared=True)


def _swap(x: Tensor, r: random.Random) -> Wrong:
    if x.dim() < 2:
        return _size(x, r)
    one, other = r.sample(range(x.dim()), 2)
    return Wrong(x.transpose(one, other), "swapped axes", shared=True)


def _dtype(x: Tensor, r: random.Random) -> Wrong:
    dtype = r.choice([d for d in OTHER_DTYPES if d != x.dtype])
    return Wrong(x.to(dtype), f"dtype {dtype}")


def _device(x: Tensor, r: random.Random) -> Wrong:
    places = ["meta", *(["cuda"] if torch.cuda.is_available() else [])]
    return Wrong(x.to(r.choice(places)), "device", shared=True)


def _container(x: Tensor, r: random.Random) -> Wrong:
    array = x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()
    made = (
        x.tolist(),
        array,
        str(x),
        None,
        3,
        0.5,
        True,
        {},
        object(),
        (x,),
        [x],
        b"x",
        returns_none,
    )
    return Wrong(r.choice(made), "container")


def _values(x: Tensor, r: random.Random) -> Wrong:
    if x.dtype == torch.bool:
        return Wrong(torch.full_like(x, r.random() < 0.5), "values")
    if x.is_floating_point():
        value = r.choice((math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-38, 0.0, -1.0, 1e4))
    else:
        value = r.choice((-1, -100, 0, 1, 6, 10**6, 2**31, 2**62, -(2**63)))
        limits = torch.iinfo(x.dtype)
        value = max(limits.min, min(limits.max, value))
    if r.random() < 0.3:
        return Wrong(torch.full_like(x, value), f"all {value}", shared=True)
    where = torch.zeros(x.numel(), dtype=torch.bool)
    if x.numel():
        where[r.randrange(x.numel())] = True
    return Wrong(x.masked_fill(where.view(x.shape), value), f"one {value}", shared=True)


def _layout(x: Tensor, r: random.Random) -> Wrong:
    layout = r.choice(("transposed", "strided", "expanded", "offset"))
    if x.dtype == torch.bool and layout == "offset":
        layout = "strided"
    return Wrong(relayout(x, layout), f"layout {layout}", shared=True)


def _flipped(x: Tensor, r: random.Random) -> Wrong:
    """Negated lazily: a view with the bit that says so."""
    if x.is_floating_point():
        return Wrong(torch._neg_view(x), "negative view", shared=True)  # pyright: ignore
    return _layout(x, r)


def _grad(x: Tensor, r: random.Random) -> Wrong:
    if not x.is_floating_point():
        return _layout(x, r)
    made = (x.clone().requires_grad_(), torch.nn.Parameter(x.clone()))
    return Wrong(r.choice(made), "requires grad", shared=True)


def _exotic(x: Tensor, r: random.Random) -> Wrong:
    kind = r.choice(("sparse", "csr", "nested", "quantized", "subclass", "buffer"))
    unmade = contextlib.suppress(RuntimeError, TypeError, IndexError, ValueError)
    with unmade, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "sparse":
            return Wrong(x.to_sparse(), "sparse", shared=True)
        if kind == "csr" and x.dim() >= 2:
            return Wrong(x.to_sparse_csr(), "csr", shared=True)
        if kind == "nested" and x.dim() >= 2 and len(x):
            layout = r.choice((torch.strided, torch.jagged))
            return Wrong(torch.nested.nested_tensor(list(x), layout=layout), "nested", shared=True)
        if kind == "quantized":
            made = torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
            return Wrong(made, "quantized", shared=True)
        if kind == "subclass":
            return Wrong(x.as_subclass(_Subclass), "subclass", shared=True)
        return Wrong(torch.nn.Buffer(x), "buffer", shared=True)
    return _layout(x, r)


class _Subclass(Tensor):
    pass


TENSOR = (
    _rank, _size, _size, _empty, _swap, _dtype, _device, _container, _values, _values, _layout,
    _flipped, _grad, _exotic,
)  # fmt: skip


# ---------------------------------------------------------------- corruptions of the others


def _other(value: Any, r: random.Random) -> Wrong:
    """Something else in place of a number, a name, a sequence, a function or nothing."""
    numbers = (math.nan, math.inf, -math.inf, -1, -0.5, 0, 0.5, 1, 2, 1e-300, 1e300, 1e-9, 7, *HUGE)
    names = ("bogus", "", "MEAN", b"mean", "first", "mean", "weights", "none", "\0", "a" * 300)
    sequences = (
        (), [], [1], (1, 2), (2, 1), (1, 1), (0, 1, 2), [1.0, 2.0], (-1, 2), [True, 2], ("a", "b"),
        (math.nan, 1.0), (0.0, math.inf), (0.5, 0.9), (3.0, 0.1), [[1], [2]], (1, 2, 3, 4, 5),
        [0.0, 0.0], [None], (1, 10**6), (0.1, 3.0, 4.0), range(3), range(0), [10**400], (2**62,),
    )  # fmt: skip
    things = (
        None, True, False, 1j, {}, set(), object(), returns_none, np.float32(0.5), np.float64(0.5),
        np.int64(2), np.array([1.0]), torch.tensor(1.0), torch.tensor([1, 2]), torch.ones(2, 3),
        torch.float32, torch.int64, torch.device("meta"), torch.Generator(), "cpu", "nowhere",
        torch.tensor(math.nan), torch.tensor(-1.0), torch.tensor(True), 10**400,
    )  # fmt: skip
    if isinstance(value, WhiteningStatistics) and r.random() < 0.7:
        return _statistics(value, r)
    if isinstance(value, RowLocalWeights) and r.random() < 0.7:
        return _row_local(r)
    group = r.choice((numbers, names, sequences, things))
    new = r.choice(group)
    # Whether a callable is one that a loss can use is told by its result.
    if callable(value) and r.random() < 0.7:
        new = r.choice(BAD_WEIGHT_FUNCTIONS)
    if type(value) in (list, tuple) and r.random() < 0.5:
        return _members(value, r)
    return Wrong(new, "value", shared=True)


def _statistics(value: WhiteningStatistics, r: random.Random) -> Wrong:
    field = r.choice(value._fields)
    part = r.choice((_rank, _size, _dtype, _values, _container))(getattr(value, field), r)
    return Wrong(value._replace(**{field: part.value}), f"field {field}: {part.what}", shared=True)


def _row_local(r: random.Random) -> Wrong:
    kind = r.choice(("dft", "bogus", 3, None, "DFT", ["dft"]))
    power = r.choice((1.0, -1.0, math.nan, math.inf, "2", None, 2**70, True, torch.tensor(1.0)))
    return Wrong(RowLocalWeights(kind, power), "row-local weights")


def _members(value: Any, r: random.Random) -> Wrong:
    items = list(value)
    if r.random() < 0.3 or not items:
        items = items[:-1] if r.random() < 0.5 else [*items, *items[:1]]
        return Wrong(type(value)(items), "number of members", shared=True)
    place = r.randrange(len(items))
    old = items[place]
    part = corrupt(old, r)
    items[place] = part.value
    return Wrong(type(value)(items), f"one member: {part.what}", shared=True)


def corrupt(value: Any, r: random.Random) -> Wrong:
    if isinstance(value, Tensor):
        return r.choice(TENSOR)(value, r)
    return _other(value, r)


# ---------------------------------------------------------------- what must happen


def assignments(call: Call, arguments: Arguments) -> Iterator[dict[str, int]]:
    """Every way to give the named axes sizes that all tensors agree with."""
    choices = []
    for name, law in call.laws.items():
        x = arguments[name]
        if not isinstance(x, Tensor) or not law.axes:
            continue
        fitting = []
        for axes in law.axes:
            shown, _, missing = axes.partition("|")
            letters = shown.split()
            if len(letters) == x.dim():
                fitting.append([*zip(letters, x.shape, strict=True), *((m, 1) for m in missing)])
        choices.append(fitting)
    for way in product(*choices):
        sizes: dict[str, int] = {}
        if all(sizes.setdefault(a, n) == n for pairs in way for a, n in pairs):
            yield sizes


def law_of(call: Call, arguments: Arguments) -> Verdict:
    """What the documentation says of the whole call."""
    found: list[Verdict] = []
    devices = set()
    for name, law in call.laws.items():
        x = arguments[name]
        if law.axes and (isinstance(x, Tensor) or law.judge is None):
            found.append(law.alone(x))
        if isinstance(x, Tensor):
            devices.add(x.device)
    if False in found:
        return False
    if None in found:
        return None
    if len(devices) > 1:
        return None if _scalar_apart(call, arguments) else False
    sizes = next(assignments(call, arguments), None)
    if sizes is None:
        return False
    for name, law in call.laws.items():
        x = arguments[name]
        if law.judge is not None and not (law.axes and isinstance(x, Tensor)):
            found.append(law.judge(x, arguments, sizes))
    if False in found:
        return False
    found += [_entries_rule(call, arguments), *(rule(arguments) for rule in call.rules)]
    return False if False in found else None if None in found else True


def _scalar_apart(call: Call, arguments: Arguments) -> bool:
    """A 0-d tensor may come from another device, as in torch."""
    held = [x for n, x in arguments.items() if isinstance(x, Tensor) and call.laws[n].axes != ("",)]
    return len({x.device for x in held}) <= 1


def _entries_rule(call: Call, arguments: Arguments) -> bool:
    """Weights by token go with a mask by token, weights by prediction with one by prediction."""
    shapes = {
        arguments[name].shape for name, law in call.laws.items() if law in (ENTRIES, SCORES, VALID)
    }
    return len(shapes) <= 1


def tame(x: Any) -> bool:
    """Ordinary finite numbers, whose results must be finite too."""
    if isinstance(x, Tensor):
        if x.is_nested or x.layout != torch.strided or x.is_quantized or x.is_meta:
            return False
        if not x.is_floating_point():
            return True
        y = x.detach().double().abs()
        return bool(((y <= 1e6) & ((y == 0) | (y >= 1e-6))).all())
    if isinstance(x, bool) or x is None or isinstance(x, str):
        return True
    if isinstance(x, (int, float)):
        return x == 0 or 1e-6 <= abs(x) <= 1e6
    if isinstance(x, (list, tuple)):
        return all(tame(y) for y in x)
    return True


def tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from tensors_in(y)


def _readable(x: Tensor) -> bool:
    if x.is_nested or x.layout != torch.strided or x.is_quantized or x.is_meta:
        return False
    return not x.is_neg()


def _sharing(call: Call, name: str) -> set[str]:
    """The arguments that share an axis with one, and those that it is said to depend on, or they on it."""
    law = call.laws[name]

    def letters(one: Law) -> set[str]:
        return {letter for axes in one.axes for letter in re.findall(r"\w", axes)}

    near = {other for other, its in call.laws.items() if letters(its) & letters(law)}
    near |= {other for other, its in call.laws.items() if name in its.related}
    return near | set(law.related) | {name}


class Outcome(NamedTuple):
    """``kind`` is one of `returned`, `refused` and `violation`."""

    kind: str
    said: str


def judge(name: str, arguments: Arguments, wrong: dict[str, Wrong], verdict: Verdict) -> Outcome:
    """Make the call and compare what happens with what must."""
    call = CALLS[name]
    held = [x for x in tensors_in(list(arguments.values())) if _readable(x)]
    try:
        with untouched(*held), _guarded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = call.function(**arguments)
    except AssertionError as error:
        return Outcome("violation", f"changed an input: {error}")
    except _Hung:
        return Outcome("violation", f"hangs: no answer in {SECONDS} s")
    except DOCUMENTED as error:
        if verdict is True:
            return Outcome("violation", f"refuses what is right: {_first(error)}")
        return _clear(call, error, wrong)
    except Exception as error:
        return Outcome("violation", f"{type(error).__name__} from inside: {_first(error)}")
    if verdict is False:
        return Outcome("violation", f"accepts what is wrong, gives {_short(out)}")
    return _as_documented(name, call, arguments, out)


def _clear(call: Call, error: Exception, wrong: dict[str, Wrong]) -> Outcome:
    """Whether a message names a corrupted argument and says what came."""
    text = str(error)
    wanted = set()
    for name, how in wrong.items():
        wanted |= _sharing(call, name) if how.shared else {name}
    if isinstance(error, TypeCheckError):
        (blamed,) = re.findall(r"typechecking parameter '(\w+)'", text)[:1] or [""]
        return (
            Outcome("refused", "TypeCheckError")
            if blamed in wanted
            else Outcome("violation", f"TypeCheckError of {blamed!r}, not {sorted(wanted)}")
        )
    if not any(re.search(rf"\b{name}\b", text) for name in wanted):
        kind = type(error).__name__
        return Outcome("violation", f"{kind} does not name {sorted(wrong)}: {_first(error)}")
    # torch's own parser of arguments says "not"; a pair that excludes each other needs no value.
    if not re.search(r"\bgot\b|, not |leave them out", text):
        return Outcome("violation", f"does not say what came: {_first(error)}")
    return Outcome("refused", type(error).__name__)


def _as_documented(name: str, call: Call, arguments: Arguments, out: Any) -> Outcome:
    found = list(tensors_in(out))
    if name.endswith("_and_stats"):
        loss, stats = out
        assert isinstance(stats, MTPLossStats)
        x = arguments["logits"] if "logits" in arguments else arguments["hidden"]
        heads = x.shape[2] if x.dim() == 4 else 1
        shapes = [(), (*x.shape[:2], heads), *[(heads,)] * 4]
        found = [loss, *stats]
    elif call.shape is None:
        return Outcome("returned", "nothing") if out is None else Outcome("violation", "a result")
    else:
        try:
            shapes = [call.shape(arguments)] * len(found)
        except Exception as error:
            return Outcome("violation", f"accepts what has no shape: {error!r}")
    for x, shape in zip(found, shapes, strict=True):
        if tuple(x.shape) != shape:
            return Outcome("violation", f"the shape is {tuple(x.shape)}, documented {shape}")
    mild = all(tame(x) for x in arguments.values())
    if call.finite or mild:
        for x in found:
            if x.is_floating_point() and _readable(x) and not x.isfinite().all():
                return Outcome("violation", f"not finite: {_short(x)}")
    return _backward(arguments, found, mild)


def _backward(arguments: Arguments, found: list[Tensor], mild: bool) -> Outcome:
    leaves = [x for x in tensors_in(list(arguments.values())) if x.requires_grad and x.is_leaf]
    outs = [x.sum() for x in found if x.requires_grad]
    if not leaves or not outs:
        return Outcome("returned", "tensors")
    total = torch.stack(outs).sum()
    try:
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
    except Exception as error:
        return Outcome("violation", f"backward {type(error).__name__}: {_first(error)}")
    if mild and not all(g.isfinite().all() for g in grads if g is not None and _readable(g)):
        return Outcome("violation", "a gradient is not finite")
    return Outcome("returned", "tensors and gradients")


class _Hung(BaseException):
    pass


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """No call takes more than `SECONDS`, or more memory than `ROOM`: a few elements need neither."""

    def rang(number: int, frame: Any) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, rang)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _first(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _short(x: Any) -> str:
    return " ".join(repr(x).split())[:120]


def shown(x: Any) -> str:
    """A value as one can type it again, more or less."""
    if isinstance(x, Tensor):
        if x.is_nested:
            return "nested tensor"
        more = ", requires_grad" if x.requires_grad else ""
        kind = f"{type(x).__name__} " if type(x) is not Tensor else ""
        data = _short(x.tolist()) if _readable(x) and x.numel() <= 12 else "..."
        return f"{kind}{x.dtype}{list(x.shape)}{more} {data}"
    return _short(x)


class Input(NamedTuple):
    """One input of the fuzz, all of it determined by a name and a seed."""

    arguments: Arguments
    wrong: dict[str, Wrong]


def make_input(name: str, seed: int, targets: tuple[str, ...] | None = None) -> Input:
    call, world = CALLS[name], World(seed)
    arguments = call.arguments(world)
    if targets is None:
        count = world.random.choices((0, 1, 2), (1, 14, 5))[0]
        targets = tuple(world.random.sample(sorted(call.laws), min(count, len(call.laws))))
    wrong = {}
    for target in targets:
        wrong[target] = corrupt(arguments[target], world.random)
        arguments[target] = wrong[target].value
    return Input(arguments, wrong)


def run_input(name: str, seed: int, targets: tuple[str, ...] | None = None) -> Outcome:
    made = make_input(name, seed, targets)
    return judge(name, made.arguments, made.wrong, law_of(CALLS[name], made.arguments))


def describe(name: str, seed: int, targets: tuple[str, ...] | None = None) -> str:
    made = make_input(name, seed, targets)
    lines = [f"{name}:{seed} (law: {law_of(CALLS[name], made.arguments)})"]
    for key, value in made.arguments.items():
        mark = f"  <- {made.wrong[key].what}" if key in made.wrong else ""
        lines.append(f"    {key} = {shown(value)}{mark}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def input_at(index: int, seed: int, only: str | None = None) -> tuple[str, int]:
    """The functions take turns; the seed of an input says all about it."""
    names = [only] if only else sorted(CALLS)
    return names[index % len(names)], seed * 10**8 + index


def child(inputs: int, seed: int, start: int, folder: Path, only: str | None) -> None:
    """Run the inputs from `start` on; the file `last` always names the one that runs."""
    torch.set_num_threads(1)
    with (folder / "last").open("w") as last, (folder / "found.jsonl").open("a") as found:
        for index in range(start, inputs):
            name, one = input_at(index, seed, only)
            last.seek(0)
            last.write(f"{index:12d}")
            last.flush()
            outcome = run_input(name, one)
            found.write(json.dumps([name, one, *outcome]) + "\n")
            found.flush()


def supervise(command: list[str], last: Path, patience: float = 3 * SECONDS) -> str | None:
    """Run a child; what went wrong, if it crashed or if `last` stood still for too long."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        seen, since = "", time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=1)
                if process.returncode == 0:
                    return None
                return f"the interpreter ended with {process.returncode}: {errors[-500:]}"
            now = last.read_text() if last.exists() else ""
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                process.kill()
                process.communicate()
                return f"hangs: no answer in {patience} s"


def campaign(inputs: int, seed: int, only: str | None) -> int:
    """All inputs in a child process, a new one after each crash; the number of violations."""
    found: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), 0
        while start < inputs:
            words = ["--child", str(folder), "--inputs", inputs, "--seed", seed, "--start", start]
            words += ["--only", only] if only else []
            said = supervise(
                [sys.executable, "-m", "tests.test_fuzz", *map(str, words)], folder / "last"
            )
            if said is None:
                break
            index = int((folder / "last").read_text() or start)
            found.append([*input_at(index, seed, only), "violation", said])
            start = index + 1
        lines = (folder / "found.jsonl").read_text().splitlines()
        found += [json.loads(line) for line in lines]
    return report(found)


def signature(name: str, seed: int, said: str) -> tuple[str, ...]:
    """What makes two violations the same one: numbers and shapes apart."""
    made = make_input(name, seed)
    said = re.sub(r"'[^']*' object", "an object", said)
    said = re.sub(r"'[\w.]+' and '[\w.]+'", "these types", said)
    said = re.sub(r"\S*[0-9]\S*|[(\[].*", "#", said)
    return ", ".join(sorted(made.wrong)) if "name" in said else "", said[:60]


def report(found: list[list[Any]]) -> int:
    kinds = ("returned", "refused", "violation")
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    groups: dict[tuple[str, ...], list[tuple[str, int, str]]] = collections.defaultdict(list)
    for name, seed, kind, said in found:
        counts[name][kind] += 1
        if kind == "violation":
            groups[signature(name, seed, said)].append((name, seed, said))
    print(f"{'function':36}" + "".join(f"{kind:>10}" for kind in kinds))
    for name in sorted(counts):
        print(f"{name:36}" + "".join(f"{counts[name][kind]:10d}" for kind in kinds))
    total = {kind: sum(c[kind] for c in counts.values()) for kind in kinds}
    print(f"{'all ' + str(len(found)) + ' inputs':36}" + "".join(f"{total[k]:10d}" for k in kinds))
    for cases in sorted(groups.values(), key=len, reverse=True):
        functions = sorted({name for name, _, _ in cases})
        print(f"\n{len(cases)} x in {', '.join(functions)}: {cases[0][2]}")
        print(describe(*cases[0][:2]))
    return total["violation"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a function, or function:seed to see that one input")
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only and ":" in options.only:
        name, seed = options.only.split(":")
        print(describe(name, int(seed)))
        print(run_input(name, int(seed)))
        return 0
    if options.child:
        child(options.inputs, options.seed, options.start, options.child, options.only)
        return 0
    return 1 if campaign(options.inputs, options.seed, options.only) else 0


# ---------------------------------------------------------------- the tests

PAIRS = [(name, argument) for name in sorted(CALLS) for argument in CALLS[name].laws]
RECORDS = {"MTPLossStats", "WeightStatistics", "WhiteningStatistics", "RowLocalWeights"}
SEEDS = st.integers(0, 2**31 - 1)


def parameters(name: str) -> set[str]:
    """What one can give; for a module, to its constructor and to the call."""
    public: Any = getattr(wmtp, name)
    if not inspect.isclass(public):
        return set(inspect.signature(public).parameters)
    forward: Any = vars(public)["forward"]
    found = set(inspect.signature(public).parameters) | set(inspect.signature(forward).parameters)
    if "options" in found:  # those of the class above
        found |= set(inspect.signature(public.__mro__[1]).parameters)
    return found - {"self", "options"}


def test_the_table_holds_every_public_callable() -> None:
    """The records are no calls: they are results, or arguments that are corrupted as such."""
    public = {name for name in wmtp.__all__ if callable(getattr(wmtp, name))}
    assert set(CALLS) == public - RECORDS
    assert all(issubclass(getattr(wmtp, name), tuple) for name in RECORDS)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_the_table_holds_every_argument(name: str) -> None:
    assert set(CALLS[name].laws) == parameters(name)


def complain(name: str, seed: int, targets: tuple[str, ...] | None, outcome: Outcome) -> str:
    return f"{outcome.said}\n{describe(name, seed, targets)}"


@settings(max_examples=5 * settings().max_examples)
@given(st.sampled_from(sorted(CALLS)), SEEDS)
def test_a_valid_call_gives_what_is_documented(name: str, seed: int) -> None:
    outcome = run_input(name, seed, ())
    assert outcome.kind == "returned" or name == "check_weights", complain(name, seed, (), outcome)
    assert outcome.kind != "violation", complain(name, seed, (), outcome)


@settings(max_examples=25 * settings().max_examples)
@given(st.sampled_from(PAIRS), SEEDS)
def test_a_corrupted_argument_is_refused_clearly_or_served(
    pair: tuple[str, str], seed: int
) -> None:
    name, target = pair
    made = make_input(name, seed, (target,))
    outcome = judge(name, made.arguments, made.wrong, law_of(CALLS[name], made.arguments))
    assert outcome.kind != "violation", complain(name, seed, (target,), outcome)


@settings(max_examples=10 * settings().max_examples)
@given(st.sampled_from(sorted(CALLS)), SEEDS)
def test_two_corrupted_arguments_are_refused_clearly_or_served(name: str, seed: int) -> None:
    outcome = run_input(name, seed)
    assert outcome.kind != "violation", complain(name, seed, None, outcome)


def _planted(kind: str) -> Callable[..., Tensor]:
    def call(values: Tensor, **others: Any) -> Tensor:
        if kind == "changes an input":
            values.add_(1)
        if kind == "fails inside":
            raise RuntimeError("The size of tensor a must match")
        if kind == "names nothing":
            raise ValueError("a bad shape, got [3]")
        if kind == "names another":
            raise ValueError("gamma must lie in [0, 1], got 7")
        if kind == "says no value":
            raise ValueError("values is bad")
        if kind == "is not finite":
            return values * float("nan")
        if kind == "drops an axis":
            return values[0]
        return values.clone()

    return call


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("changes an input", None, "changed an input"),
        ("fails inside", "int", "RuntimeError from inside"),
        ("names nothing", "int", "does not name ['values']"),
        ("names another", "int", "does not name ['values']"),
        ("says no value", "int", "does not say what came"),
        ("is not finite", None, "not finite"),
        ("drops an axis", None, "the shape is"),
        ("accepts all", "int", "accepts what is wrong"),
        ("names nothing", None, "refuses what is right"),
    ],
)
def test_the_fuzz_sees_a_planted_violation(
    kind: str, value: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CALLS["td_deltas"]
    monkeypatch.setitem(CALLS, "td_deltas", dataclasses.replace(call, function=_planted(kind)))
    made = make_input("td_deltas", 5, ())
    wrong = {}
    if value == "int":
        wrong = {"values": Wrong(made.arguments["values"].long(), "dtype")}
        made.arguments["values"] = wrong["values"].value
    outcome = judge("td_deltas", made.arguments, wrong, law_of(call, made.arguments))
    assert outcome.kind == "violation"
    assert said in outcome.said


def test_a_hang_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SECONDS", 0.2)

    def forever(**arguments: Any) -> None:
        while True:
            pass

    call = dataclasses.replace(CALLS["td_deltas"], function=forever)
    monkeypatch.setitem(CALLS, "td_deltas", call)
    assert "hangs" in run_input("td_deltas", 5, ()).said


@pytest.mark.parametrize(
    ("code", "said"),
    [("pass", None), ("import os; os.abort()", "ended with -6"), ("while True: pass", "hangs")],
)
def test_a_child_that_crashes_or_hangs_is_reported(
    code: str, said: str | None, tmp_path: Path
) -> None:
    found = supervise([sys.executable, "-S", "-c", code], tmp_path / "last", patience=1.5)
    assert (found is None) if said is None else (found is not None and said in found)


# ---------------------------------------------------------------- what the fuzz has found

F, T = torch.ones(1, 2, 1), torch.ones(1, 2)
ONCE, BOTH = F.bool(), T.bool()
LOGITS, LABELS = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2).long()
META = torch.ones(1, 2, device="meta")
SPARSE = T.to_sparse()


def strided_nested() -> Tensor:
    """Torch warns of this layout, once a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([T[0]])


REPRODUCTIONS: list[tuple[str, Callable[[], Any], str]] = [
    ("a group that is a string", lambda: wmtp.dft_weights(F, ONCE, group="x"), "group"),
    ("a group that is never used", lambda: wmtp.dft_weights(F, ONCE, mode="none", group=3), "group"),
    ("2**70 heads", lambda: wmtp.mtp_targets(LABELS, 2**70), "offsets"),
    ("2**40 heads for one", lambda: wmtp.mtp_ce_loss(LOGITS, LABELS, offsets=2**40), "offsets"),
    ("offsets beside a reference by head",
     lambda: wmtp.excess_loss(F, F, offsets=(0, 0)), "offsets"),
    ("no head weight", lambda: wmtp.weighted_mean(F, None, ONCE, head_weights=()), "head_weights"),
    ("head weights that are bytes",
     lambda: wmtp.weighted_mean(F, None, ONCE, head_weights=b"x"), "head_weights"),  # pyright: ignore
    ("coefficients that are bytes",
     lambda: wmtp.combine_weights([T], BOTH, mode="product", coefficients=b"x"), "coefficients"),
    ("labels of a subclass beyond the vocabulary",
     lambda: wmtp.mtp_ce_loss(LOGITS, (LABELS + 99).as_subclass(_Subclass)), "labels"),
    ("weights without values", lambda: wmtp.check_weights(META, META.bool()), "weights"),
    ("ignore_index 2**70", lambda: wmtp.mtp_ce_loss(LOGITS, LABELS, ignore_index=2**70),
     "ignore_index"),
    ("softcap 2**70", lambda: wmtp.predictive_entropy(LOGITS, softcap=2**70), "softcap"),
    ("slab_bytes 2**70", lambda: wmtp.linear_mtp_ce_loss(F, T.mT, LABELS, slab_bytes=2**70),
     "slab_bytes"),
    ("keep in another mode",
     lambda: wmtp.rho1_weights(F, ONCE, T, mode="softmax", keep=-1.0), "keep"),
    ("a bool for correction",
     lambda: wmtp.group_advantages(torch.ones(2), torch.zeros(2).long(), correction=True),
     "correction"),
    ("fields of statistics",
     lambda: wmtp.exp_weights(T, BOTH, statistics=WhiteningStatistics(1.0, 0.0, 1.0)),  # pyright: ignore
     "statistics"),
    ("a critic's targets elsewhere", lambda: wmtp.value_loss(T, META, BOTH), "targets"),
    ("rewards elsewhere", lambda: wmtp.td_deltas(T, BOTH, rewards=META), "rewards"),
    ("a rejected mask elsewhere",
     lambda: wmtp.pairwise_ranking_loss(T, T, BOTH, META.bool()), "rejected_valid"),
    ("head weights elsewhere",
     lambda: wmtp.weighted_mean(F, None, ONCE, head_weights=META[0, :1]), "head_weights"),
    ("a sparse tensor", lambda: wmtp.td_deltas(SPARSE, BOTH), "values"),
    ("a module's dim", lambda: wmtp.ValueHead("a"), "dim"),
    ("a module's heads", lambda: wmtp.MTPHeads(2, "a"), "heads"),
    ("a module's device", lambda: wmtp.ValueHead(2, device="nowhere"), "device"),
    ("a module's dtype", lambda: wmtp.ValueHead(2, dtype=torch.int64), "dtype"),
    ("a module's smoothing", lambda: wmtp.WeightedMTPLoss(label_smoothing="a"), "label_smoothing"),
    ("a module's offsets", lambda: wmtp.WeightedMTPLoss(offsets=-math.inf), "offsets"),
    ("another dtype than the module's", lambda: wmtp.MTPHeads(2, 2)(torch.ones(1, 1, 2).double()),
     "hidden"),
    ("a group beside a scope by sequence",
     lambda: wmtp.softmax_weights(T, BOTH, scope="sequence", group="x"), "group"),
    ("a group of statistics", lambda: wmtp.update_statistics(None, T, BOTH, group=T), "group"),
    ("a wild range", lambda: wmtp.mtp_targets(LABELS, range(2**70)), "offsets"),
    ("a wild offset", lambda: wmtp.align_to_heads(T, (1, 2**62)), "offsets"),
    ("offsets that are bytes", lambda: wmtp.align_to_heads(T, b"ab"), "offsets"),
    ("a fill that int64 cannot hold", lambda: wmtp.align_to_heads(LABELS, 1, fill=1e30), "fill"),
    ("a fill that float32 cannot hold", lambda: wmtp.align_to_heads(T, 1, fill=1e300), "fill"),
    ("logits without a head", lambda: wmtp.mtp_ce_loss(LOGITS[:, :, :0], LABELS), "logits"),
    ("hidden states without a head",
     lambda: wmtp.linear_mtp_ce_loss(torch.ones(1, 2, 0, 3), torch.ones(4, 3), LABELS), "hidden"),
    ("a cross entropy without a head",
     lambda: wmtp.excess_loss(F[:, :, :0], T), "token_ce"),
    ("beta in another mode",
     lambda: wmtp.critic_delta_weights(T, BOTH, mode="top_k", beta=-1.0), "beta"),
    ("clip in another mode",
     lambda: wmtp.critic_delta_weights(T, BOTH, mode="softmax", clip=(2.0, 3.0)), "clip"),
    ("a clip of 2**70", lambda: wmtp.normalize_weights(T, BOTH, clip=(0, 2**70)), "clip"),
    ("an initial value that float32 cannot hold",
     lambda: wmtp.td_deltas(T, BOTH, initial_value=1e300), "initial_value"),
    ("a normalizer that float32 cannot hold",
     lambda: wmtp.weighted_mean(F, None, ONCE, normalizer=1e300), "normalizer"),
    ("a normalizer elsewhere",
     lambda: wmtp.weighted_mean(F, None, ONCE, normalizer=META[0, 0]), "normalizer"),
    ("a weight outside that float32 cannot hold",
     lambda: wmtp.span_weights(LABELS, torch.ones(1), BOTH, outside=1e300), "outside"),
    ("span values elsewhere", lambda: wmtp.span_weights(LABELS, META[0], BOTH), "span_values"),
    ("statistics elsewhere",
     lambda: wmtp.exp_weights(T, BOTH, statistics=WhiteningStatistics(*[META[0, 0]] * 3)),
     "statistics"),
    ("statistics of integers",
     lambda: wmtp.update_statistics(WhiteningStatistics(*[torch.tensor(1)] * 3), T, BOTH),
     "statistics"),
    ("rewards of sequences elsewhere",
     lambda: wmtp.group_relative_weights(META[:, 0], torch.zeros(1).long(), BOTH), "rewards"),
    ("a jagged tensor",
     lambda: wmtp.check_weights(torch.nested.nested_tensor([T[0]], layout=torch.jagged), BOTH),
     "weights"),
    ("a nested tensor", lambda: wmtp.td_deltas(strided_nested(), BOTH), "values"),
    ("a sparse member", lambda: wmtp.combine_weights([T, SPARSE], BOTH), "weights"),
    ("a member that is no tensor", lambda: wmtp.combine_weights([T, T, "x"], BOTH), "weights"),  # pyright: ignore
    ("a coefficient that is a name",
     lambda: wmtp.combine_weights([T, T, T], BOTH, coefficients=[1.0, 1.0, "x"]), "coefficients"),  # pyright: ignore
    ("hidden states elsewhere", lambda: wmtp.ValueHead(2)(META[..., None].expand(1, 2, 2)), "hidden"),
    ("2**40 heads of a module", lambda: wmtp.MTPHeads(2, 2**40), "heads"),
    ("a bool for a dim", lambda: wmtp.ValueHead(True), "dim"),
    ("a module's slab", lambda: wmtp.LinearWeightedMTPLoss(slab_bytes=0), "slab_bytes"),
    ("a module's ignored label", lambda: wmtp.WeightedMTPLoss(ignore_index=2**70), "ignore_index"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name"), [pytest.param(c, n, id=i) for i, c, n in REPRODUCTIONS])
def test_what_the_fuzz_found_is_refused_clearly(call: Callable[[], Any], name: str) -> None:
    said = ""
    try:
        with _guarded():
            call()
    except DOCUMENTED as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} from inside") from error
    blamed = re.findall(r"typechecking parameter '(\w+)'", said) or [said]
    assert re.search(rf"\b{name}\b", blamed[0]), said or "accepted"


@pytest.mark.parametrize("ignored", [2**63 - 1, -(2**63), 2**53 + 1])
def test_every_int64_can_be_the_ignored_label(ignored: int) -> None:
    labels = torch.tensor([[1, 2, ignored]])
    assert wmtp.mtp_targets(labels, 1, ignore_index=ignored)[0, :, 0].tolist() == [
        2,
        ignored,
        ignored,
    ]
    loss = wmtp.mtp_ce_loss(torch.zeros(1, 3, 1, 4), labels, ignore_index=ignored)
    torch.testing.assert_close(loss, torch.tensor(4.0).log())


def test_an_upper_bound_beyond_the_dtype_bounds_nothing() -> None:
    weights = torch.tensor([[1.0, 3.0]])
    wide = wmtp.normalize_weights(weights, BOTH, clip=(0.1, 1e300))
    assert torch.equal(wide, wmtp.normalize_weights(weights, BOTH, clip=(0.1, math.inf)))


if __name__ == "__main__":
    sys.exit(main())
