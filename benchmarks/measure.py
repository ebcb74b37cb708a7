"""What every benchmark shares: the machine's name, clocks, peaks, the floor, tables and CSV."""

import csv
import ctypes
import gc
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor


Key = TypeVar("Key", bound=Hashable)
Job = Callable[[], object]

MIB = 2**20


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Each distribution's version, or "not installed"."""
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {"Python": platform.python_version(), **found, "torch": torch.__version__}


def chip(device: torch.device | str = "cpu") -> str:
    """The processor's name as the system gives it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# glibc gives large blocks back to the kernel when they are freed, unless these say otherwise.
_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**36), "MALLOC_TRIM_THRESHOLD_": str(2**36)}


def memory_is_kept() -> bool:
    """Whether this process was started by ``keep_memory``."""
    return all(os.environ.get(name) == value for name, value in _KEPT_MEMORY.items())


def keep_memory() -> None:
    """Begin this process anew with an allocator that keeps freed memory for the next step.

    Otherwise whatever a step allocates is asked of the kernel again, page by page, in the next: on a
    virtual machine that can take longer than the step. jemalloc and tcmalloc keep memory too.
    """
    if not memory_is_kept():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_KEPT_MEMORY})


def gives_memory_back() -> dict[str, str]:
    """The environment of a process whose peak is to be what it holds, not what it keeps."""
    return {name: value for name, value in os.environ.items() if name not in _KEPT_MEMORY}


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:100] if lines else ''}"


def timed(job: Job, device: torch.device | str = "cpu") -> float:
    """Seconds of one call, with the device idle before and after."""
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    jobs: dict[Key, Job],
    rounds: int,
    *,
    minutes: float = float("inf"),
    device: torch.device | str = "cpu",
) -> dict[Key, list[float]]:
    """Seconds of every job, which take turns so that the machine's mood meets all of them.

    In another order each time: what comes after a job that heats the chip is slower. A first turn warms
    up and is not counted. After ``minutes`` no further turn is begun, but two are always made: a median
    of less says nothing.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in jobs}
    order, rng = list(jobs), random.Random(0)
    start = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 2 and time.perf_counter() - start > 60 * minutes:
            break
        rng.shuffle(order)
        for key in order:
            took = timed(jobs[key], device)
            if turn:
                seconds[key].append(took)
    return seconds


def medians(seconds: dict[Key, list[float]]) -> dict[Key, float]:
    return {key: statistics.median(values) for key, values in seconds.items()}


Product = tuple[str, str, int]  # which product, how it is tiled, rows or columns per tile


def floor_jobs(
    hidden: Tensor, unembedding: Tensor, rows: Sequence[int], columns: Sequence[int]
) -> dict[Product, Job]:
    """The three products nobody can avoid, each tiled by rows and by slices of the vocabulary.

    Into memory that is already there, holding random numbers (zeros are faster on some chips).
    Where a tiling must add partial results up it does so in the operands' dtype, which for bf16 is
    less than a loss may do, so that this stays a floor.
    """
    size, vocab = len(hidden), len(unembedding)
    rows = sorted({min(tile, size) for tile in rows})
    columns = sorted({min(tile, vocab) for tile in columns})
    slab = hidden.repeat(1, -(-max(rows[-1] * vocab, columns[-1] * size) // hidden.numel()))
    slab = slab.flatten()
    of_hidden, of_weight = torch.zeros_like(hidden), torch.zeros_like(unembedding)

    def view(height: int, width: int) -> Tensor:
        return slab[: height * width].view(height, width)

    def logits_by_rows(tile: int) -> None:
        for block in hidden.split(tile):
            torch.mm(block, unembedding.T, out=view(len(block), vocab))

    def logits_by_columns(tile: int) -> None:
        for part in unembedding.split(tile):
            torch.mm(hidden, part.T, out=view(size, len(part)))

    def hidden_by_rows(tile: int) -> None:
        for out in of_hidden.split(tile):
            torch.mm(view(len(out), vocab), unembedding, out=out)

    def hidden_by_columns(tile: int) -> None:
        for i, part in enumerate(unembedding.split(tile)):
            of_hidden.addmm_(view(size, len(part)), part, beta=float(i > 0))

    def weight_by_rows(tile: int) -> None:
        for i, block in enumerate(hidden.split(tile)):
            of_weight.addmm_(view(len(block), vocab).T, block, beta=float(i > 0))

    def weight_by_columns(tile: int) -> None:
        for out in of_weight.split(tile):
            torch.mm(view(size, len(out)).T, hidden, out=out)

    jobs: dict[Product, Job] = {}
    for name, by_rows, by_columns in (
        ("logits", logits_by_rows, logits_by_columns),
        ("of hidden", hidden_by_rows, hidden_by_columns),
        ("of unembedding", weight_by_rows, weight_by_columns),
    ):
        jobs |= {(name, "rows", tile): partial(by_rows, tile) for tile in rows}
        jobs |= {(name, "columns", tile): partial(by_columns, tile) for tile in columns}
    return jobs


def fastest_tilings(jobs: dict[Product, Job], keep: int, device: str = "cpu") -> dict[Product, Job]:
    """The ``keep`` best tilings of each product in one turn: they go on to the timed rounds."""
    seconds = {key: timed(job, device) for key, job in jobs.items()}
    chosen: dict[Product, Job] = {}
    for product in dict.fromkeys(name for name, _, _ in jobs):
        of_it = sorted((key for key in jobs if key[0] == product), key=seconds.__getitem__)
        chosen |= {key: jobs[key] for key in of_it[:keep]}
    return chosen


def floor_of(seconds: dict[Product, float]) -> tuple[float, str]:
    """The sum of each product's best tiling, and which they were."""
    best: dict[str, Product] = {}
    for key, value in seconds.items():
        if key[0] not in best or value < seconds[best[key[0]]]:
            best[key[0]] = key
    words = (f"{name} {seconds[key]:.4f} s ({key[2]} {key[1]})" for name, key in best.items())
    return sum(seconds[key] for key in best.values()), ", ".join(words)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def resident_peak(job: Job) -> float:
    """MiB by which the resident size rises above what it was before, at the peak of one call.

    ``VmHWM`` belongs to this process's own memory; ``ru_maxrss`` is inherited from the parent. The
    mark is reset first where that is permitted, and freed memory returned, so that neither an
    earlier peak nor the allocator's reserve hides this one's.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc only
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        before = _status("VmHWM")
    job()
    return (_status("VmHWM") - before) / MIB


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """One tidy table; columns are those of any row, in the order in which they turn up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
