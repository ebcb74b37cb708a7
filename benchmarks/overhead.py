"""What wmtp adds to starting up and to every call: its import, and its checks of types and shapes.

    python benchmarks/overhead.py

Each figure is a median over processes of their own. In each, calls with and without the checks (as
``JAXTYPING_DISABLE=1`` leaves them out) take turns. The import is timed after torch's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from measure import chip, versions, write_csv


IMPORT_TARGET, CALL_TARGET = 0.15, 50e-6

CHILD = """
import json, statistics, time, timeit
import torch
start = time.perf_counter()
import wmtp
found = {"import wmtp": time.perf_counter() - start}
torch.set_num_threads(1)
from jaxtyping import config
labels = torch.randint(8, (1, 4))
hidden, unembedding = torch.randn(1, 4, 2, 8), torch.randn(8, 8)
ce, valid = torch.rand(1, 4, 2), torch.ones(1, 4, 2, dtype=torch.bool)
calls = {
    "align_to_heads": lambda: wmtp.align_to_heads(labels, 2),
    "normalize_weights": lambda: wmtp.normalize_weights(ce, valid),
    "exp_weights": lambda: wmtp.exp_weights(ce, valid),
    "critic_delta_weights": lambda: wmtp.critic_delta_weights(ce[..., 0], valid[..., 0]),
    "weighted_mean": lambda: wmtp.weighted_mean(ce, ce, valid),
    "linear_weighted_mtp_loss": lambda: wmtp.linear_weighted_mtp_loss(hidden, unembedding, labels),
}
for name, call in calls.items():
    seconds = {True: [], False: []}
    for turn in range(60):
        for off in seconds:
            config.update("jaxtyping_disable", off)
            call()
            seconds[off].append(timeit.timeit(call, number=20) / 20)
    found[name] = [statistics.median(seconds[off]) for off in (False, True)]
print(json.dumps({**found, "version": wmtp.__version__}))
"""


def child() -> dict:
    # With cached bytecode, as installed packages have it.
    environment = {**os.environ, "JAXTYPING_DISABLE": "0", "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    # The first fills the caches of files and bytecode.
    runs = [child() for _ in range(options.rounds + 1)][1:]
    used = {**versions([]), "wmtp": runs[0].pop("version"), "chip": chip()}
    print(", ".join(f"{name} {value}" for name, value in used.items()))
    rows: list[dict[str, object]] = []
    missed = False
    for name in runs[0]:
        if name == "import wmtp":
            typed, untyped = statistics.median(run[name] for run in runs), 0.0
            cost, target = typed, IMPORT_TARGET
            print(f"  {name} after torch: {typed:.3f} s (target {target} s)", end="")
        else:
            typed, untyped = (statistics.median(run[name][i] for run in runs) for i in (0, 1))
            cost, target = typed - untyped, CALL_TARGET
            print(
                f"  {name}: {1e6 * typed:.0f} µs, unchecked {1e6 * untyped:.0f} µs: "
                f"checks {1e6 * cost:.0f} µs (target {1e6 * target:.0f} µs)",
                end="",
            )
        print("" if cost <= target else "   MISSED")
        missed |= cost > target
        rows.append(
            {**used, "what": name, "seconds": typed, "unchecked": untyped, "cost": cost}
            | {"target": target, "rounds": options.rounds}
        )
    if options.csv:
        write_csv(options.csv, rows)
    sys.exit(missed)


if __name__ == "__main__":
    main()
