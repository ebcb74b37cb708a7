"""What the fuzz knows of every public callable: a valid call, and the law for each argument.

Written from the documentation and not read from the package's annotations, so that an annotation
that is wrong is found too. A law says of a value ``True`` (must be accepted), ``False`` (must be
refused) or ``None`` (either, as long as a refusal is a clear one).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import wmtp
from wmtp import RowLocalWeights, WhiteningStatistics


IGNORE = -100
Verdict = bool | None
Arguments = dict[str, Any]

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_SIGNED = {torch.int8, torch.int16, torch.int32, torch.int64}
DTYPES: dict[str, set[torch.dtype]] = {
    "float": _FLOATS,
    "bool": {torch.bool},
    "int": _SIGNED,
    "int64": {torch.int64},
    "any": _FLOATS | _SIGNED | {torch.bool, torch.uint8},
    "count": _FLOATS | _SIGNED,
}


class World:
    """The sizes and the randomness of one call."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        pick = self.random.choice
        self.sizes = {
            "b": pick((1, 2, 3)),
            "s": pick((1, 2, 3, 5)),
            "h": pick((1, 2, 3)),
            "v": pick((2, 4, 6)),
            "d": pick((1, 3, 4)),
            "p": pick((1, 2)),
            "c": pick((1, 3, 4)),
            "r": pick((1, 2, 4)),
            "n": pick((1, 2, 3)),
        }
        self.dtype = pick((torch.float32,) * 3 + (torch.float64, torch.bfloat16))
        self.members = pick((1, 2, 3))
        self.rank = pick((2, 3))

    def shape(self, axes: str) -> tuple[int, ...]:
        return tuple(self.sizes[axis] for axis in axes.split())

    def normal(self, axes: str) -> Tensor:
        x = torch.randn(self.shape(axes), generator=self.generator, dtype=torch.float64)
        return x.to(self.dtype)

    def positive(self, axes: str) -> Tensor:
        return self.normal(axes).abs()

    def unit(self, axes: str) -> Tensor:
        return torch.rand(self.shape(axes), generator=self.generator).to(self.dtype)

    def mask(self, axes: str) -> Tensor:
        return torch.rand(self.shape(axes), generator=self.generator) < 0.7

    def integers(self, axes: str, low: int, high: int) -> Tensor:
        return torch.randint(low, high, self.shape(axes), generator=self.generator)

    def labels(self, axes: str) -> Tensor:
        return self.integers(axes, 0, self.sizes["v"]).masked_fill(~self.mask(axes), IGNORE)

    def entries(self) -> str:
        """The axes of what may be per token or per prediction: one choice for a whole call."""
        return "b s" if self.rank == 2 else "b s h"


@dataclass(frozen=True)
class Law:
    """One argument: how to make a good one, and which others are good.

    ``axes`` are the accepted shapes of a tensor; ``"b s v|h"`` says that the missing axis is 1.
    """

    make: Callable[[World], Any]
    axes: tuple[str, ...] = ()
    dtype: str = ""
    optional: bool = False
    judge: Callable[[Any, Arguments, dict[str, int]], Verdict] | None = None
    related: tuple[str, ...] = ()

    def alone(self, value: Any) -> Verdict:
        """The verdict on a tensor's kind, apart from the other arguments."""
        if value is None:
            return self.optional
        if not isinstance(value, Tensor):
            return False
        odd = value.is_nested or value.layout != torch.strided or value.is_quantized
        if odd or type(value) not in PLAIN:
            return None
        if value.dtype not in DTYPES[self.dtype]:
            # The narrowest floats are floats to the annotations; some computations refuse them.
            float8 = value.is_floating_point() and value.dtype not in _FLOATS
            return None if float8 or self.dtype == "any" else False
        return True


PLAIN = (Tensor, torch.nn.Parameter)


def tensor(make: Callable[[World], Any], dtype: str, *axes: str, optional: bool = False) -> Law:
    return Law(make, axes, dtype, optional)


def beyond(*values: Any) -> bool:
    """Whether there is an int among them that torch cannot take."""
    return any(isinstance(x, int) and not -(2**63) <= x < 2**63 for x in values)


def number(
    make: Callable[[World], Any],
    low: float = -math.inf,
    high: float = math.inf,
    *,
    edges: str = "[]",
    optional: bool = False,
    whole: bool = False,
    related: tuple[str, ...] = (),
) -> Law:
    """A Python number in an interval, never NaN; at infinity either answer will do."""

    def judge(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
        if value is None:
            return optional
        if isinstance(value, bool):
            return None
        if whole and isinstance(value, np.integer):
            return None
        if not isinstance(value, int if whole else (int, float)):
            return False
        if beyond(value):
            return False
        if value != value:
            return None if low == -math.inf else False
        if low == -math.inf and abs(value) > 1e6:
            return None
        above = value > low if edges[0] == "(" else value >= low
        below = value < high if edges[1] == ")" else value <= high
        if above and below and (abs(value) > 1e30 or 0 < abs(value) < 1e-30):
            return None
        return above and below

    return Law(make, optional=optional, judge=judge, related=related)


_NUMBER = number(lambda w: w.random.choice((0, 1.5)))


def choice(*names: str, related: tuple[str, ...] = ()) -> Law:
    def judge(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
        return isinstance(value, str) and value in names

    return Law(lambda w: w.random.choice(names), judge=judge, related=related)


def flag() -> Law:
    def judge(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
        return isinstance(value, bool)

    return Law(lambda w: w.random.random() < 0.5, judge=judge)


def _offset_steps(value: Any) -> list[int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return list(range(1, value + 1)) if 1 <= value <= 1000 else None
    if isinstance(value, (list, tuple, range)) and all(type(x) is int for x in value):
        steps = list(value)
        rising = all(a < b for a, b in pairwise(steps))
        return steps if steps and steps[0] >= 0 and rising else None
    return None


def _judge_offsets(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if isinstance(value, int) and not isinstance(value, bool) and value > 1000:
        return False if "h" in sizes else None
    steps = _offset_steps(value)
    if steps is None or len(steps) != sizes.get("h", len(steps)):
        return False
    return None if steps[-1] > 1000 else True


def _make_offsets(w: World) -> Any:
    heads = w.sizes["h"]
    leap = [2 * h + 1 for h in range(heads)]
    return w.random.choice((heads, tuple(range(heads)), leap, range(2, heads + 2)))


OFFSETS = Law(_make_offsets, judge=_judge_offsets)


def _judge_optional_offsets(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    return True if value is None else _judge_offsets(value, arguments, sizes)


# A function of labels and heads alone has nothing that the offsets must agree with.
MAYBE_OFFSETS = Law(
    lambda w: w.random.choice((None, _make_offsets(w))),
    optional=True,
    judge=_judge_optional_offsets,
)


def _judge_clip(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if value is None:
        return True
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    if not all(isinstance(x, (int, float)) for x in value):
        return False
    if beyond(*value):
        return False
    if any(isinstance(x, bool) or x == math.inf for x in value):
        return None
    return 0 <= value[0] <= 1 <= value[1]


CLIP = Law(
    lambda w: w.random.choice((None, (0.1, 3.0), (0.0, 1.0), (1, 1))),
    optional=True,
    judge=_judge_clip,
    related=("mode",),
)


def _judge_weights(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if isinstance(value, RowLocalWeights):
        power = value.power
        if not isinstance(power, (int, float)) or isinstance(power, bool):
            return False if not isinstance(power, bool) else None
        known = value.kind in ("dft", "focal", "entropy", "el2n")
        return (known and 0 <= power < math.inf) and (True if power < 1e6 else None)
    if value is None or any(value is one for one in WEIGHT_FUNCTIONS):
        return True
    return value is BROAD_WEIGHTS if callable(value) else False


def _ce_weights(token_ce: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, token_ce, 0)


# The result is checked by the loss; a shape or a type that is wrong has to be told.
def returns_none(token_ce: Tensor, valid: Tensor) -> Any:
    return None


def returns_list(token_ce: Tensor, valid: Tensor) -> Any:
    return token_ce.tolist()


def returns_token_shape(token_ce: Tensor, valid: Tensor) -> Any:
    return token_ce[..., 0]


def returns_integers(token_ce: Tensor, valid: Tensor) -> Any:
    return valid.long()


def returns_complex(token_ce: Tensor, valid: Tensor) -> Any:
    return token_ce.to(torch.complex64)


BAD_WEIGHT_FUNCTIONS = (
    returns_none, returns_list, returns_token_shape, returns_integers, returns_complex,
)  # fmt: skip
WEIGHT_FUNCTIONS = (wmtp.dft_weights, wmtp.focal_weights, _ce_weights)
BROAD_WEIGHTS = partial(wmtp.focal_weights, gamma=1.0)


def _make_weights(w: World) -> Any:
    kinds = ("dft", "focal", "entropy", "el2n")
    return w.random.choice(
        (
            None,
            w.positive("b s"),
            w.positive("b s h"),
            w.random.choice(WEIGHT_FUNCTIONS),
            BROAD_WEIGHTS,
            RowLocalWeights(w.random.choice(kinds), w.random.choice((0.0, 0.5, 1, 2.0))),
        )
    )


def _judge_head_weights(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if value is None:
        return True
    if not isinstance(value, (list, tuple, range)):
        return False
    if not all(isinstance(x, (int, float)) for x in value):
        return False
    if any(isinstance(x, bool) for x in value):
        return None
    if not all(0 <= x < math.inf for x in value) or len(value) != sizes.get("h", len(value)):
        return False
    if beyond(*value):
        return False
    return None if any(x > 1e30 for x in value) else True


def _judge_normalizer(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if isinstance(value, str):
        return value in ("weights", "tokens")
    if isinstance(value, bool):
        return None
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf or beyond(value):
        return False
    return None if value > 1e30 or 0 < value < 1e-30 else True


def _judge_count(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if value is None or isinstance(value, str):
        return value is None
    return _judge_normalizer(value, arguments, sizes)


def _judge_initial(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if isinstance(value, str):
        return value == "first"
    if isinstance(value, bool):
        return None
    if not isinstance(value, (int, float)):
        return False
    return True if abs(value) <= 1e6 else None


def _judge_statistics(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if value is None:
        return True
    if not isinstance(value, WhiteningStatistics):
        return False
    held = arguments.get("scores")
    wanted: tuple[int, ...] = () if held is None or held.dim() == 2 else (sizes["h"],)
    if arguments.get("whiten", True) is False:
        return False
    for item in value:
        x: Any = item
        if not isinstance(x, Tensor) or x.dtype not in DTYPES["float"] or x.shape != wanted:
            return False
        if held is not None and x.device != held.device:
            return False
    return True


def _make_statistics(w: World) -> Any:
    scores, valid = w.normal(w.entries()), w.mask(w.entries())
    return w.random.choice((None, wmtp.update_statistics(None, scores, valid)))


def _judge_members(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    shape = arguments["valid"].shape
    for item in value:
        x: Any = item
        if not isinstance(x, Tensor) or x.dtype not in DTYPES["float"]:
            return False
        if x.is_nested or x.layout != torch.strided:
            return False
        if x.shape != shape or x.device != arguments["valid"].device:
            return False
    return True


def _judge_coefficients(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if value is None:
        return True
    if arguments["mode"] == "intersection" or not isinstance(value, (list, tuple, range)):
        return False
    if not all(isinstance(x, (int, float)) for x in value):
        return False
    if any(isinstance(x, bool) for x in value):
        return None
    try:
        if len(value) != len(arguments["weights"]):
            return False
    except TypeError:
        return False
    good = all(0 <= x < math.inf for x in value) and any(x > 0 for x in value)
    good = good and not beyond(*value)
    ordinary = arguments["mode"] == "mixture" or all(x == 0 or 1e-30 < x < 1e30 for x in value)
    return good and (True if ordinary else None)


def _judge_fill(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    verdict, row = _NUMBER.judge(value, arguments, sizes), arguments["per_token"]  # pyright: ignore
    if verdict is not True or row.is_floating_point() or row.is_complex():
        return verdict
    if row.dtype == torch.bool:
        return value in (0, 1)
    limits = torch.iinfo(row.dtype)
    return limits.min <= value <= limits.max and value == int(value)


def _judge_generator(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    return isinstance(value, torch.Generator) and value.device == arguments["weights"].device


def _judge_group(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    return value is None


def _judge_device(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if isinstance(value, torch.device):
        return True
    if isinstance(value, str):
        return value in ("cpu", "meta")
    return True if value is None else None if isinstance(value, int) else False


def _judge_dtype(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if not isinstance(value, torch.dtype):
        return value is None
    return value in DTYPES["float"] or (None if value.is_floating_point else False)


GROUP = Law(lambda w: None, optional=True, judge=_judge_group)
IGNORE_INDEX = number(lambda w: IGNORE, whole=True)
SMOOTHING = number(lambda w: w.random.choice((0.0, 0.1, 1)), 0, 1)
Z_LOSS = number(lambda w: w.random.choice((0.0, 1e-3)), 0, edges="[)")
SOFTCAP = number(lambda w: w.random.choice((None, 2.0)), 0, edges="()", optional=True)
SCOPE = choice("sequence", "batch", "all")
MODE = choice("mean_one", "none", related=("min_ess", "clip"))
UNIT = number(lambda w: w.random.choice((0.0, 0.5, 1)), 0, 1)
POWER = number(lambda w: w.random.choice((0.0, 0.5, 1, 2.0)), 0, edges="[)")
WARM = number(lambda w: w.random.choice((0.5, 1, 3.0)), 0, edges="()")
KEEP = number(lambda w: w.random.choice((0.3, 0.6, 1)), 0, 1, edges="(]")
EXTREME = number(lambda w: w.random.choice((5.0, 1e6)), 0, related=("weights",))
# What fits one row and no vocabulary at all is a question of the sizes: see `_judge_slab`.


def _judge_slab(value: Any, arguments: Arguments, sizes: dict[str, int]) -> Verdict:
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int):
        return None if isinstance(value, bool) else False
    unembedding = arguments.get("unembedding")
    row = len(unembedding) * unembedding.dtype.itemsize if isinstance(unembedding, Tensor) else 1
    return value >= row and (True if value < 2**62 else None)


SLAB = Law(
    lambda w: w.random.choice((None, 64, 2**20)), optional=True, judge=_judge_slab,
    related=("unembedding",),
)  # fmt: skip

TOKENS_F = partial(tensor, dtype="float")
LOGITS = Law(lambda w: w.normal("b s h v"), ("b s h v", "b s v|h"), "float", related=("offsets",))
HIDDEN = Law(lambda w: w.normal("b s h d"), ("b s h d", "b s d|h"), "float", related=("offsets",))
LABELS = tensor(lambda w: w.labels(w.random.choice(("b s", "b s h"))), "int64", "b s", "b s h")
TOKEN_LABELS = tensor(lambda w: w.labels("b s"), "int64", "b s")
# A vocabulary that has become too small is told of the labels outside it.
UNEMBEDDING = Law(lambda w: w.normal("v d"), ("v d",), "float", related=("labels",))
BIAS = tensor(lambda w: w.random.choice((None, w.normal("v"))), "float", "v", optional=True)
CE = tensor(lambda w: w.positive("b s h"), "float", "b s h")
PREDICTED = tensor(lambda w: w.mask("b s h"), "bool", "b s h")
VALUES = tensor(lambda w: w.normal("b s"), "float", "b s")
REWARDS = tensor(lambda w: w.random.choice((None, w.normal("b s"))), "float", "b s", optional=True)
TRAINED = tensor(lambda w: w.mask("b s"), "bool", "b s")
ENTRIES = tensor(lambda w: w.positive(w.entries()), "float", "b s", "b s h")
SCORES = tensor(lambda w: w.normal(w.entries()), "float", "b s", "b s h")
VALID = tensor(lambda w: w.mask(w.entries()), "bool", "b s", "b s h")
SEGMENTS = tensor(
    lambda w: w.random.choice((None, w.integers("b s", 0, 2))), "int", "b s", optional=True
)
POSITIONS = tensor(
    lambda w: w.random.choice((None, torch.arange(w.sizes["s"]).expand(w.shape("b s")))),
    "int", "b s", optional=True,
)  # fmt: skip
ATTENTION = tensor(
    lambda w: w.random.choice((None, w.mask("b s").long(), w.mask("b s"))),
    "any", "b s", optional=True,
)  # fmt: skip
BOUNDARIES = Law(
    lambda w: torch.tensor([0, w.sizes["s"]]) if w.sizes["b"] == 1 else None,
    ("x",), "int", optional=True, related=("labels",),
)  # fmt: skip
DOCUMENTS = {
    "attention_mask": ATTENTION,
    "position_ids": POSITIONS,
    "segment_ids": SEGMENTS,
    "cu_seqlens": BOUNDARIES,
}
WEIGHTS = Law(_make_weights, ("b s", "b s h"), "float", True, _judge_weights)
HEAD_WEIGHTS = Law(
    lambda w: w.random.choice((None, [1.0] * w.sizes["h"], w.unit("h"))),
    ("h",), "float", True, _judge_head_weights, ("heads",),
)  # fmt: skip
NORMALIZER = Law(
    lambda w: w.random.choice(("weights", "tokens", 3, 7.5, torch.tensor(4), torch.tensor(2.5))),
    ("",), "count", False, _judge_normalizer,
)  # fmt: skip
COUNT = replace(
    NORMALIZER,
    make=lambda w: w.random.choice((None, 3, 7.5, torch.tensor(4), torch.tensor(2.5))),
    optional=True,
    judge=_judge_count,
)
LOSS = {
    "offsets": MAYBE_OFFSETS,
    "ignore_index": IGNORE_INDEX,
    "label_smoothing": SMOOTHING,
    "z_loss": Z_LOSS,
    "softcap": SOFTCAP,
}
WEIGHTED = {"weights": WEIGHTS, **LOSS, "head_weights": HEAD_WEIGHTS, "normalizer": NORMALIZER}
LINEAR = {"hidden": HIDDEN, "unembedding": UNEMBEDDING, "labels": LABELS, "bias": BIAS}
REDUCTION = choice("mean", "sum", "none")
INITIAL = Law(lambda w: w.random.choice(("first", 0.5, 0)), judge=_judge_initial)
WHITEN = {"whiten": flag(), "statistics": Law(
    _make_statistics, optional=True, judge=_judge_statistics, related=("whiten", "scores")
)}  # fmt: skip
GENERATOR = Law(lambda w: torch.Generator().manual_seed(3), judge=_judge_generator)
MIN_ESS = number(lambda w: None, 0, 1, edges="(]", optional=True, related=("mode",))
SCORE_OPTIONS = {"scope": SCOPE, "group": GROUP}
TD = {**DOCUMENTS, "cu_seqlens": replace(BOUNDARIES, related=("values",))}
DEVICE = Law(lambda w: w.random.choice((None, "cpu")), optional=True, judge=_judge_device)
DTYPE = Law(
    lambda w: w.random.choice((None, torch.float32, torch.bfloat16)), optional=True,
    judge=_judge_dtype,
)  # fmt: skip
WIDTH = number(lambda w: w.sizes["d"], 1, 2**24, whole=True, related=("hidden",))


def heads_of(arguments: Arguments) -> int:
    for name in ("logits", "hidden"):
        if name in arguments:
            x = arguments[name]
            return x.shape[2] if x.dim() == 4 else 1
    steps = _offset_steps(arguments["offsets"])
    assert steps is not None
    return len(steps)


def predictions(arguments: Arguments) -> tuple[int, ...]:
    x = arguments["logits"] if "logits" in arguments else arguments["hidden"]
    return (*x.shape[:2], heads_of(arguments))


def _reduced(arguments: Arguments) -> tuple[int, ...]:
    return predictions(arguments) if arguments["reduction"] == "none" else ()


def _spread(name: str) -> Callable[[Arguments], tuple[int, ...]]:
    return lambda arguments: (*arguments[name].shape, heads_of(arguments))


def like(name: str) -> Callable[[Arguments], tuple[int, ...]]:
    return lambda arguments: tuple(arguments[name].shape)


def scalar(arguments: Arguments) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class Call:
    """A public callable, its arguments, and the shape that the documentation promises.

    ``finite``: the result is finite whatever the values are, as every builder's is.
    """

    function: Callable[..., Any]
    laws: dict[str, Law]
    shape: Callable[[Arguments], tuple[int, ...]] | None
    finite: bool = False
    rules: tuple[Callable[[Arguments], Verdict], ...] = ()
    needed: dict[str, Any] = field(default_factory=dict)

    def arguments(self, world: World) -> Arguments:
        """A valid call; options that exclude each other are set apart by `needed`."""
        made = {name: law.make(world) for name, law in self.laws.items()}
        if "whiten" in made and made.get("statistics") is not None:
            made["whiten"] = True
        if "dim" in made:
            made["hidden"] = made["hidden"].to(made["dtype"] or torch.float32)
        if made.get("mode") == "intersection":
            made["coefficients"] = None
        if made.get("cu_seqlens") is not None and made["cu_seqlens"][-1] > world.sizes["s"]:
            made["cu_seqlens"] = None
        return made


def _labels_rule(arguments: Arguments) -> Verdict:
    """On the CPU a target outside the vocabulary is refused, where it is a target."""
    labels, ignore = arguments["labels"], arguments.get("ignore_index", IGNORE)
    if not isinstance(ignore, int) or abs(ignore) >= 2**62 or labels.is_meta:
        return None
    x = arguments["logits"] if "logits" in arguments else arguments["unembedding"]
    vocab = x.shape[-1] if "logits" in arguments else x.shape[0]
    if vocab == 0:
        return None
    if labels.dim() == 2 and labels.numel():
        steps = _offset_steps(arguments["offsets"]) if arguments.get("offsets") else None
        steps = steps or list(range(1, heads_of(arguments) + 1))
        if "offsets" not in arguments:
            steps = [1]
        reached = torch.zeros(labels.shape[1], dtype=torch.bool)
        for step in steps:
            reached[min(step, labels.shape[1]) :] = True
        # Documents may hide some more of them.
        hidden = any(arguments.get(name) is not None for name in DOCUMENTS)
        wrong = (labels != ignore) & ((labels < 0) | (labels >= vocab))
        if bool((wrong & reached).any()):
            return None if hidden else False
        return True
    return not bool(((labels != ignore) & ((labels < 0) | (labels >= vocab))).any())


def _boundaries_rule(arguments: Arguments) -> Verdict:
    cu = arguments.get("cu_seqlens")
    if cu is None:
        return True
    held = arguments["labels" if "labels" in arguments else "values"]
    if held.dim() != 2 or held.shape[0] != 1 or cu.numel() == 0:
        return False
    if cu.is_meta:
        return None
    steps = cu.tolist()
    rising = all(a <= b for a, b in pairwise(steps))
    if rising and steps[0] == 0 and any(a == b for a, b in pairwise(steps)):
        return None
    return rising and steps[0] == 0 and steps[-1] <= held.shape[1]


def _spans_rule(arguments: Arguments) -> Verdict:
    ids, valid, count = arguments["span_ids"], arguments["valid"], len(arguments["span_values"])
    if ids.is_meta or valid.is_meta:
        return None
    return not bool(((ids < -1) | (ids >= count))[valid].any())


def _min_ess_rule(arguments: Arguments) -> Verdict:
    return not (arguments.get("mode") == "none" and arguments["min_ess"] is not None)


def _dtypes_rule(arguments: Arguments) -> Verdict:
    kinds = {
        arguments[name].dtype
        for name in ("hidden", "unembedding", "bias")
        if arguments.get(name) is not None
    }
    return len(kinds) == 1


def _heads_rule(arguments: Arguments) -> Verdict:
    """Whether no head at all is an empty result or a mistake is for the function to say."""
    return None if arguments["token_ce"].shape[2] == 0 else True


def _vocab_rule(arguments: Arguments) -> Verdict:
    """Nothing can be predicted out of an empty vocabulary or by no head."""
    x = arguments["logits"] if "logits" in arguments else arguments["unembedding"]
    empty = x.shape[-1] == 0 if "logits" in arguments else x.shape[0] == 0
    return False if empty else None if 0 in predictions(arguments)[2:] else True


def _gate(arguments: Arguments) -> Verdict:
    """What `check_weights` is for: it refuses harm at valid entries."""
    weights, valid = arguments["weights"], arguments["valid"]
    if weights.is_meta or valid.is_meta:
        return None
    if weights.shape != valid.shape:
        return False
    seen = weights[valid].double()
    good = seen.isfinite() & (seen >= 0) & (seen <= arguments["extreme"])
    return bool(good.all()) and bool(seen.numel() == 0 or (seen > 0).any())


def _module(name: str) -> Callable[..., Any]:
    """A module's constructor and its call as one function of all their arguments."""
    kind = getattr(wmtp, name)
    given = {
        "MTPHeads": ("hidden",),
        "ValueHead": ("hidden",),
        "WeightedMTPLoss": ("logits", "labels", "weights"),
        "LinearWeightedMTPLoss": ("hidden", "unembedding", "labels", "weights", "bias"),
    }[name]

    def call(**arguments: Any) -> Any:
        tensors = {key: arguments.pop(key) for key in given if key in arguments}
        return kind(**arguments)(**tensors)

    return call


def _heads_input(w: World) -> Tensor:
    return w.normal("b s d")


def _sized_rule(arguments: Arguments) -> Verdict:
    same = arguments["hidden"].shape[-1] == arguments["dim"]
    dtype = arguments["dtype"] or torch.float32
    plain = arguments["device"] in (None, "cpu") and arguments["hidden"].dtype == dtype
    plain = plain and not arguments["hidden"].is_meta
    return False if not same else True if plain else None


LINEAR_RULES = (_dtypes_rule, _vocab_rule, _labels_rule)
DENSE_RULES = (_vocab_rule, _labels_rule)
BY_ENTRY = {"weights": ENTRIES, "valid": VALID}

CALLS: dict[str, Call] = {
    "align_to_heads": Call(
        wmtp.align_to_heads,
        {"per_token": tensor(lambda w: w.normal("b s"), "any", "b s"), "offsets": OFFSETS,
         "fill": Law(lambda w: w.random.choice((0, 1)), judge=_judge_fill, related=("per_token",))},
        _spread("per_token"),
    ),
    "mtp_targets": Call(
        wmtp.mtp_targets,
        {"labels": TOKEN_LABELS, "offsets": OFFSETS, "ignore_index": IGNORE_INDEX, **DOCUMENTS},
        _spread("labels"), rules=(_boundaries_rule,),
    ),
    "mtp_ce_loss": Call(
        wmtp.mtp_ce_loss, {"logits": LOGITS, "labels": LABELS, **LOSS, "reduction": REDUCTION},
        _reduced, rules=DENSE_RULES,
    ),
    "linear_mtp_ce_loss": Call(
        wmtp.linear_mtp_ce_loss, {**LINEAR, **LOSS, "reduction": REDUCTION, "slab_bytes": SLAB},
        _reduced, rules=LINEAR_RULES,
    ),
    "token_nll": Call(
        wmtp.token_nll,
        {"logits": tensor(lambda w: w.normal("b s v"), "float", "b s v"), "labels": TOKEN_LABELS,
         "ignore_index": IGNORE_INDEX, **DOCUMENTS, "softcap": SOFTCAP},
        like("labels"), rules=(*DENSE_RULES, _boundaries_rule),
    ),
    "linear_token_nll": Call(
        wmtp.linear_token_nll,
        {"hidden": tensor(lambda w: w.normal("b s d"), "float", "b s d"),
         "unembedding": UNEMBEDDING, "labels": TOKEN_LABELS, "bias": BIAS,
         "ignore_index": IGNORE_INDEX, **DOCUMENTS, "softcap": SOFTCAP, "slab_bytes": SLAB},
        like("labels"), rules=(*LINEAR_RULES, _boundaries_rule),
    ),
    "excess_loss": Call(
        wmtp.excess_loss,
        {"token_ce": CE, "offsets": MAYBE_OFFSETS,
         "reference_nll": tensor(lambda w: w.positive(w.random.choice(("b s", "b s h"))),
                                 "float", "b s", "b s h")},
        like("token_ce"), rules=(_heads_rule,),
    ),
    "td_deltas": Call(
        wmtp.td_deltas,
        {"values": VALUES, "valid": TRAINED, "rewards": REWARDS, "gamma": UNIT,
         "initial_value": INITIAL, **TD},
        like("values"), rules=(_boundaries_rule,),
    ),
    "gae": Call(
        wmtp.gae,
        {"values": VALUES, "valid": TRAINED, "rewards": REWARDS, "gamma": UNIT, "lam": UNIT,
         "initial_value": INITIAL, **TD},
        like("values"), rules=(_boundaries_rule,),
    ),
    "group_advantages": Call(
        wmtp.group_advantages,
        {"rewards": tensor(lambda w: w.normal("b"), "float", "b"),
         "group_ids": tensor(lambda w: w.integers("b", 0, 2), "int", "b"),
         "eps": number(lambda w: w.random.choice((1e-6, 0.1)), 0, edges="[)"),
         "correction": number(lambda w: w.random.choice((0, 1)), 0, 1, whole=True)},
        like("rewards"),
    ),
    "target_probability": Call(
        wmtp.target_probability,
        {"logits": LOGITS, "labels": LABELS, "offsets": MAYBE_OFFSETS,
         "ignore_index": IGNORE_INDEX, "softcap": SOFTCAP},
        predictions, rules=DENSE_RULES,
    ),
    "predictive_entropy": Call(
        wmtp.predictive_entropy, {"logits": LOGITS, "softcap": SOFTCAP}, predictions,
        rules=(_vocab_rule,),
    ),
    "el2n": Call(
        wmtp.el2n,
        {"logits": LOGITS, "labels": LABELS, "offsets": MAYBE_OFFSETS,
         "ignore_index": IGNORE_INDEX, "softcap": SOFTCAP},
        predictions, rules=DENSE_RULES,
    ),
    "normalize_weights": Call(
        wmtp.normalize_weights,
        {**BY_ENTRY, "mode": MODE, "clip": CLIP, "min_ess": MIN_ESS, **SCORE_OPTIONS,
         "on_zero": choice("uniform", "zero")},
        like("valid"), finite=True, rules=(_min_ess_rule,),
    ),
    "softmax_weights": Call(
        wmtp.softmax_weights,
        {"scores": SCORES, "valid": VALID, "temperature": WARM, **SCORE_OPTIONS},
        like("valid"), finite=True,
    ),
    "top_k_weights": Call(
        wmtp.top_k_weights, {"scores": SCORES, "valid": VALID, "keep": KEEP, **SCORE_OPTIONS},
        like("valid"), finite=True,
    ),
    "exp_weights": Call(
        wmtp.exp_weights,
        {"scores": SCORES, "valid": VALID, "beta": WARM, "clip": CLIP, **WHITEN, **SCORE_OPTIONS},
        like("valid"), finite=True,
    ),
    "rho1_weights": Call(
        wmtp.rho1_weights,
        {"token_ce": CE, "valid": PREDICTED,
         "reference_nll": tensor(lambda w: w.positive(w.random.choice(("b s", "b s h"))),
                                 "float", "b s", "b s h"),
         "keep": KEEP, "mode": choice("top_k", "softmax"), "temperature": WARM,
         "offsets": MAYBE_OFFSETS, **SCORE_OPTIONS},
        like("valid"), finite=True, rules=(_heads_rule,),
    ),
    "critic_delta_weights": Call(
        wmtp.critic_delta_weights,
        {"values": VALUES, "valid": TRAINED, "rewards": REWARDS, "gamma": UNIT, "lam": UNIT,
         "mode": choice("exp", "softmax", "top_k"), "beta": WARM, "clip": CLIP, "keep": KEEP,
         "temperature": WARM, "whiten": flag(),
         "statistics": Law(
             lambda w: None, optional=True, judge=_judge_statistics,
             related=("whiten", "values", "scores"),
         ),
         "initial_value": INITIAL, **TD, **SCORE_OPTIONS},
        like("valid"), finite=True, rules=(_boundaries_rule,),
    ),
    "dft_weights": Call(
        wmtp.dft_weights, {"token_ce": CE, "valid": PREDICTED, "mode": MODE, **SCORE_OPTIONS},
        like("valid"), finite=True,
    ),
    "focal_weights": Call(
        wmtp.focal_weights,
        {"token_ce": CE, "valid": PREDICTED, "gamma": POWER, "mode": MODE, **SCORE_OPTIONS},
        like("valid"), finite=True,
    ),
    "entropy_weights": Call(
        wmtp.entropy_weights,
        {"entropy": ENTRIES, "valid": VALID, "power": POWER, "mode": MODE, **SCORE_OPTIONS},
        like("valid"), finite=True,
    ),
    "el2n_weights": Call(
        wmtp.el2n_weights,
        {"el2n": ENTRIES, "valid": VALID, "power": POWER, "mode": MODE, **SCORE_OPTIONS},
        like("valid"), finite=True,
    ),
    "group_relative_weights": Call(
        wmtp.group_relative_weights,
        {"rewards": tensor(lambda w: w.normal("b"), "float", "b"),
         "group_ids": tensor(lambda w: w.integers("b", 0, 2), "int", "b"),
         "valid": VALID, "beta": WARM, "clip": CLIP, "group": GROUP},
        like("valid"), finite=True,
    ),
    "score_weights": Call(
        wmtp.score_weights,
        {"scores": ENTRIES, "valid": VALID, "clip": CLIP, "min_ess": number(
            lambda w: w.random.choice((None, 0.5)), 0, 1, edges="(]", optional=True),
         **SCORE_OPTIONS},
        like("valid"), finite=True,
    ),
    "span_weights": Call(
        wmtp.span_weights,
        {"span_ids": tensor(lambda w: w.integers("b s", -1, w.sizes["n"]), "int", "b s"),
         "span_values": Law(lambda w: w.positive("n"), ("n",), "float", related=("span_ids",)),
         "valid": TRAINED,
         "outside": POWER, "clip": CLIP, **SCORE_OPTIONS},
        like("valid"), finite=True, rules=(_spans_rule,),
    ),
    "combine_weights": Call(
        wmtp.combine_weights,
        {"weights": Law(
            lambda w: [w.positive(w.entries()) for _ in range(w.members)], judge=_judge_members,
            related=("valid", "coefficients")),
         "valid": VALID, "mode": choice("mixture", "product", "intersection",
                                        related=("coefficients",)),
         "coefficients": Law(
             lambda w: w.random.choice((None, [1.0] * w.members)), optional=True,
             judge=_judge_coefficients, related=("mode", "weights")),
         **SCORE_OPTIONS},
        like("valid"), finite=True,
    ),
    "shuffled_weights": Call(
        wmtp.shuffled_weights, {**BY_ENTRY, "generator": GENERATOR}, like("valid"),
    ),
    "random_matched_weights": Call(
        wmtp.random_matched_weights, {**BY_ENTRY, "generator": GENERATOR}, like("valid"),
    ),
    "update_statistics": Call(
        wmtp.update_statistics,
        {"statistics": Law(_make_statistics, optional=True, judge=_judge_statistics,
                           related=("scores",)),
         "scores": SCORES, "valid": VALID, "decay": UNIT,
         "group": GROUP},
        lambda a: () if a["scores"].dim() == 2 else (a["scores"].shape[2],),
    ),
    "weighted_mtp_loss": Call(
        wmtp.weighted_mtp_loss, {"logits": LOGITS, "labels": LABELS, **WEIGHTED}, scalar,
        rules=DENSE_RULES,
    ),
    "linear_weighted_mtp_loss": Call(
        wmtp.linear_weighted_mtp_loss, {**LINEAR, **WEIGHTED, "slab_bytes": SLAB}, scalar,
        rules=LINEAR_RULES,
    ),
    "weighted_mtp_loss_and_stats": Call(
        wmtp.weighted_mtp_loss_and_stats, {"logits": LOGITS, "labels": LABELS, **WEIGHTED}, None,
        rules=DENSE_RULES,
    ),
    "linear_weighted_mtp_loss_and_stats": Call(
        wmtp.linear_weighted_mtp_loss_and_stats, {**LINEAR, **WEIGHTED, "slab_bytes": SLAB}, None,
        rules=LINEAR_RULES,
    ),
    "weighted_mean": Call(
        wmtp.weighted_mean,
        {"token_ce": CE, "valid": PREDICTED,
         "weights": tensor(lambda w: w.random.choice((None, w.positive("b s h"))), "float",
                           "b s h", optional=True),
         "head_weights": HEAD_WEIGHTS, "normalizer": NORMALIZER},
        scalar,
    ),
    "lambda_returns": Call(
        wmtp.lambda_returns,
        {"values": VALUES, "rewards": tensor(lambda w: w.normal("b s"), "float", "b s"),
         "valid": TRAINED, "gamma": UNIT, "lam": UNIT, **TD},
        like("values"), rules=(_boundaries_rule,),
    ),
    "value_loss": Call(
        wmtp.value_loss,
        {"values": VALUES, "targets": tensor(lambda w: w.unit("b s"), "float", "b s"),
         "valid": TRAINED, "kind": choice("mse", "huber", "bce"), "delta": WARM, "normalizer": COUNT},
        scalar,
    ),
    "pairwise_ranking_loss": Call(
        wmtp.pairwise_ranking_loss,
        {"chosen_values": tensor(lambda w: w.normal("p c"), "float", "p c"),
         "rejected_values": tensor(lambda w: w.normal("p r"), "float", "p r"),
         "chosen_valid": tensor(lambda w: w.mask("p c"), "bool", "p c"),
         "rejected_valid": tensor(lambda w: w.mask("p r"), "bool", "p r"),
         "pool": choice("last", "mean"),
         "margin": number(lambda w: w.random.choice((0.0, 1, -0.5))), "normalizer": COUNT},
        scalar,
    ),
    "weight_statistics": Call(
        wmtp.weight_statistics, {**BY_ENTRY, "extreme": EXTREME}, scalar,
    ),
    "check_weights": Call(
        wmtp.check_weights, {**BY_ENTRY, "extreme": EXTREME}, None, rules=(_gate,),
    ),
    "MTPHeads": Call(
        _module("MTPHeads"),
        {"dim": WIDTH,
         "heads": number(lambda w: w.sizes["h"], 1, 2**16, whole=True),
         "hidden_dim": number(
             lambda w: w.random.choice((None, 2)), 1, 2**24, whole=True, optional=True),
         "device": DEVICE, "dtype": DTYPE,
         "hidden": Law(_heads_input, ("b s d",), "float", related=("dim",))},
        lambda a: (*a["hidden"].shape[:2], a["heads"], a["hidden"].shape[2]), rules=(_sized_rule,),
    ),
    "ValueHead": Call(
        _module("ValueHead"),
        {"dim": WIDTH,
         "device": DEVICE, "dtype": DTYPE,
         "hidden": Law(_heads_input, ("b s d",), "float", related=("dim",))},
        lambda a: tuple(a["hidden"].shape[:2]), rules=(_sized_rule,),
    ),
    "WeightedMTPLoss": Call(
        _module("WeightedMTPLoss"), {"logits": LOGITS, "labels": LABELS, **WEIGHTED}, scalar,
        rules=DENSE_RULES,
    ),
    "LinearWeightedMTPLoss": Call(
        _module("LinearWeightedMTPLoss"), {**LINEAR, **WEIGHTED, "slab_bytes": SLAB}, scalar,
        rules=LINEAR_RULES,
    ),
}  # fmt: skip
