"""The configuration: frozen dataclasses, read from TOML and checked in this one place."""

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from .errors import LabError
from .weighting import ALGOS


def _option(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A field with a default and the values that it allows (`low` and `high` included)."""
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """How an arm is trained; every arm of a comparison shares this section."""

    algo: str = _option("rho1-wmtp", choices=ALGOS)
    name: str = "run"
    seed: int = _option(1, low=0)
    steps: int = _option(900, low=1)
    batch: int = _option(2, low=1)
    learning_rate: float = _option(2e-3, low=1e-8, high=1.0)
    warmup: int = _option(50, low=0)
    weight_decay: float = _option(0.05, low=0.0)
    clip_norm: float = _option(1.0, low=1e-8)
    log_every: int = _option(10, low=1)
    evaluate_every: int = _option(300, low=1)
    checkpoint_every: int = _option(300, low=1)
    threads: int = _option(2, low=1, high=256)


@dataclass(frozen=True)
class CorpusConfig:
    """Which files are read and how many bytes of them each split may hold."""

    root: str = ""  # "" is the standard library of the running interpreter
    # Tests and code pages are long tables that say little about Python; `_sysconfigdata*`
    # differs between machines.
    skip: tuple[str, ...] = (
        "site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data",
        "lib2to3", "_sysconfigdata*",
    )  # fmt: skip
    split_seed: int = _option(0, low=0)
    max_file_bytes: int = _option(60_000, low=1)
    test_bytes: int = _option(200_000, low=1)
    validation_bytes: int = _option(60_000, low=1)
    reference_bytes: int = _option(1_500_000, low=1)
    train_bytes: int = _option(1_500_000, low=1)
    # of the files, in the order test, validation, reference; training has the rest
    shares: tuple[float, ...] = (0.08, 0.04, 0.4)


@dataclass(frozen=True)
class CorruptionConfig:
    """Noise in the training documents; no other split is ever touched."""

    share: float = _option(0.5, low=0.0, high=1.0)  # of the documents
    rate: float = _option(0.5, low=0.0, high=1.0)  # of the printable bytes of such a document
    kind: Literal["random", "substitution"] = "random"


@dataclass(frozen=True)
class ModelConfig:
    """The byte transformer of every arm, of the reference and of the critic."""

    dim: int = _option(128, low=8, high=4096)
    layers: int = _option(2, low=1, high=64)
    attention_heads: int = _option(4, low=1, high=64)
    heads: int = _option(4, low=1, high=16)
    context: int = _option(256, low=16, high=8192)


@dataclass(frozen=True)
class Rho1Config:
    """The reference model and how its verdict becomes a weight."""

    keep: float = _option(0.6, low=0.01, high=1.0)
    mode: Literal["top_k", "softmax"] = "top_k"
    temperature: float = _option(1.0, low=1e-3)
    scope: Literal["sequence", "batch", "all"] = "batch"
    reference_steps: int = _option(900, low=1)
    reference_nll: str = ""  # a file with the NLL of every training byte, from anywhere


@dataclass(frozen=True)
class CriticConfig:
    """Stage 1, a value head that tells code that compiles from code that does not; stage 2."""

    steps: int = _option(600, low=1)
    batch: int = _option(16, low=1)
    learning_rate: float = _option(1e-3, low=1e-8, high=1.0)
    pairs: int = _option(4000, low=2)
    heldout_pairs: int = _option(400, low=1)
    max_bytes: int = _option(160, low=16)  # of a function; longer ones are left out
    pool: Literal["last", "mean"] = "mean"
    beta: float = _option(1.0, low=1e-3)
    clip_low: float = _option(0.1, low=0.0, high=1.0)
    clip_high: float = _option(3.0, low=1.0)
    lam: float = _option(0.0, low=0.0, high=1.0)


@dataclass(frozen=True)
class CombinedConfig:
    """The mixture of the Rho-1 and the critic weights."""

    rho1: float = _option(1.0, low=0.0)
    critic: float = _option(1.0, low=0.0)


@dataclass(frozen=True)
class CompareConfig:
    """Arms that are trained first, on the same batches from the same weights."""

    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrackingConfig:
    """What is written beside the results."""

    mlflow: bool = True
    plots: bool = True


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes."""

    train: TrainConfig = TrainConfig()
    corpus: CorpusConfig = CorpusConfig()
    corruption: CorruptionConfig = CorruptionConfig()
    model: ModelConfig = ModelConfig()
    rho1: Rho1Config = Rho1Config()
    critic: CriticConfig = CriticConfig()
    combined: CombinedConfig = CombinedConfig()
    compare: CompareConfig = CompareConfig()
    tracking: TrackingConfig = TrackingConfig()

    def as_dict(self) -> dict[str, dict[str, Any]]:
        return {
            section: {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
            for section, values in asdict(self).items()
        }


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The file with the overrides (`section.key=value`) on top, all of it checked."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(
            f"--config {path}: {error.strerror or error}; give an existing .toml file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LabError(f"{path} is not valid TOML: {error}; correct that place") from None
    for override in overrides:
        section, key, value = _parse_override(override)
        table = data.setdefault(section, {})
        if isinstance(table, dict):
            table[key] = value
    return from_dict(data)


def from_dict(data: dict[str, Any]) -> Config:
    """A checked `Config`; keys that are not given keep their defaults."""
    known = get_type_hints(Config)
    sections: dict[str, Any] = {}
    for name, table in data.items():
        if name not in known:
            raise LabError(f"unknown section [{name}]{_nearest(name, known)}")
        if not isinstance(table, dict):
            raise LabError(f"{name} = {table!r}: write it as a section, [{name}]")
        sections[name] = _section(name, known[name], cast(dict[str, Any], table))
    config = replace(Config(), **sections)
    _check_together(config)
    return config


def _parse_override(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise LabError(f"--set {text}: write it as section.key=value, as in train.steps=50")
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, value.strip()  # a bare word is a string: train.algo=baseline-mtp


def _section(name: str, kind: type, table: dict[str, Any]) -> Any:
    hints = get_type_hints(kind)
    options = {option.name: option for option in fields(kind)}
    values = {}
    for key, value in table.items():
        if key not in options:
            raise LabError(f"unknown key {name}.{key}{_nearest(key, options)}")
        value = _typed(f"{name}.{key}", value, hints[key])
        _check_range(f"{name}.{key}", value, options[key].metadata)
        values[key] = value
    return kind(**values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        _check_choice(name, value, get_args(hint))
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint in (tuple[str, ...], tuple[float, ...]):
        if not isinstance(value, list | tuple):
            raise LabError(f"{name} = {value!r}: expected a list, as in {name}=[...]")
        return tuple(
            _typed(name, item, str if hint == tuple[str, ...] else float) for item in value
        )
    if type(value) is not hint:
        raise LabError(f"{name} = {value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def _check_range(name: str, value: Any, allowed: Mapping[str, Any]) -> None:
    low, high, choices = (allowed.get(key) for key in ("low", "high", "choices"))
    if choices:
        _check_choice(name, value, choices)
    if isinstance(value, float) and not math.isfinite(value):
        raise LabError(f"{name} = {value}: give a finite number")
    if (low is not None and value < low) or (high is not None and value > high):
        top = "" if high is None else f" and at most {high}"
        raise LabError(f"{name} = {value}: must be at least {low}{top}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        hint = _nearest(value, choices, otherwise="")
        raise LabError(f"{name} = {value!r}: choose one of {', '.join(choices)}{hint}")


def _check_together(config: Config) -> None:
    model, corpus = config.model, config.corpus
    if model.dim % model.attention_heads:
        raise LabError(
            f"model.dim = {model.dim}: must be a multiple of model.attention_heads "
            f"= {model.attention_heads}"
        )
    if model.heads >= model.context:
        raise LabError(f"model.heads = {model.heads}: must be below model.context")
    bad = [share for share in corpus.shares if not 0 < share < 1]
    if len(corpus.shares) != 3 or bad or sum(corpus.shares) >= 1:
        raise LabError(
            f"corpus.shares = {list(corpus.shares)}: give three shares above 0 (test, validation, "
            "reference) whose sum is below 1"
        )
    for arm in config.compare.arms:
        _check_choice("compare.arms", arm, ALGOS)
    name = config.train.name
    if not name.replace("-", "").replace("_", "").isalnum():
        raise LabError(f"train.name = {name!r}: use letters, digits, - and _ (it names a folder)")
    if config.combined.rho1 + config.combined.critic == 0:
        raise LabError("combined.rho1 and combined.critic are both 0: make one of them positive")


def _nearest(word: Any, known: Iterable[str], otherwise: str | None = None) -> str:
    names = list(known)
    found = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    if found:
        return f"; did you mean {found[0]!r}?"
    return f"; known: {', '.join(names)}" if otherwise is None else otherwise
