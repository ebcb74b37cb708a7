"""The Triton kernels against float64 formulas; interpreted on the CPU where there is no GPU."""

import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import OnGpu, addmm_of_a_gpu
from tests.loss_forms import held_logits
from tests.strategies import integers, normal, uniform


HAS_CUDA = torch.cuda.is_available()
DEVICES = ["cuda"] if HAS_CUDA else ["cpu"]

if not sys.platform.startswith("linux"):
    pytest.skip("Triton is published for Linux only", allow_module_level=True)
triton = importlib.import_module("triton")
tl = importlib.import_module("triton.language")
kernels = importlib.import_module("wmtp.triton_softmax")
target_kernels = importlib.import_module("wmtp.triton_target_rows")
wmtp = importlib.import_module("wmtp")
slab_softmax = importlib.import_module("wmtp.slab_softmax")
problem, slab_columns, slab_rows = (
    importlib.import_module(f"wmtp.{name}") for name in ("problem", "slab_columns", "slab_rows")
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTINGS = ["none", "dft", "focal", "entropy", "el2n"]
# Sizes around the block, which the tests make 16 columns long.
BLOCK = 16
SIZES = [1, 15, 16, 17, 50]
# One rounding of the slab's dtype. The interpreter cuts bfloat16 off instead of rounding it.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
SUBNORMAL = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2.0**-24}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "_LARGEST_BLOCK", BLOCK)
    # −inf is what these tests are about; NumPy, which the interpreter runs on, would warn of it.
    with np.errstate(all="raise", under="ignore"):
        yield


# ------------------------------------------------------------------------------------- the formulas


class Options(NamedTuple):
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


PLAIN = Options()
OPTIONS = [
    PLAIN,
    Options(smoothing=0.1),
    Options(z_loss=0.01),
    Options(softcap=5.0),
    Options(0.2, 0.03, 7.0),
]


def capped(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    z = logits.double()
    if not softcap:
        return z, torch.ones_like(z)
    return softcap * torch.tanh(z / softcap), torch.cosh((z / softcap).clamp(-300, 300)) ** -2


class Truth(NamedTuple):
    loss: Tensor
    ce: Tensor
    lse: Tensor
    correct: Tensor
    weight: Tensor
    at_target: Tensor
    gradient: Tensor
    # The largest term of the gradient: what its error is measured by.
    terms: Tensor


def truth(
    logits: Tensor,
    wanted: Tensor,
    options: Options,
    weighting: str = "none",
    power: float = 1.0,
) -> Truth:
    rows, vocab = logits.shape
    eps, z_loss, softcap = options
    z, slope = capped(logits, softcap)
    row = torch.arange(rows, device=logits.device)
    lse = z.logsumexp(1)
    chosen = z[row, wanted]
    p = (z - lse[:, None]).exp()
    others = p.clone()
    others[row, wanted] = 0
    missing = others.sum(1)  # 1 − p_y
    ce = lse - chosen
    loss = (1 - eps) * ce + z_loss * lse.square()
    if eps:
        loss = loss + eps * (lse - z.mean(1))
    if weighting == "none":
        base = torch.ones_like(lse)
    elif weighting == "dft":
        base = p[row, wanted]
    elif weighting == "focal":
        base = missing
    elif weighting == "entropy":
        base = (lse - torch.where(p > 0, p * z, 0.0).sum(1)).clamp(min=0)
    else:
        base = (others.square().sum(1) + missing.square()).sqrt()
    weight = base**power
    pull = (1 + 2 * z_loss * lse)[:, None]
    at_target = 2 * z_loss * lse * p[row, wanted] - missing + eps * (1 - 1 / vocab)
    at_target = at_target * slope[row, wanted]
    gradient = (pull * p - eps / vocab) * slope
    gradient[row, wanted] = 0
    terms = ((pull * p).abs() + eps / vocab) * slope
    first = (z == z.amax(1, keepdim=True)).double().argmax(1)
    return Truth(loss, ce, lse, first == wanted, weight, at_target, gradient, terms)


def near(actual: Tensor, expected: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def check_slab(slab: Tensor, gradient: Tensor, terms: Tensor, options: Options) -> None:
    # A soft-capped logit is known to some 1e-7 of the cap, and is exponentiated.
    tolerance = 2e-5 + 4e-7 * options.softcap
    size = ROUNDING[slab.dtype] * gradient.abs() + tolerance * terms
    error = (slab.double() - gradient).abs()
    assert bool((error <= size + SUBNORMAL[slab.dtype]).all()), (error - size).max()


def numbers(
    seed: int, rows: int, cols: int, dtype: torch.dtype, device: str, stride: int | None = None
) -> Tensor:
    """A slab of logits, with rows further apart than they are long if a stride is given."""
    stride = cols if stride is None else stride
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((max(rows, 1), stride), math.nan, dtype=dtype, device=device)
    slab = whole.as_strided((rows, cols), (stride, 1))
    slab.copy_(3 * torch.randn(rows, cols, generator=generator))
    return slab


def targets(seed: int, rows: int, low: int, high: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(low, high, (rows,), generator=generator).to(device)


def factors(seed: int, rows: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 2)
    return torch.randn(rows, generator=generator).to(device)


def check_rows(
    slab: Tensor,
    wanted: Tensor,
    options: Options = PLAIN,
    weighting: str = "none",
    power: float = 1.0,
    with_correct: bool = True,
) -> Truth:
    right = truth(slab, wanted, options, weighting, power)
    eps, z_loss, softcap = options
    loss, ce, base, log_sum, correct, weight, at_target = kernels.gradient_over_rows(
        slab, wanted, eps, z_loss, softcap, weighting, power, with_correct
    )
    near(base + log_sum, right.lse)
    near(log_sum, right.lse - base.double(), atol=1e-6 + 4e-7 * softcap)
    near(ce, right.ce)
    near(loss, right.loss)
    # A power multiplies the relative error, and a soft-capped logit is known to 1e-7 of the cap.
    relative = (1e-5 + 4e-7 * softcap) * max(1.0, power)
    entropy = weighting == "entropy" and power > 0
    # An entropy is known to 2e-6, of which a power is taken.
    near(weight, right.weight, rtol=relative, atol=2e-6 ** min(1.0, power) if entropy else 0)
    assert correct.dtype == torch.bool
    assert torch.equal(correct, right.correct & with_correct)
    peak = right.at_target.abs().max().item() if len(wanted) else 0.0
    # Terms that may cancel, as in the formula.
    mixed = eps or z_loss or weighting == "entropy"
    absolute = 3e-6 * max(1.0, peak) if mixed else 1e-37
    near(at_target, right.at_target, rtol=2 * relative, atol=absolute)
    check_slab(slab, right.gradient, right.terms, options)
    row = torch.arange(len(wanted), device=slab.device)
    assert bool((slab[row, wanted] == 0).all())
    return right


def check_columns(
    slab: Tensor, wanted: Tensor, lse: Tensor, factor: Tensor, options: Options, vocab: int
) -> None:
    """The formula with the given log-sum-exp, which is what the float32 of it says."""
    eps, z_loss, softcap = options
    z, slope = capped(slab, softcap)
    here = (wanted >= 0) & (wanted < slab.shape[1])
    row, column = here.nonzero().squeeze(1), wanted[here]
    short = torch.expm1(z[row, column] - lse.double()[row])
    push = 2 * z_loss * lse.double()
    entry = push[row] * (1 + short) + short + eps * (1 - 1 / vocab)
    right = torch.zeros_like(push)
    right[row] = entry * slope[row, column] * factor.double()[row]
    scale = factor.double()[:, None]
    p = (z - lse.double()[:, None]).exp()
    pull = (1 + push)[:, None]
    gradient = (pull * p - eps / vocab) * slope * scale
    gradient[row, column] = 0
    terms = ((pull * p).abs() + eps / vocab) * slope * scale.abs()
    # Kept in two numbers whose sum it is.
    base = (lse.double() - 0.7).float()
    log_sum = (lse.double() - base.double()).float()
    found = kernels.gradient_over_columns(
        slab, wanted, base, log_sum, factor, eps, z_loss, softcap, vocab
    )
    # The difference of two capped logits of the cap's size is known no better than they are.
    slack = 4e-7 * (softcap + (10.0 if softcap else 0.0))
    near(found, right, rtol=1e-5, atol=(3e-6 + slack) if eps or z_loss or softcap else 2e-7)
    assert bool((found[~here] == 0).all())
    assert bool((slab[row, column] == 0).all())
    check_slab(slab, gradient, terms, options)


# --------------------------------------------------------------------------------------- whole rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_of_every_size(device: str, dtype: torch.dtype, options: Options) -> None:
    for seed, cols in enumerate(SIZES):
        slab = numbers(seed, 3, cols, dtype, device)
        wanted = targets(seed, 3, 0, cols, device)
        check_rows(slab, wanted, options)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("options", [PLAIN, OPTIONS[-1]], ids=str)
def test_every_weighting(device: str, weighting: str, options: Options) -> None:
    for seed, (power, cols) in enumerate(itertools.product((1.0, 2.0, 0.5, 0.0), (1, 37))):
        slab = numbers(seed, 2, cols, torch.float32, device)
        wanted = targets(seed, 2, 0, cols, device)
        check_rows(slab, wanted, options, weighting, power)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_block_as_long_as_the_gpu_takes_it(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_LARGEST_BLOCK", 4096)
    for cols in (4096, 10_001):
        slab = numbers(cols, 2, cols, dtype, device)
        wanted = targets(cols, 2, 0, cols, device)
        check_rows(slab, wanted, OPTIONS[-1], "entropy", 2.0)


@given(data=st.data())
def test_any_rows(data: st.DataObject) -> None:
    device = DEVICES[0]
    rows, cols = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40))
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 2**20))
    options = data.draw(st.sampled_from(OPTIONS))
    slab = numbers(seed, rows, cols, dtype, device, cols + data.draw(st.integers(0, 5)))
    if data.draw(st.booleans()):  # few different values: ties
        slab.copy_(slab.round().clamp(-1, 1))
    wanted = targets(seed, rows, 0, cols, device)
    weighting = data.draw(st.sampled_from(WEIGHTINGS))
    power = data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    check_rows(slab, wanted, options, weighting, power, data.draw(st.booleans()))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_masked_vocabulary(device: str, weighting: str) -> None:
    slab = numbers(5, 4, 50, torch.float32, device)
    hidden = torch.zeros(4, 50, dtype=torch.bool, device=device)
    hidden[:, :20] = True  # more than the first block
    hidden[1] = False
    hidden[2] = True  # one logit is left
    wanted = torch.tensor([30, 3, 49, 5], device=device)  # the last row's target is masked
    hidden[2, 49] = False
    slab[hidden] = -math.inf
    right = check_rows(slab, wanted, PLAIN, weighting)
    assert bool((slab[hidden] == 0).all())
    assert bool(right.lse.isfinite().all())
    assert right.ce.isinf().tolist() == [False, False, False, True]


def test_a_masked_vocabulary_under_a_softcap_has_no_slope(device: str) -> None:
    slab = numbers(6, 2, 20, torch.float32, device)
    slab[:, 3:9] = -math.inf
    wanted = torch.tensor([12, 3], device=device)
    loss, *_, at_target = kernels.gradient_over_rows(
        slab, wanted, 0.1, 0.1, 2.0, "none", 1.0, False
    )
    assert bool(loss.isfinite().all())
    assert bool((slab[:, 3:9] == 0).all())
    assert float(at_target[1]) == 0


@pytest.mark.parametrize("options", [PLAIN, Options(smoothing=0.1), Options(softcap=30.0)], ids=str)
def test_large_logits(device: str, options: Options) -> None:
    for seed, level in enumerate((1e4, -1e4)):
        slab = numbers(seed, 3, 40, torch.float32, device) + level
        wanted = targets(seed, 3, 0, 40, device)
        right = truth(slab, wanted, options)
        found = kernels.gradient_over_rows(slab, wanted, *options, "none", 1.0, False)
        near(found[3], right.lse - found[2].double())
        near(found[1], right.ce)  # not as far off as the log-sum-exp's last place is
        near(found[0], right.loss)
        near(found[6], right.at_target, atol=1e-6)
        check_slab(slab, right.gradient, right.terms, options)


def test_logits_far_apart(device: str) -> None:
    slab = torch.zeros(3, 40, device=device)
    slab[0, 7], slab[1, 33], slab[2, 0] = 1e4, 1e4, -1e4
    wanted = torch.tensor([7, 2, 0], device=device)
    for weighting in WEIGHTINGS:
        check_rows(slab.clone(), wanted, PLAIN, weighting)


def test_all_logits_equal_and_other_ties(device: str) -> None:
    slab = torch.zeros(5, 40, device=device)
    slab[3, 5] = slab[3, 30] = slab[4, 5] = slab[4, 30] = 2
    wanted = torch.tensor([0, 39, 17, 5, 30], device=device)
    for softcap in (0.0, 1.0):
        right = check_rows(slab.clone(), wanted, Options(0, 0, softcap))
        assert right.correct.tolist() == [True, False, False, True, False]
    slab[0, 1] = 1e4  # a softcap makes a tie of what it bounds
    slab[0, 0] = 9e3
    right = check_rows(slab[:1].clone(), wanted[:1], Options(0, 0, 1.0))
    assert right.correct.tolist() == [True]


@pytest.mark.parametrize("weighting", ["none", "focal", "el2n"])
def test_what_is_missing_of_a_sure_target_does_not_cancel(device: str, weighting: str) -> None:
    slab = torch.zeros(4, 100, device=device)
    wanted = torch.tensor([0, 40, 99, 50], device=device)
    slab[torch.arange(4), wanted] = torch.tensor([10.0, 20.0, 30.0, 25.0], device=device)
    slab[3, 7] = 3.0
    right = truth(slab, wanted, PLAIN, weighting)
    *_, weight, at_target = kernels.gradient_over_rows(
        slab, wanted, 0.0, 0.0, 0.0, weighting, 1.0, False
    )
    assert float(right.at_target.abs().min()) < 1e-10
    near(weight, right.weight, rtol=3e-6, atol=0)
    near(at_target, right.at_target, rtol=5e-6, atol=0)


def test_nan_stays_nan_and_stays_in_its_row(device: str) -> None:
    for weighting in WEIGHTINGS:
        slab = numbers(1, 3, 40, torch.float32, device)
        slab[1, 20] = math.nan
        wanted = torch.tensor([3, 3, 3], device=device)
        with np.errstate(all="ignore"):
            found = kernels.gradient_over_rows(slab, wanted, 0, 0, 0, weighting, 1.0, True)
        for i in (0, 1, 3, 6):
            assert found[i].isnan().tolist() == [False, True, False]
        assert int(slab[1].isnan().sum()) == 39
        assert not bool(slab[[0, 2]].isnan().any())
        assert not bool(found[4][1])


def test_an_unknown_weighting_is_refused(device: str) -> None:
    slab, one = torch.zeros(1, 2, device=device), torch.ones(1, device=device).long()
    with pytest.raises(ValueError, match="weighting must be one of"):
        kernels.gradient_over_rows(slab, one, 0.0, 0.0, 0.0, "dtf", 1.0, False)


# ----------------------------------------------------------------------------------- some columns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("asked", [(False, False), (True, False), (False, True), (True, True)])
def test_what_a_slab_contributes(
    device: str, dtype: torch.dtype, softcap: float, asked: tuple[bool, bool]
) -> None:
    for seed, cols in enumerate(SIZES):
        slab = numbers(seed, 4, cols, dtype, device, cols + 3)
        wanted = torch.tensor([-1, 0, cols - 1, cols], device=device)
        before = slab.clone()
        base, log_sum, chosen, best, best_at, total = kernels.reduce_columns(
            slab, wanted, softcap, *asked
        )
        assert torch.equal(slab, before)
        z, _ = capped(slab, softcap)
        near(log_sum, (z - base.double()[:, None]).logsumexp(1))
        near(base, z.amax(1), rtol=1e-6)
        expected = torch.stack([0 * z[0, 0], z[1, 0], z[2, cols - 1], 0 * z[0, 0]])
        near(chosen, expected, rtol=1e-6, atol=0)
        assert best_at.dtype == torch.int64
        if asked[0]:
            near(best, z.amax(1), rtol=1e-6, atol=0)
            row = torch.arange(4, device=device)
            near(z[row, best_at].float(), z.amax(1), rtol=1e-6, atol=0)
        else:
            assert best.numel() == best_at.numel() == 0
        if asked[1]:
            near(total, z.sum(1), atol=1e-5)
        else:
            assert total.numel() == 0


def test_the_first_of_equally_good_columns(device: str) -> None:
    slab = torch.zeros(4, 40, device=device)
    slab[1, 39] = slab[1, 38] = slab[2, 17] = slab[2, 16] = slab[2, 3 + 30] = 5
    slab[3] = -math.inf
    wanted = torch.zeros(4, dtype=torch.int64, device=device)
    base, log_sum, chosen, best, best_at, _ = kernels.reduce_columns(slab, wanted, 0.0, True, True)
    assert best_at.tolist() == [0, 38, 16, 0]
    assert best.tolist() == [0, 5, 5, -math.inf]
    assert (float(base[3]), float(log_sum[3])) == (0, -math.inf)
    assert chosen.tolist() == [0, 0, 0, -math.inf]


def test_far_and_large_logits_of_a_slab(device: str) -> None:
    slab = numbers(3, 4, 40, torch.float32, device)
    slab[0] += 1e4
    slab[1, :35] = -math.inf
    slab[2] = torch.linspace(-1e4, 1e4, 40, device=device)
    slab[3] = torch.finfo(torch.bfloat16).min  # a usual mask
    wanted = torch.zeros(4, dtype=torch.int64, device=device)
    base, log_sum, chosen, best, best_at, _ = kernels.reduce_columns(slab, wanted, 0.0, True, False)
    near(log_sum, (slab.double() - base.double()[:, None]).logsumexp(1), rtol=1e-6)
    assert torch.equal(best, slab.amax(1))
    assert torch.equal(best_at, slab.argmax(1))
    assert torch.equal(chosen, slab[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_over_some_columns(device: str, dtype: torch.dtype, options: Options) -> None:
    for seed, cols in enumerate(SIZES):
        vocab, first = cols + 9, 4
        whole = numbers(seed, 6, vocab, dtype, device)
        lse = capped(whole, options.softcap)[0].logsumexp(1).float()
        wanted = torch.tensor([-first, -1, 0, cols - 1, cols, 2**40], device=device)
        slab = whole[:, first : first + cols]
        before = whole.clone()
        check_columns(slab, wanted, lse, factors(seed, 6, device), options, vocab)
        assert torch.equal(whole[:, :first], before[:, :first])
        assert torch.equal(whole[:, first + cols :], before[:, first + cols :])


def test_masked_and_large_logits_over_some_columns(device: str) -> None:
    slab = numbers(4, 3, 40, torch.float32, device)
    slab[0] += 1e4
    slab[1, 3:37] = slab[2, 3:37] = -math.inf
    masked = slab == -math.inf
    lse = slab.double().logsumexp(1).float()
    wanted = torch.tensor([5, 1, 20], device=device)
    check_columns(slab, wanted, lse, torch.ones(3, device=device), PLAIN, 40)
    assert bool((slab[masked] == 0).all())


def test_over_columns_a_sure_target_does_not_cancel(device: str) -> None:
    slab = torch.zeros(4, 100, device=device)
    wanted = torch.tensor([0, 40, 99, 7], device=device)
    slab[torch.arange(4), wanted] = torch.tensor([4.0, 8.0, 12.0, 0.5], device=device)
    lse = slab.double().logsumexp(1).float()
    right = torch.expm1(slab[torch.arange(4), wanted].double() - lse.double())
    one = torch.ones(4, device=device)
    found = kernels.gradient_over_columns(slab, wanted, lse, 0 * lse, one, 0.0, 0.0, 0.0, 100)
    near(found, right, rtol=2e-6, atol=0)


def test_slabs_of_columns_say_what_whole_rows_say(device: str) -> None:
    options, cols = OPTIONS[-1], 37
    logits = numbers(8, 3, cols, torch.float32, device)
    wanted, factor = targets(8, 3, 0, cols, device), factors(8, 3, device)
    rows = logits.clone()
    _, ce, base, log_sum, correct, _, at_target = kernels.gradient_over_rows(
        rows, wanted, *options, "none", 1.0, True
    )
    parts = [(0, 20), (20, 37)]
    found = [
        kernels.reduce_columns(logits[:, a:b], wanted - a, options.softcap, True, True)
        for a, b in parts
    ]
    lse = base + log_sum
    near(torch.stack([x[0] + x[1] for x in found]).logsumexp(0), lse, rtol=1e-6)
    near(lse - found[0][2] - found[1][2], ce)
    best_at = torch.where(found[0][3] >= found[1][3], found[0][4], found[1][4] + 20)
    assert torch.equal(best_at == wanted, correct)
    entries = [
        kernels.gradient_over_columns(
            logits[:, a:b], wanted - a, base, log_sum, factor, *options, cols
        )
        for a, b in parts
    ]
    near(entries[0] + entries[1], factor * at_target)
    near(logits, factor[:, None] * rows, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_made_of_the_logits_of_others(device: str, dtype: torch.dtype) -> None:
    cols, source = 37, torch.tensor([0, 4, 2, 6], device=device)
    slab = numbers(1, 7, cols, dtype, device, 50)
    wanted, factor = targets(1, 4, -9, cols, device), factors(1, 4, device)
    base = slab.float().amax(1)[source]
    log_sum = slab.double().logsumexp(1).float()[source] - base
    left, alone = slab.clone(), slab[source].clone()
    options = 0.1, 0.01, 5.0, 2 * cols
    right = kernels.gradient_over_columns(alone, wanted, base, log_sum, factor, *options)
    found = kernels.gradient_over_columns(slab, wanted, base, log_sum, factor, *options, source)
    assert torch.equal(found, right)
    assert torch.equal(slab[:4], alone)
    assert torch.equal(slab[4:], left[4:])


def test_of_a_target_that_does_not_exist_nothing_is_read(device: str) -> None:
    whole = numbers(0, 3, 16, torch.float32, device)
    for stray in (8, -1, 2**32, -(2**40)):
        slab = whole.clone()[1:2, :8]
        loss, ce, *_ = kernels.gradient_over_rows(
            slab, torch.tensor([stray], device=device), *PLAIN, "none", 1.0, True
        )
        assert bool(loss.isnan().all())
        assert bool(ce.isnan().all())


# ----------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_launch_nothing(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_reduce_columns", "_gradient_over_rows", "_gradient_over_columns"):
        monkeypatch.setattr(kernels, name, None)
    slab = torch.empty(0, 7, dtype=dtype, device=device)
    rows, wanted = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    found: Any = kernels.reduce_columns(slab, wanted, 0.0, True, True)
    assert [x.shape for x in found] == [(0,)] * 6
    found = kernels.gradient_over_rows(slab, wanted, 0.0, 0.0, 0.0, "none", 1.0, True)
    assert [x.shape for x in found] == [(0,)] * 7
    found = kernels.gradient_over_columns(slab, wanted, rows, rows, rows, 0.0, 0.0, 0.0, 7)
    assert found.shape == (0,)
    found = kernels.gradient_over_columns(slab, wanted, rows, rows, rows, 0.0, 0.0, 0.0, 7, wanted)
    assert found.shape == (0,)


@pytest.mark.parametrize(("apart", "own"), [(27, 20), (31, 20), (32, 32), (40, 20), (48, 32)])
def test_nothing_is_written_between_the_rows(device: str, apart: int, own: int) -> None:
    """But to the next multiple of 16 columns, if every row starts at one; whatever is there."""
    slab = numbers(2, 3, 20, torch.bfloat16, device, apart)
    gaps = slab.as_strided((2, apart - own), (apart, 1), own)
    wanted, factor = targets(2, 3, 0, 20, device), factors(2, 3, device)
    lse = slab.double().logsumexp(1).float()
    kernels.gradient_over_columns(slab, wanted, lse, 0 * lse, factor, 0.1, 0.1, 2.0, 20)
    kernels.gradient_over_rows(slab, wanted, 0.1, 0.1, 2.0, "el2n", 2.0, True)
    assert bool(gaps.isnan().all())
    assert bool(slab.isfinite().all())


@pytest.mark.parametrize("cols", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_what_lies_between_aligned_rows_changes_no_number(
    device: str, cols: int, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_LARGEST_BLOCK", 128)
    wanted, factor = targets(2, 5, -2, cols, device), factors(2, 5, device)
    found: list[list[Tensor]] = []
    for apart in (cols, cols + -cols % 16):
        slab = numbers(2, 5, cols, torch.float32, device, apart)
        made = [*kernels.reduce_columns(slab, wanted, softcap, True, True)]
        copy, lse = slab.clone(), made[0] + made[1]
        known = wanted, lse, 0 * lse, factor
        made += [kernels.gradient_over_columns(slab, *known, 0.1, 0.1, softcap, cols), slab]
        rest = 0.1, 0.1, softcap, "entropy", 0.5, True
        copy = (
            copy
            if apart == cols
            else torch.full((5, apart), math.nan, device=device)[:, :cols].copy_(copy)
        )
        made += [*kernels.gradient_over_rows(copy, wanted.clamp(min=0), *rest), copy]
        found.append(made)
    # Compiled code adds up in the order of its layout, and aligned rows have another.
    near = {"rtol": 0.0, "atol": 0.0} if device == "cpu" else {"rtol": 1e-5, "atol": 1e-6}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **near)


def test_what_the_kernels_would_misread_is_refused(device: str) -> None:
    wanted = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="side by side"):
        kernels.reduce_columns(torch.zeros(3, 2, device=device).T, wanted, 0.0, False, False)
    slab = torch.zeros(2, 3, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        kernels.reduce_columns(slab, wanted, 0.0, False, False)


@triton.jit
def _probe_functions(
    x,
    tanh,
    slope,
    expm1,
    size,
    block: tl.constexpr,  # pyright: ignore[reportInvalidTypeForm]
):
    at = tl.arange(0, block)
    value = tl.load(x + at, mask=at < size, other=0.0)
    t, s = kernels._tanh(value)
    tl.store(tanh + at, t, mask=at < size)
    tl.store(slope + at, s, mask=at < size)
    tl.store(expm1 + at, kernels._expm1(-tl.abs(value)), mask=at < size)


def test_the_elementary_functions_are_accurate_everywhere(device: str) -> None:
    positive = torch.logspace(-30, 1.9, 4000, dtype=torch.float64).float()
    dense = torch.linspace(0.5, 0.75, 3000)
    x = torch.cat([positive, -positive, dense, torch.tensor([0.0, math.inf, -math.inf])]).to(device)
    tanh, slope, expm1 = (torch.empty_like(x) for _ in range(3))
    block = triton.next_power_of_2(len(x))
    _probe_functions[(1,)](x, tanh, slope, expm1, len(x), block=block)
    wide = x.double()
    near(tanh, torch.tanh(wide), rtol=4e-7, atol=0)
    near(expm1, torch.expm1(-wide.abs()), rtol=1e-6, atol=0)
    right = torch.cosh(wide.clamp(-300, 300)) ** -2
    # An exponential of -2x is known to 2x roundings on a GPU.
    near(slope, right, rtol=2e-5, atol=1e-37)


@triton.jit
def _probe_offsets(out, stride):
    row = tl.program_id(0)
    tl.store(out + row, kernels._offset(row, stride))


def test_rows_may_start_behind_the_reach_of_32_bits(device: str) -> None:
    out = torch.zeros(5, dtype=torch.int64, device=device)
    stride = 2**31 - 16
    _probe_offsets[(5,)](out, stride)
    assert out.tolist() == [row * stride for row in range(5)]


@pytest.mark.skipif(not HAS_CUDA, reason="the interpreter would touch every page of the slab")
def test_a_slab_of_more_than_four_gibibytes() -> None:
    stride = 2**31 + 16
    whole = torch.empty(stride + 40, dtype=torch.bfloat16, device="cuda")
    slab = whole.as_strided((2, 40), (stride, 1))
    slab.copy_(numbers(0, 2, 40, torch.bfloat16, "cuda"))
    wanted = targets(0, 2, 0, 40, "cuda")
    check_rows(slab, wanted)


# ------------------------------------------------------------------------------- in the whole losses


LOSSES: dict[str, dict[str, Any]] = {
    "known": {},
    "masked": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0},
    "function": {},
    "dft": {},
    "entropy": {"softcap": 3.0},
    "large z-loss": {"z_loss": 0.5},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(LOSSES, [torch.float32, torch.bfloat16]),
        # What would overflow is divided first, whoever has written it.
        ("large z-loss", torch.float16),
    ],
)
def test_the_losses_are_the_same_with_the_kernels_and_without(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 2, 8, generator=rng).to(dtype).to(DEVICES[0])
    unembedding = torch.randn(100, 8, generator=rng).to(dtype).to(DEVICES[0])
    labels = torch.randint(100, (2, 5), generator=rng).to(DEVICES[0])
    if dtype == torch.float16:
        # Logits of some thousands, and no gradient larger than 65,504.
        hidden, unembedding = 50 * hidden, 10 * unembedding
    weights: Any = {
        "function": lambda ce, valid: torch.where(valid, ce, 0),
        "dft": wmtp.RowLocalWeights("dft"),
        "entropy": wmtp.RowLocalWeights("entropy", 0.5),
    }.get(name)
    if name == "masked":
        labels[:, :3] = -100

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, unembedding)]
        loss, stats = wmtp.linear_weighted_mtp_loss_and_stats(
            leaves[0], leaves[1], labels, weights, slab_bytes=5 * 100 * 4 + 4_000, **LOSSES[name]
        )
        loss.backward()
        return [loss.detach(), *stats, *(x.grad for x in leaves if x.grad is not None)]

    calls: list[Tensor] = []

    def with_kernels(logits: Tensor) -> Any:
        calls.append(logits)
        return kernels

    monkeypatch.setattr(slab_softmax, "_kernels", lambda _: None)
    plain = run()
    monkeypatch.setattr(slab_softmax, "_kernels", with_kernels)
    assert all(bool(number.isfinite().all()) for number in plain)
    for one, other in zip(run(), plain, strict=True):
        # The interpreter cuts bfloat16 off where a GPU rounds it.
        rounding = 2**-10 if dtype == torch.float16 else 2**-6
        tolerance = 2e-5 if dtype == torch.float32 or one.dtype != dtype else rounding
        size = float(other.abs().max()) if dtype == torch.float16 else 1.0
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * 0.1 * size)
    assert calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("slab_bytes", "missing", "every", "options"),
    [
        (2**20, 0, 2, {}),
        (2**13, 9, 2, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}),
        (2**13, 0, 1, {}),
    ],
)
def test_schedules_take_the_route_of_a_gpu(
    dtype: torch.dtype,
    slab_bytes: int,
    missing: int,
    every: int,
    options: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that are aligned, kernels, sums in one operation: the numbers are those of a CPU."""
    rows, vocab, needs = 40, 333, [True, True, True]
    x, unembedding = normal(0, rows, 8).to(dtype), normal(1, vocab, 8).to(dtype)
    target, factor = integers(2, vocab, rows) - missing, uniform(3, rows).float()
    seen: list[str] = []
    monkeypatch.setattr(kernels, "_LARGEST_BLOCK", 128)

    def guess(ce: Tensor, known: Tensor) -> Tensor:
        some = torch.arange(rows, device=ce.device) % every == 0
        return torch.where(known & some, factor.to(ce.device), 0)

    def on_gpu(part: Tensor) -> Tensor:
        return part.cuda() if HAS_CUDA else part.as_subclass(OnGpu)

    def found(moved: Callable[[Tensor], Tensor]) -> list[Tensor]:
        *given, scale = map(moved, (x, unembedding, unembedding[:, 0], target, factor))
        asked = problem.Problem(*given, 0.0, 0.0, 0.0, slab_bytes)._replace(**options)
        columns = slab_columns.forward_columns(asked, True)
        later = slab_columns.backward_columns(asked, scale, columns.base, columns.log_sum, needs)
        dft = problem.RowLocal("dft", 1.0)
        local, known = slab_rows.forward_backward_rows(asked, scale, dft, True, True, needs)
        first, made, guessed = slab_rows.forward_guessing_rows(asked, guess, True, needs)
        made = slab_rows.corrected_rows(asked, guessed, scale, made, needs)
        all_rows, all_gradients = [columns, local, first], [later, known, made]
        for form in ("held", "lent"):
            with held_logits(form):
                kept, held = slab_columns.forward_held(asked, needs, True, False)
                assert (len(held.lent) > 0) == (form == "lent")
                some = scale * (scale > 0.5)
                used = slab_columns.backward_held(
                    asked, some, kept.base, kept.log_sum, needs, held, False
                )
            all_rows.append(kept)
            all_gradients.append(used)
        numbers = [x * some.unit for some in all_gradients for x in some[:3]]
        for some in all_rows:
            numbers += [some.loss, some.ce, some.base + some.log_sum, some.correct, some.weight]
        return [part.as_subclass(Tensor).cpu() for part in numbers]

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            seen.append(name)
            return function(*arguments, **named)

        return call

    def addmm(*arguments: Any, **named: Any) -> Any:
        if "out_dtype" not in named:
            return with_bias(*arguments, **named)
        seen.append("wide sum")
        wide_sum = with_bias if HAS_CUDA else addmm_of_a_gpu
        return wide_sum(*arguments, **named)

    plain, with_bias = found(lambda part: part), torch.addmm
    monkeypatch.setattr(torch, "addmm", addmm)
    names = ["reduce_columns", "gradient_over_rows", "gradient_over_columns"]
    for name in names:
        monkeypatch.setattr(kernels, name, noted(name, getattr(kernels, name)))
    for name in ("write_hidden", "add_targets"):
        names.append(name)
        monkeypatch.setattr(target_kernels, name, noted(name, getattr(target_kernels, name)))
    for one, other in zip(found(on_gpu), plain, strict=True):
        rounding = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
        size = float(other.abs().max()) if other.is_floating_point() else 0.0
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding * 0.2 * size)
    assert {*seen} == {*names, *(["wide sum"] if dtype != torch.float32 else [])}
