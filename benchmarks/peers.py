"""The contenders: what each computes, on which device it runs, and whether its answer is right.

Most peers give a cross entropy per token; ``weigh`` does with it what their user would write. A peer
that is not installed, or cannot run here, is told so by ``unavailable`` and shown, never dropped.
"""

import itertools
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Literal, NamedTuple

import torch
from measure import first_line
from torch import Tensor
from torch.nn import functional as F

import wmtp


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative errors of a right answer: a few roundings of the logits' dtype.
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}


class Sizes(NamedTuple):
    """``batch · seq · heads`` predictions over ``vocab`` from ``dim``."""

    batch: int
    seq: int
    heads: int
    dim: int
    vocab: int

    @property
    def predictions(self) -> int:
        return self.batch * self.seq * self.heads


class Inputs(NamedTuple):
    """One problem: hidden states, unembedding, targets, weights, a reference's NLL."""

    hidden: Tensor
    unembedding: Tensor
    targets: Tensor
    weights: Tensor
    reference: Tensor


class Case(NamedTuple):
    """What is asked of a contender."""

    masked: bool = False
    weights: Literal["given", "rho-1", "dft", "one"] = "given"
    gradients: bool = True


# Floors are always those of all three products over all rows, so that cases can be compared.
CASES = {
    "all": Case(),
    "half masked": Case(masked=True),
    "rho-1": Case(weights="rho-1"),
    "dft": Case(weights="dft"),
    "evaluation": Case(gradients=False),
}

Loss = Callable[[Inputs, Case], Tensor]
TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # [n dim], [vocab dim], [n] -> [n]


class Contender(NamedTuple):
    """A loss, the distribution it comes from, where it runs, which cases it can express.

    ``also``: the same loss by other routes, which are checked but not timed.
    """

    loss: Loss
    package: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    cases: tuple[str, ...] = tuple(CASES)
    weighted: bool = True  # if not, one unweighted mean: less than is asked, and checked as that
    also: tuple[Loss, ...] = ()


def make_inputs(sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Random, with logits of variance one, the same for every dtype."""
    rng = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=rng, device=device)
    uniform = partial(torch.rand, generator=rng, device=device)
    shape = (sizes.batch, sizes.seq, sizes.heads)
    unembedding = random(sizes.vocab, sizes.dim).mul_(sizes.dim**-0.5)
    return Inputs(
        random(*shape, sizes.dim).to(dtype).requires_grad_(),
        unembedding.to(dtype).requires_grad_(),
        torch.randint(sizes.vocab, shape, generator=rng, device=device),
        uniform(shape) + 0.5,
        uniform(shape) * 4 + 8,
    )


def prepare(x: Inputs, case: Case) -> Inputs:
    """Mask the first half of every row, as prompts are, if the case says so."""
    if not case.masked:
        return x
    targets = x.targets.clone()
    targets[:, : targets.shape[1] // 2] = -100
    return x._replace(targets=targets)


def weigh(token_ce: Tensor, x: Inputs, case: Case) -> Tensor:
    """What a user of a per-token loss writes."""
    token_ce = token_ce.view(x.targets.shape)
    valid = x.targets != -100
    if case.weights == "rho-1":
        weights = wmtp.rho1_weights(token_ce.detach(), valid, x.reference)
    elif case.weights == "dft":
        weights = torch.exp(-token_ce.detach()) * valid
    else:
        weights = x.weights * valid if case.weights == "given" else valid.float()
    return (token_ce * weights).sum() / weights.sum()


def weighing(token_loss: TokenLoss) -> Loss:
    def loss(x: Inputs, case: Case) -> Tensor:
        found = token_loss(x.hidden.flatten(0, 2), x.unembedding, x.targets.flatten())
        return weigh(found.float(), x, case)

    return loss


def of_wmtp(x: Inputs, case: Case, slab_bytes: int | None = None) -> Tensor:
    weights = {
        "given": x.weights,
        "rho-1": partial(wmtp.rho1_weights, reference_nll=x.reference),
        "dft": wmtp.RowLocalWeights("dft"),
        "one": None,
    }[case.weights]
    return wmtp.linear_weighted_mtp_loss(
        x.hidden, x.unembedding, x.targets, weights, slab_bytes=slab_bytes
    )


@cache
def _compiled_wmtp() -> Loss:
    # Every case and every size is a graph of its own.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(of_wmtp, dynamic=False, fullgraph=True)


def of_wmtp_compiled(x: Inputs, case: Case) -> Tensor:
    return _compiled_wmtp()(x, case)


def dense(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, unembedding).float(), targets, reduction="none")


@cache
def _compiled_dense() -> TokenLoss:
    return torch.compile(dense, dynamic=False)


def dense_compiled(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    return _compiled_dense()(hidden, unembedding, targets)


def torch_chunked(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, reduction: str = "none"
) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        hidden, unembedding, targets, reduction=reduction, options=options
    )


def trl(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """As ``trl.trainer.utils.add_fused_lm_head`` calls it: only a GPU leaves masked rows out."""
    kernel = import_module("trl.kernels").ChunkedLogProbFunction
    valid = targets != -100
    if hidden.is_cuda:
        rows, labels = hidden[valid], targets[valid]
    else:
        rows, labels = hidden, targets.clamp(min=0)
    found = -kernel.apply(rows, unembedding, None, labels, 1.0, 32768, None, 1.0, ())[0]
    if hidden.is_cuda:
        return found.new_zeros(targets.shape).masked_scatter(valid, found)
    return found.masked_fill(~valid, 0)


def liger_scaled(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Slabs of rows in plain torch on the CPU, a kernel of its own on Hopper."""
    function = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    return function.apply(hidden, unembedding, targets)


def liger_log_prob(hidden: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Slabs of rows and vocabulary in plain torch: the per-token part of its chunked PPO losses."""
    module = import_module("liger_kernel.chunked_loss.fused_linear_ppo")
    size = module._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    apply = module._ChunkedSelectiveLogProbFunction.apply
    return -apply(hidden, unembedding, targets, None, 1.0, size)


def liger_triton(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, reduction: str = "none"
) -> Tensor:
    module = import_module("liger_kernel.transformers")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction=reduction)
    return loss(unembedding, hidden, targets)


def cut(hidden: Tensor, unembedding: Tensor, targets: Tensor, **options: object) -> Tensor:
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return function(hidden, unembedding, targets, reduction="none", **options)


def quack(hidden: Tensor, unembedding: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
    """Its chunked loss has no losses per token; where these are wanted it holds all logits."""
    module = import_module("quack.linear_cross_entropy")
    if reduction == "none":
        return module.linear_cross_entropy_func(
            hidden, unembedding, None, targets, reduction="none"
        )
    return module.chunked_linear_cross_entropy(hidden, unembedding, targets, reduction=reduction)


def mean_only(token_loss: Callable[..., Tensor]) -> Loss:
    def loss(x: Inputs, case: Case) -> Tensor:
        flat = x.hidden.flatten(0, 2)
        return token_loss(flat, x.unembedding, x.targets.flatten(), reduction="mean")

    return loss


_UNWEIGHTED = ("all", "half masked", "evaluation")
_LIGER, _CUT, _QUACK = "liger-kernel", "cut-cross-entropy", "quack-kernels"
# What the second entry of wmtp may hold beside gradients: the memory of the leanest peers.
LEAN_BYTES = 3 * 2**30 // 10
# At the size of the check the default holds all logits on a GPU. A part of them, in the memory of the
# gradient too; and sums and guesses in the forward pass instead.
CHECKED_BYTES = 8 * 2**20, 36 * 2**20
CHECKED_SIZES = Sizes(batch=2, seq=96, heads=4, dim=256, vocab=33000)

CONTENDERS = {
    "wmtp": Contender(
        of_wmtp, "wmtp", also=tuple(partial(of_wmtp, slab_bytes=size) for size in CHECKED_BYTES)
    ),
    "wmtp, 0.3 GiB": Contender(partial(of_wmtp, slab_bytes=LEAN_BYTES), "wmtp", devices=("cuda",)),
    "wmtp, compiled": Contender(of_wmtp_compiled, "wmtp", devices=("cuda",)),
    "dense": Contender(weighing(dense)),
    "dense, compiled": Contender(weighing(dense_compiled), devices=("cuda",)),
    "torch chunked": Contender(weighing(torch_chunked)),
    "torch chunked, mean": Contender(mean_only(torch_chunked), cases=_UNWEIGHTED, weighted=False),
    "TRL": Contender(weighing(trl), "trl"),
    "Liger scaled CE": Contender(weighing(liger_scaled), _LIGER),
    "Liger log-prob": Contender(weighing(liger_log_prob), _LIGER, devices=("cpu",)),
    "Liger Triton": Contender(weighing(liger_triton), _LIGER),
    "Liger Triton, mean": Contender(
        mean_only(liger_triton), _LIGER, ("cuda",), _UNWEIGHTED, weighted=False
    ),
    "CCE torch_compile": Contender(
        weighing(partial(cut, impl="torch_compile")), _CUT, devices=("cpu",)
    ),
    "CCE": Contender(weighing(partial(cut, impl="cce")), _CUT, devices=("cuda",)),
    "CCE unfiltered": Contender(
        weighing(partial(cut, impl="cce", filter_eps=None)), _CUT, devices=("cuda",)
    ),
    "Quack": Contender(weighing(quack), _QUACK, devices=("cuda",)),
    "Quack, mean": Contender(mean_only(quack), _QUACK, ("cuda",), _UNWEIGHTED, weighted=False),
}
PACKAGES = tuple(dict.fromkeys(x.package for x in CONTENDERS.values() if x.package != "torch"))


def unavailable(name: str, dtype: torch.dtype, device: str) -> str:
    """Why a contender cannot run here, or nothing."""
    try:
        run(name, make_inputs(Sizes(2, 16, 1, 32, 64), dtype, device), CASES["all"])
    except ModuleNotFoundError as error:
        return f"not installed ({error.name})"
    except Exception as error:  # whatever it is, it is shown and the others go on
        return f"cannot run here: {first_line(error)}"
    return ""


def run(name: str, x: Inputs, case: Case) -> None:
    """One step: the loss and, unless it is evaluation, its gradients."""
    if case.gradients:
        CONTENDERS[name].loss(x, case).backward()
        x.hidden.grad = x.unembedding.grad = None
    else:
        with torch.no_grad():
            CONTENDERS[name].loss(x, case)


class Truth(NamedTuple):
    """A problem, and the dense loss and gradients of it in float64, weighted and not."""

    x: Inputs
    case: Case
    answers: dict[bool, list[Tensor]]


def truths(
    dtype: torch.dtype, device: str = "cpu", vocab: int = CHECKED_SIZES.vocab
) -> dict[str, Truth]:
    """Of a problem of several slabs for every contender, in every case."""
    base = make_inputs(CHECKED_SIZES._replace(vocab=vocab), dtype, device)
    found: dict[str, Truth] = {}
    for label, case in CASES.items():
        x = prepare(base, case)
        wide = x._replace(
            hidden=x.hidden.detach().double().requires_grad_(),
            unembedding=x.unembedding.detach().double().requires_grad_(),
        )
        logits = F.linear(wide.hidden, wide.unembedding).flatten(0, 2)
        token_ce = F.cross_entropy(logits, x.targets.flatten(), reduction="none")
        # Scores far apart: rounding must not decide which predictions Rho-1 keeps.
        rng = torch.Generator().manual_seed(1)
        order = torch.randperm(token_ce.numel(), generator=rng).to(device) / 4.0
        x = x._replace(reference=(token_ce.detach() - order).view(x.targets.shape).float())
        answers: dict[bool, list[Tensor]] = {}
        for weighted in (True, False):
            asked = case if weighted else case._replace(weights="one")
            loss = weigh(token_ce, x, asked)
            of = torch.autograd.grad(loss, (wide.hidden, wide.unembedding), retain_graph=True)
            answers[weighted] = [loss.detach(), *of]
        found[label] = Truth(x, case, answers)
    return found


def errors(name: str, truth: Truth) -> list[float]:
    """Relative errors of the loss and of both gradients, which also meet an upstream of 0.37."""
    contender = CONTENDERS[name]
    expected = truth.answers[contender.weighted]
    worst = [0.0, 0.0, 0.0]
    for form, upstream in itertools.product((contender.loss, *contender.also), (1.0, 0.37)):
        with torch.set_grad_enabled(truth.case.gradients):
            loss = form(truth.x, truth.case)
        got = [loss.detach()]
        if truth.case.gradients:
            of = torch.autograd.grad(loss * upstream, (truth.x.hidden, truth.x.unembedding))
            # Undone in float64: a division in bfloat16 would be a rounding of our own.
            got += [gradient.double() / upstream for gradient in of]
        for i, (a, b) in enumerate(zip(got, expected, strict=False)):
            error = ((a.double() - b).norm() / b.norm()).item()
            worst[i] = max(worst[i], error if error == error else float("inf"))
    return worst if truth.case.gradients else worst[:1]


def verdicts(
    names: list[str], dtype_name: str, device: str = "cpu", vocab: int = CHECKED_SIZES.vocab
) -> dict[tuple[str, str], str]:
    """``{(contender, case): "right", "WRONG by 3.1e-01", "raises …"}``, printed on the way."""
    found: dict[tuple[str, str], str] = {}
    print(f"\n{dtype_name}: relative errors against float64 (loss, of hidden, of unembedding)")
    truth = truths(DTYPES[dtype_name], device, vocab)
    for name, label in itertools.product(names, CASES):
        if label not in CONTENDERS[name].cases:
            found[name, label] = "cannot express this case"
            continue
        try:
            wrong = errors(name, truth[label])
        except Exception as error:
            found[name, label], shown = f"raises {first_line(error)}", ""
        else:
            bad = max(wrong) > TOLERANCES[dtype_name]
            found[name, label] = f"WRONG by {max(wrong):.1e}" if bad else "right"
            shown = " ".join(f"{value:.1e}" for value in wrong)
        note = "" if CONTENDERS[name].weighted else " (as an unweighted mean)"
        print(f"  {name:20} {label:12} {shown:24} {found[name, label]}{note}", flush=True)
    return found
