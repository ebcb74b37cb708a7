"""Checkpoints: one safetensors file with tensors and JSON, replaced in one move, never executed."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import LabError


Metadata = dict[str, Any]
PROGRESS = ("step", "logged")  # how many steps were made, and how many lines of history written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside its place, then moved there: a reader sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written; a process that lives may still be writing.

    Called before anything is written there, so that a file of this very process number is old.
    """
    for part in folder.glob(".*.part"):
        number = part.suffixes[-2][1:]
        if number.isdecimal() and not _lives(int(number)):
            part.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Whether another process has this number; where that cannot be asked, as if there were one."""
    if process == os.getpid():
        return False
    if os.name != "posix":  # elsewhere signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Metadata) -> None:
    """Replace a safetensors file."""
    with replacing(path) as part:
        save_file(tensors, part, metadata={"json": json.dumps(metadata, sort_keys=True)})


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that this package wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabError(
            f"cannot read {path}: {error}; remove its folder and start a new run"
        ) from None


def read_tensors(path: Path, *, advice: str) -> tuple[dict[str, Tensor], Metadata]:
    """Read a file that `write_tensors` wrote; `advice` says what to do when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("json", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise LabError(f"{path} is truncated or damaged ({error}); {advice}") from None


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, metadata: Metadata
) -> None:
    """The parameters, the optimiser's state for each of them, and what is needed to go on."""
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    write_tensors(path, tensors, metadata)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Metadata
) -> Metadata:
    """Fill the model and the optimiser; refuse a checkpoint of another configuration or corpus."""
    advice = f"remove {path.parent} to train this part again"
    tensors, metadata = read_tensors(path, advice=advice)
    stored = metadata.get("identity", {})
    if found := differences(stored, identity):
        raise LabError(f"{path} was made with another {found}; give the same again, or {advice}")
    if lacking := [key for key in PROGRESS if not isinstance(metadata.get(key), int)]:
        raise LabError(f"{path} does not say its {' and '.join(lacking)}; {advice}")
    parameters = dict(model.named_parameters())
    values: dict[str, Tensor] = {}
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "model":
            values[rest] = tensor
        else:
            entry, _, name = rest.partition(".")
            state.setdefault(name, {})[entry] = tensor
    shapes, wanted = _shapes(values), _shapes(parameters)
    if found := differences({**dict.fromkeys(state, "no values"), **shapes}, wanted):
        raise LabError(f"{path} belongs to another model ({found}); {advice}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
            if name in state:  # what no gradient has reached yet has no state
                optimizer.state[parameter] = state[name]
    return metadata


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def differences(stored: Metadata, wanted: Metadata) -> str:
    """What differs, in words: `train.steps (stored 900, given 50)`; empty when all is the same."""
    old, new = _flatten(stored), _flatten(wanted)
    missing = "nothing"
    return ", ".join(
        f"{key} (stored {old.get(key, missing)}, given {new.get(key, missing)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    )


def _flatten(data: Metadata, prefix: str = "") -> Metadata:
    flat: Metadata = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
