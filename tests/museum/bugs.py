"""The bugs: what went wrong, where it was seen, and how it looks in our code.

Each is the smallest change of ours that makes the same mistake. It must import, and an old text must
stand in its file exactly once; `tests/test_museum.py` checks both.
"""

from __future__ import annotations

from typing import NamedTuple


class Change(NamedTuple):
    """One replacement in one file."""

    file: str
    old: str
    new: str


class Bug(NamedTuple):
    """A mistake of the field.

    Attributes:
        name: what to call it.
        story: what goes wrong, in one line.
        seen: who has met it, in markdown.
        changes: the replacements that plant it.
        tests: what pytest is given first.
    """

    name: str
    story: str
    seen: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...]


def _issue(repository: str, number: int) -> str:
    # GitHub forwards from issues to pull requests.
    short = repository.split("/")[1]
    return f"[{short} #{number}](https://github.com/{repository}/issues/{number})"


def _issues(repository: str, *numbers: int) -> str:
    return ", ".join(_issue(repository, number) for number in numbers)


def _bug(name: str, story: str, seen: str, file: str, old: str, new: str, *tests: str) -> Bug:
    return Bug(name, story, seen, (Change(file, old, new),), tuple(f"tests/{t}" for t in tests))


_MEGATRON, _LIGER, _TRL = "NVIDIA/Megatron-LM", "linkedin/Liger-Kernel", "huggingface/trl"
_HF, _VERL, _CCE = "huggingface/transformers", "verl-project/verl", "apple/ml-cross-entropy"
_MILES, _AUTOMODEL = "radixark/miles", "NVIDIA-NeMo/Automodel"

TARGETS = (
    _bug(
        "off-by-one head",
        "the first head is asked for the token it has just read, every other for one too near",
        _issues(_MILES, 3219, 3233) + ", " + _issue(_VERL, 6432),
        "wmtp/targets.py",
        "return tuple(range(1, offsets + 1))",
        "return tuple(range(offsets))",
        "test_targets.py",
    ),
    _bug(
        "wrap-around roll",
        "labels are rolled, so the last positions of a row are trained on its first tokens",
        _issue(_VERL, 6475) + ", [BIG-bench #876](https://github.com/google/BIG-bench/pull/876)",
        "wmtp/targets.py",
        "[padded[:, step : step + seq] for step in steps]",
        "[padded[:, :seq].roll(-step, 1) for step in steps]",
        "test_targets.py",
    ),
    _bug(
        "document boundary leak",
        "only the first label of each packed document is masked: head k still sees k − 1 of its tokens",
        "packing collators of transformers and TRL, made for next-token prediction",
        "wmtp/targets.py",
        """    for ids in documents.ids:
        together = together & (
            rearrange(ids, "batch seq -> batch seq 1") == align_to_heads(ids, offsets)
        )
""",
        """    if documents.ids:
        together = together & align_to_heads(documents.continues(), offsets)
""",
        "test_targets.py",
    ),
    _bug(
        "padding matched as target",
        "the mask is applied where a prediction is made, not where its target stands",
        _issue("modelscope/ms-swift", 8192) + ", " + _issue(_CCE, 59),
        "wmtp/targets.py",
        """ & align_to_heads(
        documents.real, offsets
    )
""",
        """ & torch.ones_like(targets).bool()
""",
        "test_targets.py",
    ),
    _bug(
        "labels mutated",
        "the caller's labels are masked in place; the next loss that reads them sees fewer targets",
        _issue(_AUTOMODEL, 3917),
        "wmtp/targets.py",
        """    targets = align_to_heads(labels, offsets)
""",
        """    if attention_mask is not None:
        labels.masked_fill_(attention_mask == 0, ignore_index)
    targets = align_to_heads(labels, offsets)
""",
        "test_targets.py",
    ),
    _bug(
        "padding behind cu_seqlens",
        "tokens behind the last boundary count as one more document",
        _issue(_MEGATRON, 6205),
        "wmtp/documents.py",
        "real = real & (place < cu_seqlens[-1])",
        "real = real & (place >= 0)",
        "test_targets.py",
    ),
    _bug(
        "cu_seqlens off by one",
        "a boundary belongs to the document before it: its first token is trained across it",
        _issue(_VERL, 6475),
        "wmtp/documents.py",
        "place, right=True)",
        "place, right=False)",
        "test_targets.py",
    ),
    _bug(
        "numbered attention mask",
        "a mask whose numbers tell packed documents apart is read as one of padding alone",
        "packing collators of axolotl and LLaMA-Factory",
        "wmtp/documents.py",
        "ids.append(attention_mask)",
        "ids.append(real)",
        "test_targets.py",
    ),
)

CROSS_ENTROPY = (
    _bug(
        "NaN from an ignored row",
        "the loss of an ignored row is masked, its logits are not: NaN · 0 reaches the gradient",
        "`torch.nn.functional.cross_entropy` with `ignore_index`",
        "wmtp/cross_entropy.py",
        "wide(torch.where(rows, logits, 0))",
        "wide(logits)",
        "test_cross_entropy.py",
    ),
    _bug(
        "all ignored",
        "the mean over no valid prediction is 0/0",
        _issue(_LIGER, 177)
        + ", [torchtune #2341](https://github.com/pytorch/torchtune/issues/2341), "
        + _issue(_AUTOMODEL, 3796),
        "wmtp/cross_entropy.py",
        "total / found.valid.sum().clamp(min=1)",
        "total / found.valid.sum()",
        "test_cross_entropy.py",
    ),
    _bug(
        "mean over padding",
        "the sum over valid predictions is divided by the number of all",
        _issue("EleutherAI/gpt-neo", 45),
        "wmtp/cross_entropy.py",
        "total / found.valid.sum().clamp(min=1)",
        "total / max(1, found.valid.numel())",
        "test_cross_entropy.py",
    ),
    _bug(
        "softmax in the dtype of the logits",
        "bfloat16 logits are not widened before the softmax",
        _issue("vllm-project/speculators", 788),
        "wmtp/_dtypes.py",
        "return tensor.to(wide_dtype(tensor.dtype))",
        "return tensor",
        "test_cross_entropy.py",
    ),
    _bug(
        "accuracy over ignored labels",
        "ignored places count as right where the first token happens to be the most probable",
        _issue("modelscope/ms-swift", 10049),
        "wmtp/cross_entropy.py",
        "correct = valid & (scores.argmax",
        "correct = (scores.argmax",
        "test_loss.py::test_statistics_follow_the_oracle",
    ),
    _bug(
        "reference NLL one token early",
        "the reference's log-probabilities stay at the position that made them, not at their token",
        _issue(_MILES, 3219) + ", " + _issue(_VERL, 6432),
        "wmtp/cross_entropy.py",
        "return shift_right(predict(logits, targets, None, ignore_index, objective).loss[..., 0])",
        "return predict(logits, targets, None, ignore_index, objective).loss[..., 0]",
        "test_cross_entropy.py",
    ),
    _bug(
        "softcap without its factor",
        "logits are multiplied with tanh(logits / softcap), which caps nothing",
        _issue("unslothai/unsloth-zoo", 593),
        "wmtp/cross_entropy.py",
        "softcap * torch.tanh(scores / softcap)",
        "scores * torch.tanh(scores / softcap)",
        "test_cross_entropy.py",
    ),
)

SCORES = (
    _bug(
        "absolute excess",
        "tokens that the model predicts better than the reference are trained hardest",
        "ports of Rho-1 that take the absolute difference of the two losses",
        "wmtp/scores.py",
        "return wide(token_ce) - wide(reference_nll)",
        "return (wide(token_ce) - wide(reference_nll)).abs()",
        "test_scores.py",
    ),
    _bug(
        "double shift of the reference",
        "a reference that is already indexed by token is shifted once more",
        _issue(_MILES, 2215),
        "wmtp/scores.py",
        "reference_nll = align_to_heads(reference_nll, steps)",
        "reference_nll = align_to_heads(reference_nll, [step + 1 for step in steps])",
        "test_scores.py",
    ),
    _bug(
        "terminal delta that drops a term",
        "the last delta is R − V_last, so V_last − V_{last−1} is nobody's",
        "token-advantage code whose terminal rule differs from its GAE",
        "wmtp/scores.py",
        "after = torch.where(tracks.last(), 0, after)",
        "after, before = (torch.where(tracks.last(), x, y) for x, y in ((0, after), (values, before)))",
        "test_scores.py",
    ),
    _bug(
        "level leaks into the delta",
        "V_t − 0.95 V_{t−1} weights by the level of the value, not by its change",
        "critic-weighted training code with the discount on the wrong value",
        "wmtp/scores.py",
        "earned + gamma * after - before",
        "earned + after - gamma * before",
        "test_scores.py",
    ),
    _bug(
        "deltas in bfloat16",
        "values are subtracted in the dtype of the model, where small changes are 0",
        "token-advantage code that keeps the dtype of a bfloat16 critic; cf. "
        + _issue("vllm-project/speculators", 788),
        "wmtp/scores.py",
        "    values = wide(values)\n    if initial_value",
        "    if initial_value",
        "test_scores.py",
    ),
    _bug(
        "group of one",
        "an answer without rivals gets its raw reward as its advantage",
        "verl's GRPO outcome advantage",
        "wmtp/scores.py",
        "return torch.where(alone, 0, ",
        "return torch.where(alone, rewards, ",
        "test_scores.py",
    ),
    _bug(
        "entropy of a masked vocabulary",
        "0 · −inf makes the entropy NaN",
        _issue(_TRL, 7221) + ", " + _issue("pytorch/pytorch", 40553),
        "wmtp/scores.py",
        "torch.where(p > 0, log_p, 0)",
        "log_p",
        "test_scores.py",
    ),
    _bug(
        "entropy with a NaN gradient",
        "NaN is replaced after the product, so the value is right and its gradient NaN",
        _issue(_TRL, 7252),
        "wmtp/scores.py",
        "-(p * torch.where(p > 0, log_p, 0)).sum(-1)",
        "-(p * log_p).nan_to_num(nan=0.0).sum(-1)",
        "test_operators.py",
        "test_scores.py",
    ),
    _bug(
        "sum divided by powers of the discount",
        "advantages as a cumulative sum over γ^t: not finite after a few thousand tokens",
        "vectorised GAE by cumulative sums",
        "wmtp/scans.py",
        "    step = 1\n    while step <",
        """    if bool((coefficients[:, :-1] != 0).all()):
        ones = torch.ones_like(coefficients[:, :1])
        powers = torch.cat([ones, coefficients[:, :-1].cumprod(1)], 1)
        return (terms * powers).flip(1).cumsum(1).flip(1) / powers
    step = 1
    while step <""",
        "test_scores.py",
        "test_critic.py",
    ),
    _bug(
        "reward lost at tool output",
        "the running return is reset at untrained tokens, so what came before them learns nothing",
        _issues(_VERL, 7278, 6376),
        "wmtp/scans.py",
        "coefficients.masked_fill(~tracks.inner, 0)",
        "coefficients.masked_fill(~tracks.inner | ~tracks.trained, 0)",
        "test_scores.py",
    ),
    _bug(
        "discount for tool output",
        "every observation token costs one more step of γλ",
        _issue(_MILES, 1827),
        "wmtp/scans.py",
        "torch.ones_like(terms).masked_fill(tracks.trained, decay)",
        "torch.full_like(terms, decay)",
        "test_scores.py",
    ),
    _bug(
        "value across documents",
        "the last value of one packed document is the next one's V_{−1}",
        _issue("alibaba/ROLL", 447),
        "wmtp/scans.py",
        'find_documents(values, **descriptions, name="values")',
        'find_documents(values, name="values")',
        "test_scores.py",
    ),
)

WEIGHTS = (
    _bug(
        "ties over-selected",
        "everything at the threshold is kept: with many equal scores, nearly all",
        "TRL's high-entropy mask, `entropies >= quantile`",
        "wmtp/selection.py",
        "return selected | (tied & (above + place <= wanted))",
        "return selected | tied",
        "test_weights.py",
    ),
    _bug(
        "NaN ranked first",
        "a sort puts NaN above every number, so unscored tokens are selected",
        "`torch.sort` and `torch.topk`",
        "wmtp/selection.py",
        "torch.where(scores.isnan(), 0, ordered if wide else ordered & 0xFFFFFFFF)",
        "ordered if wide else ordered & 0xFFFFFFFF",
        "test_weights.py",
    ),
    _bug(
        "k of the padded size",
        "the share is taken of all entries, so padding makes the valid ones keep more",
        "rlax `mpo_ops`, top-k fraction",
        "wmtp/selection.py",
        "scoped.total(valid.long())",
        "scoped.total(torch.ones_like(valid).long())",
        "test_weights.py",
    ),
    _bug(
        "invalid entries in the quantile",
        "padding takes places in the ranking and moves the threshold",
        _issue(_TRL, 3709),
        "wmtp/selection.py",
        "tied, selected = valid, torch.zeros_like(valid)",
        "tied, selected = torch.ones_like(valid), torch.zeros_like(valid)",
        "test_weights.py",
    ),
    _bug(
        "all heads in one ranking",
        "far heads have larger losses, so they take the places of near ones",
        "Rho-1 applied to several heads as if they were one",
        "wmtp/scopes.py",
        '("batch", 3): "b t h -> h (b t)"',
        '("batch", 3): "b t h -> 1 (b t h)"',
        "test_weights.py",
    ),
    _bug(
        "a rank that skips a collective",
        "a rank without valid tokens returns before the all-reduce, and the others wait for ever",
        _issue(_TRL, 3933) + ", " + _issue(_AUTOMODEL, 2468),
        "wmtp/scopes.py",
        """        if self._group is not None:
            op =""",
        """        if self._group is not None and bool((tensor > 0).any()):
            op =""",
        "test_distributed.py",
    ),
    _bug(
        "denominator per rank",
        "each rank normalises by its own count, so tokens of short ranks count more",
        _issue(_MEGATRON, 7452),
        "wmtp/scopes.py",
        'None if scope == "sequence" else group',
        "None",
        "test_distributed.py",
    ),
    _bug(
        "ties counted once per rank",
        "every rank keeps the entries at the global threshold as if it were alone",
        "thresholds gathered across ranks, as in TRL's high-entropy mask",
        "wmtp/scopes.py",
        "torch.stack([torch.zeros_like(count), *every[:rank]]).sum(0)",
        "torch.zeros_like(count)",
        "test_distributed.py",
    ),
    _bug(
        "clipped after normalising",
        "clipping last breaks the mean, and with it the learning rate",
        "advantage-weighted fine-tuning that clips exp(A / β) and divides by the token count",
        "wmtp/normalize.py",
        "out = _project(raw, inside, count, clip, scoped)",
        "out = (raw * (count / scoped.total(raw).clamp(min=1))).clamp(*clip)",
        "test_normalize.py",
    ),
    _bug(
        "normalised after clipping",
        "normalising last takes the weights out of their bounds",
        "mean-one normalisation of clipped advantage weights",
        "wmtp/normalize.py",
        "out = _project(raw, inside, count, clip, scoped)",
        """clipped = torch.where(inside, raw.clamp(*clip), 0)
        out = clipped * (count / scoped.total(clipped).clamp(min=1e-30))""",
        "test_normalize.py",
    ),
    _bug(
        "first batch not whitened",
        "running statistics start at mean 0 and deviation 1 and are used before the first update",
        "exponential moving averages of TD statistics",
        "wmtp/weights.py",
        "fresh = statistics.flat",
        """fresh = torch.zeros_like(statistics.m2).bool()
            blank = (statistics.m2 <= 0).to(found.mean)
            statistics = WhiteningStatistics(
                torch.maximum(statistics.count, blank), statistics.mean, statistics.m2 + blank
            )""",
        "test_weights.py",
    ),
    _bug(
        "variance by subtraction",
        "E[x²] − E[x]² cancels when the mean is large",
        "exponential moving averages of TD statistics",
        "wmtp/whitening.py",
        "m2 = scoped.total(torch.where(use, values - mean, 0).square())",
        """squares = scoped.total(torch.where(use, values, 0).square())
    m2 = (squares - count * mean.square()).clamp(min=0)""",
        "test_weights.py",
    ),
    _bug(
        "1 − p cancels",
        "the focal factor of a sure token, 1 − exp(−CE), is 0 in float32",
        "focal losses written as (1 − exp(−CE))^γ",
        "wmtp/methods.py",
        "(-torch.expm1(-wide(token_ce.detach())))",
        "(1 - torch.exp(-wide(token_ce.detach())))",
        "test_weights.py",
    ),
    Bug(
        "weights carry gradient to the critic",
        "nothing is detached: the cross entropy trains the critic to weight easy tokens",
        "critic-weighted training code without a stop-gradient",
        (
            Change("wmtp/methods.py", "        values.detach(),\n", "        values,\n"),
            Change("wmtp/weights.py", "scaled = wide(scores.detach())", "scaled = wide(scores)"),
            Change(
                "wmtp/weights.py",
                "ranked = wide(scoped.split(scores.detach()))\n    limit",
                "ranked = wide(scoped.split(scores))\n    limit",
            ),
            Change("wmtp/normalize.py", "scoped.split(weights.detach())", "scoped.split(weights)"),
        ),
        ("tests/test_weights.py",),
    ),
    _bug(
        "prompt zeros shuffled into the response",
        "the control permutes over the attention mask, so the zeros of the prompt wander",
        "shuffled controls over `attention_mask` in place of the loss mask",
        "wmtp/controls.py",
        "torch.where(valid, keys, 2.0).argsort(dim=1)",
        "keys.argsort(dim=1)",
        "test_controls.py",
    ),
    _bug(
        "random control of another distribution",
        "weights are drawn from a fitted log-normal and clipped, not from those they stand for",
        "random controls LogNormal(μ, σ) clipped to the bounds of the weights",
        "wmtp/controls.py",
        "return _deal(weights, valid, places, places.gather(1, draw))",
        """drawn = torch.exp(1.5 * torch.erfinv(2 * _uniform(valid, generator) - 1)).clamp(0.1, 3.0)
    return torch.where(valid, drawn.to(wide(weights).dtype), 0)""",
        "test_controls.py",
    ),
    _bug(
        "product that underflows",
        "weights are multiplied before they are normalised, and tiny ones vanish",
        "products of per-token weights in float32",
        "wmtp/combine.py",
        "return softmax_weights(logs, valid, scope=scope, group=group)",
        "return normalize_weights(logs.exp(), valid, scope=scope, group=group)",
        "test_weights.py",
    ),
    _bug(
        "DFT in the dtype of the logits",
        "the probability that weights a token is rounded to bfloat16",
        "Liger-Kernel `use_token_scaling`, softmax in the dtype of the logits",
        "wmtp/row_local.py",
        """        score = torch.exp(-ce) if kind == "dft" else -torch.expm1(-ce)
""",
        """        score = torch.exp(-ce).bfloat16().to(ce.dtype) if kind == "dft" else -torch.expm1(-ce)
""",
        "test_row_local.py",
    ),
)

LOSS = (
    _bug(
        "mean of means",
        "every head is divided by its own sum of weights, so the tokens of far heads count more",
        _issues(_MEGATRON, 2417, 3159) + ", " + _issue("NVIDIA-NeMo/RL", 230),
        "wmtp/denominators.py",
        "whole = used.sum() / heads",
        "whole = used.sum((0, 1)).clamp(min=torch.finfo(dtype).tiny)",
        "test_loss.py",
    ),
    _bug(
        "denominator per micro-batch",
        "the caller's count over the accumulation window is ignored",
        _issues(_HF, 34191, 37766) + ", " + _issue(_VERL, 7321),
        "wmtp/denominators.py",
        "whole = count_of(normalizer, used)",
        "whole = valid.sum().to(dtype) / heads",
        "test_loss.py",
    ),
    _bug(
        "times the number of processes twice",
        "the loss is scaled by the world size, which the trainer does as well",
        _issue(_HF, 34373),
        "wmtp/denominators.py",
        "    return used * (head_weights_of(head_weights, used) * reciprocal(whole))",
        """    if torch.distributed.is_initialized():
        whole = whole / torch.distributed.get_world_size()
    return used * (head_weights_of(head_weights, used) * reciprocal(whole))""",
        "test_distributed.py",
    ),
    _bug(
        "empty head divides by zero",
        "heads that look past every row have no target: 0/0",
        _issue("modelscope/mcore-bridge", 104) + ", " + _issue(_VERL, 6464),
        "wmtp/denominators.py",
        "return torch.where(empty, 0, 1 / torch.where(empty, 1, count))",
        "return torch.where(empty, torch.nan, 1 / torch.where(empty, 1, count))",
        "test_loss.py",
    ),
    _bug(
        "sum of weights clamped to one",
        "a clamp made for counts is applied to a sum of weights, and small weights shrink the loss",
        "`loss_mask.sum().clamp(min=1)` denominators, as in speculators",
        "wmtp/denominators.py",
        "return torch.where(empty, 0, 1 / torch.where(empty, 1, count))",
        "return 1 / count.clamp(min=1)",
        "test_loss.py",
    ),
    _bug(
        "token weights cancel",
        "each position is divided by its own sum over the heads: a weight per token does nothing",
        "multi-token losses normalised over the heads of a position",
        "wmtp/denominators.py",
        "        whole = used.sum() / heads",
        """        over_heads = used.sum(-1, keepdim=True)
        used = used / torch.where(over_heads > 0, over_heads, 1)
        whole = used.sum() / heads""",
        "test_loss.py",
    ),
    _bug(
        "weights in an integer mask",
        "fractional weights travel in an integer mask and are cut to 0",
        "tinker-cloud #65",
        "wmtp/denominators.py",
        "used = torch.where(valid, weights.to(dtype), 0)\n    if",
        "used = torch.where(valid, weights.to(torch.int64).to(dtype), 0)\n    if",
        "test_loss.py",
    ),
    _bug(
        "weights silently dropped",
        "the fused path takes weights and does not use them",
        _issue("modelscope/ms-swift", 10100),
        "wmtp/loss.py",
        "    used = _align_weights(weights, valid, offsets)\n    factors",
        "    used = _align_weights(None, valid, offsets)\n    factors",
        "test_loss.py",
    ),
    _bug(
        "weights one token off",
        "a token's weight is used where the token is read, not where it is predicted",
        _issues(_MILES, 3219, 3233),
        "wmtp/loss.py",
        'return align_to_heads(weights, offsets_for(offsets, valid.shape[2], "the predictions"))',
        "return weights.unsqueeze(-1).expand(valid.shape)",
        "test_loss.py",
    ),
    _bug(
        "head weights renormalised",
        'λ is divided by its sum, so "plus 0.1 times each extra head" is something else',
        "speculators, whose step weights are normalised",
        "wmtp/denominators.py",
        "return head_weights.to(like)",
        "return head_weights.to(like) / head_weights.to(like).sum()",
        "test_loss.py",
    ),
    _bug(
        "disconnected zero",
        "a batch without targets returns a fresh tensor(0.), and backward raises or a rank hangs",
        "trainers that return `torch.tensor(0.)`; TRL keeps the zero connected for this reason",
        "wmtp/denominators.py",
        "    values = torch.where(valid, wide(token_ce), 0)\n",
        """    if not bool(valid.any()):
        return wide(token_ce).new_zeros(())
    values = torch.where(valid, wide(token_ce), 0)
""",
        "test_loss.py",
    ),
    _bug(
        "statistics as means",
        "the logged loss of a head is a mean already, so micro-batches cannot be added",
        _issue("NVIDIA-NeMo/RL", 230) + ", " + _issue(_MEGATRON, 5543),
        "wmtp/loss.py",
        "return MTPLossStats(found.ce, sums[0], ",
        "return MTPLossStats(found.ce, sums[0] / sums[2].clamp(min=1), ",
        "test_loss.py",
    ),
)

LINEAR = (
    _bug(
        "ignored grad_output",
        "the gradient made in the forward pass is returned whatever comes from above",
        "torchtitan `ChunkedLossWrapper`",
        "wmtp/operators.py",
        "        upstream = grad_outputs[0]\n",
        "        upstream = torch.ones_like(grad_outputs[0])\n",
        "test_loss_autograd.py",
        "test_loss.py",
    ),
    _bug(
        "upstream gradient of element 0",
        "with reduction none, every row is scaled by the upstream gradient of the first",
        _issues(_LIGER, 968, 678, 1298),
        "wmtp/operators.py",
        "inputs = (upstream, *saved, *options",
        "inputs = (upstream[:1].expand_as(upstream), *saved, *options",
        "test_linear_cross_entropy.py",
    ),
    _bug(
        "gradients gated on the input",
        "a frozen trunk with a trainable unembedding gets no gradient at all",
        "Liger-Kernel, fused linear cross entropy",
        "wmtp/schedule.py",
        "tensor.requires_grad for tensor in problem[:3]",
        "tensor.requires_grad and problem.hidden.requires_grad for tensor in problem[:3]",
        "test_loss_autograd.py",
    ),
    _bug(
        "second backward scaled twice",
        "gradients kept for the backward pass are scaled in place, so the next pass finds them scaled",
        _issue("Dao-AILab/quack", 209),
        "wmtp/operators.py",
        "in_place = _checks.has_values(scale) and not _graph_is_kept()",
        "in_place = _checks.has_values(scale)",
        "test_loss_autograd.py",
    ),
    _bug(
        "bf16 accumulation",
        "the gradient of the unembedding is added up in bfloat16, rounded once per chunk",
        _issues(_LIGER, 512, 827) + ", " + _issues(_CCE, 14, 18),
        "wmtp/slab_rows.py",
        "of_weight = unfilled(weight, weight.shape if needs[1] else (0,), dtype, active)",
        "of_weight = unfilled(weight, weight.shape if needs[1] else (0,), weight.dtype, active)",
        "test_linear_cross_entropy.py",
        "test_loss_autograd.py",
    ),
    _bug(
        "bias of the first chunk",
        "every slab of the vocabulary gets the bias of the first",
        _issue(_CCE, 52),
        "wmtp/slab_columns.py",
        "problem.bias[part]",
        "problem.bias[: part.stop - part.start]",
        "test_linear_cross_entropy.py",
    ),
    _bug(
        "answer depends on the chunk size",
        "label smoothing is spread over the columns of a slab, not over the vocabulary",
        _issue(_AUTOMODEL, 3804),
        "wmtp/slab_softmax.py",
        "p.sub_(label_smoothing / vocab)",
        "p.sub_(label_smoothing / logits.shape[1])",
        "test_linear_cross_entropy.py",
    ),
    _bug(
        "small gradients filtered out",
        "probabilities below 2⁻¹² are dropped before the weight of the token is known",
        "cut-cross-entropy `filter_eps`, " + _issue(_CCE, 18),
        "wmtp/slab_softmax.py",
        "    if p is not slab:",
        "    p.masked_fill_(p < 2**-12, 0)\n    if p is not slab:",
        "test_linear_cross_entropy.py",
    ),
    _bug(
        "target's gradient rounded with the others",
        "p − 1 of a sure target is formed in bfloat16, where it cancels",
        _issues(_LIGER, 1329, 1419),
        "wmtp/slab_softmax.py",
        "    return rows, at_target, row_scale",
        "    return rows, at_target.to(logits.dtype).to(ce.dtype), row_scale",
        "test_linear_cross_entropy.py",
    ),
    _bug(
        "target of another slab",
        "a target outside a slab of the vocabulary matches its nearest column",
        _issue(_CCE, 59),
        "wmtp/slab_softmax.py",
        "    return inside, torch.where(inside, wanted, 0)",
        "    return torch.ones_like(inside), wanted.clamp(0, columns - 1)",
        "test_linear_cross_entropy.py",
    ),
    _bug(
        "log-sum-exp in bfloat16",
        "what is summed over the vocabulary and over rows is held in the dtype of the inputs",
        _issue("NVIDIA/TransformerEngine", 3193),
        "wmtp/problem.py",
        "return wide_dtype(self.hidden.dtype)",
        "return self.hidden.dtype",
        "test_linear_cross_entropy.py",
    ),
    _bug(
        "autocast reaches a sum",
        "under autocast a product of float32 numbers inside the loss is made in bfloat16",
        "an earlier version of wmtp",
        "wmtp/slab_softmax.py",
        "torch.linalg.vector_norm(p, dim=1)",
        'torch.einsum("rv, rv -> r", p, p).sqrt()',
        "test_loss_autograd.py",
    ),
    _bug(
        "autocast ignored",
        "the fused loss multiplies in float32 where autocast asks for bfloat16",
        "`torch.nn.functional.linear_cross_entropy`, chunked",
        "wmtp/linear_cross_entropy.py",
        "not wide and autocasts(hidden)",
        "not wide and False",
        "test_linear_cross_entropy.py",
    ),
    _bug(
        "loss per token in bfloat16",
        "the unreduced loss comes back in the dtype of the inputs",
        "`torch.nn.functional.linear_cross_entropy`, chunked",
        "wmtp/linear_cross_entropy.py",
        "loss=rows.loss.view(valid.shape)",
        "loss=rows.loss.to(problem.hidden.dtype).view(valid.shape)",
        "test_linear_cross_entropy.py",
    ),
    _bug(
        "int32 offsets",
        "row · stride overflows 32 bits once a slab has more than 2³¹ logits",
        _issue("fla-org/flash-linear-attention", 1080) + ", " + _issue(_TRL, 7266),
        "wmtp/triton_softmax.py",
        "return row.to(tl.int64) * stride",
        "return (row * stride).to(tl.int32)",
        "test_triton_softmax.py::test_rows_may_start_behind_the_reach_of_32_bits",
    ),
    _bug(
        "sharded unembedding taken for the whole",
        "a rank's shard of the vocabulary is used as if it were all of it",
        _issue(_CCE, 31) + ", " + _issue(_LIGER, 332) + ", " + _issue(_TRL, 6065),
        "wmtp/_checks.py",
        "if _DTENSOR_MODULE not in sys.modules:",
        "if _DTENSOR_MODULE:",
        "test_transforms.py::test_the_argument_that_is_sharded_is_named",
    ),
)

REST = (
    _bug(
        "critic trained on its own target",
        "the λ-return is not detached, so the values move towards each other",
        "value losses without a stop-gradient",
        "wmtp/critic.py",
        "next_trained(wide(values.detach()), tracks)",
        "next_trained(wide(values), tracks)",
        "test_critic.py",
    ),
    _bug(
        "long sequences outvote short ones",
        "the critic's loss is a mean over all tokens where it should be one over sequences",
        _issue("NVIDIA-NeMo/Speech", 8343),
        "wmtp/critic.py",
        "return _mean(per_sequence, count > 0, normalizer)",
        "return _mean(per_sequence * count, valid, normalizer)",
        "test_critic.py",
    ),
    _bug(
        "reward read at the padding",
        "a sequence is scored at its last position, padded or not",
        _issues(_HF, 35352, 35911)
        + ", [gpt-neox #1285](https://github.com/EleutherAI/gpt-neox/pull/1285)",
        "wmtp/critic.py",
        "counted = valid & (valid.flip(1).cumsum(1).flip(1) == 1)",
        "counted = torch.arange(valid.shape[1]).expand(valid.shape) == valid.shape[1] - 1",
        "test_critic.py",
    ),
    _bug(
        "failures counted over padding",
        "NaN at padded places raises the alarm at every step",
        "weight statistics logged over the whole row",
        "wmtp/statistics.py",
        "nan_weights=(inside & ~entries.isfinite())",
        "nan_weights=(~entries.isfinite())",
        "test_statistics.py",
    ),
    _bug(
        "quantile of a large tensor",
        "`torch.quantile` refuses more than 2²⁴ entries",
        _issues("pytorch/pytorch", 64947, 67592),
        "wmtp/statistics.py",
        "    last = (count - 1).clamp(min=0)\n    place =",
        """    if bool(used.any()):
        return torch.quantile(entries[used], entries.new_tensor(levels))
    last = (count - 1).clamp(min=0)
    place =""",
        "test_statistics.py",
    ),
    _bug(
        "value head in bfloat16",
        "the critic's head runs in the dtype of the trunk, and differences of values vanish",
        "value heads under autocast",
        "wmtp/nn.py",
        "dtype = torch.promote_types(hidden.dtype, torch.float32)",
        "dtype = hidden.dtype",
        "test_nn.py",
    ),
    _bug(
        "option stored and never read",
        "a module keeps an argument under a name that nobody asks for",
        "configurations whose keys and readers differ",
        "wmtp/nn.py",
        "            softcap=softcap,\n        )\n\n    def forward(\n        self,\n        logits",
        "            softcap=None,\n        )\n\n    def forward(\n        self,\n        logits",
        "test_nn.py",
    ),
    _bug(
        "oracle with ties over-selected",
        "the reference that the tests compare with keeps everything at the threshold itself",
        "TRL's high-entropy mask, `entropies >= quantile`",
        "tests/oracle.py",
        "        for rank in sorted(range(len(group)), key=order)[:k]:\n",
        """        ranked = sorted(range(len(group)), key=order)
        last = [order(rank)[:2] for rank in ranked[:k][-1:]]
        for rank in [r for r in ranked if order(r)[:2] <= last[0]]:
""",
        "test_oracle.py",
        "test_weights.py",
    ),
    _bug(
        "oracle without the discount",
        "the reference's advantages decay by λ alone",
        "recurrences in which γ and λ are one constant",
        "tests/oracle.py",
        "later = delta[b][j] + gamma * lam * later",
        "later = delta[b][j] + lam * later",
        "test_oracle.py",
    ),
)

BUGS = TARGETS + CROSS_ENTROPY + SCORES + WEIGHTS + LOSS + LINEAR + REST
