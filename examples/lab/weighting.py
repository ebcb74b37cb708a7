"""From the name of a method to its weights: the only place where methods are named."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wmtp import (
    align_to_heads,
    combine_weights,
    critic_delta_weights,
    excess_loss,
    random_matched_weights,
    rho1_weights,
    shuffled_weights,
    td_deltas,
)

from .seeds import generator


if TYPE_CHECKING:
    from .config import Config


@dataclass(frozen=True)
class View:
    """What a method may look at in one step, beside the cross entropy: all of it `[batch seq]`."""

    config: "Config"
    step: int
    segment_ids: Tensor
    trained: Tensor  # which tokens are text, not padding
    reference_nll: Tensor | None
    values: Tensor | None


Weigh = Callable[[Tensor, Tensor, View], Tensor]  # (token_ce, valid, view) -> [batch seq heads]


def uniform(token_ce: Tensor, valid: Tensor, view: View) -> Tensor:
    """Every prediction counts the same."""
    return valid.to(token_ce.dtype)


def rho1(token_ce: Tensor, valid: Tensor, view: View) -> Tensor:
    """Learn what the reference knows and the model does not, yet."""
    assert view.reference_nll is not None
    options = view.config.rho1
    return rho1_weights(
        token_ce, valid, view.reference_nll,
        keep=options.keep, mode=options.mode, temperature=options.temperature,
        scope=options.scope,
    )  # fmt: skip


def critic(token_ce: Tensor, valid: Tensor, view: View) -> Tensor:
    """Learn the bytes after which the code looks more likely to compile."""
    assert view.values is not None
    options = view.config.critic
    per_token = critic_delta_weights(
        view.values, view.trained,
        lam=options.lam, beta=options.beta, clip=(options.clip_low, options.clip_high),
        segment_ids=view.segment_ids,
    )  # fmt: skip
    return torch.where(valid, align_to_heads(per_token, token_ce.shape[-1]), 0.0)


def combined(token_ce: Tensor, valid: Tensor, view: View) -> Tensor:
    """A mixture of the two: what either of them asks for."""
    members = [rho1(token_ce, valid, view), critic(token_ce, valid, view)]
    shares = [view.config.combined.rho1, view.config.combined.critic]
    return combine_weights(members, valid, mode="mixture", coefficients=shares)


def shuffled(token_ce: Tensor, valid: Tensor, view: View) -> Tensor:
    """Rho-1's weights on other positions: the same numbers with no meaning."""
    return shuffled_weights(rho1(token_ce, valid, view), valid, generator=_rng(view))


def random_matched(token_ce: Tensor, valid: Tensor, view: View) -> Tensor:
    """Weights drawn from the distribution of Rho-1's."""
    return random_matched_weights(rho1(token_ce, valid, view), valid, generator=_rng(view))


def _rng(view: View) -> torch.Generator:
    # from the step, not from a running state: resuming draws the same numbers
    return generator("control", view.config.train.seed, view.step)


@dataclass(frozen=True)
class Method:
    """How an arm weighs its bytes and what has to be trained before it can."""

    weigh: Weigh
    reference: bool = False
    critic: bool = False
    single_head: bool = False


METHODS = {
    "baseline-ntp": Method(uniform, single_head=True),
    "baseline-mtp": Method(uniform),
    "rho1-wmtp": Method(rho1, reference=True),
    "critic-wmtp": Method(critic, critic=True),
    "combined-wmtp": Method(combined, reference=True, critic=True),
    "shuffled-control": Method(shuffled, reference=True),
    "random-control": Method(random_matched, reference=True),
}
ALGOS = tuple(METHODS)


def diagnostics(
    method: Method, token_ce: Tensor, weights: Tensor, valid: Tensor, view: View
) -> dict[str, Tensor]:
    """What the scores look like behind the weights, for those that the method has."""
    found = {}
    if method.reference and view.reference_nll is not None:
        found["rho1_usage_ratio"] = ((weights > 0) & valid).sum() / valid.sum()
        excess = excess_loss(token_ce, view.reference_nll)
        found["excess_loss_mean"] = excess[valid].mean()
    if method.critic and view.values is not None:
        deltas = td_deltas(view.values, view.trained, segment_ids=view.segment_ids)
        found["critic_delta_mean"] = deltas[view.trained].mean()
        found["critic_delta_std"] = deltas[view.trained].std(correction=0)
    return found
