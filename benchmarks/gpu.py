"""The linear loss on a CUDA device against its floor and its peers, in one run of a few minutes.

    python benchmarks/gpu.py --csv benchmarks/results/gpu.csv            # some five minutes
    python benchmarks/gpu.py --heads 1 --contenders wmtp "dense, compiled"
    python benchmarks/gpu.py --device cpu --small                # tries the script itself

bf16, N 8192 predictions, dim 4096, vocab 128256, with one head and with four. *Floor* is the three
matrix products over all rows, each at the best of several tilings. Answers are first compared with
float64 at a smaller size. A contender that raises is shown with its error, and the others go on.
Liger's scaled cross entropy and Quack want nvidia-cutlass-dsl as well.
"""

import argparse
import gc
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
    interleaved,
    medians,
    resident_peak,
    timed,
    versions,
    write_csv,
)
from peers import (
    CASES,
    CHECKED_SIZES,
    CONTENDERS,
    DTYPES,
    LEAN_BYTES,
    PACKAGES,
    Sizes,
    make_inputs,
    prepare,
    run,
    unavailable,
    verdicts,
)

import wmtp


ROWS, COLUMNS = (1024, 2048, 4096, 8192), (4096, 8192, 16384, 32768)
# What wmtp is meant to reach, by contender and case: times of the floor; and MiB at the peak beyond the
# gradients.
TIME_TARGETS = {("wmtp", "all"): 1.10, ("wmtp", "rho-1"): 1.00}
MEMORY_TARGETS = {("wmtp, 0.3 GiB", label): LEAN_BYTES / MIB for label in ("all", "rho-1")}
# What every contender does that can; wmtp does all cases.
SHARED_CASES = ("all", "half masked", "rho-1", "evaluation")


def peak_of(job: Job, device: str) -> float:
    """MiB at the peak of one call beyond what was allocated before."""
    if device != "cuda":
        return resident_peak(job)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def compare(
    sizes: Sizes, able: list[str], answers: dict[tuple[str, str], str], options: argparse.Namespace
) -> list[dict[str, object]]:
    """One table: seconds, times floor and peak memory of every contender that gets through."""
    dtype, device = DTYPES[options.dtype], options.device
    x = make_inputs(sizes, dtype, device)
    gradients = (x.hidden.numel() + x.unembedding.numel()) * dtype.itemsize / MIB
    jobs: dict[object, Job] = {}
    peaks: dict[object, float] = {}
    rows: list[dict[str, object]] = []
    described: dict[str, object] = {"dtype": options.dtype, **sizes._asdict()}
    described["predictions"] = sizes.predictions
    print(
        f"\n{options.dtype}, N {sizes.predictions}, dim {sizes.dim}, vocab {sizes.vocab}, heads "
        f"{sizes.heads}; gradients {gradients:.0f} MiB"
    )
    pairs = [
        (name, label)
        for label in CASES
        for name in able
        if label in CONTENDERS[name].cases and (label in SHARED_CASES or name == "wmtp")
    ]
    for name, label in pairs:
        job = partial(run, name, prepare(x, CASES[label]), CASES[label])
        answer = answers.get((name, label), "not checked")
        try:
            job()  # kernels are chosen and compiled here; too little memory shows here
            peaks[name, label] = peak_of(job, device)
        except Exception as error:
            answer = first_line(error)
            print(f"  {label:12} {name:20} {answer}", flush=True)
        else:
            jobs[name, label] = job
        rows.append({"case": label, "contender": name, "answer": answer})
        x.hidden.grad = x.unembedding.grad = None
        release(device)
    flat = x.hidden.detach().flatten(0, 2)
    # The first turn over all tilings only warms up.
    products = floor_jobs(flat, x.unembedding.detach(), ROWS, COLUMNS)
    for job in products.values():
        timed(job, device)
    tilings = fastest_tilings(products, 2, device)
    seconds = interleaved(
        {**tilings, **jobs}, options.rounds, minutes=options.minutes, device=device
    )
    least, words = floor_of(medians({key: seconds[key] for key in tilings}))
    print(f"  floor {1e3 * least:.2f} ms: {words}")
    print(f"  {'case':12} {'contender':20} {'ms':>9} {'× floor':>8} {'peak MiB':>9}")
    for row in rows:
        pair = row["contender"], row["case"]
        row |= {**described, "floor_seconds": least, "gradients_mib": gradients}
        if pair not in jobs:
            continue
        value, peak = medians({pair: seconds[pair]})[pair], peaks[pair]
        row |= {"seconds": value, "fastest": min(seconds[pair]), "rounds": len(seconds[pair])}
        row |= {"times_floor": value / least, "peak_mib": peak}
        print(
            f"  {row['case']:12} {row['contender']:20} {1e3 * value:9.2f} {value / least:8.2f} "
            f"{peak:9.0f}   {row['answer']}{against_targets(row)}"
        )
    return rows


def against_targets(row: dict) -> str:
    """What wmtp was meant to reach, next to what it did."""
    pair, words = (row["contender"], row["case"]), ""
    if pair in TIME_TARGETS:
        met = row["times_floor"] <= TIME_TARGETS[pair]
        words += f"; target ≤ {TIME_TARGETS[pair]:.2f} × floor {'met' if met else 'MISSED'}"
    if pair in MEMORY_TARGETS:
        most = row["gradients_mib"] + MEMORY_TARGETS[pair]
        met = row["peak_mib"] <= most
        words += f"; target ≤ {most:.0f} MiB {'met' if met else 'MISSED'}"
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=1.0, help="per table, as linear_loss.py")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu --small tries the script")
    predictions, dim, vocab = (256, 64, 4000) if options.small else (8192, 4096, 128256)
    described: dict[str, object] = {
        **versions([*PACKAGES, "triton"]),
        "wmtp": wmtp.__version__,
        "CUDA": torch.version.cuda,
        "chip": chip(options.device),
    }
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    rows: list[dict[str, object]] = []
    able = []
    for name in options.contenders or CONTENDERS:
        if options.device not in CONTENDERS[name].devices:
            continue
        why = unavailable(name, DTYPES[options.dtype], options.device)
        if why:
            print(f"  {name:20} {why}", flush=True)
            rows.append({"contender": name, "answer": why})
        else:
            able.append(name)
        release(options.device)
    checked = 4000 if options.small else CHECKED_SIZES.vocab
    answers = verdicts(able, options.dtype, options.device, checked)
    release(options.device)
    for heads in options.heads:
        rows += compare(
            Sizes(2, predictions // heads // 2, heads, dim, vocab), able, answers, options
        )
        release(options.device)
        if options.csv:
            write_csv(options.csv, [{**described, **row} for row in rows])


if __name__ == "__main__":
    main()
