"""The Triton kernels compiled for GPUs that are not here: they assemble, and keep to their registers.

Triton brings the assembler of CUDA with it, so what a GPU would be given can be made without one, exactly
as the kernels are launched: with the arguments, blocks and warps of ``wmtp/triton_softmax.py``. What the
interpreter cannot see shows here: types that do not fit, spilled registers, loads of single logits.

    python -m tests.test_triton_compiled 90          # prints what every kernel takes on sm_90
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor


if not sys.platform.startswith("linux"):
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

# Ampere, Hopper, Blackwell.
ARCHITECTURES = [80, 90, 100]
# Two programs of 256 threads each share a multiprocessor's 65,536 registers.
MOST_REGISTERS = 128
# Shared memory, in bytes: a reduction over 8 warps.
MOST_SHARED = 2048
# Bytes that may be spilled where everything is asked for at once, which nobody does.
MOST_SPILLED = 16
# Rows of a slab start at a multiple of so many columns on a GPU.
ALIGNED_COLUMNS = 64
# By module.
KERNELS = {
    "triton_softmax": ("_reduce_columns", "_gradient_over_rows", "_gradient_over_columns"),
    "triton_target_rows": ("_write_hidden", "_add_targets"),
}
SLAB_CALLS = tuple(name.removeprefix("_") for name in KERNELS["triton_softmax"])
FLAGS = (False, True)


class Case(NamedTuple):
    """A launch: a kernel's wrapper, a slab and the options that choose what is compiled."""

    call: str
    dtype: str
    columns: int
    options: dict[str, Any]

    def launch(self, kernels: dict[str, Any]) -> None:
        """Call the wrapper as ``slab_softmax.py`` or ``target_rows.py`` does."""
        apart = self.columns + -self.columns % ALIGNED_COLUMNS
        slab = torch.zeros(2, apart, dtype=getattr(torch, self.dtype))[:, : self.columns]
        wanted, numbers = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
        given: dict[str, tuple[Tensor, ...]] = {
            "reduce_columns": (slab, wanted),
            "gradient_over_rows": (slab, wanted),
            "gradient_over_columns": (slab, wanted, numbers, numbers, numbers),
            "write_hidden": (slab, wanted, slab.float(), numbers, slab, wanted, numbers),
            "add_targets": (slab, wanted, slab, numbers),
        }
        options = self.options | ({"source": wanted} if "source" in self.options else {})
        module = next(module for module in kernels.values() if hasattr(module, self.call))
        getattr(module, self.call)(*given[self.call], **options)


def cases() -> Iterator[Case]:
    """Every combination of options for bfloat16 but the softcap's; then what differs otherwise."""
    plain = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
    every = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 30.0}
    none = {"weighting": "none", "power": 1.0, "with_correct": False}
    for best, total in itertools.product(FLAGS, FLAGS):
        options = {"softcap": 0.0, "with_best": best, "with_sum": total}
        yield Case("reduce_columns", "bfloat16", 32768, options)
    for smoothing, z_loss in itertools.product((0.0, 0.1), (0.0, 0.1)):
        options = plain | {"label_smoothing": smoothing, "z_loss": z_loss, "vocab": 99}
        yield Case("gradient_over_columns", "bfloat16", 32768, options)
    options = plain | {"vocab": 128256, "source": True}
    yield Case("gradient_over_columns", "bfloat16", 128256, options)
    for kind, correct in itertools.product(("none", "dft", "focal", "entropy", "el2n"), FLAGS):
        options = plain | {"weighting": kind, "power": 1.0, "with_correct": correct}
        yield Case("gradient_over_rows", "bfloat16", 128256, options)
    # The most that can be asked for; odd rows; one column, which Triton makes a constant of.
    for dtype, columns in (
        ("bfloat16", 4096), ("float16", 4096), ("float32", 4096), ("bfloat16", 50257), ("float32", 1),
    ):  # fmt: skip
        most = {"weighting": "entropy", "power": 0.5, "with_correct": True}
        yield Case("gradient_over_rows", dtype, columns, plain | none)
        yield Case("gradient_over_rows", dtype, columns, every | most)
        yield Case("gradient_over_columns", dtype, columns, every | {"vocab": columns})
        options = {"softcap": 30.0, "with_best": True, "with_sum": True}
        yield Case("reduce_columns", dtype, columns, options)
        yield Case("write_hidden", dtype, columns, {})
        yield Case("add_targets", dtype, columns, {})


class _NoDevice:
    """What Triton asks its driver when it compiles."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class _CompiledOnly:
    """A kernel whose launches compile it and end there."""

    def __init__(self, kernel: Any, found: list[Any]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.found.append(self.kernel.run(*arguments, grid=grid, warmup=True, **options))

        return launch


def compiled(architecture: int) -> Iterator[tuple[Case, Any]]:
    """Every case, and what Triton has made of it. Only where Triton does not interpret."""
    backends, runtime = (
        importlib.import_module(f"triton.{name}") for name in ("backends.compiler", "runtime")
    )
    kernels = {name: importlib.import_module(f"wmtp.{name}") for name in KERNELS}
    runtime.driver.set_active(_NoDevice(backends.GPUTarget("cuda", architecture, 32)))
    found: list[Any] = []
    for module, names in KERNELS.items():
        for name in names:
            kernel = getattr(kernels[module], name)
            setattr(kernels[module], name, _CompiledOnly(kernel, found))
    for case in cases():
        case.launch(kernels)
        yield case, found.pop()


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of its stack and local memory, and of shared memory."""
    nvidia = importlib.import_module("triton.backends.nvidia")
    tool = Path(str(nvidia.__file__)).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said)
    return {name: int(number) for name, number in pairs}


def main() -> None:
    """Print a line of JSON for every case."""
    for case, kernel in compiled(int(sys.argv[1])):
        ptx = kernel.asm["ptx"]
        print(
            json.dumps(
                {
                    **case._asdict(),
                    **resources(kernel.asm["cubin"]),
                    "warps": kernel.metadata.num_warps,
                    "vector_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
                    "vector_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
                }
            ),
            flush=True,
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_and_keep_to_their_registers(
    architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_triton_compiled", str(architecture)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = list(cases())
    assert [Case(*(row[name] for name in Case._fields)) for row in found] == wanted
    for row, case in zip(found, wanted, strict=True):
        everything = case.options.get("softcap", 0.0) > 0
        assert row["STACK"] + row["LOCAL"] <= (MOST_SPILLED if everything else 0), row
        assert everything or row["REG"] <= MOST_REGISTERS, row
        assert row["SHARED"] <= MOST_SHARED, row
        # Rows of a slab are aligned whatever the vocabulary, those of hidden states are as they are given.
        if case.columns % ALIGNED_COLUMNS == 0 or (case.call in SLAB_CALLS and case.columns > 1):
            assert row["vector_loads"] >= 1, row
            assert row["vector_stores"] >= (case.call != "reduce_columns"), row


if __name__ == "__main__":
    main()
