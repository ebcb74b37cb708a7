"""Train a small byte-level model with weighted multi-token prediction and compare methods.

    python examples/train.py --config examples/rho1.toml
    python examples/train.py --config examples/rho1.toml --set train.algo=shuffled-control
    python examples/train.py --config examples/rho1.toml --resume

The configuration sets everything: the method in `train.algo`, the arms to compare in `compare.arms`.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from lab.config import load_config
from lab.errors import Interrupted, LabError
from lab.experiment import open_run, preflight, prepare_text, run
from lab.report import table
from lab.training import Stop


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like every other one of this program."""

    def error(self, message: str) -> NoReturn:
        raise LabError(f"{message}; see --help")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE.toml")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE",
        help="change one value of the configuration; may be given several times",
    )  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--resume", action="store_true", help="go on with the newest such run")
    parser.add_argument(
        "--stop-after", type=int, metavar="STEP", help="save and stop at this step, as Ctrl-C would"
    )
    options = parser.parse_args(arguments)
    if options.stop_after is not None and options.stop_after < 1:
        parser.error(f"--stop-after {options.stop_after}: give a step of at least 1")
    return options


def resume_command(options: argparse.Namespace) -> str:
    """What to type to go on."""
    changed = [word for override in options.overrides for word in ("--set", override)]
    place = ["--config", options.config, *changed, "--runs", str(options.runs)]
    return shlex.join(["python", sys.argv[0], *place, "--resume"])


def main(arguments: list[str] | None = None) -> int:
    """0: done. 2: a mistake in what was given, told in one line. 130: stopped, can go on.

    What stops a run is Ctrl-C, SIGTERM or `--stop-after`.
    """
    try:
        options = parse(arguments)
        config = load_config(options.config, options.overrides)
        text = prepare_text(config)
        preflight(config, text, options.runs)
        folder = open_run(config, options.runs, options.resume)
        print(f"run folder: {folder}", flush=True)
        with Stop(options.stop_after) as stop:
            results = run(config, text, folder, stop)
    except LabError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(f"\n{stopped}; a checkpoint is saved. To go on:\n  {resume_command(options)}")
        return 130
    except OSError as error:
        print(f"train.py: error: {error}; check the path, its rights and the disk", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    print(f"\nclean held-out test files\n{table(results)}\n\nresults: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
