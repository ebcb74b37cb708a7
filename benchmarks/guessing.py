"""How often a guess of Rho-1's selection is wrong on real text, and what that costs.

    python benchmarks/guessing.py                             # trains for three minutes, then measures

The linear loss guesses which predictions Rho-1 keeps, slab by slab, from the cross entropy that it has
so far, and takes each slab's rows from all over the batch. A prediction that was guessed wrong costs
three products of its row in the backward pass. Two small models are trained on Python sources, in
words; one is the other's reference. On text that neither has seen this counts the wrong guesses, for
rows taken from all over the batch and for rows in their order, which no loss here does.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from measure import chip
from skipping import Model, numbered, train, words_of
from torch import Tensor

import wmtp


SLABS = (2, 4, 8, 16, 64)


def wrong_guesses(
    token_ce: Tensor, reference: Tensor, keep: float, slabs: int, strided: bool
) -> float:
    """Share of predictions whose guess is not what the whole batch decides; ``[batch seq heads]``."""
    valid = torch.ones_like(token_ce, dtype=torch.bool)
    kept = wmtp.rho1_weights(token_ce, valid, reference, keep=keep) > 0
    seen, guessed = torch.zeros_like(valid).flatten(), torch.zeros_like(valid).flatten()
    rows = torch.arange(len(seen))
    for i in range(slabs):
        block = rows[i::slabs] if strided else rows.chunk(slabs)[i]
        seen[block] = True
        weights = wmtp.rho1_weights(token_ce, seen.view(valid.shape), reference, keep=keep)
        guessed[block] = weights.flatten()[block] > 0
    return float((guessed != kept.flatten()).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=Path(sysconfig.get_path("purelib")))
    parser.add_argument("--megabytes", type=float, default=12)
    parser.add_argument("--minutes", type=float, default=3, help="for both models together")
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--rows", type=int, default=32, help="rows of context in a batch")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{chip()}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    words = words_of(options.root, options.megabytes)
    tokens, vocab = numbered(words, options.vocab, options.context)
    order = torch.randperm(len(tokens))
    unseen, rows = tokens[order[: options.rows]], tokens[order[options.rows :]]

    found: list[Tensor] = []
    for name, share in (("reference", 0.7), ("model", 0.3)):
        model = Model(vocab, options.dim, 2, options.context)
        trained = train(model, rows, share * options.minutes, options.batch)
        with torch.no_grad():
            found.append(wmtp.linear_token_nll(model(unseen), model.unembedding, unseen))
        print(
            f"{name}: trained to {trained:.3f}, unseen text {float(found[-1].mean()):.3f} nats a word"
        )
    reference, token_ce = found[0][:, 1:, None], found[1][:, 1:, None]
    spread = (token_ce - reference).mean(1).std()
    print(
        f"{token_ce.numel()} predictions in {options.rows} rows, keep {options.keep}; mean excess of a "
        f"row varies by {float(spread):.3f}"
    )
    print("  slabs   guessed wrong   as products of all rows   in their order")
    for slabs in SLABS:
        here, there = (
            wrong_guesses(token_ce, reference, options.keep, slabs, strided)
            for strided in (True, False)
        )
        print(f"  {slabs:5} {100 * here:13.2f} % {3 * here:21.3f} U {100 * there:17.2f} %")


if __name__ == "__main__":
    main()
