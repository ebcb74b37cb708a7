"""What every public function has to compute, as plain loops over Python floats (float64).

The only thing taken from torch is the container: a tensor comes in, becomes nested lists, and
nested lists go back into a tensor. Nothing here is vectorised, and nothing is shared with `wmtp`.
A place that the formulas never read is never read here either, so it may hold anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


Index = tuple[int, ...]
Rows = list[Any]

FLOAT32_MAX = 3.4028234663852886e38


# ------------------------------------------------------------------------------------ containers


def rows(x: Tensor | None) -> Any:
    """Nested lists of Python numbers, in float64 if they are floating."""
    if x is None:
        return None
    known = x.detach()
    return (known.double() if known.is_floating_point() else known).tolist()


def filled(shape: Sequence[int], value: float = 0.0) -> Any:
    if not shape:
        return value
    return [filled(shape[1:], value) for _ in range(shape[0])]


def tensor(nested: Any, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    # The shape is passed because an empty list has forgotten its inner sizes.
    return torch.tensor(nested, dtype=dtype).reshape(tuple(shape))


def places(shape: Sequence[int]) -> list[Index]:
    return list(itertools.product(*(range(n) for n in shape)))


def get(nested: Any, index: Index) -> Any:
    for i in index:
        nested = nested[i]
    return nested


def put(nested: Any, index: Index, value: Any) -> None:
    for i in index[:-1]:
        nested = nested[i]
    nested[index[-1]] = value


# --------------------------------------------------------------------------- index law and targets


def offset_list(offsets: int | Sequence[int] | None, heads: int) -> list[int]:
    if offsets is None:
        offsets = heads
    if isinstance(offsets, int):
        return [h + 1 for h in range(offsets)]
    return [int(o) for o in offsets]


def _documents_from_positions(row: list[int]) -> list[int]:
    document, out = 0, []
    for t, position in enumerate(row):
        if t > 0 and position != row[t - 1] + 1:
            document += 1
        out.append(document)
    return out


def _documents_from_cu_seqlens(bounds: list[int], length: int) -> list[int | None]:
    out: list[int | None] = []
    for t in range(length):
        home = None
        for d in range(len(bounds) - 1):
            if bounds[d] <= t < bounds[d + 1]:
                home = d
        out.append(home)
    return out


def mtp_targets(
    labels: Tensor,
    offsets: int | Sequence[int],
    *,
    ignore_index: int = -100,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    batch, seq = labels.shape
    steps = offset_list(offsets, 0)
    label, mask = rows(labels), rows(attention_mask)
    out = filled((batch, seq, len(steps)), ignore_index)
    for b in range(batch):
        documents: list[list[Any]] = []
        if position_ids is not None:
            documents.append(_documents_from_positions(rows(position_ids)[b]))
        if segment_ids is not None:
            documents.append(rows(segment_ids)[b])
        if cu_seqlens is not None:
            documents.append(_documents_from_cu_seqlens(rows(cu_seqlens), seq))
        for t in range(seq):
            for h, step in enumerate(steps):
                j = t + step
                if j >= seq or label[b][j] == ignore_index:
                    continue
                if mask is not None and (mask[b][t] == 0 or mask[b][j] != mask[b][t]):
                    continue
                if any(d[t] is None or d[t] != d[j] for d in documents):
                    continue
                out[b][t][h] = label[b][j]
    return tensor(out, (batch, seq, len(steps)), torch.int64)


def align_to_heads(per_token: Tensor, offsets: int | Sequence[int], *, fill: float = 0) -> Tensor:
    batch, seq = per_token.shape
    steps = offset_list(offsets, 0)
    source = rows(per_token)
    out = filled((batch, seq, len(steps)), fill)
    for b, t, h in places((batch, seq, len(steps))):
        if t + steps[h] < seq:
            out[b][t][h] = source[b][t + steps[h]]
    dtype = torch.float64 if per_token.is_floating_point() else per_token.dtype
    return tensor(out, (batch, seq, len(steps)), dtype)


def _targets_of(
    labels: Tensor, heads: int, offsets: int | Sequence[int] | None, ignore_index: int
) -> Rows:
    if labels.dim() == 3:
        return rows(labels)
    return rows(mtp_targets(labels, offset_list(offsets, heads), ignore_index=ignore_index))


def valid_of(
    labels: Tensor,
    heads: int,
    *,
    offsets: int | Sequence[int] | None = None,
    ignore_index: int = -100,
) -> Tensor:
    target = _targets_of(labels, heads, offsets, ignore_index)
    shape = (*labels.shape[:2], heads)
    out = filled(shape, False)
    for i in places(shape):
        put(out, i, get(target, i) != ignore_index)
    return tensor(out, shape, torch.bool)


# ------------------------------------------------------------------------------------ cross entropy


def _capped(row: list[float], softcap: float | None) -> list[float]:
    return row if softcap is None else [softcap * math.tanh(z / softcap) for z in row]


def _lse(row: list[float]) -> float:
    top = max(row)
    if math.isinf(top):
        return top
    return top + math.log(sum(math.exp(z - top) for z in row))


def cell(
    row: list[float],
    target: int,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[float, float, list[float]]:
    """(loss, plain cross entropy, d loss / d logits) of one prediction."""
    z = _capped(row, softcap)
    lse, vocab = _lse(z), len(z)
    ce = lse - z[target]
    loss = ce
    if label_smoothing:
        spread = sum(lse - value for value in z) / vocab
        loss = (1 - label_smoothing) * ce + label_smoothing * spread
    loss += z_loss * lse * lse
    grad = []
    for v in range(vocab):
        g = math.exp(z[v] - lse) * (1 + 2 * z_loss * lse) - label_smoothing / vocab
        if v == target:
            g -= 1 - label_smoothing
        if softcap is not None:
            g *= 1 - (z[v] / softcap) ** 2
        grad.append(g)
    return loss, ce, grad


def _with_heads(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.dim() == 3 else x


def linear_logits(hidden: Tensor, unembedding: Tensor, bias: Tensor | None = None) -> Tensor:
    """[batch seq heads vocab], one scalar product at a time; rows that hold NaN stay NaN."""
    h, u, c = rows(_with_heads(hidden)), rows(unembedding), rows(bias)
    batch, seq, heads, dim = _with_heads(hidden).shape
    vocab = unembedding.shape[0]
    out = filled((batch, seq, heads, vocab))
    for b, t, k, v in places((batch, seq, heads, vocab)):
        total = sum(h[b][t][k][d] * u[v][d] for d in range(dim))
        out[b][t][k][v] = total + (c[v] if c is not None else 0.0)
    return tensor(out, (batch, seq, heads, vocab))


def cells(
    logits: Tensor,
    labels: Tensor,
    *,
    offsets: int | Sequence[int] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Rows, Rows, Rows, Rows, tuple[int, int, int, int]]:
    """(loss, plain ce, d loss/d logits, valid, shape) of every prediction; 0 where ignored."""
    x = _with_heads(logits)
    batch, seq, heads, vocab = x.shape
    value, target = rows(x), _targets_of(labels, heads, offsets, ignore_index)
    shape = (batch, seq, heads)
    loss, ce, valid = filled(shape), filled(shape), filled(shape, False)
    grad = filled((batch, seq, heads, vocab))
    for i in places(shape):
        if get(target, i) == ignore_index:
            continue
        one, plain, row = cell(
            get(value, i),
            get(target, i),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
        )
        put(loss, i, one)
        put(ce, i, plain)
        put(grad, i, row)
        put(valid, i, True)
    return loss, ce, grad, valid, (batch, seq, heads, vocab)


def mtp_ce_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    upstream: Tensor | float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(loss, gradient for logits) for an upstream gradient (ones when it is not given)."""
    loss, _, grad, valid, (batch, seq, heads, vocab) = cells(logits, labels, **options)
    shape = (batch, seq, heads)
    kept = [i for i in places(shape) if get(valid, i)]
    up = filled(shape)
    for i in kept:
        if reduction == "none":
            put(up, i, 1.0 if upstream is None else float(upstream[i]))  # pyright: ignore[reportIndexIssue]
        else:
            scale = 1.0 if upstream is None else float(upstream)
            put(up, i, scale / (len(kept) if reduction == "mean" else 1))
    out = filled((batch, seq, heads, vocab))
    for i in kept:
        put(out, i, [get(up, i) * g for g in get(grad, i)])
    gradient = tensor(out, (batch, seq, heads, vocab)).reshape(logits.shape)
    if reduction == "none":
        return tensor(loss, shape), gradient
    total = math.fsum(get(loss, i) for i in kept)
    if reduction == "mean":
        total = total / len(kept) if kept else 0.0
    return tensor(total, ()), gradient


def through_linear(
    grad_logits: Tensor, hidden: Tensor, unembedding: Tensor, bias: Tensor | None
) -> dict[str, Tensor]:
    """Gradients for hidden, unembedding and bias; hidden rows with no gradient are not read."""
    g, h, u = rows(_with_heads(grad_logits)), rows(_with_heads(hidden)), rows(unembedding)
    batch, seq, heads, dim = _with_heads(hidden).shape
    vocab = unembedding.shape[0]
    gh, gu, gb = filled((batch, seq, heads, dim)), filled((vocab, dim)), filled((vocab,))
    for b, t, k in places((batch, seq, heads)):
        for v in range(vocab):
            if g[b][t][k][v] == 0.0:
                continue
            gb[v] += g[b][t][k][v]
            for d in range(dim):
                gh[b][t][k][d] += g[b][t][k][v] * u[v][d]
                gu[v][d] += g[b][t][k][v] * h[b][t][k][d]
    out = {
        "hidden": tensor(gh, (batch, seq, heads, dim)).reshape(hidden.shape),
        "unembedding": tensor(gu, (vocab, dim)),
    }
    if bias is not None:
        out["bias"] = tensor(gb, (vocab,))
    return out


def linear_mtp_ce_loss(
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    logits = linear_logits(hidden, unembedding, bias)
    loss, grad = mtp_ce_loss(logits, labels, **options)
    return loss, through_linear(grad, hidden, unembedding, bias)


def token_nll(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    **documents: Tensor | None,
) -> Tensor:
    batch, seq, _ = logits.shape
    target = rows(mtp_targets(labels, [1], ignore_index=ignore_index, **documents))
    value, out = rows(logits), filled((batch, seq))
    for b in range(batch):
        for j in range(1, seq):
            if target[b][j - 1][0] != ignore_index:
                out[b][j] = cell(value[b][j - 1], target[b][j - 1][0], softcap=softcap)[1]
    return tensor(out, (batch, seq))


# -------------------------------------------------------------------------------------------- scores


def excess_loss(
    token_ce: Tensor, reference_nll: Tensor, *, offsets: int | Sequence[int] | None = None
) -> Tensor:
    batch, seq, heads = token_ce.shape
    steps, ce, reference = offset_list(offsets, heads), rows(token_ce), rows(reference_nll)
    out = filled((batch, seq, heads))
    for b, t, h in places((batch, seq, heads)):
        if reference_nll.dim() == 3:
            known = reference[b][t][h]
        else:
            known = reference[b][t + steps[h]] if t + steps[h] < seq else 0.0
        out[b][t][h] = ce[b][t][h] - known
    return tensor(out, (batch, seq, heads))


def _homes(
    shape: Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Rows:
    """The document of every token by each description, None where it has none."""
    out = filled(shape, None)
    for b in range(shape[0]):
        told: list[list[Any]] = []
        for numbers in (attention_mask, segment_ids):
            if numbers is not None:
                told.append(rows(numbers)[b])
        if position_ids is not None:
            told.append(_documents_from_positions(rows(position_ids)[b]))
        if cu_seqlens is not None:
            told.append(_documents_from_cu_seqlens(rows(cu_seqlens), shape[1]))
        for t in range(shape[1]):
            padding = attention_mask is not None and rows(attention_mask)[b][t] == 0
            home = tuple(numbers[t] for numbers in told)
            out[b][t] = None if padding or None in home else home
    return out


def _trained(homes: list[Any], valid: list[bool]) -> dict[Any, list[int]]:
    """Document -> its trained tokens in order."""
    out: dict[Any, list[int]] = {}
    for t, home in enumerate(homes):
        if valid[t] and home is not None:
            out.setdefault(home, []).append(t)
    return out


def td_deltas(
    values: Tensor,
    valid: Tensor,
    *,
    rewards: Tensor | None = None,
    gamma: float = 1.0,
    initial_value: float | str = "first",
    **documents: Tensor | None,
) -> Tensor:
    batch, seq = values.shape
    value, ok, reward = rows(values), rows(valid), rows(rewards)
    homes = _homes((batch, seq), **documents)
    out = filled((batch, seq))
    for b in range(batch):
        for tokens in _trained(homes[b], ok[b]).values():
            for j in tokens:
                if j > 0 and homes[b][j - 1] == homes[b][j]:
                    before = value[b][j - 1]
                elif initial_value == "first":
                    continue
                else:
                    before = float(initial_value)
                after, gained = value[b][j], 0.0
                if reward is not None:
                    gained = reward[b][j]
                    if j == tokens[-1]:
                        after = 0.0
                out[b][j] = gained + gamma * after - before
    return tensor(out, (batch, seq))


def gae(
    values: Tensor,
    valid: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    rewards: Tensor | None = None,
    initial_value: float | str = "first",
    **documents: Tensor | None,
) -> Tensor:
    batch, seq = values.shape
    delta = rows(
        td_deltas(
            values, valid, rewards=rewards, gamma=gamma, initial_value=initial_value, **documents
        )
    )
    homes, ok = _homes((batch, seq), **documents), rows(valid)
    out = filled((batch, seq))
    for b in range(batch):
        for tokens in _trained(homes[b], ok[b]).values():
            later = 0.0
            for j in reversed(tokens):
                later = delta[b][j] + gamma * lam * later
                out[b][j] = later
    return tensor(out, (batch, seq))


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, eps: float = 1e-6, correction: int = 1
) -> Tensor:
    reward, group = rows(rewards), rows(group_ids)
    out = []
    for i in range(len(reward)):
        peers = [reward[k] for k in range(len(reward)) if group[k] == group[i]]
        if len(peers) <= correction:
            out.append(0.0)
            continue
        mean = math.fsum(peers) / len(peers)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in peers) / (len(peers) - correction))
        out.append((reward[i] - mean) / (std + eps))
    return tensor(out, (len(reward),))


def _per_prediction(
    logits: Tensor,
    labels: Tensor,
    of: Callable[[list[float], int], float],
    *,
    offsets: int | Sequence[int] | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    x = _with_heads(logits)
    target = _targets_of(labels, x.shape[2], offsets, ignore_index)
    value, out = rows(x), filled(x.shape[:3])
    for i in places(x.shape[:3]):
        if get(target, i) != ignore_index:
            row = _capped(get(value, i), softcap)
            lse = _lse(row)
            put(out, i, of([math.exp(z - lse) for z in row], get(target, i)))
    return tensor(out, x.shape[:3])


def target_probability(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return _per_prediction(logits, labels, lambda p, y: p[y], **options)


def el2n(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    def distance(p: list[float], y: int) -> float:
        return math.sqrt(sum((q - (v == y)) ** 2 for v, q in enumerate(p)))

    return _per_prediction(logits, labels, distance, **options)


def predictive_entropy(logits: Tensor, *, softcap: float | None = None) -> Tensor:
    x = _with_heads(logits)
    value, out = rows(x), filled(x.shape[:3])
    for i in places(x.shape[:3]):
        row = _capped(get(value, i), softcap)
        lse = _lse(row)
        put(out, i, sum(math.exp(z - lse) * (lse - z) for z in row if z > -math.inf))
    return tensor(out, x.shape[:3])


# ------------------------------------------------------------------------------------------- weights


def groups(valid: Tensor, scope: str) -> list[list[Index]]:
    """The valid places that are normalised or ranked together, each list in flat order."""
    ok, shape = rows(valid), tuple(valid.shape)
    out: dict[Index, list[Index]] = {}
    for i in places(shape):
        if not get(ok, i):
            continue
        head = i[2:]
        key = {"sequence": (i[0], *head), "batch": head, "all": ()}[scope]
        out.setdefault(key, []).append(i)
    return list(out.values())


def _usable(weight: float, largest: float) -> float:
    if math.isnan(weight) or weight <= 0:
        return 0.0
    return min(weight, largest)


def _mean_one(w: list[float]) -> list[float]:
    top = max(w)
    scaled = [x / top for x in w]
    mean = math.fsum(scaled) / len(w)
    return [x / mean for x in scaled]


def _clip(x: float, lo: float, hi: float) -> float:
    return min(max(x, lo), hi)


def clipped_mean_one(w: list[float], lo: float, hi: float) -> list[float]:
    n, positive = len(w), sum(x > 0 for x in w)
    if positive * hi + (n - positive) * lo < n:
        rest = (n - positive * hi) / (n - positive)
        return [hi if x > 0 else rest for x in w]
    w = _mean_one(w)
    left, right = -690.0, 690.0
    for _ in range(200):
        middle = (left + right) / 2
        mean = math.fsum(_clip(math.exp(middle) * x, lo, hi) for x in w) / n
        left, right = (middle, right) if mean < 1 else (left, middle)
    return [_clip(math.exp(right) * x, lo, hi) for x in w]


def _with_min_ess(w: list[float], rho: float) -> list[float]:
    n, total = len(w), math.fsum(w)
    mean = total / n
    variation = math.sqrt(math.fsum((x / mean - 1) ** 2 for x in w) / n)
    allowed = math.sqrt(1 / rho - 1)
    if variation <= allowed:
        return w
    mix = 1 - allowed / variation
    return [(1 - mix) * x + mix * mean for x in w]


def normalize_weights(
    weights: Tensor,
    valid: Tensor,
    *,
    mode: str = "mean_one",
    clip: tuple[float, float] | None = None,
    min_ess: float | None = None,
    scope: str = "batch",
    on_zero: str = "uniform",
) -> Tensor:
    largest = FLOAT32_MAX if weights.dtype != torch.float64 else 1.7976931348623157e308
    source, out = rows(weights), filled(weights.shape)
    for group in groups(valid, scope):
        w = [_usable(get(source, i), largest) for i in group]
        if max(w) == 0:
            w = [1.0 if on_zero == "uniform" else 0.0] * len(w)
        elif mode == "none":
            w = w if clip is None else [_clip(x, *clip) for x in w]
        else:
            w = _mean_one(w) if clip is None else clipped_mean_one(w, *clip)
        if min_ess is not None and max(w) > 0:
            w = _with_min_ess(w, min_ess)
        for i, x in zip(group, w, strict=True):
            put(out, i, x)
    return tensor(out, weights.shape)


def softmax_weights(
    scores: Tensor, valid: Tensor, *, temperature: float = 1.0, scope: str = "batch"
) -> Tensor:
    source, out = rows(scores), filled(scores.shape)
    for group in groups(valid, scope):
        s = [get(source, i) for i in group]
        s = [-math.inf if math.isnan(x) else min(x, FLOAT32_MAX) / temperature for x in s]
        top = max(s)
        e = [1.0 if top == -math.inf else math.exp(x - top) for x in s]
        total = math.fsum(e)
        for i, x in zip(group, e, strict=True):
            put(out, i, len(group) * x / total)
    return tensor(out, scores.shape)


def top_k_weights(
    scores: Tensor, valid: Tensor, *, keep: float = 0.6, scope: str = "batch"
) -> Tensor:
    source, out = rows(scores), filled(scores.shape)
    for group in groups(valid, scope):
        k = math.ceil(keep * len(group))

        def order(rank: int, group: list[Index] = group) -> tuple[bool, float, int]:
            score = get(source, group[rank])
            return (True, 0.0, rank) if math.isnan(score) else (False, -score, rank)

        for rank in sorted(range(len(group)), key=order)[:k]:
            put(out, group[rank], len(group) / k)
    return tensor(out, scores.shape)


def moments(scores: Tensor, valid: Tensor) -> list[tuple[float, float, float]]:
    """(count, mean, sum of squared distances) of the valid entries: one, or one per head."""
    source, ok = rows(scores), rows(valid)
    heads = range(scores.shape[2]) if scores.dim() == 3 else [None]
    out = []
    for h in heads:
        x = [
            get(source, i) for i in places(scores.shape) if get(ok, i) and (h is None or i[2] == h)
        ]
        mean = math.fsum(x) / len(x) if x else 0.0
        out.append((float(len(x)), mean, math.fsum((v - mean) ** 2 for v in x)))
    return out


def merged_moments(
    old: list[tuple[float, float, float]],
    new: list[tuple[float, float, float]],
    *,
    decay: float = 1.0,
) -> list[tuple[float, float, float]]:
    out = []
    for (na, ma, sa), (nb, mb, sb) in zip(old, new, strict=True):
        na, sa = na * decay, sa * decay
        n = na + nb
        if n == 0:
            out.append((0.0, 0.0, 0.0))
            continue
        shift = mb - ma
        out.append((n, ma + shift * nb / n, sa + sb + shift * shift * na * nb / n))
    return out


def exp_weights(
    scores: Tensor,
    valid: Tensor,
    *,
    beta: float = 1.0,
    clip: tuple[float, float] | None = (0.1, 3.0),
    whiten: bool = True,
    statistics: list[tuple[float, float, float]] | None = None,
    scope: str = "batch",
) -> Tensor:
    """exp of the whitened scores; the largest exponent of a scope is taken out, as the
    normalisation divides by it again."""
    source = rows(scores)
    known = statistics if statistics is not None else moments(scores, valid)
    exponent = filled(scores.shape)
    for i in places(scores.shape):
        if not rows(valid[i]):
            continue
        x = get(source, i)
        if whiten:
            n, mean, squares = known[i[2] if len(i) == 3 else 0]
            sigma = math.sqrt(squares / n)
            x = (x - mean) / sigma if sigma > 0 else 0.0
        put(exponent, i, x / beta)
    raw = filled(scores.shape)
    for group in groups(valid, scope):
        top = max(get(exponent, i) for i in group)
        for i in group:
            put(raw, i, math.exp(get(exponent, i) - top))
    return normalize_weights(tensor(raw, scores.shape), valid, clip=clip, scope=scope)


def rho1_weights(
    token_ce: Tensor,
    valid: Tensor,
    reference_nll: Tensor,
    *,
    keep: float = 0.6,
    mode: str = "top_k",
    temperature: float = 1.0,
    scope: str = "batch",
    offsets: int | Sequence[int] | None = None,
) -> Tensor:
    scores = excess_loss(token_ce, reference_nll, offsets=offsets)
    if mode == "top_k":
        return top_k_weights(scores, valid, keep=keep, scope=scope)
    return softmax_weights(scores, valid, temperature=temperature, scope=scope)


def critic_delta_weights(
    values: Tensor,
    valid: Tensor,
    *,
    lam: float = 0.0,
    mode: str = "exp",
    beta: float = 1.0,
    clip: tuple[float, float] | None = (0.1, 3.0),
    keep: float = 0.6,
    temperature: float = 1.0,
    whiten: bool = True,
    statistics: list[tuple[float, float, float]] | None = None,
    scope: str = "batch",
    **critic: Any,
) -> Tensor:
    scores = gae(values, valid, lam=lam, **critic)
    described = {
        name: x for name, x in critic.items() if name.endswith(("_mask", "_ids", "seqlens"))
    }
    homes = _homes(values.shape, **described)
    inside = [[home is not None for home in row] for row in homes]
    valid = valid & tensor(inside, values.shape, torch.bool)
    if mode == "softmax":
        return softmax_weights(scores, valid, temperature=temperature, scope=scope)
    if mode == "top_k":
        return top_k_weights(scores, valid, keep=keep, scope=scope)
    return exp_weights(
        scores,
        valid,
        beta=beta,
        clip=clip,
        whiten=whiten,
        statistics=statistics,
        scope=scope,
    )


def _mapped(
    scores: Tensor, valid: Tensor, of: Callable[[float], float], **normalisation: Any
) -> Tensor:
    source, out = rows(scores), filled(scores.shape)
    for i in places(scores.shape):
        if rows(valid[i]):
            put(out, i, of(get(source, i)))
    return normalize_weights(tensor(out, scores.shape), valid, **normalisation)


def dft_weights(token_ce: Tensor, valid: Tensor, **normalisation: Any) -> Tensor:
    return _mapped(token_ce, valid, lambda ce: math.exp(-ce), **normalisation)


def focal_weights(
    token_ce: Tensor, valid: Tensor, *, gamma: float = 2.0, **normalisation: Any
) -> Tensor:
    return _mapped(token_ce, valid, lambda ce: (-math.expm1(-ce)) ** gamma, **normalisation)


def power_weights(
    scores: Tensor, valid: Tensor, *, power: float = 1.0, **normalisation: Any
) -> Tensor:
    return _mapped(scores, valid, lambda s: s**power, **normalisation)


entropy_weights = power_weights
el2n_weights = power_weights


def score_weights(scores: Tensor, valid: Tensor, **normalisation: Any) -> Tensor:
    return _mapped(scores, valid, lambda s: s, **normalisation)


def group_relative_weights(
    rewards: Tensor,
    group_ids: Tensor,
    valid: Tensor,
    *,
    beta: float = 1.0,
    clip: tuple[float, float] | None = (0.1, 3.0),
) -> Tensor:
    advantage, ok = rows(group_advantages(rewards, group_ids)), rows(valid)
    raw = filled(valid.shape)
    for i in places(valid.shape):
        if get(ok, i):
            put(raw, i, math.exp(advantage[i[0]] / beta))
    return normalize_weights(tensor(raw, valid.shape), valid, clip=clip)


def span_weights(
    span_ids: Tensor,
    span_values: Tensor,
    valid: Tensor,
    *,
    outside: float = 1.0,
    **normalisation: Any,
) -> Tensor:
    span, value, ok = rows(span_ids), rows(span_values), rows(valid)
    raw = filled(valid.shape)
    for i in places(valid.shape):
        if get(ok, i):
            put(raw, i, outside if get(span, i) == -1 else value[get(span, i)])
    return normalize_weights(tensor(raw, valid.shape), valid, **normalisation)


def combine_weights(
    weights: Sequence[Tensor],
    valid: Tensor,
    *,
    mode: str = "mixture",
    coefficients: Sequence[float] | None = None,
    scope: str = "batch",
) -> Tensor:
    shape = tuple(valid.shape)
    share = [1.0] * len(weights) if coefficients is None else list(coefficients)
    out = filled(shape)
    if mode == "mixture":
        parts = [rows(normalize_weights(w, valid, scope=scope)) for w in weights]
        for i in places(shape):
            total = sum(c * get(part, i) for c, part in zip(share, parts, strict=True))
            put(out, i, total / sum(share))
        return tensor(out, shape)
    ok = rows(valid)
    sources = [rows(w) for w in weights]
    for i in places(shape):
        if not get(ok, i):
            continue
        entries = [get(s, i) for s in sources]
        if mode == "product":
            put(out, i, math.prod(entries))
        else:
            put(out, i, float(all(x > 0 for x in entries)))
    return normalize_weights(tensor(out, shape), valid, scope=scope)


# ---------------------------------------------------------------------------------------------- loss


def _spread_weights(
    weights: Tensor | None,
    shape: tuple[int, int, int],
    offsets: int | Sequence[int] | None,
    valid: Rows,
) -> Rows:
    """Weights aligned with predictions; places that are not valid are left at 0, unread."""
    out, source = filled(shape), rows(weights)
    steps = offset_list(offsets, shape[2])
    for b, t, h in places(shape):
        if not valid[b][t][h]:
            continue
        if source is None:
            out[b][t][h] = 1.0
        elif weights is not None and weights.dim() == 2:
            out[b][t][h] = source[b][t + steps[h]]
        else:
            out[b][t][h] = source[b][t][h]
    return out


def _weighted(
    loss: Rows,
    weight: Rows,
    valid: Rows,
    shape: tuple[int, int, int],
    head_weights: Sequence[float] | None,
    normalizer: str | float,
) -> tuple[float, Rows, Rows]:
    """(loss, d/d per-prediction loss, d/d weight)."""
    heads = shape[2]
    share = [1.0 / heads] * heads if head_weights is None else [float(x) for x in head_weights]
    kept = [i for i in places(shape) if get(valid, i)]
    numerator = math.fsum(share[i[2]] * get(weight, i) * get(loss, i) for i in kept)
    if normalizer == "weights":
        z = math.fsum(get(weight, i) for i in kept) / heads
    elif normalizer == "tokens":
        z = len(kept) / heads
    else:
        z = float(normalizer)
    to_loss, to_weight = filled(shape), filled(shape)
    if z == 0:
        return 0.0, to_loss, to_weight
    for i in kept:
        put(to_loss, i, share[i[2]] * get(weight, i) / z)
        g = share[i[2]] * get(loss, i) / z
        if normalizer == "weights":
            g -= numerator / (z * z * heads)
        put(to_weight, i, g)
    return numerator / z, to_loss, to_weight


def weighted_mean(
    token_ce: Tensor,
    weights: Tensor | None,
    valid: Tensor,
    *,
    head_weights: Sequence[float] | None = None,
    normalizer: str | float = "weights",
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, gradient for token_ce, gradient for weights)."""
    shape = tuple(token_ce.shape)
    ok = rows(valid)
    weight = _spread_weights(weights, shape, None, ok)
    value, to_loss, to_weight = _weighted(
        rows(token_ce), weight, ok, shape, head_weights, normalizer
    )
    return tensor(value, ()), tensor(to_loss, shape), tensor(to_weight, shape)


def weighted_mtp_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    offsets: int | Sequence[int] | None = None,
    head_weights: Sequence[float] | None = None,
    normalizer: str | float = "weights",
    upstream: float = 1.0,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients for logits and, where they are given, for weights)."""
    loss, _, grad, valid, (batch, seq, heads, vocab) = cells(
        logits, labels, offsets=offsets, **options
    )
    shape = (batch, seq, heads)
    weight = _spread_weights(weights, shape, offsets, valid)
    value, to_loss, to_weight = _weighted(loss, weight, valid, shape, head_weights, normalizer)
    out = filled((batch, seq, heads, vocab))
    for i in places(shape):
        put(out, i, [upstream * get(to_loss, i) * g for g in get(grad, i)])
    gradients = {"logits": tensor(out, (batch, seq, heads, vocab)).reshape(logits.shape)}
    if weights is not None:
        back, steps = filled(weights.shape), offset_list(offsets, heads)
        for b, t, h in places(shape):
            if not valid[b][t][h]:
                continue
            home = (b, t + steps[h]) if weights.dim() == 2 else (b, t, h)
            put(back, home, get(back, home) + upstream * to_weight[b][t][h])
        gradients["weights"] = tensor(back, weights.shape)
    return tensor(value, ()), gradients


def linear_weighted_mtp_loss(
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    logits = linear_logits(hidden, unembedding, bias)
    loss, gradients = weighted_mtp_loss(logits, labels, weights, **options)
    out = through_linear(gradients.pop("logits"), hidden, unembedding, bias)
    return loss, {**out, **gradients}


def loss_stats(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    offsets: int | Sequence[int] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    loss, ce, _, valid, (batch, seq, heads, vocab) = cells(
        logits, labels, offsets=offsets, **options
    )
    ignore_index = options.get("ignore_index", -100)
    shape = (batch, seq, heads)
    weight = _spread_weights(weights, shape, offsets, valid)
    value, target = rows(_with_heads(logits)), _targets_of(labels, heads, offsets, ignore_index)
    head_loss, correct, total, count = ([0.0] * heads for _ in range(4))
    for i in places(shape):
        if not get(valid, i):
            continue
        h, row = i[2], get(value, i)
        best = max(range(vocab), key=lambda v: row[v])
        head_loss[h] += get(weight, i) * get(loss, i)
        correct[h] += best == get(target, i)
        total[h] += get(weight, i)
        count[h] += 1
    return {
        "token_ce": tensor(ce, shape),
        "head_loss": tensor(head_loss, (heads,)),
        "head_accuracy": tensor(correct, (heads,)),
        "weight_sum": tensor(total, (heads,)),
        "token_count": tensor(count, (heads,)),
    }


# -------------------------------------------------------------------------------------------- critic


def lambda_returns(
    values: Tensor,
    rewards: Tensor,
    valid: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    **documents: Tensor | None,
) -> Tensor:
    batch, seq = values.shape
    value, reward, ok = rows(values), rows(rewards), rows(valid)
    homes = _homes((batch, seq), **documents)
    out = filled((batch, seq))
    for b in range(batch):
        for tokens in _trained(homes[b], ok[b]).values():
            following: int | None = None
            for j in reversed(tokens):
                ahead = 0.0
                if following is not None:
                    ahead = (1 - lam) * value[b][following] + lam * out[b][following]
                out[b][j] = reward[b][j] + gamma * ahead
                following = j
    return tensor(out, (batch, seq))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _sigmoid(x: float) -> float:
    return math.exp(-_softplus(-x))


def value_loss(
    values: Tensor, targets: Tensor, valid: Tensor, *, kind: str = "mse", delta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(loss, gradient for values)."""
    batch, seq = values.shape
    value, target, ok = rows(values), rows(targets), rows(valid)
    used = [b for b in range(batch) if any(ok[b])]
    grad, total = filled((batch, seq)), 0.0
    for b in used:
        tokens = [t for t in range(seq) if ok[b][t]]
        for t in tokens:
            v, g = value[b][t], target[b][t]
            if kind == "mse":
                one, slope = (v - g) ** 2, 2 * (v - g)
            elif kind == "huber":
                far = abs(v - g) > delta
                one = delta * (abs(v - g) - delta / 2) if far else (v - g) ** 2 / 2
                slope = math.copysign(delta, v - g) if far else v - g
            else:
                one, slope = _softplus(v) - g * v, _sigmoid(v) - g
            total += one / len(tokens) / len(used)
            grad[b][t] = slope / len(tokens) / len(used)
    return tensor(total, ()), tensor(grad, (batch, seq))


def pairwise_ranking_loss(
    chosen_values: Tensor,
    rejected_values: Tensor,
    chosen_valid: Tensor,
    rejected_valid: Tensor,
    *,
    pool: str = "last",
    margin: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient for the chosen values, gradient for the rejected values)."""
    sides = [
        (rows(chosen_values), rows(chosen_valid)),
        (rows(rejected_values), rows(rejected_valid)),
    ]
    batch = chosen_values.shape[0]

    def tokens(side: int, b: int) -> list[int]:
        ok = sides[side][1][b]
        found = [t for t in range(len(ok)) if ok[t]]
        return found[-1:] if pool == "last" else found

    pairs = [b for b in range(batch) if tokens(0, b) and tokens(1, b)]
    grads = [filled(chosen_values.shape), filled(rejected_values.shape)]
    total = 0.0
    for b in pairs:
        pooled = [sum(sides[s][0][b][t] for t in tokens(s, b)) / len(tokens(s, b)) for s in (0, 1)]
        gap = pooled[0] - pooled[1] - margin
        total += _softplus(-gap) / len(pairs)
        for s, sign in ((0, -1.0), (1, 1.0)):
            for t in tokens(s, b):
                grads[s][b][t] = sign * _sigmoid(-gap) / len(tokens(s, b)) / len(pairs)
    return (
        tensor(total, ()),
        tensor(grads[0], chosen_values.shape),
        tensor(grads[1], rejected_values.shape),
    )


# ---------------------------------------------------------------------------------------- statistics


def quantile(ordered: list[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def weight_statistics(weights: Tensor, valid: Tensor, *, extreme: float = 5.0) -> dict[str, float]:
    source, ok = rows(weights), rows(valid)
    entries = [get(source, i) for i in places(weights.shape) if get(ok, i)]
    w = sorted(x for x in entries if math.isfinite(x))
    n, total = len(w), math.fsum(w)
    out = dict.fromkeys(
        [
            "weight_mean",
            "weight_std",
            "weight_min",
            "weight_max",
            "weight_p25",
            "weight_p50",
            "weight_p75",
            "weight_p95",
            "weight_entropy",
            "effective_sample_ratio",
            "zero_fraction",
        ],
        0.0,
    )
    out["nan_weights"] = float(len(entries) - n)
    out["extreme_weights"] = float(sum(x > extreme for x in entries))
    if n == 0:
        return out
    mean = total / n
    out["weight_mean"] = mean
    out["weight_std"] = math.sqrt(math.fsum((x - mean) ** 2 for x in w) / n)
    out["weight_min"], out["weight_max"] = w[0], w[-1]
    for q in (25, 50, 75, 95):
        out[f"weight_p{q}"] = quantile(w, q / 100)
    out["zero_fraction"] = sum(x == 0 for x in w) / n
    if total > 0:
        shares = [x / total for x in w]
        entropy = -math.fsum(p * math.log(p) for p in shares if p > 0)
        out["weight_entropy"] = entropy / math.log(n) if n > 1 else 1.0
        out["effective_sample_ratio"] = total * total / (n * math.fsum(x * x for x in w))
    return out
