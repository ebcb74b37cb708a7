"""What wmtp adds to starting up and to every call: its import, and its checks of types and shapes.

    python benchmarks/overhead.py

Each figure is a median over processes of their own, which take turns with and without the checks
(``JAXTYPING_DISABLE=1``). The import is timed after torch's.
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
import json, time, timeit
import torch
start = time.perf_counter()
import wmtp
found = {"import wmtp": time.perf_counter() - start}
torch.set_num_threads(1)
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
    call()
    found[name] = min(timeit.repeat(call, number=200, repeat=10)) / 200
print(json.dumps({**found, "version": wmtp.__version__}))
"""


def child(checked: bool) -> dict:
    environment = {**os.environ, "JAXTYPING_DISABLE": "0" if checked else "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    runs: dict[bool, list[dict]] = {True: [], False: []}
    for turn in range(options.rounds + 1):
        for checked in runs:
            found = child(checked)
            if turn:  # the first turn fills the caches of files and bytecode
                runs[checked].append(found)
    used = {**versions([]), "wmtp": runs[True][0]["version"], "chip": chip()}
    print(", ".join(f"{name} {value}" for name, value in used.items()))
    rows: list[dict[str, object]] = []
    missed = False
    for name in (key for key in runs[False][0] if key != "version"):
        typed, untyped = (statistics.median(run[name] for run in runs[on]) for on in (True, False))
        cost, target = typed - untyped, CALL_TARGET
        if name == "import wmtp":
            cost, target = typed, IMPORT_TARGET
            print(f"  {name} after torch: {typed:.3f} s (target {target} s)", end="")
        else:
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
