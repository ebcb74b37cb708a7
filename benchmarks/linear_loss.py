"""Time and memory of the linear loss against its floor and its peers, on a CPU.

    python benchmarks/linear_loss.py                        # N 4096, dim 512, vocab 32000
    python benchmarks/linear_loss.py --vocab 128256 --dim 1024 --seq 256

Every contender computes the loss and its gradients on the same inputs in one process. They take turns
(the machine's mood then meets all of them), and the table gives medians. *Floor* is the three matrix
products that nobody can avoid, alone, at the best slab of those tried. Before anything is timed, each
contender's gradients are compared with float64; a wrong answer is shown as wrong. Memory is the peak
resident size of a process of its own beyond its inputs.
"""

import argparse
import csv
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import wmtp


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOOR_ROWS = (256, 512, 1024)


class Inputs(NamedTuple):
    """One problem: hidden states, unembedding, targets, weights, a reference's NLL."""

    hidden: Tensor
    unembedding: Tensor
    targets: Tensor
    weights: Tensor
    reference: Tensor


class Case(NamedTuple):
    """What is asked: which targets and which weights, and how long the dense path would take."""

    masked: bool = False
    rho1: bool = False
    gradients: bool = True


CASES = {
    "all": Case(),
    "half masked": Case(masked=True),
    "rho-1": Case(rho1=True),
    "evaluation": Case(gradients=False),
}


def make_inputs(options: argparse.Namespace, dtype: torch.dtype) -> Inputs:
    rng = torch.Generator().manual_seed(0)
    shape = (options.batch, options.seq, options.heads)
    hidden = torch.randn(*shape, options.dim, generator=rng)
    unembedding = torch.randn(options.vocab, options.dim, generator=rng) * options.dim**-0.5
    return Inputs(
        hidden.to(dtype).requires_grad_(),
        unembedding.to(dtype).requires_grad_(),
        torch.randint(options.vocab, shape, generator=rng),
        torch.rand(shape, generator=rng) + 0.5,
        torch.rand(shape, generator=rng) * 4 + 8,
    )


def prepare(inputs: Inputs, case: Case) -> Inputs:
    """Mask the first half of every row, as prompts are, if the case says so."""
    if not case.masked:
        return inputs
    targets = inputs.targets.clone()
    targets[:, : targets.shape[1] // 2] = -100
    return inputs._replace(targets=targets)


def of_wmtp(x: Inputs, case: Case) -> Tensor:
    rho1 = partial(wmtp.rho1_weights, reference_nll=x.reference)
    weights = rho1 if case.rho1 else x.weights
    return wmtp.linear_weighted_mtp_loss(x.hidden, x.unembedding, x.targets, weights)


def weigh(token_ce: Tensor, x: Inputs, case: Case) -> Tensor:
    """What a user of a per-token loss writes."""
    token_ce = token_ce.view(x.targets.shape).float()
    valid = x.targets != -100
    weights = x.weights * valid
    if case.rho1:
        weights = wmtp.rho1_weights(token_ce.detach(), valid, x.reference)
    return (token_ce * weights).sum() / weights.sum()


def of_dense(x: Inputs, case: Case) -> Tensor:
    logits = F.linear(x.hidden, x.unembedding).flatten(0, 2)
    return weigh(F.cross_entropy(logits.float(), x.targets.flatten(), reduction="none"), x, case)


def of_torch_chunked(x: Inputs, case: Case) -> Tensor:
    token_ce = F.linear_cross_entropy(
        x.hidden.flatten(0, 2),
        x.unembedding,
        x.targets.flatten(),
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return weigh(token_ce, x, case)


def of_torch_chunked_mean(x: Inputs, case: Case) -> Tensor:
    """Its fastest form: one unweighted mean, which is less than what the others compute."""
    return F.linear_cross_entropy(
        x.hidden.flatten(0, 2),
        x.unembedding,
        x.targets.flatten(),
        options=torch.nn.LinearCrossEntropyOptions(),
    )


CONTENDERS: dict[str, Callable[[Inputs, Case], Tensor]] = {
    "wmtp": of_wmtp,
    "dense": of_dense,
    "torch chunked": of_torch_chunked,
    "torch chunked, unweighted mean": of_torch_chunked_mean,
}


def run(contender: str, x: Inputs, case: Case) -> None:
    if case.gradients:
        CONTENDERS[contender](x, case).backward()
        x.hidden.grad = x.unembedding.grad = None
    else:
        with torch.no_grad():
            CONTENDERS[contender](x, case)


def floor(x: Inputs, rows: int) -> None:
    """The three products of ``rows`` rows at a time, into memory that is already there."""
    hidden, weight = x.hidden.detach().flatten(0, 2), x.unembedding.detach()
    slab = hidden.new_empty(rows, len(weight))
    total = torch.empty_like(weight)
    for block in hidden.split(rows):
        torch.mm(block, weight.T, out=slab[: len(block)])
    for block in hidden.split(rows):
        torch.mm(slab[: len(block)], weight, out=block.new_empty(block.shape))
    for i, block in enumerate(hidden.split(rows)):
        fresh = i == 0 or total.dtype != torch.float32
        accumulate = partial(torch.mm, out=total) if fresh else total.addmm_
        accumulate(slab[: len(block)].T, block)


def gradient_errors(contender: str, x: Inputs, case: Case) -> tuple[float, float]:
    """Relative Frobenius errors of both gradients against the dense loss in float64."""
    wide = x._replace(
        hidden=x.hidden.detach().double().requires_grad_(),
        unembedding=x.unembedding.detach().double().requires_grad_(),
    )
    logits = F.linear(wide.hidden, wide.unembedding).flatten(0, 2)
    token_ce = F.cross_entropy(logits, x.targets.flatten(), reduction="none")
    if contender.endswith("mean"):
        truth = token_ce.sum() / (x.targets != -100).sum()
    else:
        truth = weigh(token_ce, x, case)
    expected = torch.autograd.grad(truth, (wide.hidden, wide.unembedding))
    got = torch.autograd.grad(CONTENDERS[contender](x, case), (x.hidden, x.unembedding))
    errors = [
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)
    ]
    return errors[0], errors[1]


def check(options: argparse.Namespace) -> None:
    """Gradients of a smaller problem, many slabs long, against float64."""
    small = argparse.Namespace(**{**vars(options), "seq": 32, "vocab": 4000, "dim": 128})
    print("relative gradient errors against float64 (hidden, unembedding)")
    for name, dtype in DTYPES.items():
        for contender in CONTENDERS:
            for label, case in CASES.items():
                if case.gradients and not case.rho1:
                    x = prepare(make_inputs(small, dtype), case)
                    of_hidden, of_weight = gradient_errors(contender, x, case)
                    print(f"  {name} {contender:32} {label:12} {of_hidden:.1e} {of_weight:.1e}")


def timed(f: Callable[[], None]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name in options.dtypes:
        x = make_inputs(options, DTYPES[name])
        jobs: dict[tuple[str, str], Callable[[], None]] = {}
        for size in FLOOR_ROWS:
            jobs["floor", str(size)] = partial(floor, x, size)
        for label in options.cases:
            for contender in options.contenders:
                jobs[label, contender] = partial(
                    run, contender, prepare(x, CASES[label]), CASES[label]
                )
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
        for turn in range(options.rounds + 1):
            for key, job in jobs.items():
                took = timed(job)
                if turn:  # the first turn warms up
                    seconds[key].append(took)
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        least = min(value for (label, _), value in medians.items() if label == "floor")
        print(f"\n{name}: floor {least:.3f} s (three products, best of {FLOOR_ROWS} rows)")
        for (label, contender), value in medians.items():
            if label != "floor":
                rows.append(
                    {"dtype": name, "case": label, "contender": contender, "seconds": value,
                     "of_floor": value / least}
                )  # fmt: skip
                print(f"  {label:12} {contender:32} {value:8.3f} s   {value / least:5.2f} × floor")
    return rows


def measure_memory(options: argparse.Namespace) -> None:
    """Peak resident memory beyond the inputs, each contender in a process of its own."""
    print("\npeak memory beyond inputs, MiB")
    for name in options.dtypes:
        for label in options.cases:
            for contender in options.contenders:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", name, label, contender]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                print(f"  {name} {label:12} {contender:32} {float(done.stdout):8.0f}")


def one(options: argparse.Namespace) -> None:
    name, label, contender = options.one
    case = CASES[label]
    # A tiny run first, so that libraries and thread pools are there before the peak is read.
    tiny = argparse.Namespace(**{**vars(options), "seq": 8, "vocab": 64, "dim": 16})
    run(contender, prepare(make_inputs(tiny, DTYPES[name]), case), case)
    x = prepare(make_inputs(options, DTYPES[name]), case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(contender, x, case)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for size, default in (("batch", 2), ("seq", 512), ("heads", 4), ("dim", 512), ("vocab", 32000)):
        parser.add_argument(f"--{size}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--csv", type=Path, help="where to write the times")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        return one(options)
    predictions = options.batch * options.seq * options.heads
    print(
        f"wmtp {wmtp.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{options.threads} threads; N {predictions}, dim {options.dim}, vocab {options.vocab}"
    )
    if not options.skip_check:
        check(options)
    rows = measure(options)
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    if not options.skip_memory:
        measure_memory(options)
    return None


if __name__ == "__main__":
    main()
