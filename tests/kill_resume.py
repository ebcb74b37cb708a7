"""Kill a training run again and again: what it ends with is what it would have been.

    python -m tests.kill_resume --kills 20

The tiny configuration is trained once without interruption. Then it is trained again, each process
killed (SIGKILL, no chance to save) at a moment drawn uniformly over the time that an uninterrupted one
takes, and gone on with by ``--resume``, until so many kills have happened; every other round waits
for a file that is being written (``*.part``) and kills there. A run that ends before its kill starts
the next round from nothing. All that a run leaves behind (weights, optimiser, metrics, results) must
be the same bit for bit, times and file names apart, and no half-written file may be left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open


ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
CHANGES = (
    "tracking.mlflow=false", "tracking.plots=false", "train.threads=1", "train.name=run",
    "train.steps=8", "train.checkpoint_every=1", "train.log_every=1", "train.evaluate_every=4",
    "rho1.reference_steps=4", "compare.arms=[]",
)  # fmt: skip
# What tells one process from another, and nothing about the numbers.
PASSING = {"seconds_of_training_since_start_or_resume"}


class Ended(NamedTuple):
    """How one process ended: killed by us, or by itself with a code."""

    killed: bool
    code: int
    errors: str
    seconds: float


def command(runs: Path, resume: bool, algo: str) -> list[str]:
    words = [word for change in (*CHANGES, f"train.algo={algo}") for word in ("--set", change)]
    place = ["--config", str(ROOT / "examples" / "tiny.toml"), "--runs", str(runs)]
    return [
        sys.executable, str(ROOT / "examples" / "train.py"), *place, *words,
        *(["--resume"] if resume else []),
    ]  # fmt: skip


def parts(runs: Path) -> list[Path]:
    return list(runs.rglob(".*.part"))


def start(
    runs: Path, resume: bool, algo: str, after: float | None = None, at_write: bool = False
) -> Ended:
    """Run to the end, or until `after` seconds and then, if asked, until a file is being written."""
    began = time.monotonic()
    known = set(parts(runs))
    with subprocess.Popen(
        command(runs, resume, algo), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        while process.poll() is None:
            elapsed = time.monotonic() - began
            if after is not None and elapsed >= after:
                late = elapsed >= after + 5
                if not at_write or late or set(parts(runs)) - known:
                    process.kill()
                    break
            time.sleep(0.0002 if at_write and after is not None and elapsed >= after else 0.002)
        _, errors = process.communicate()
    killed = process.returncode == -9
    return Ended(killed, process.returncode, errors, time.monotonic() - began)


def _without_times(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_times(value) for key, value in data.items() if key not in PASSING}
    return [_without_times(value) for value in data] if isinstance(data, list) else data


def outcome(runs: Path) -> dict[str, Any]:
    """Everything that a finished run leaves: tensors as bytes, JSON without times."""
    found: dict[str, Any] = {}
    for path in sorted(runs.rglob("*")):
        name = str(path.relative_to(runs))
        if path.is_dir() or path.name.endswith(".part"):
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                found[name] = (
                    file.metadata(),
                    {
                        key: (str(x.dtype), tuple(x.shape), x.numpy().tobytes())
                        for key, x in tensors.items()
                    },
                )
        elif path.suffix == ".json":
            found[name] = _without_times(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of the files that are not the same."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def until_done(
    runs: Path, algo: str, kills: int, length: float, r: random.Random
) -> tuple[int, list[str]]:
    """One run, killed up to `kills` times; how often it was, and what was wrong."""
    done = 0
    while True:
        resume = (runs / "run").exists()
        if resume and not (runs / "run" / "run.json").exists():
            # Killed between making the folder and describing it: what --resume then advises.
            print("  no run.json yet: the folder is removed", flush=True)
            shutil.rmtree(runs / "run")
            resume = False
        at_write = done % 2 == 1
        after = r.uniform(0, length) if done < kills else None
        ended = start(runs, resume, algo, after, at_write)
        place = "while a file was written" if parts(runs) else ""
        print(f"  {'resumed' if resume else 'started'}, {ended.seconds:5.2f} s, "
              f"{f'killed {place}' if ended.killed else f'ended with {ended.code}'}",
              flush=True)  # fmt: skip
        done += ended.killed
        if not ended.killed:
            return done, [] if ended.code == 0 else [f"ended with {ended.code}: {ended.errors}"]


def kill_and_resume(kills: int, seed: int, algo: str, folder: Path) -> list[str]:
    """What is wrong after so many kills; nothing, if all is well."""
    r = random.Random(seed)
    straight = start(folder / "straight", False, algo)
    if straight.code != 0:
        return [f"the uninterrupted run failed: {straight.errors}"]
    wanted = outcome(folder / "straight")
    # The first one may have filled caches; the second tells how long one takes.
    again = start(folder / "again", False, algo)
    if wrong := differing(outcome(folder / "again"), wanted):
        return [f"two uninterrupted runs differ in {wrong}"]
    length = min(straight.seconds, again.seconds)
    print(f"uninterrupted: {length:.2f} s, {len(wanted)} files", flush=True)
    done, rounds, said = 0, 0, []
    while done < kills and not said:
        runs = folder / f"round{rounds}"
        more, said = until_done(runs, algo, min(kills - done, 5), length, r)
        done += more
        rounds += 1
        wrong = differing(outcome(runs), wanted) if not said else []
        if wrong:
            said.append(f"round {rounds}: these differ from the uninterrupted run: {wrong}")
        left = [path.name for path in parts(runs)]
        if left and not said:
            said.append(f"round {rounds}: left behind half written: {left}")
        print(f"round {rounds}: {done} kills so far, differing files: {wrong or 'none'}, "
              f"left behind: {left or 'nothing'}", flush=True)  # fmt: skip
        shutil.rmtree(runs, ignore_errors=True)
    print(f"{done} kills in {rounds} rounds")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algo", default="rho1-wmtp", help="baseline-mtp needs no reference model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        said = kill_and_resume(options.kills, options.seed, options.algo, Path(name))
    print("\n".join(said) or "the same bit for bit")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
