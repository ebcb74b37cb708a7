"""Time and memory of the linear loss against its floor and its peers, on a CPU.

    python benchmarks/linear_loss.py                          # N 4096, dim 512, vocab 32000
    python benchmarks/linear_loss.py --vocab 128256 --dim 1024 --seq 256
    python benchmarks/linear_loss.py --sweep                  # against V, N and heads

Every contender computes the loss and its gradients on the same inputs in one process, in turns, and
the table gives medians. *Floor* is the three matrix products over all rows that nobody can avoid,
each at the best of several tilings, whatever the case. Before anything is timed, each contender's
loss and gradients are compared with float64; a wrong answer is shown as wrong. Memory is the peak
resident size of a process of its own beyond its inputs, and so includes the gradients. With
``--keep-memory`` the allocator of the timed process keeps what a step frees: no page faults. wmtp, the
dense loss and torch's chunked one are timed in every case, other peers in ``--peer-cases``.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from measure import (
    MIB,
    Job,
    chip,
    fastest_tilings,
    first_line,
    floor_jobs,
    floor_of,
    gives_memory_back,
    interleaved,
    keep_memory,
    medians,
    memory_is_kept,
    resident_peak,
    versions,
    write_csv,
)
from peers import (
    CASES,
    CONTENDERS,
    DTYPES,
    PACKAGES,
    Sizes,
    make_inputs,
    prepare,
    run,
    unavailable,
    verdicts,
)

import wmtp


FLOOR_ROWS = (256, 512, 1024, 2048)
FLOOR_COLUMNS = (512, 1024, 2048)

ON_CPU = [name for name, contender in CONTENDERS.items() if "cpu" in contender.devices]
# These are timed in every case and swept; what others cost depends little on the case.
MAIN = ["wmtp", "dense", "torch chunked"]
# One axis at a time; the trunk is batch · seq positions, and N is that times the heads.
SWEEPS = {
    "vocab": [Sizes(1, 512, 1, 512, vocab) for vocab in (8000, 16000, 32000, 64000, 128000)],
    "predictions": [Sizes(1, seq, 1, 512, 16000) for seq in (512, 1024, 2048, 4096)],
    "heads": [Sizes(1, 512, heads, 512, 16000) for heads in (1, 2, 4, 8)],
}

Row = dict[str, object]
Pair = tuple[str, str]  # contender, case


def measure_times(
    sizes: Sizes,
    dtype: torch.dtype,
    pairs: list[Pair],
    rounds: int,
    minutes: float,
    tilings: tuple[tuple[int, ...], tuple[int, ...]] = (FLOOR_ROWS, FLOOR_COLUMNS),
) -> tuple[dict[Pair, list[float]], float, str]:
    """Seconds of each pair, and of the floor in the same turns."""
    x = make_inputs(sizes, dtype)
    flat = x.hidden.detach().flatten(0, 2)
    products = floor_jobs(flat, x.unembedding.detach(), *tilings)
    jobs: dict[object, Job] = {**fastest_tilings(products, keep=2 if len(products) > 6 else 1)}
    for name, label in pairs:
        jobs[name, label] = partial(run, name, prepare(x, CASES[label]), CASES[label])
    seconds = interleaved(jobs, rounds, minutes=minutes)
    least, words = floor_of(medians({key: seconds[key] for key in products if key in seconds}))
    return {pair: seconds[pair] for pair in pairs}, least, words


def measure_memory(sizes: Sizes, dtype: str, pair: Pair, threads: int) -> float:
    """MiB at the peak beyond the inputs, in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--one", dtype, *pair]
    for axis, value in sizes._asdict().items():
        command += [f"--{axis}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, env=gives_memory_back())
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout.splitlines()[-1])


def one(options: argparse.Namespace, sizes: Sizes) -> None:
    """The process that ``measure_memory`` starts."""
    dtype, name, label = options.one
    case = CASES[label]
    # A tiny run first, so that libraries, compilers and thread pools are there already.
    tiny = make_inputs(Sizes(2, 16, sizes.heads, 32, 64), DTYPES[dtype])
    run(name, prepare(tiny, case), case)
    x = prepare(make_inputs(sizes, DTYPES[dtype]), case)
    print(resident_peak(partial(run, name, x, case)))


def describe(sizes: Sizes, dtype: str, threads: int) -> Row:
    """The columns that say what was measured, where, and with what."""
    installed = {**versions(PACKAGES), "wmtp": wmtp.__version__}
    memory = "kept" if memory_is_kept() else "given back"
    place = {"chip": chip(), "threads": threads, "freed memory": memory, "dtype": dtype}
    return {**installed, **place, "predictions": sizes.predictions, **sizes._asdict()}


def compare(options: argparse.Namespace, sizes: Sizes, dtype: str) -> list[Row]:
    """All contenders in all cases at one size: the answers, the times, the memory."""
    rows: dict[Pair, Row] = {}
    able = []
    for name in options.contenders:
        why = unavailable(name, DTYPES[dtype], "cpu")
        if why:
            print(f"  {name:20} {why}", flush=True)
            rows[name, "any"] = {"contender": name, "answer": why}
        else:
            able.append(name)
    answers = {} if options.skip_check else verdicts(able, dtype)
    pairs: list[Pair] = [
        (name, label)
        for label in options.cases
        for name in able
        if label in CONTENDERS[name].cases
        and (name in MAIN or label in options.peer_cases)
        and not answers.get((name, label), "").startswith("raises")
    ]
    for name, label in pairs:
        rows[name, label] = {"case": label, "contender": name}
        rows[name, label]["answer"] = answers.get((name, label), "not checked")
    if not options.skip_times:
        seconds, least, words = measure_times(
            sizes, DTYPES[dtype], pairs, options.rounds, options.minutes
        )
        print(f"\n{dtype}: floor {least:.4f} s: {words}; {len(seconds[pairs[0]])} rounds")
        for pair, value in medians(seconds).items():
            rows[pair] |= {
                "seconds": value,
                "fastest": min(seconds[pair]),
                "rounds": len(seconds[pair]),
                "floor_seconds": least,
                "times_floor": value / least,
            }
            tell(pair, f"{value:8.3f} s   {value / least:5.2f} × floor   {rows[pair]['answer']}")
    if not options.skip_memory:
        gradients = (sizes.predictions + sizes.vocab) * sizes.dim * DTYPES[dtype].itemsize / MIB
        print(f"\n{dtype}: peak memory beyond the inputs, of which gradients {gradients:.0f} MiB")
        for pair in (pair for pair in pairs if pair[1] in options.memory_cases):
            try:
                peak = measure_memory(sizes, dtype, pair, options.threads)
            except RuntimeError as error:
                tell(pair, first_line(error))
                continue
            rows[pair] |= {"peak_mib": peak, "gradients_mib": gradients}
            tell(pair, f"{peak:8.0f} MiB")
    return [{**describe(sizes, dtype, options.threads), **row} for row in rows.values()]


def sweep(options: argparse.Namespace, dtype: str) -> list[Row]:
    """Time and memory of a few contenders along each axis."""
    rows: list[Row] = []
    measured: dict[Sizes, list[Row]] = {}  # the axes share a point
    print(f"\n{dtype}: seconds, times floor and MiB, all predictions weighted")
    for axis, points in SWEEPS.items():
        for sizes in points:
            if sizes not in measured:
                measured[sizes] = sweep_point(options, sizes, dtype)
            for row in measured[sizes]:
                rows.append({"axis": axis, **row})
                print(
                    f"  {axis} {row[axis]!s:8} {row['contender']!s:14} {row['seconds']:8.3f} s"
                    f" {row['times_floor']:6.2f} × floor {row['peak_mib']:8.0f} MiB",
                    flush=True,
                )
    return rows


def sweep_point(options: argparse.Namespace, sizes: Sizes, dtype: str) -> list[Row]:
    pairs = [(name, "all") for name in MAIN if name in options.contenders]
    seconds, least, _ = measure_times(
        sizes, DTYPES[dtype], pairs, options.rounds, options.minutes, tilings=((512,), (1024,))
    )
    return [
        describe(sizes, dtype, options.threads)
        | {"case": pair[1], "contender": pair[0], "seconds": value}
        | {"floor_seconds": least, "times_floor": value / least}
        | {"peak_mib": measure_memory(sizes, dtype, pair, options.threads)}
        for pair, value in medians(seconds).items()
    ]


def tell(pair: Pair, words: str) -> None:
    print(f"  {pair[1]:12} {pair[0]:20} {words}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for size, default in zip(Sizes._fields, (2, 512, 4, 512, 32000), strict=True):
        parser.add_argument(f"--{size}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=4, help="begin no round after these")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peer-cases", nargs="*", choices=CASES, default=["all"])
    parser.add_argument("--memory-cases", nargs="+", choices=CASES, default=["all", "rho-1"])
    parser.add_argument("--contenders", nargs="+", choices=ON_CPU, default=ON_CPU)
    parser.add_argument("--csv", type=Path, help="where to write the table")
    parser.add_argument("--sweep", action="store_true", help="against V, N and heads instead")
    parser.add_argument("--keep-memory", action="store_true", help="between steps (glibc only)")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--skip-times", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.keep_memory:
        keep_memory()
    torch.set_num_threads(options.threads)
    sizes = Sizes(*(getattr(options, name) for name in Sizes._fields))
    if options.one:
        one(options, sizes)
        return
    installed = {**versions(PACKAGES), "wmtp": wmtp.__version__}
    print(", ".join(f"{name} {number}" for name, number in installed.items()))
    print(f"{chip()}, {options.threads} threads")
    if not options.sweep:
        print(f"N {sizes.predictions}, dim {sizes.dim}, vocab {sizes.vocab}, heads {sizes.heads}")
    rows: list[Row] = []
    for dtype in options.dtypes:
        rows += sweep(options, dtype) if options.sweep else compare(options, sizes, dtype)
    if options.csv:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
