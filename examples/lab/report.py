"""The closing table: every arm on clean text that nothing was trained or tuned on."""

from collections.abc import Mapping
from typing import Any

from .evaluation import Score, accuracy_gain


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Loss and top-1 accuracy per head, and each arm's gain over the first one."""
    scores = {algo: Score.from_dict(result["test"]) for algo, result in results.items()}
    heads = max(score.count.shape[1] for score in scores.values())
    width = max(len("gain over "), *map(len, scores)) + 2
    names = "".join(f"{f'head {head}':>18}" for head in range(heads))
    lines = [f"{'':{width}}{names}", f"{'':{width}}" + f"{'loss':>10}{'top-1':>8}" * heads]
    for algo, score in scores.items():
        cells = zip(score.head_loss(), score.head_accuracy(), strict=True)
        lines.append(f"{algo:{width}}" + "".join(f"{loss:10.3f}{hit:8.1%}" for loss, hit in cells))
    base, *others = scores
    for algo in others:
        lines += ["", *_gain(algo, base, scores)]
    return "\n".join(lines)


def _gain(algo: str, base: str, scores: Mapping[str, Score]) -> list[str]:
    score, before = scores[algo], scores[base]
    common = min(score.count.shape[1], before.count.shape[1])
    lines = [f"{algo} against {base}, top-1 in points [95% interval over the test text]:"]
    for head, (gain, low, high) in enumerate(accuracy_gain(score, before, common)):
        loss = score.head_loss()[head] - before.head_loss()[head]
        lines.append(
            f"  head {head}: {100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], "
            f"loss {loss:+.3f}"
        )
    return lines
