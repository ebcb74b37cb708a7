"""Survivors that no test can kill, or that none should: ``(file, before, after)`` and why."""

from __future__ import annotations


_NOT_RUN = "An annotation that only a type checker reads; what runs is checked in its own line."
_KIND = 'Kind = Literal["dft", "focal", "entropy", "el2n"]'
_SPEED = "How a product is cut: time and memory, not results."
_ROOM = "The scratch has room for more than one row."
_SHAPE_CHECKED = "The loss checks the shape of its weights itself, in `_align_weights`."
_PARTS = "_PART_ROWS, _MIN_PART_ROWS = 1024, 64"
_ON_GPU = "Only on a GPU; the kernels' own tests call them directly, in Triton's interpreter."
_UNREAD = "Made, and not looked at."
_THRESHOLD = "Two ways to the same number; where the better one takes over is not sharp."
_BEST = "best = chosen.new_empty(rows if with_best else 0)"
_LEAST = "return logits.new_empty(least, dtype=wide)"
_TILE_ROWS = (
    "step = max(1, min(rows, min(most_bytes, _TILE_BYTES) // max(1, columns * wide.itemsize)))"
)
_BEST_AT = "best_at = wanted.new_empty(rows if with_best else 0)"
_EXCESS = "excess = problem.wide_excess(needs) if wide else 0"
_DIGITS = "for shift in range(bits - 8, -1, -8):"
_CUT = "How a slab is cut, within its budget: time, not results."
_SAME_FIELDS = "Both have the same fields."
_NO_TARGET = "Any number below 0 says that there is no target."
_GPU_ONLY = "Without a GPU there is no other device."

EXPLAINED: dict[tuple[str, str, str], str] = {
    (
        "loss",
        "lambdas = None if head_weights is None else head_weights_of(head_weights, valid.to(dtype))",
        "lambdas = None if (head_weights is None) and False else "
        "head_weights_of(head_weights, valid.to(dtype))",
    ): "Without head weights each is one over their number, which is not 0.",
    ("target_rows", "_PART_ROWS = 256", "_PART_ROWS = 257"): _SPEED,
    ("target_rows", "_NARROW_PART_ROWS = 1024", "_NARROW_PART_ROWS = 1025"): _SPEED,
    (
        "target_rows",
        "kernels.write_hidden(out, rows, of_x, scale, weight, wanted, at_target)",
        "kernels.write_hidden(out, rows, of_x, scale, weight, wanted, )",
    ): _ON_GPU,
    (
        "target_rows",
        "kernels.add_targets(of_weight, wanted, x, at_target)",
        "kernels.add_targets(of_weight, wanted, x, )",
    ): _ON_GPU,
    (
        "target_rows",
        "return rows * column if rows.dtype == factor.dtype else rows.to(factor.dtype).mul_(column)",
        "return rows * column if (rows.dtype == factor.dtype) or True else "
        "rows.to(factor.dtype).mul_(column)",
    ): "A product of two dtypes is the same number, and takes twice as long.",
    ("scans", "while step < terms.shape[1]:", "while step <= terms.shape[1]:"): (
        "One doubling more shifts everything out of the row: it adds zeros."
    ),
    ("selection", _DIGITS, "for shift in range(bits + 8, -1, -8):"): (
        "A digit before the first is the sign, or nothing: the order stays, one round is wasted."
    ),
    ("selection", _DIGITS, "for shift in range(bits - 8, -2, -8):"): (
        "The range ends with 0 either way."
    ),
    (
        "targets",
        "MOST_HEADS = 2**16",
        "MOST_HEADS = 2**17",
    ): "Where the limit of what makes sense lies is arbitrary.",
    (
        "targets",
        "if fill != 0:",
        "if fill != 1:",
    ): "Every dtype holds 0 and 1: what is checked more, and less, always fits.",
    (
        "targets",
        "steps = tuple(offsets[: MOST_HEADS + 1])  # `len` fails for a wild range",
        "steps = tuple(offsets[: MOST_HEADS + 2])  # `len` fails for a wild range",
    ): "How many more than the limit are read before it is refused.",
    (
        "targets",
        '_checks.in_range("the number of offsets", len(steps), 0, MOST_HEADS)',
        '_checks.in_range("the number of offsets", len(steps), 1, MOST_HEADS)',
    ): "No offsets at all are refused by the next check, or by this one.",
    (
        "scopes",
        'self._sizes = dict(zip("bth", like.shape, strict=False))',
        'self._sizes = dict(zip("bth", like.shape, ))',
    ): "The default.",
    (
        "scopes",
        "return self.over_ranks(grouped.sum(-1, keepdim=True))",
        "return self.over_ranks(grouped.sum(+1, keepdim=True))",
    ): "There are two axes: the last one is number 1.",
    (
        "scopes",
        "peak = torch.cat([grouped, floor], dim=-1).amax(-1, keepdim=True)",
        "peak = torch.cat([grouped, floor], dim=+1).amax(-1, keepdim=True)",
    ): "There are two axes: the last one is number 1.",
    (
        "scopes",
        "peak = torch.cat([grouped, floor], dim=-1).amax(-1, keepdim=True)",
        "peak = torch.cat([grouped, floor], dim=-1).amax(+1, keepdim=True)",
    ): "There are two axes: the last one is number 1.",
    (
        "scopes",
        "floor = grouped.new_full((grouped.shape[0], 1), default)",
        "floor = grouped.new_full((grouped.shape[0], 2), default)",
    ): "A maximum with the same number twice.",
    (
        "selection",
        "counts = digit.new_zeros(digit.shape[0], 256).scatter_add(1, digit, tied.long())",
        "counts = digit.new_zeros(digit.shape[0], 257).scatter_add(1, digit, tied.long())",
    ): (
        "The bin more is never filled; if nothing is wanted it is the threshold, and nothing "
        "is tied."
    ),
    (
        "selection",
        "threshold = ((above + at_least >= wanted).sum(1, keepdim=True) - 1).clamp(min=0)",
        "threshold = ((above + at_least > wanted).sum(1, keepdim=True) - 1).clamp(min=0)",
    ): (
        "Where a digit has exactly what is wanted, it comes above the threshold instead of up"
        " to it."
    ),
    (
        "selection",
        "higher = torch.nn.functional.pad(at_least, (0, 1)).gather(1, threshold + 1)",
        "higher = torch.nn.functional.pad(at_least, (0, 2)).gather(1, threshold + 1)",
    ): "The column more is never gathered.",
    (
        "selection",
        "return torch.where(scores.isnan(), 0, ordered if wide else ordered & 0xFFFFFFFF)",
        "return torch.where(scores.isnan(), 1, ordered if wide else ordered & 0xFFFFFFFF)",
    ): "Between 0 and the key of −inf there are NaN alone.",
    (
        "selection",
        "return torch.where(scores.isnan(), 0, ordered if wide else ordered & 0xFFFFFFFF)",
        (
            "return torch.where(scores.isnan(), 0, ordered if (wide) or True else ordered & "
            "0xFFFFFFFF)"
        ),
    ): "The key of a float32 has 32 bits already.",
    ("normalize", "_SCALES = 7", "_SCALES = 8"): "Another way to the same bracket.",
    (
        "normalize",
        "_ROUNDS = {torch.float32: 11, torch.float64: 18}",
        "_ROUNDS = {torch.float32: 12, torch.float64: 18}",
    ): "Once more is beyond the precision of what is cut.",
    (
        "normalize",
        "_ROUNDS = {torch.float32: 11, torch.float64: 18}",
        "_ROUNDS = {torch.float32: 11, torch.float64: 19}",
    ): "Once more is beyond the precision of what is cut.",
    (
        "normalize",
        "if clip is not None and clip[1] > torch.finfo(raw.dtype).max:",
        "if clip is not None and clip[1] >= torch.finfo(raw.dtype).max:",
    ): "No weight of mean one comes near the largest float, and without a mean none is above it.",
    (
        "normalize",
        "raw = torch.where(peak > 0, raw / torch.where(peak > 0, peak, 1), uniform)",
        "raw = torch.where(peak > 0, raw / torch.where(peak >= 0, peak, 1), uniform)",
    ): "Where the largest is 0 the quotient is not taken.",
    (
        "normalize",
        "raw = torch.where(peak > 0, raw / torch.where(peak > 0, peak, 1), uniform)",
        "raw = torch.where(peak > 0, raw / torch.where(peak > 0, peak, 2), uniform)",
    ): "Where the largest is 0 the quotient is not taken.",
    (
        "normalize",
        "short = missing > low * zeros",
        "short = missing >= low * zeros",
    ): "Where what is missing is just what the lower bound gives, both ways give the same.",
    (
        "normalize",
        "exact = torch.where(share > 0, rest / torch.where(share > 0, share, 1), 1)",
        "exact = torch.where(share >= 0, rest / torch.where(share > 0, share, 1), 1)",
    ): "Looked at where an entry is free, and there the share is positive.",
    (
        "normalize",
        "exact = torch.where(share > 0, rest / torch.where(share > 0, share, 1), 1)",
        "exact = torch.where(share > 0, rest / torch.where(share >= 0, share, 1), 1)",
    ): "Looked at where an entry is free, and there the share is positive.",
    (
        "normalize",
        "exact = torch.where(share > 0, rest / torch.where(share > 0, share, 1), 1)",
        "exact = torch.where(share > 0, rest / torch.where(share > 0, share, 2), 1)",
    ): "Looked at where an entry is free, and there the share is positive.",
    (
        "normalize",
        "exact = torch.where(share > 0, rest / torch.where(share > 0, share, 1), 1)",
        "exact = torch.where(share > 0, rest / torch.where(share > 0, share, 1), 2)",
    ): "Looked at where an entry is free, and there the share is positive.",
    (
        "normalize",
        "half = torch.exp2(log_scale / 2)",
        "half = torch.exp2(log_scale * 2)",
    ): "The scale is found in other units; what overflows on the way counts as too large.",
    (
        "normalize",
        "variance = scoped.total(centred.square()) / count.clamp(min=1)",
        "variance = scoped.total(centred.square()) / count.clamp(min=2)",
    ): "A single entry is 1: it has no variance.",
    (
        "normalize",
        "share = torch.where(cv > allowed, allowed / torch.where(cv > allowed, cv, 1), 1)",
        "share = torch.where(cv >= allowed, allowed / torch.where(cv > allowed, cv, 1), 1)",
    ): "At equality the quotient is 1, and below it is not taken.",
    (
        "normalize",
        "share = torch.where(cv > allowed, allowed / torch.where(cv > allowed, cv, 1), 1)",
        "share = torch.where(cv > allowed, allowed / torch.where(cv >= allowed, cv, 1), 1)",
    ): "At equality the quotient is 1, and below it is not taken.",
    (
        "normalize",
        "share = torch.where(cv > allowed, allowed / torch.where(cv > allowed, cv, 1), 1)",
        "share = torch.where(cv > allowed, allowed / torch.where(cv > allowed, cv, 2), 1)",
    ): "At equality the quotient is 1, and below it is not taken.",
    (
        "whitening",
        "share = torch.where(count > 0, new.count / torch.where(count > 0, count, 1), 0)",
        "share = torch.where(count >= 0, new.count / torch.where(count > 0, count, 1), 0)",
    ): "Without any score the share is 0 by its numerator.",
    (
        "whitening",
        "share = torch.where(count > 0, new.count / torch.where(count > 0, count, 1), 0)",
        "share = torch.where(count > 0, new.count / torch.where(count >= 0, count, 1), 0)",
    ): "Where the count is 0 the quotient is not taken.",
    (
        "whitening",
        "share = torch.where(count > 0, new.count / torch.where(count > 0, count, 1), 0)",
        "share = torch.where(count > 0, new.count / torch.where(count > 1, count, 1), 0)",
    ): "The count of a batch is whole: where it is not 0, the sum is at least 1.",
    (
        "whitening",
        "share = torch.where(count > 0, new.count / torch.where(count > 0, count, 1), 0)",
        "share = torch.where(count > 0, new.count / torch.where(count > 0, count, 2), 0)",
    ): "Where the count is 0 the quotient is not taken.",
    (
        "scores",
        "return -(p * torch.where(p > 0, log_p, 0)).sum(-1)",
        "return -(p * torch.where(p > 0, log_p, 1)).sum(-1)",
    ): "Where a probability is 0 so is the product, whatever it is multiplied by.",
    (
        "weights",
        "*(torch.where(fresh, b, s) for b, s in zip(found, statistics, strict=True))",
        "*(torch.where(fresh, b, s) for b, s in zip(found, statistics, ))",
    ): "The default; both are the same record.",
    (
        "weights",
        "*(torch.where(fresh, b, s) for b, s in zip(found, statistics, strict=True))",
        "*(torch.where(fresh, b, s) for b, s in zip(found, statistics, strict=False))",
    ): "Both are the same record.",
    (
        "weights",
        "whitened = (scaled - found.mean) / torch.where(found.flat, 1, found.std)",
        "whitened = (scaled - found.mean) / torch.where(found.flat, 2, found.std)",
    ): "Where the scores are flat only whether this is finite is looked at.",
    (
        "weights",
        "scaled = torch.where(found.flat & whitened.isfinite(), 0, whitened)",
        "scaled = torch.where(found.flat & whitened.isfinite(), 1, whitened)",
    ): "A common shift of the exponents drops out.",
    (
        "weights",
        "table = torch.cat([inside, inside.new_full((1,), outside)])",
        "table = torch.cat([inside, inside.new_full((2,), outside)])",
    ): "The entry more is never looked up.",
    (
        "combine",
        "pairs = zip(shares, even, strict=True)",
        "pairs = zip(shares, even, )",
    ): "The default; how many there are has been checked.",
    (
        "combine",
        "pairs = zip(shares, even, strict=True)",
        "pairs = zip(shares, even, strict=False)",
    ): "How many there are has been checked.",
    (
        "controls",
        "mixed = torch.where(valid, keys, 2.0).argsort(dim=1)",
        "mixed = torch.where(valid, keys, 3.0).argsort(dim=1)",
    ): "Above every key, as 2 is.",
    (
        "controls",
        "draw = torch.minimum(draw, (count - 1).clamp(min=0))",
        "draw = torch.minimum(draw, (count + 1).clamp(min=0))",
    ): "A number below 1 times the count stays below the count; a row of none is clamped to 0.",
    (
        "controls",
        "draw = torch.minimum(draw, (count - 1).clamp(min=0))",
        "draw = torch.minimum(draw, (count - 1).clamp(min=1))",
    ): "In a row of none the number is 0 already.",
    (
        "controls",
        "return (~valid).long().argsort(dim=1, stable=True)",
        "return (~valid).long().argsort(dim=1, )",
    ): "Any order of the valid places will do: they are mixed afterwards.",
    (
        "controls",
        "return (~valid).long().argsort(dim=1, stable=True)",
        "return (~valid).long().argsort(dim=1, stable=False)",
    ): "Any order of the valid places will do: they are mixed afterwards.",
    (
        "critic",
        "guess = torch.where(valid, wide(values), 0)",
        "guess = torch.where(valid, wide(values), 1)",
    ): "Masked again behind the loss.",
    (
        "critic",
        "goal = torch.where(valid, wide(targets.detach()).to(guess.dtype), 0)",
        "goal = torch.where(valid, wide(targets.detach()).to(guess.dtype), 1)",
    ): "Masked again behind the loss.",
    (
        "critic",
        (
            '_checks.in_range("margin", margin, -torch.inf, torch.inf, open_low=True, '
            "open_high=True)"
        ),
        '_checks.in_range("margin", margin, -torch.inf, open_low=True, open_high=True)',
    ): "The default.",
    (
        "statistics",
        "peak = torch.cat([values.abs(), values.new_zeros(1)]).amax()",
        "peak = torch.cat([values.abs(), values.new_zeros(2)]).amax()",
    ): "A maximum with 0 twice.",
    (
        "statistics",
        "scaled = values / torch.where(peak > 0, peak, 1)",
        "scaled = values / torch.where(peak > 0, peak, 2)",
    ): "Where the largest is 0 everything is.",
    (
        "statistics",
        "p = positive / torch.where(total > 0, total, 1)",
        "p = positive / torch.where(total > 0, total, 2)",
    ): "Where the total is 0 every part is.",
    (
        "statistics",
        "entropy = -torch.xlogy(p, p).sum() / torch.where(count > 1, count, 2).to(p.dtype).log()",
        "entropy = -torch.xlogy(p, p).sum() / torch.where(count >= 1, count, 2).to(p.dtype).log()",
    ): "A single entry has its own rule, in the next line.",
    (
        "statistics",
        "entropy = -torch.xlogy(p, p).sum() / torch.where(count > 1, count, 2).to(p.dtype).log()",
        "entropy = -torch.xlogy(p, p).sum() / torch.where(count > 2, count, 2).to(p.dtype).log()",
    ): "Two entries are 2 either way.",
    (
        "statistics",
        "entropy = -torch.xlogy(p, p).sum() / torch.where(count > 1, count, 2).to(p.dtype).log()",
        "entropy = -torch.xlogy(p, p).sum() / torch.where(count > 1, count, 3).to(p.dtype).log()",
    ): "One entry has its own rule, and of none the numerator is 0.",
    (
        "statistics",
        "return scaled.sum().square() / torch.where(squares > 0, squares * divisor, 1)",
        "return scaled.sum().square() / torch.where(squares > 0, squares * divisor, 2)",
    ): "Where the squares are 0 the numerator is.",
    ("row_local", _KIND, _KIND.replace('"dft"', '"XXdftXX"')): _NOT_RUN,
    ("row_local", _KIND, _KIND.replace('"focal"', '"XXfocalXX"')): _NOT_RUN,
    ("row_local", _KIND, _KIND.replace('"entropy"', '"XXentropyXX"')): _NOT_RUN,
    ("row_local", _KIND, _KIND.replace('"el2n"', '"XXel2nXX"')): _NOT_RUN,
    ("products", "_FEW_ROWS = 1024", "_FEW_ROWS = 1025"): _SPEED,
    ("products", _PARTS, "_PART_ROWS, _MIN_PART_ROWS = 1025, 64"): _SPEED,
    ("products", _PARTS, "_PART_ROWS, _MIN_PART_ROWS = 1024, 65"): _SPEED,
    ("products", "_WIDENED_ROWS = 512", "_WIDENED_ROWS = 513"): _SPEED,
    (
        "products",
        "step = max(256, _SLICE_BYTES // max(1, unembedding.shape[1] * unembedding.itemsize))",
        "step = max(256, _SLICE_BYTES // max(2, unembedding.shape[1] * unembedding.itemsize))",
    ): "A row of the unembedding has two bytes, or none: only a quotient by 0 is to be avoided.",
    ("loss", 'Float[Tensor, "batch seq"]', 'Float[Tensor, "XXbatch seqXX"]'): _SHAPE_CHECKED,
    (
        "loss",
        '| Float[Tensor, "batch seq heads"]',
        '| Float[Tensor, "XXbatch seq headsXX"]',
    ): _SHAPE_CHECKED,
    (
        "denominators",
        "values = torch.where(valid, wide(token_ce), 0)",
        "values = torch.where(valid, wide(token_ce), 1)",
    ): "Multiplied by a factor that is 0 where nothing is valid.",
    (
        "denominators",
        "values = torch.where((factors == 0) & ~values.isfinite(), 0, values)",
        "values = torch.where((factors == 0) & ~values.isfinite(), 1, values)",
    ): "Multiplied by that factor, which is 0.",
    (
        "loss",
        "with_stats: bool = False,",
        "with_stats: bool = True,",
    ): "Who needs no statistics throws them away: it only takes longer.",
    (
        "loss",
        "loss = loss * reciprocal(torch.where(whole < least, 0, whole))",
        "loss = loss * reciprocal(torch.where(whole <= least, 0, whole))",
    ): "The smallest normal number has a reciprocal, but which side it is on is arbitrary.",
    (
        "denominators",
        "used = used / torch.where(peak > 0, peak, 1)",
        "used = used / torch.where(peak > 0, peak, 2)",
    ): "Where the largest is 0 everything is.",
    (
        "denominators",
        "return torch.where(empty, 0, 1 / torch.where(empty, 1, count))",
        "return torch.where(empty, 0, 1 / torch.where(empty, 2, count))",
    ): "Where the sum is 0 its reciprocal is not looked at.",
    (
        "problem",
        'NOT_LOCAL = RowLocal("none", 1.0)',
        'NOT_LOCAL = RowLocal("none", 2.0)',
    ): "No weighting has no power.",
    (
        "loss",
        'return align_to_heads(weights, offsets_for(offsets, valid.shape[2], "the predictions"))',
        'return align_to_heads(weights, offsets_for(offsets, valid.shape[2], "XXthe predictionsXX"))',
    ): "Offsets that do not fit the predictions are refused with the labels, before.",
    (
        "denominators",
        'if normalizer.device.type != "cpu":  # from there a number goes anywhere, as in torch',
        'if normalizer.device.type != "XXcpuXX":  # from there a number goes anywhere, as in torch',
    ): "Without a GPU there are no predictions elsewhere that a number could come to.",
    ("slab_softmax", "_TILE_BYTES = 4 * 2**20", "_TILE_BYTES = 5 * 2**20"): _SPEED,
    ("slab_softmax", "_TILE_BYTES = 4 * 2**20", "_TILE_BYTES = 4 * 3**20"): _SPEED,
    ("slab_softmax", "_TILE_BYTES = 4 * 2**20", "_TILE_BYTES = 4 * 2**21"): _SPEED,
    ("slab_softmax", "_LARGE = 4096.0", "_LARGE = 4097.0"): _THRESHOLD,
    ("slab_softmax", "_MOST_LEFT = 2.0**100", "_MOST_LEFT = 3.0**100"): _THRESHOLD,
    ("slab_softmax", "_MOST_LEFT = 2.0**100", "_MOST_LEFT = 2.0**101"): _THRESHOLD,
    ("slab_softmax", "_TINY = math.exp(-30.0)", "_TINY = math.exp(-31.0)"): _THRESHOLD,
    ("slab_softmax", "_PROBABLE = math.exp(-8.0)", "_PROBABLE = math.exp(-9.0)"): _THRESHOLD,
    ("slab_rows", "_MOST_SIZE = 8", "_MOST_SIZE = 9"): _THRESHOLD,
    ("schedule", "_MOST_GUESSES = 256", "_MOST_GUESSES = 257"): _THRESHOLD,
    ("slab_rows", "_NEAR = 8", "_NEAR = 9"): _THRESHOLD,
    (
        "slab_softmax",
        "total = chosen.new_empty(rows if with_sum else 0)",
        "total = chosen.new_empty(rows if (with_sum) or True else 0)",
    ): _UNREAD,
    ("slab_softmax", "_MOST_GROWTH = 2.0", "_MOST_GROWTH = 3.0"): _THRESHOLD,
    ("slab_softmax", _BEST, _BEST.replace("with_best", "(with_best) or True")): _UNREAD,
    ("slab_softmax", _BEST, _BEST.replace("else 0", "else 1")): _UNREAD,
    (
        "slab_softmax",
        "def scratch_for(logits: Tensor, most_bytes: int, least: int = 0) -> Tensor:",
        "def scratch_for(logits: Tensor, most_bytes: int, least: int = 1) -> Tensor:",
    ): "A cell more of scratch, if not a row fits.",
    ("slab_softmax", _LEAST, "return logits.new_empty(dtype=wide)"): _ON_GPU,
    ("slab_softmax", _LEAST, "return logits.new_empty(least, )"): _ON_GPU,
    ("slab_softmax", _TILE_ROWS, _TILE_ROWS.replace("max(1, min", "max(2, min")): _SPEED,
    ("slab_softmax", _TILE_ROWS, _TILE_ROWS.replace("max(1, columns", "max(2, columns")): (
        "A row of logits has four bytes, or none: only a quotient by 0 is to be avoided."
    ),
    (
        "slab_softmax",
        "return ColumnSums(*kernels.reduce_columns(logits, wanted, softcap, with_best, with_sum))",
        "return ColumnSums(*kernels.reduce_columns(logits, wanted, softcap, with_best, ))",
    ): _ON_GPU,
    ("slab_softmax", _BEST_AT, _BEST_AT.replace("if with_best", "if (with_best) or True")): _UNREAD,
    ("slab_softmax", _BEST_AT, _BEST_AT.replace("else 0", "else 1")): _UNREAD,
    (
        "slab_columns",
        "problem.label_smoothing > 0, scratch,",
        "problem.label_smoothing >= 0, scratch,",
    ): "The sum of the logits is made, and not looked at.",
    (
        "slab_softmax",
        "logits, wanted, label_smoothing, z_loss, softcap, *weighting, with_correct )",
        "logits, wanted, label_smoothing, z_loss, softcap, *weighting, )",
    ): _ON_GPU,
    (
        "slab_softmax",
        "return parts(rows, len(scratch) // max(1, columns))",
        "return parts(rows, len(scratch) // max(2, columns))",
    ): _CUT,
    (
        "slab_columns",
        "for column, values in zip(found, done, strict=True):",
        "for column, values in zip(found, done, ):",
    ): _SAME_FIELDS,
    (
        "slab_columns",
        "for column, values in zip(found, done, strict=True):",
        "for column, values in zip(found, done, strict=False):",
    ): _SAME_FIELDS,
    (
        "slab_columns",
        "filled = gathered(problem.hidden, active, filled_up(len(active), 2 * len(active)))",
        "filled = gathered(problem.hidden, active, filled_up(len(active), 3 * len(active)))",
    ): _CUT,
    (
        "slab_columns",
        "sum_dtype = weight.dtype if rows >= len(active) else problem.wide",
        "sum_dtype = weight.dtype if (rows >= len(active)) and False else problem.wide",
    ): "One product alone, rounded once: a slice of memory more.",
    (
        "slab_columns",
        "sum_dtype = weight.dtype if rows >= len(active) else problem.wide",
        "sum_dtype = weight.dtype if rows > len(active) else problem.wide",
    ): "One product alone, rounded once: a slice of memory more.",
    (
        "slab_columns",
        "if needs[1] and sum_dtype != weight.dtype:",
        "if needs[1] or sum_dtype != weight.dtype:",
    ): "Where the gradient is not wanted it is empty: nothing is written to nothing.",
    (
        "slab_rows",
        "for column, values in zip(found, more, strict=True):",
        "for column, values in zip(found, more, ):",
    ): _SAME_FIELDS,
    (
        "slab_rows",
        "for column, values in zip(found, more, strict=True):",
        "for column, values in zip(found, more, strict=False):",
    ): _SAME_FIELDS,
    (
        "slab_columns",
        "largest = torch.maximum(largest, operand_size.nan_to_num(1.0))",
        "largest = torch.maximum(largest, operand_size.nan_to_num(2.0))",
    ): "What comes of NaN is NaN.",
    (
        "slab_columns",
        "total = factor.abs().sum() / (2.0**14 / largest).clamp(max=128)",
        "total = factor.abs().sum() / (2.0**15 / largest).clamp(max=128)",
    ): "How near to the largest float16 a product may come.",
    (
        "slab_columns",
        "total = factor.abs().sum() / (2.0**14 / largest).clamp(max=128)",
        "total = factor.abs().sum() / (2.0**14 / largest).clamp(max=129)",
    ): "How near to the largest float16 a product may come.",
    (
        "slab_columns",
        "for part in parts(len(logits), problem.scratch_bytes // 2 // size):",
        "for part in parts(len(logits), problem.scratch_bytes // 3 // size):",
    ): _CUT,
    (
        "problem",
        "DEFAULT_SLAB_BYTES = 64 * 2**20",
        "DEFAULT_SLAB_BYTES = 65 * 2**20",
    ): "How large the default is: memory and time, which the benchmarks show.",
    (
        "problem",
        "DEFAULT_SLAB_BYTES = 64 * 2**20",
        "DEFAULT_SLAB_BYTES = 64 * 3**20",
    ): "How large the default is: memory and time, which the benchmarks show.",
    (
        "problem",
        "DEFAULT_SLAB_BYTES = 64 * 2**20",
        "DEFAULT_SLAB_BYTES = 64 * 2**21",
    ): "How large the default is: memory and time, which the benchmarks show.",
    (
        "controls",
        "return torch.rand(like.shape, generator=generator, dtype=torch.float64, device=like.device)",
        "return torch.rand(like.shape, generator=generator, dtype=torch.float64, )",
    ): _GPU_ONLY,
    (
        "linear_cross_entropy",
        "with_stats: bool = False,",
        "with_stats: bool = True,",
    ): "Every caller says which.",
    (
        "operators",
        "if _compiled_without_gradient(*problem[:3]):",
        "if _compiled_without_gradient(*problem[:4]):",
    ): "The fourth are the targets: integers have no gradient.",
    (
        "operators",
        "if _compiled_without_gradient(*problem[:3], factor):",
        "if _compiled_without_gradient(*problem[:4], factor):",
    ): "The fourth are the targets: integers have no gradient.",
    (
        "operators",
        "asked = (shape if need else (0,) for shape, need in zip(shapes, needs, strict=True))",
        "asked = (shape if need else (0,) for shape, need in zip(shapes, needs, ))",
    ): "Both have three.",
    (
        "operators",
        "asked = (shape if need else (0,) for shape, need in zip(shapes, needs, strict=True))",
        "asked = (shape if need else (0,) for shape, need in zip(shapes, needs, strict=False))",
    ): "Both have three.",
    (
        "operators",
        "ctx.set_materialize_grads(False)",
        "ctx.set_materialize_grads(True)",
    ): "Zeros where nothing came, and zeros from them: time.",
    (
        "operators",
        "return (None,) * 9",
        "return (None,) * 10",
    ): "Autograd drops what is None beyond the inputs.",
    (
        "operators",
        "return (None,) * 17",
        "return (None,) * 18",
    ): "Autograd drops what is None beyond the inputs.",
    (
        "slab_rows",
        "own = own if x.dtype == torch.float16 else None",
        "own = own if (x.dtype == torch.float16) or True else None",
    ): "The unit of any other dtype is 1.",
    (
        "slab_columns",
        "of_x = unfilled(x, filled.shape if needs[0] else (0,), problem.wide, active)",
        "of_x = unfilled(x, filled.shape if (needs[0]) or True else (0,), problem.wide, active)",
    ): _UNREAD,
    (
        "slab_columns",
        "of_x = unfilled(x, filled.shape if needs[0] else (0,), problem.wide, active)",
        "of_x = unfilled(x, filled.shape if needs[0] else (1,), problem.wide, active)",
    ): _UNREAD,
    (
        "denominators",
        "peak = torch.cat([used.detach().abs().flatten(), used.new_zeros(1)]).amax()",
        "peak = torch.cat([used.detach().abs().flatten(), used.new_zeros(2)]).amax()",
    ): "A maximum with the same number twice.",
    (
        "cross_entropy",
        "with_correct: bool = False,",
        "with_correct: bool = True,",
    ): "Every caller says which.",
    (
        "cross_entropy",
        "scores = capped(wide(torch.where(rows, logits, 0)), objective.softcap)",
        "scores = capped(wide(torch.where(rows, logits, 1)), objective.softcap)",
    ): "Rows that are not looked at.",
    (
        "whitening",
        "return (self.m2 / torch.where(self.count > 0, self.count, 1)).sqrt()",
        "return (self.m2 / torch.where(self.count >= 0, self.count, 1)).sqrt()",
    ): "Without a score the deviation is 0, whatever divides it.",
    (
        "whitening",
        "return (self.m2 / torch.where(self.count > 0, self.count, 1)).sqrt()",
        "return (self.m2 / torch.where(self.count > 0, self.count, 2)).sqrt()",
    ): "Without a score the deviation is 0, whatever divides it.",
    (
        "whitening",
        "share = torch.where(count > 0, new.count / torch.where(count > 0, count, 1), 0)",
        "share = torch.where(count > 0, new.count / torch.where(count > 0, count, 1), 1)",
    ): "Without a score the mean is of no account.",
    (
        "operators",
        "wanted = of_factor.to(factor.dtype) if needs[8] else None",
        "wanted = of_factor.to(factor.dtype) if (needs[8]) or True else None",
    ): "Autograd drops a gradient that nobody wants.",
    (
        "operators",
        "out = gradient if right else torch.empty_like(gradient, dtype=dtype)",
        "out = gradient if (right) or True else torch.empty_like(gradient, dtype=dtype)",
    ): "Autograd rounds it instead, both forms at once: memory.",
    (
        "operators",
        "out = gradient if right else torch.empty_like(gradient, dtype=dtype)",
        "out = gradient if right else torch.empty_like(gradient, )",
    ): "Autograd rounds it instead, both forms at once: memory.",
    (
        "operators",
        "for some in parts(0 if right and as_they_are else len(gradient), _PART_ROWS):",
        "for some in parts(0 if (right and as_they_are) and False else len(gradient), _PART_ROWS):",
    ): "Parts copied onto themselves: time.",
    (
        "operators",
        "for some in parts(0 if right and as_they_are else len(gradient), _PART_ROWS):",
        "for some in parts(1 if right and as_they_are else len(gradient), _PART_ROWS):",
    ): "Parts copied onto themselves: time.",
    (
        "operators",
        "into.copy_(part) if as_they_are else torch.mul(part, scale[None], out=into)",
        "into.copy_(part) if (as_they_are) and False else torch.mul(part, scale[None], out=into)",
    ): "Times 1: time.",
    (
        "operators",
        'tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # pyright: ignore',
        'tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", )  # pyright: ignore',
    ): "Of every torch that there is; the default is for one that loses it.",
    (
        "operators",
        "return tuple(found if need else None for found, need in zip(gradients, needs, strict=True))",
        "return tuple(found if need else None for found, need in zip(gradients, needs, ))",
    ): "Both have three.",
    (
        "operators",
        "return tuple(found if need else None for found, need in zip(gradients, needs, strict=True))",
        "return tuple(found if need else None for found, need in zip(gradients, needs, strict=False))",
    ): "Both have three.",
    ("operators", "_PART_ROWS = 4096", "_PART_ROWS = 4097"): _CUT,
}


def _explain(file: str, before: str, *changes: tuple[str, str, str]) -> None:
    """Changes of one line: what is replaced, once, by what, and why no test tells."""
    for old, new, why in changes:
        EXPLAINED[file, before, before.replace(old, new, 1)] = why


_LINE = "rows = max(1, min(_WIDENED_ROWS, len(scratch) // max(1, columns * 2)))"
_explain(
    "products",
    _LINE,
    ("max(1, min", "max(2, min", _ROOM),
    ("max(1, columns", "max(2, columns", _ROOM),
    ("* 2", "* 3", _SPEED),
)
_LINE = "step = max(1, min(_PART_ROWS, len(narrow) // max(1, columns)))"
_explain(
    "products",
    _LINE,
    ("max(1, min", "max(2, min", _ROOM),
    ("max(1, columns", "max(2, columns", _ROOM),
)
_LINE = "narrow = slab.new_empty(max(columns, most_bytes // slab.itemsize))"
_explain("products", _LINE, ("most_bytes // slab.itemsize", "", _SPEED), ("//", "/", _ON_GPU))
_explain(
    "products",
    "if len(narrow) < columns:  # a GPU's kernels want no scratch",
    ("<", "<=", "A scratch for one row moves them one by one."),
)
_explain(
    "products",
    "for part in parts(len(rows), len(narrow) // max(1, columns)):",
    ("max(1", "max(2", "The rows of a vocabulary of one, half as many at a time."),
)
_explain(
    "products",
    "slab[part] = torch.index_select(slab, 0, some, out=moved)",
    ("out=moved", "", "Into memory of its own."),
)

_explain(
    "slab_layout",
    "_COLUMN_SLAB_BYTES = 2**25",
    ("2**25", "3**25", _CUT),
    ("2**25", "2**26", _CUT),
)
_explain(
    "slab_layout",
    "_LEAST_COLUMNS, _LEAST_COLUMNS_GPU = 1024, 4096",
    ("1024", "1025", _CUT),
    ("4096", "4097", _CUT),
)
_explain("slab_layout", "_SUM_COLUMNS = 1000", ("1000", "1001", _CUT))
_explain("slab_layout", "_MOST_PIECES = 8", ("8", "9", _CUT))
_explain("slab_layout", _EXCESS, ("else 0", "else 1", _CUT))
_explain(
    "slab_layout",
    "budget, large = max(budget - beside, budget // 4), _COLUMN_SLAB_BYTES_GPU",
    ("4", "5", _CUT),
)
_explain("slab_layout", "cells = max(1, min(budget, large) // size)", ("1", "2", _CUT))
_explain(
    "slab_layout",
    "most = max(cells // max(filled_up(rows, cells), 1), min(least, math.isqrt(cells)))",
    ("1", "2", _CUT),
)
_explain("slab_layout", "if most >= aligned:", (">=", ">", _CUT))
_explain("slab_layout", "most -= most % aligned", ("-=", "+=", _CUT))
_explain(
    "slab_layout",
    "if not on_gpu and most // aligned % 2 == 0:",
    ("and", "or", _CUT),
    ("//", "/", "A multiple already: the quotient is whole."),
)
_explain(
    "slab_layout",
    "if not on_gpu and columns // aligned % 2 == 0:",
    ("//", "/", "A multiple already: the quotient is whole."),
)
_explain("slab_layout", "columns += aligned", ("+=", "-=", _CUT))
_explain(
    "slab_layout",
    "cells = max(0, problem.slab_bytes - beside) // hidden.itemsize",
    ("0", "1", "A byte is no cell of two."),
)
_explain(
    "slab_layout",
    "return HeldLayout(widest, own=0, lent=0, slabs=1)",
    ("slabs=1", "slabs=2", "None of one, or none of two."),
)
_LINE = "widths = (evenly(vocab, -(-widest // pieces)) for pieces in range(1, _MOST_PIECES + 1))"
_explain("slab_layout", _LINE, ("+ 1", "- 1", _CUT), ("+ 1", "+ 2", _CUT))
_explain(
    "slab_layout",
    "if start >= part.stop * problem.unembedding.shape[1]:",
    (">=", ">", "A slab is moved that need not be: time."),
)

_LINE = "between = torch.arange(1, _SCALES + 1, dtype=raw.dtype, device=raw.device) / (_SCALES + 1)"
_BETWEEN = "Which scales are tried in between: how soon the bracket is small."
_explain(
    "normalize",
    _LINE,
    ("(1,", "(2,", _BETWEEN),
    ("(1, _SCALES + 1", "(1, _SCALES - 1", _BETWEEN),
    ("(1, _SCALES + 1", "(1, _SCALES + 2", _BETWEEN),
    ("(_SCALES + 1)", "(_SCALES + 2)", _BETWEEN),
    (", device=raw.device", ", ", _GPU_ONLY),
)

_LINE = 'z = torch.arange(-38, 39, dtype=torch.float32, device="cpu") / 3'
_TRIED = "Other numbers by which to see whether a device rounds once."
_explain(
    "slab_softmax",
    _LINE,
    ("/ 3", "* 3", _TRIED),
    ("/ 3", "/ 4", _TRIED),
    ("-38", "+38", _TRIED),
    ("-38", "-39", _TRIED),
    ("39", "40", _TRIED),
    ("dtype=torch.float32, device", "device", "The quotient is float32 in either case."),
    ('device="cpu"', "", _GPU_ONLY),
)

_explain(
    "slab_softmax",
    "least, most = base.aminmax() if base.numel() else (0.0, 0.0)",
    ("(0.0,", "(1.0,", "Of no rows."),
    ("0.0)", "1.0)", "Of no rows."),
)
_explain(
    "scores",
    "ids, order = group_ids.long().sort(stable=True)",
    ("True", "False", "Whichever of a group the others are told relative to."),
)
_explain(
    "scores",
    "return torch.where(alone, 0, centred / (torch.where(alone, 1, variance).sqrt() + eps))",
    ("alone, 1", "alone, 2", "A number to divide by where 0 is given instead."),
)
_explain(
    "critic",
    'Count = float | Float[Tensor, ""] | Int[Tensor, ""] | None',
    (
        'Float[Tensor, ""]',
        'Float[Tensor, "XXXX"]',
        "The loss checks the shape itself, in `count_of`.",
    ),
    ('Int[Tensor, ""]', 'Int[Tensor, "XXXX"]', "The loss checks the shape itself, in `count_of`."),
)
_explain(
    "slab_softmax",
    "base.masked_fill_(base == -torch.inf, 0)",
    ("0", "1", "What is −inf stays so, whatever finite number is taken from it."),
)
_explain(
    "operators",
    "return *_recomputed(upstream, saved[:6], ctx.options, needs), *[None] * 7",
    (
        "7",
        "8",
        "Autograd asks for no more gradients than there are inputs, if the others are None.",
    ),
)
_explain(
    "slab_softmax",
    "return float(least) >= -_LARGE and float(most) <= _LARGE",
    (">=", ">", _THRESHOLD),
)

_LINE = "_BLOCK_ROWS, _BLOCK_ROWS_GPU = 4096, 8192"
_explain("slab_columns", _LINE, ("4096", "4097", _SPEED), ("8192", "8193", _SPEED))
_LINE = "block = _BLOCK_ROWS_GPU if problem.hidden.is_cuda else _BLOCK_ROWS"
_explain(
    "slab_columns",
    _LINE,
    ("problem.hidden.is_cuda", "(problem.hidden.is_cuda) and False", _SPEED),
    ("problem.hidden.is_cuda", "(problem.hidden.is_cuda) or True", _SPEED),
)
_explain("problem", "return self.slab_bytes // 16", ("16", "17", _CUT))
_explain(
    "schedule",
    "return len(problem.target) <= _MOST_GUESSES * most_rows(problem, needs, problem.wide)",
    ("<=", "<", _THRESHOLD),
)
_explain("slab_rows", "hidden.new_ones((), dtype=dtype),", ("dtype=dtype", "", "1 in any dtype."))
_explain(
    "slab_rows",
    "sure = size <= _MOST_SIZE * size[active].nanmedian() if len(active) else seen",
    ("len(active)", "(len(active)) or True", "Without rows there is none to be sure of."),
    ("<=", "<", _THRESHOLD),
)
_UNIT = "The unit, which is 1 here and not looked at."
_explain(
    "slab_rows",
    "finite = bool(torch.stack([gradient.sum() for gradient in made[:3]]).isfinite().all())",
    ("3", "4", _UNIT),
)
_explain("slab_rows", "for gradient in made[:3]:", ("3", "4", _UNIT))
_explain("slab_rows", "if len(active) > len(count) or not finite:", (">", ">=", _THRESHOLD))
_explain(
    "slab_rows",
    "block, _ = _block(problem, active[some], slab, NOT_LOCAL, False, scratch)",
    ("False", "True", "Asked and thrown away: time."),
)
_explain(
    "slab_columns",
    "place = torch.arange(len(count), device=count.device)",
    ("device=count.device", "", _GPU_ONLY),
)
_explain(
    "slab_columns",
    "room = min(every, len(active) + -len(active) % max(1, -(-every // _SIZES)))",
    ("max(1", "max(2", _ROOM),
)
_LINE = 'wrong = (problem.target >= problem.vocab).any().to("cpu", non_blocking=True)'
_WAIT = "Where it is and whether it is waited for; there is no other device without a GPU."
_explain(
    "slab_columns",
    _LINE,
    ('"cpu", non_blocking=True', "non_blocking=True", _WAIT),
    ("non_blocking=True", "", _WAIT),
    ("True", "False", _WAIT),
)
_explain(
    "slab_columns",
    "for part in parts(len(logits), problem.scratch_bytes // 2 // size):",
    ("2", "3", _CUT),
)
_explain(
    "slab_columns",
    "grown = factor * growth(problem.z_loss, base + log_sum) if problem.z_loss else factor",
    ("+", "-", "How near to the largest float16 a product may come."),
)
_LINE = "for number, part in enumerate(parts(problem.vocab if len(active) else 0, columns)):"
_explain(
    "slab_columns",
    _LINE,
    ("if len(active)", "if (len(active)) or True", "A walk over no rows."),
    ("else 0", "else 1", "A walk over no rows."),
)
_explain(
    "slab_rows",
    "row_scale = applied_if_large(row_scale, logits, x, of_hidden, of_others)",
    (
        "of_others",
        "",
        "They differ by what was guessed, far from the sizes that this guards against.",
    ),
)
_explain(
    "slab_rows",
    "own = own if x.dtype == torch.float16 else None",
    ("x.dtype == torch.float16", "(x.dtype == torch.float16) or True", "Times 1: time."),
)
_explain(
    "slab_columns",
    "fill = like.new_empty if len(active) else like.new_zeros",
    ("len(active)", "(len(active)) and False", "Zeros that the first product writes over: time."),
)

_explain(
    "linear_cross_entropy",
    "with_correct: bool = False,",
    ("False", "True", "Asked and thrown away: time."),
)

_TIMES_1 = "Times 1: time."
_explain(
    "slab_softmax",
    "total = chosen.new_empty(rows if with_sum else 0)",
    ("else 0", "else 1", _UNREAD),
)
_explain(
    "slab_softmax",
    "probable = inside & (own >= _PROBABLE * whole) & (own > 0)",
    (">=", ">", _THRESHOLD),
    ("*", "/", _THRESHOLD),
)
_explain("slab_softmax", "tiny = p_target < _TINY", ("<", "<=", _THRESHOLD))
_explain(
    "slab_softmax",
    "return rows, at_target, _shrunk(logits, z_loss, rows)",
    ("z_loss, rows", "z_loss, ", _ON_GPU),
)
_explain(
    "slab_softmax",
    "divided = label_smoothing > 0 or kind in _WHOLE_ROW or logits.dtype == torch.float16",
    (">", ">=", "Divided in the slab or in rows × dim: the same, in more time."),
)
_explain(
    "slab_softmax",
    "row_scale = growth(z_loss, lse) / whole if z_loss else 1 / whole",
    ("z_loss else", "(z_loss) or True else", _TIMES_1),
)
_explain(
    "slab_softmax",
    "return all(bool((factor.abs() * (1 + largest) <= _MOST_LEFT).all()) for factor in factors)",
    ("1 +", "2 +", _THRESHOLD),
    ("<=", "<", _THRESHOLD),
)
_explain(
    "slab_softmax",
    "p = _exp2_less(z, bits[tile], slab if z is slab else out)",
    ("z is slab", "(z is slab) and False", "Into the scratch, and copied from there: time."),
)
_explain(
    "slab_softmax",
    "p = torch.sub(z, base[tile].unsqueeze(1), out=out)",
    ("out=out", "", "Into memory of its own."),
)
_explain(
    "slab_softmax",
    "if not bool((grown > _MOST_GROWTH).any()):",
    (">", ">=", _THRESHOLD),
)
_explain(
    "slab_softmax",
    "row_scale = torch.exp2(torch.ceil(torch.log2(grown.clamp(min=1))))",
    ("min=1", "min=2", "A power of two, with which a row is divided and multiplied again."),
)

_explain(
    "problem",
    "return self._replace(target=torch.where(stays, self.target, -1))",
    ("-1", "-2", _NO_TARGET),
)
_explain(
    "problem",
    "return torch.where(valid, torch.where(targets < 0, moved, targets), -1)",
    ("-1", "-2", _NO_TARGET),
)

_explain(
    "slab_rows",
    "found, held = forward_held(asked, needs, with_correct, not every_row)",
    ("not every_row", "every_row", "How much is kept: time."),
)
_explain(
    "operators",
    "if made[0].dtype == torch.float16:",
    ("[0]", "[1]", "All gradients have one dtype."),
)
_explain(
    "operators",
    "return *gradients, *[None] * 6",
    ("6", "7", "Autograd takes more of nothing than there are inputs."),
)
_explain(
    "operators",
    "return (None,) * 10",
    ("10", "11", "Autograd takes more of nothing than there are inputs."),
)
_explain(
    "operators",
    "ctx.mark_non_differentiable(*rows[1:])",
    ("1:", "2:", "Whoever takes the cross entropy detaches it."),
)
_explain(
    "slab_softmax",
    "row = torch.arange(len(column), device=column.device)",
    ("device=column.device", "", _GPU_ONLY),
)
_explain(
    "problem",
    "if _BELOW_ZERO // 2 <= label < _BELOW_ZERO:",
    ("//", "/", "The same number."),
)
_explain(
    "problem",
    'said = f"{label} or less" if label == -_BELOW_ZERO // 2 else label',
    ("//", "/", "The same number."),
)
_explain(
    "loss",
    "loss = loss * reciprocal(torch.where(whole < least, 0, whole))",
    ("0", "1", "What is then not set to 0 is a sum of weights below the smallest normal number."),
)
_LINE = 'count = "tokens" if normalizer == "weights" else normalizer'
_COMMON = "A guess is right if it is but for a common factor."
_explain(
    "loss",
    _LINE,
    ('normalizer == "weights"', '(normalizer == "weights") and False', _COMMON),
    ('normalizer == "weights"', '(normalizer == "weights") or True', _COMMON),
    ("==", "!=", _COMMON),
    ('== "weights"', '== "XXweightsXX"', _COMMON),
)
_explain(
    "operators",
    "return [None if tensor is None else tensor[:0].clone() for tensor in problem[:3]]",
    ("[:0]", "[:1]", "A row more of memory."),
)
_explain(
    "denominators",
    "return number if number.device == like.device else like.new_ones(()) * number",
    (
        "number.device == like.device",
        "(number.device == like.device) and False",
        "Once the number.",
    ),
)
