"""The shape of the package: what it exports, what may import what, and that compiling is harmless."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wmtp
from tests import oracle
from tests.helpers import close, grads, leaf
from tests.strategies import IGNORE, Batch, integers, mask, normal, uniform


PACKAGE = Path(wmtp.__file__).parent

# A module may import those above it and nothing else of the package.
ORDER = [
    "_checks",
    "_dtypes",
    "_typing",
    "_kernels",
    "documents",
    "targets",
    "cross_entropy",
    "problem",
    "products",
    "triton_softmax",
    "slab_softmax",
    "triton_target_rows",
    "target_rows",
    "slab_layout",
    "schedule",
    "slab_columns",
    "slab_rows",
    "operators",
    "linear_cross_entropy",
    "scans",
    "scopes",
    "selection",
    "scores",
    "row_local",
    "normalize",
    "whitening",
    "weights",
    "methods",
    "guesses",
    "combine",
    "controls",
    "denominators",
    "loss",
    "critic",
    "statistics",
    "nn",
]
# Subpackages at the rim: they may use everything above, nothing above may use them.
RIM = ("integrations", "parallel")

# name -> positional arguments | keyword-only arguments
DOCUMENTS = "attention_mask position_ids segment_ids cu_seqlens"
SIGNATURES = {
    "align_to_heads": "per_token offsets | fill",
    "mtp_targets": (f"labels offsets | ignore_index {DOCUMENTS}"),
    "mtp_ce_loss": (
        "logits labels | offsets ignore_index label_smoothing z_loss softcap reduction"
    ),
    "linear_mtp_ce_loss": (
        "hidden unembedding labels | bias offsets ignore_index label_smoothing z_loss softcap "
        "reduction slab_bytes"
    ),
    "token_nll": (f"logits labels | ignore_index {DOCUMENTS} softcap"),
    "linear_token_nll": (
        "hidden unembedding labels | bias ignore_index attention_mask position_ids segment_ids "
        "cu_seqlens softcap slab_bytes"
    ),
    "excess_loss": "token_ce reference_nll | offsets",
    "td_deltas": f"values valid | rewards gamma initial_value {DOCUMENTS}",
    "gae": f"values valid | rewards gamma lam initial_value {DOCUMENTS}",
    "group_advantages": "rewards group_ids | eps correction",
    "target_probability": "logits labels | offsets ignore_index softcap",
    "predictive_entropy": "logits | softcap",
    "el2n": "logits labels | offsets ignore_index softcap",
    "normalize_weights": "weights valid | mode clip min_ess scope group on_zero",
    "softmax_weights": "scores valid | temperature scope group",
    "top_k_weights": "scores valid | keep scope group",
    "exp_weights": "scores valid | beta clip whiten statistics scope group",
    "rho1_weights": "token_ce valid reference_nll | keep mode temperature scope offsets group",
    "critic_delta_weights": (
        "values valid | rewards gamma lam mode beta clip keep temperature whiten statistics "
        f"initial_value {DOCUMENTS} scope group"
    ),
    "dft_weights": "token_ce valid | mode scope group",
    "focal_weights": "token_ce valid | gamma mode scope group",
    "entropy_weights": "entropy valid | power mode scope group",
    "el2n_weights": "el2n valid | power mode scope group",
    "group_relative_weights": "rewards group_ids valid | beta clip group",
    "score_weights": "scores valid | clip min_ess scope group",
    "span_weights": "span_ids span_values valid | outside clip scope group",
    "combine_weights": "weights valid | mode coefficients scope group",
    "shuffled_weights": "weights valid | generator",
    "random_matched_weights": "weights valid | generator",
    "update_statistics": "statistics scores valid | decay group",
    "weighted_mtp_loss": (
        "logits labels weights | offsets head_weights normalizer ignore_index label_smoothing "
        "z_loss softcap"
    ),
    "linear_weighted_mtp_loss": (
        "hidden unembedding labels weights | bias offsets head_weights normalizer ignore_index "
        "label_smoothing z_loss softcap slab_bytes"
    ),
    "weighted_mtp_loss_and_stats": (
        "logits labels weights | offsets head_weights normalizer ignore_index label_smoothing "
        "z_loss softcap"
    ),
    "linear_weighted_mtp_loss_and_stats": (
        "hidden unembedding labels weights | bias offsets head_weights normalizer ignore_index "
        "label_smoothing z_loss softcap slab_bytes"
    ),
    "weighted_mean": "token_ce weights valid | head_weights normalizer",
    "lambda_returns": f"values rewards valid | gamma lam {DOCUMENTS}",
    "value_loss": "values targets valid | kind delta normalizer",
    "pairwise_ranking_loss": (
        "chosen_values rejected_values chosen_valid rejected_valid | pool margin normalizer"
    ),
    "weight_statistics": "weights valid | extreme",
    "check_weights": "weights valid | extreme",
}
TUPLES = ["MTPLossStats", "RowLocalWeights", "WeightStatistics", "WhiteningStatistics"]
MODULES = ["LinearWeightedMTPLoss", "MTPHeads", "ValueHead", "WeightedMTPLoss"]


# -------------------------------------------------------------------------------------- the package


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "wmtp":
                    yield [*name.name.split("."), "__init__"][1]
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level:
                parts = ["wmtp", *parts]
            if parts[0] != "wmtp":
                continue
            if len(parts) > 1 and parts[1]:
                yield parts[1]
            else:
                yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.stem)
def test_dependencies_go_one_way(path: Path) -> None:
    assert path.stem in ORDER, f"say where {path.stem} stands in the order"
    allowed = set(ORDER[: ORDER.index(path.stem)])
    assert set(imports(path)) <= allowed


def test_every_folder_of_the_package_is_known() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders <= set(RIM)


def test_only_one_file_knows_the_type_checker() -> None:
    users = [path.stem for path in sources() if "beartype" in path.read_text()]
    assert users == ["_typing"]


def test_the_public_names() -> None:
    assert len(wmtp.__all__) == len(set(wmtp.__all__))
    public = set(wmtp.__all__) - {"nn", "__version__"}
    assert public == {*SIGNATURES, *TUPLES, *MODULES}
    assert all(hasattr(wmtp, name) for name in wmtp.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures(name: str) -> None:
    parameters = inspect.signature(getattr(wmtp, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert len(positional) + len(keyword) == len(parameters)
    assert f"{' '.join(positional)} | {' '.join(keyword)}" == SIGNATURES[name]


@pytest.mark.parametrize("name", [*SIGNATURES, *MODULES])
def test_public_callables_are_documented(name: str) -> None:
    text = inspect.getdoc(getattr(wmtp, name)) or ""
    assert "Args:" in text
    assert "Raises:" in text
    assert "Example:" in text
    assert ">>>" in text
    assert "Source:" in text
    for parameter in inspect.signature(getattr(wmtp, name)).parameters.values():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            assert parameter.name in text, f"{parameter.name} is not explained"


@pytest.mark.parametrize("name", TUPLES)
def test_public_tuples_are_documented(name: str) -> None:
    kind = getattr(wmtp, name)
    text = inspect.getdoc(kind) or ""
    assert all(field in text for field in kind._fields) or name == "WhiteningStatistics"
    assert len(text) > 40


# ----------------------------------------------------------------------------------------- compiling


def problem() -> Batch:
    labels = integers(0, 6, 2, 5)
    labels[0, 2] = IGNORE
    return Batch(2, 5, 2, 6, 3, None, labels, 1)


def dense(weights: Any, **options: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    case = problem()

    def loss(logits: Tensor, used: Tensor) -> Tensor:
        chosen = weights if callable(weights) else used
        return wmtp.weighted_mtp_loss(logits, case.labels, chosen, **options)

    return loss, [leaf(case.logits()), leaf(uniform(3, 2, 5))]


def linear(weights: Any, **options: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    case = problem()

    def loss(hidden: Tensor, unembedding: Tensor, bias: Tensor, used: Tensor) -> Tensor:
        chosen = weights if callable(weights) else used
        return wmtp.linear_weighted_mtp_loss(
            hidden, unembedding, case.labels, chosen, bias=bias, **options
        )

    tensors = (case.hidden(), case.unembedding(), case.bias(), uniform(3, 2, 5))
    return loss, [leaf(x) for x in tensors]


RHO1 = functools.partial(wmtp.rho1_weights, reference_nll=uniform(4, 2, 5))
EXTRAS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "head_weights": (1.0, 0.3)},
    {"normalizer": 7},
]


# Tracing an autograd function makes dynamo itself create an object that it then warns about.
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager")


@COMPILES
@pytest.mark.parametrize("form", [dense, linear])
@pytest.mark.parametrize("options", EXTRAS, ids=["plain", "everything", "counted"])
@pytest.mark.parametrize("weights", [None, RHO1], ids=["token weights", "rho1"])
def test_the_losses_compile_without_a_break(
    form: Callable[..., Any], options: dict[str, Any], weights: Any
) -> None:
    loss, tensors = form(weights, **options)
    there = [leaf(x) for x in tensors]
    eager, graph = loss(*tensors), compiled(loss)(*there)
    close(graph, eager)
    for a, b in zip(grads(graph, there), grads(eager, tensors), strict=True):
        close(a, b)


@COMPILES
@pytest.mark.parametrize("form", [dense, linear])
@pytest.mark.parametrize("weights", [None, RHO1], ids=["token weights", "rho1"])
def test_the_losses_compile_where_no_gradient_is_wanted(
    form: Callable[..., Any], weights: Any
) -> None:
    loss, tensors = form(weights)
    tensors = [x.detach() for x in tensors]
    close(compiled(loss)(*tensors), loss(*tensors))


@COMPILES
@pytest.mark.parametrize("form", [dense, linear])
def test_another_length_needs_at_most_one_more_graph(form: Callable[..., Any]) -> None:
    frames = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        frames.append(graph)
        return graph.forward

    def loss(x: Tensor, unembedding: Tensor, labels: Tensor) -> Tensor:
        if form is dense:
            return wmtp.weighted_mtp_loss(x, labels)
        return wmtp.linear_weighted_mtp_loss(x, unembedding, labels)

    torch._dynamo.reset()
    graph = torch.compile(loss, fullgraph=True, backend=count)
    unembedding = normal(1, 6, 3)
    for seq in (5, 6, 7, 8, 9):
        x = leaf(normal(seq, 2, seq, 2, 6 if form is dense else 3))
        labels = integers(seq, 6, 2, seq)
        close(graph(x, unembedding, labels), loss(x, unembedding, labels))
    assert len(frames) <= 2


SCORES, VALID = normal(0, 2, 5), mask(1, 0.8, 2, 5)


@pytest.mark.parametrize(
    "build",
    [
        lambda x: wmtp.normalize_weights(x.exp(), VALID, clip=(0.1, 3.0), min_ess=0.5),
        lambda x: wmtp.softmax_weights(x, VALID),
        lambda x: wmtp.top_k_weights(x, VALID),
        lambda x: wmtp.exp_weights(x, VALID),
        lambda x: wmtp.critic_delta_weights(x, VALID, lam=0.9),
        lambda x: wmtp.gae(x, VALID, segment_ids=torch.tensor([[0, 0, 1, 1, 1]] * 2)),
        lambda x: wmtp.lambda_returns(x, x, VALID),
        lambda x: wmtp.value_loss(x, 2 * x, VALID),
        lambda x: torch.stack(list(wmtp.weight_statistics(x.exp(), VALID))),
    ],
    ids=["normalize", "softmax", "top_k", "exp", "critic", "gae", "returns", "value", "statistics"],
)
def test_scores_and_weights_compile_without_a_break(build: Callable[[Tensor], Tensor]) -> None:
    close(compiled(build)(SCORES), build(SCORES))


def test_targets_compile_without_a_break() -> None:
    labels = integers(0, 6, 2, 5)
    segments = torch.tensor([[0, 0, 1, 1, 1]] * 2)
    graph = compiled(lambda x, s: wmtp.mtp_targets(x, 3, segment_ids=s))
    expected = oracle.mtp_targets(labels, 3, segment_ids=segments)
    assert torch.equal(graph(labels, segments), expected)


# ------------------------------------------------------------------------- with the type checks off


def digest() -> list[list[float]]:
    """One number or row of everything."""
    labels, valid = integers(0, 6, 2, 7), mask(1, 0.8, 2, 7)
    logits, hidden, unembedding = normal(2, 2, 7, 3, 6), normal(3, 2, 7, 3, 4), normal(4, 6, 4)
    weights, scores = uniform(5, 2, 7), normal(6, 2, 7)
    results = [
        wmtp.mtp_targets(labels, 3).double(),
        wmtp.mtp_ce_loss(logits, labels, z_loss=0.1),
        wmtp.linear_mtp_ce_loss(hidden, unembedding, labels, softcap=2.0, reduction="none"),
        wmtp.weighted_mtp_loss(logits, labels, weights),
        wmtp.linear_weighted_mtp_loss(hidden, unembedding, labels, weights),
        wmtp.exp_weights(scores, valid),
        wmtp.top_k_weights(scores, valid),
        wmtp.critic_delta_weights(scores, valid),
        wmtp.lambda_returns(scores, scores, valid),
        wmtp.value_loss(scores, weights, valid),
        torch.stack(list(wmtp.weight_statistics(weights, valid))),
    ]
    return [result.flatten().tolist() for result in results]


def refusals() -> list[str]:
    """What calls with shapes that do not fit end in."""
    zeros, ones = torch.zeros, torch.ones
    calls: list[Callable[[], object]] = [
        lambda: wmtp.mtp_ce_loss(zeros(1, 3, 2, 4), zeros(1, 2).long()),
        lambda: wmtp.weighted_mtp_loss(zeros(1, 3, 2, 4), zeros(1, 3).long(), ones(1, 4)),
        lambda: wmtp.linear_mtp_ce_loss(zeros(1, 3, 2, 4), zeros(5, 3), zeros(1, 3).long()),
        lambda: wmtp.normalize_weights(ones(2, 3), ones(1, 3).bool()),
        lambda: wmtp.top_k_weights(ones(2, 3), ones(2, 1).bool()),
        lambda: wmtp.td_deltas(ones(2, 3), ones(2, 1).bool()),
        lambda: wmtp.excess_loss(ones(2, 3, 2), ones(1, 3)),
        lambda: wmtp.value_loss(ones(2, 3), ones(2, 1), ones(2, 3).bool()),
        lambda: wmtp.lambda_returns(ones(2, 3), ones(2, 1), ones(2, 3).bool()),
        lambda: wmtp.weight_statistics(ones(2, 3), ones(2, 1).bool()),
        lambda: wmtp.weighted_mean(ones(2, 3, 1), None, ones(2, 1, 1).bool()),
        lambda: wmtp.group_advantages(ones(3), zeros(1).long()),
    ]
    ends = []
    for call in calls:
        try:
            ends.append(f"accepted: {call()}")
        except ValueError:
            ends.append("ValueError")
    return ends


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
    )
    return done.stdout


@pytest.fixture(scope="module")
def unchecked() -> dict[str, Any]:
    code = """
import json
import sys
import wmtp
loaded = [name for name in sys.modules if name.startswith("wmtp.")]
from tests.test_architecture import digest, refusals
print(json.dumps({"loaded": loaded, "digest": digest(), "refusals": refusals()}))
"""
    return json.loads(run_python(code, JAXTYPING_DISABLE="1"))


def test_importing_the_package_does_not_import_the_rim(unchecked: dict[str, Any]) -> None:
    assert "wmtp.loss" in unchecked["loaded"]
    assert not {f"wmtp.{name}" for name in RIM} & set(unchecked["loaded"])


def test_the_values_do_not_depend_on_the_type_checks(unchecked: dict[str, Any]) -> None:
    assert unchecked["digest"] == digest()


def test_shapes_are_checked_with_the_type_checks_off(unchecked: dict[str, Any]) -> None:
    assert set(unchecked["refusals"]) == {"ValueError"}
