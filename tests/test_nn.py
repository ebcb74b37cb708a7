"""Thin modules: they store arguments and call the functions."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import all_zero, close, grads, leaf
from tests.strategies import SEEDS, Batch, batches, integers, normal
from wmtp import (
    LinearWeightedMTPLoss,
    MTPHeads,
    ValueHead,
    WeightedMTPLoss,
    linear_weighted_mtp_loss,
    weighted_mtp_loss,
)


OPTIONS: dict[str, Any] = {
    "offsets": (2, 3),
    "head_weights": (1.0, 0.3),
    "normalizer": "tokens",
    "ignore_index": 1,
    "label_smoothing": 0.1,
    "z_loss": 0.2,
    "softcap": 3.0,
}


@given(SEEDS, st.integers(0, 3), st.integers(0, 5), st.integers(1, 4))
def test_every_head_starts_as_the_trunk(seed: int, batch: int, seq: int, heads: int) -> None:
    hidden = normal(seed, batch, seq, 6).float()
    out = MTPHeads(6, heads)(hidden)
    assert out.shape == (batch, seq, heads, 6)
    assert torch.equal(out, hidden[:, :, None].expand(batch, seq, heads, 6))


def trained_heads(heads: int = 3) -> MTPHeads:
    module = MTPHeads(6, heads, hidden_dim=4)
    with torch.no_grad():
        for n, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(n, *parameter.shape))
    return module


def test_head_zero_is_the_trunk_itself_after_training_too() -> None:
    hidden = normal(0, 2, 5, 6).float()
    out = trained_heads()(hidden)
    assert torch.equal(out[:, :, 0], hidden)
    assert not torch.equal(out[:, :, 1], out[:, :, 2])
    assert not torch.equal(out[:, :, 1], hidden)


def test_heads_look_at_one_position_at_a_time() -> None:
    module, hidden = trained_heads(), leaf(normal(0, 1, 4, 6).float())
    (gradient,) = grads(module(hidden)[0, 2].sum(), [hidden])
    assert all_zero(gradient[0, [0, 1, 3]])
    assert not all_zero(gradient[0, 2])


def test_the_new_heads_learn_from_the_first_step() -> None:
    module, hidden = MTPHeads(6, 3), normal(0, 1, 4, 6).float()
    module(hidden).square().sum().backward()
    moved = [bool((p.grad != 0).any()) for p in module.parameters() if p.grad is not None]
    assert any(moved)
    assert len(list(MTPHeads(6, 1).parameters())) <= len(list(module.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_are_made_with_the_dtype_asked_for(dtype: torch.dtype) -> None:
    module = MTPHeads(6, 2, dtype=dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module(normal(0, 1, 3, 6).to(dtype)).dtype == dtype


def test_modules_can_be_made_on_the_meta_device() -> None:
    for module in (MTPHeads(6, 2, device="meta"), ValueHead(6, device="meta")):
        assert all(p.is_meta for p in module.parameters())


def test_a_value_head_starts_at_zero_and_is_linear() -> None:
    head, hidden = ValueHead(6), normal(0, 2, 5, 6).float()
    assert all_zero(head(hidden))
    assert head(hidden).shape == (2, 5)
    with torch.no_grad():
        for n, parameter in enumerate(head.parameters()):
            parameter.copy_(normal(n, *parameter.shape))
    zero = head(torch.zeros_like(hidden))
    close(head(3 * hidden) - zero, 3 * (head(hidden) - zero), torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
def test_values_are_float32_whatever_the_trunk_is(autocast: bool) -> None:
    head = ValueHead(4)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(1.0)
    hidden = torch.tensor([[[1.0, 0.00390625, 0.0, 0.0]]]).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        values = head(hidden)
    assert values.dtype == torch.float32
    # In bfloat16 the small part would vanish beside the large one.
    bias = float(len(list(head.parameters())) - 1)
    assert values.item() == 1.00390625 + bias


def test_a_value_head_passes_gradients_to_the_trunk_and_itself() -> None:
    head, hidden = ValueHead(4), leaf(normal(0, 1, 3, 4).float())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(0.5)
    found = grads(head(hidden).sum(), [hidden, *head.parameters()])
    assert all(not all_zero(g) for g in found)


@given(batches(label_dims=(2,), default_offsets=True), st.sampled_from(["token", "none"]))
def test_the_loss_module_calls_the_function(case: Batch, kind: str) -> None:
    logits, weights = case.logits(), case.weights(kind)
    expected = weighted_mtp_loss(logits, case.labels, weights, **case.options)
    assert torch.equal(WeightedMTPLoss(**case.options)(logits, case.labels, weights), expected)


@given(batches(label_dims=(2,), default_offsets=True), st.sampled_from(["token", "none"]))
def test_the_linear_loss_module_calls_the_function(case: Batch, kind: str) -> None:
    hidden, unembedding, bias = case.hidden(), case.unembedding(), case.bias()
    weights = case.weights(kind)
    module = LinearWeightedMTPLoss(slab_bytes=1000, **case.options)
    for given_bias in (None, bias):
        expected = linear_weighted_mtp_loss(
            hidden, unembedding, case.labels, weights, bias=given_bias, **case.options
        )
        close(module(hidden, unembedding, case.labels, weights, bias=given_bias), expected)


def test_every_option_reaches_the_function() -> None:
    labels, weights = integers(0, 5, 2, 6), 0.1 + normal(1, 2, 6).abs()
    logits, hidden, unembedding = normal(2, 2, 6, 2, 5), normal(3, 2, 6, 2, 3), normal(4, 5, 3)
    dense, linear = WeightedMTPLoss(**OPTIONS), LinearWeightedMTPLoss(**OPTIONS)
    close(dense(logits, labels, weights), weighted_mtp_loss(logits, labels, weights, **OPTIONS))
    close(
        linear(hidden, unembedding, labels, weights),
        linear_weighted_mtp_loss(hidden, unembedding, labels, weights, **OPTIONS),
    )
    for name in OPTIONS:
        fewer = {key: value for key, value in OPTIONS.items() if key != name}
        changed = WeightedMTPLoss(**fewer)(logits, labels, weights)
        assert not torch.equal(changed, dense(logits, labels, weights)), name


MODULES = [
    MTPHeads(4, 2),
    ValueHead(4),
    WeightedMTPLoss(**OPTIONS),
    LinearWeightedMTPLoss(**OPTIONS),
]
EACH = pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)


def call(module: torch.nn.Module) -> Tensor:
    labels = integers(0, 5, 2, 6)
    if isinstance(module, LinearWeightedMTPLoss):
        return module(normal(3, 2, 6, 2, 3), normal(4, 5, 3), labels)
    if isinstance(module, WeightedMTPLoss):
        return module(normal(2, 2, 6, 2, 5), labels)
    return module(normal(5, 2, 6, 4).float())


@EACH
def test_modules_survive_copies_and_pickles(module: torch.nn.Module) -> None:
    expected = call(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(call(twin), expected)


@EACH
def test_state_goes_through_a_checkpoint(module: torch.nn.Module) -> None:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(module)
    missing = twin.load_state_dict(torch.load(file, weights_only=True))
    assert not missing.missing_keys
    assert not missing.unexpected_keys


@EACH
def test_modules_show_what_they_hold(module: torch.nn.Module) -> None:
    assert type(module).__name__ in repr(module)
    assert len(repr(module)) > len(type(module).__name__) + 2


@pytest.mark.parametrize("loss", [WeightedMTPLoss, LinearWeightedMTPLoss])
def test_a_loss_module_has_no_state(loss: type[torch.nn.Module]) -> None:
    assert not loss(**OPTIONS).state_dict()


@pytest.mark.parametrize("loss", [WeightedMTPLoss, LinearWeightedMTPLoss])
def test_tensors_among_the_options_move_with_the_module(
    loss: type[WeightedMTPLoss] | type[LinearWeightedMTPLoss],
) -> None:
    lambdas = torch.tensor([1.0, 0.25])
    module = loss(head_weights=lambdas, normalizer=torch.tensor(7.0))
    assert torch.equal(call(module), call(loss(head_weights=(1.0, 0.25), normalizer=7.0)))
    assert not module.state_dict()
    assert "0.25" in repr(module)
    module.half()  # in which some counts are infinite
    assert torch.equal(module.options["head_weights"], lambdas)
    assert module.options["normalizer"].dtype == torch.float32
    given = [module.to("meta").options[name] for name in ("head_weights", "normalizer")]
    assert [x.device.type for x in given] == ["meta", "meta"]
    assert lambdas.device.type == "cpu"
    module.options["normalizer"] = "tokens"
    assert "tokens" in repr(module)


def test_one_head_is_the_trunk_and_has_no_parameters() -> None:
    module, hidden = MTPHeads(4, 1), normal(0, 2, 5, 4).float()
    module.reset_parameters()
    assert not list(module.parameters())
    out = module(hidden)
    assert torch.equal(out, hidden[:, :, None])
    out.zero_()
    assert hidden.any()


@pytest.mark.parametrize("loss", [WeightedMTPLoss, LinearWeightedMTPLoss])
@pytest.mark.parametrize(
    ("name", "value"),
    [("label_smoothing", 2.0), ("softcap", 0.0), ("z_loss", -1.0), ("offsets", 0)],
)
def test_bad_options_are_refused_when_they_are_stored(
    loss: type[torch.nn.Module], name: str, value: float
) -> None:
    with pytest.raises(ValueError, match=name):
        loss(**{name: value})


def test_modules_refuse_what_does_not_fit() -> None:
    for bad in ({"dim": 0, "heads": 2}, {"dim": 4, "heads": 0}):
        with pytest.raises(ValueError, match=r"dim|heads"):
            MTPHeads(**bad)
    with pytest.raises(ValueError, match="hidden_dim"):
        MTPHeads(4, 2, hidden_dim=0)
    with pytest.raises(ValueError, match="dim"):
        ValueHead(0)
    for module in (MTPHeads(4, 2), ValueHead(4)):
        with pytest.raises((TypeError, ValueError), match="hidden"):
            module(torch.zeros(1, 3, 5))
        with pytest.raises((TypeError, ValueError), match="hidden"):
            module(torch.zeros(3, 4))
    with pytest.raises(TypeError):
        WeightedMTPLoss(temperature=1.0)  # type: ignore[call-arg]


def test_heads_run_on_the_meta_device() -> None:
    assert MTPHeads(4, 2, device="meta")(torch.ones(1, 2, 4, device="meta")).shape == (1, 2, 2, 4)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_hidden_states_of_another_dtype_need_autocast() -> None:
    heads, hidden = MTPHeads(4, 2, dtype=torch.bfloat16), torch.ones(1, 2, 4)
    with pytest.raises(ValueError, match="hidden"):
        heads(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert heads(hidden).shape == (1, 2, 2, 4)
        with pytest.raises(ValueError, match="hidden"):
            heads(hidden.double())
