"""How much of the backward's products a bound on the gradient error would let a loss skip.

    python benchmarks/skipping.py                             # trains for some minutes, then measures

The backward multiplies ``factor · p`` with the unembedding and the hidden states. A tile of it, some
rows by some columns of the vocabulary, may be left out if the weighted probability in all that is
left out is at most ``bound`` times that in all. The error is then certified, without looking at the
products: ``‖error of row r‖ ≤ left_out(r) · max_v ‖W_v‖`` for the hidden gradient, and
``Σ_v ‖error of row v‖ ≤ left_out · max_r ‖x_r‖`` for the unembedding's.

A small model is trained on Python sources, in words, the vocabulary sorted by frequency. On text that
it has not seen the tiles of least weighted probability are left out, as many as the bound allows (no
method that keeps the bound can leave out more tiles of that shape), and the gradients' true errors
and the products' times are measured.
"""

import argparse
import re
import sysconfig
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from measure import chip, interleaved, medians
from torch import Tensor, nn

import wmtp


UNKNOWN = 0
SHAPES = [(4096, 1), (1024, 1), (1024, 256), (256, 256), (128, 128), (64, 64), (16, 64), (1, 64)]
BOUNDS = (1e-4, 1e-3, 1e-2)


def words_of(root: Path, megabytes: float) -> list[str]:
    """Words, runs of spaces and signs of Python files, up to so many bytes."""
    found: list[str] = []
    left = int(megabytes * 2**20)
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(errors="replace")[: min(left, 100_000)]
        found += re.findall(r"[A-Za-z]+|\d+|\n *| +|[^\w\s]|_+", text)
        left -= len(text)
        if left <= 0:
            break
    return found


def numbered(words: list[str], vocab: int, context: int) -> tuple[Tensor, int]:
    """``[rows context]`` numbers of words, by frequency, and how many there are; rare ones are 0."""
    known = [word for word, _ in Counter(words).most_common(vocab - 1)]
    number = {word: place for place, word in enumerate(known, 1)}
    tokens = torch.tensor([number.get(word, UNKNOWN) for word in words])
    return tokens[: len(tokens) // context * context].view(-1, context), len(known) + 1


class Model(nn.Module):
    """A small causal transformer; gives the last hidden states."""

    def __init__(self, vocab: int, dim: int, layers: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.place = nn.Parameter(0.02 * torch.randn(context, dim))
        layer = partial(nn.TransformerEncoderLayer, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(layer(dim, dim // 64, 4 * dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.unembedding = nn.Parameter(0.02 * torch.randn(vocab, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embedding(tokens) + self.place
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.norm(x)


def train(model: Model, rows: Tensor, minutes: float, batch: int) -> float:
    """Train for so long; the mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses: list[float] = []
    start = time.perf_counter()
    while (spent := (time.perf_counter() - start) / 60) < minutes:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (len(losses) + 1) / 50) * (1 - 0.95 * spent / minutes)
        tokens = rows[torch.randint(len(rows), (batch,))]
        loss = wmtp.linear_mtp_ce_loss(model(tokens)[:, :-1], model.unembedding, tokens[:, :-1])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(
                f"  {spent:4.1f} min  step {len(losses):5}  loss {sum(losses[-50:]) / 50:.3f}",
                flush=True,
            )
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def tile_masses(weighted: Tensor, height: int, width: int) -> Tensor:
    """``[tiles down, tiles across]`` sums."""
    rows, vocab = weighted.shape
    padded = nn.functional.pad(weighted, (0, -vocab % width, 0, -rows % height))
    return padded.unflatten(0, (-1, height)).unflatten(2, (-1, width)).sum((1, 3))


def left_out(masses: Tensor, bound: float) -> Tensor:
    """The tiles of least mass, as many as the bound allows."""
    flat, order = masses.flatten().sort()
    fits = flat.cumsum(0) <= bound * masses.sum()
    out = torch.zeros(masses.numel(), dtype=torch.bool)
    out[order[fits]] = True
    return out.view(masses.shape)


def report(weighted: Tensor, hidden: Tensor, unembedding: Tensor, full: Tensor) -> None:
    """Share of tiles and true errors by shape and bound; ``full`` has the targets' entries too."""
    of_hidden, of_weight = full @ unembedding, full.T @ hidden
    print("  tile          bound    tiles left out   error of hidden, unembedding gradient")
    for height, width in SHAPES:
        masses = tile_masses(weighted, height, width)
        for bound in BOUNDS:
            out = left_out(masses, bound)
            gone = out.repeat_interleave(height, 0).repeat_interleave(width, 1)
            lost = torch.where(gone[: len(full), : full.shape[1]], weighted, 0)
            errors = (
                (lost @ unembedding).norm() / of_hidden.norm(),
                (lost.T @ hidden).norm() / of_weight.norm(),
            )
            print(
                f"  {height:5} × {width:<5} {bound:7.0e} {100 * float(out.double().mean()):12.1f} %"
                f"      {errors[0]:.1e}, {errors[1]:.1e}",
                flush=True,
            )


def time_columns(weighted: Tensor, hidden: Tensor, unembedding: Tensor, bound: float) -> None:
    """Two products over all columns against those over the columns kept, gathering included."""
    kept = (~left_out(tile_masses(weighted, len(weighted), 1), bound)[0]).nonzero().squeeze(1)

    def whole() -> tuple[Tensor, Tensor]:
        return weighted @ unembedding, weighted.T @ hidden

    def some() -> tuple[Tensor, Tensor]:
        part = weighted[:, kept]
        of_weight = torch.zeros_like(unembedding)
        of_weight[kept] = part.T @ hidden
        return part @ unembedding[kept], of_weight

    seconds = medians(interleaved({"whole": whole, "some": some}, 5))
    print(
        f"  whole columns, bound {bound:.0e}: two products {seconds['whole']:.3f} s, over the "
        f"{len(kept)} columns kept {seconds['some']:.3f} s, {seconds['some'] / seconds['whole']:.2f} ×"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=Path(sysconfig.get_path("purelib")))
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--vocab", type=int, default=16000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4096)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{chip()}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    words = words_of(options.root, options.megabytes)
    tokens, vocab = numbered(words, options.vocab, options.context)
    unseen = -(-options.rows // (options.context - 1))
    heldout, rows = tokens[-unseen:], tokens[:-unseen]
    print(f"{tokens.numel()} words, {vocab} different; {rows.numel()} to train on")

    model = Model(vocab, options.dim, options.layers, options.context)
    trained = train(model, rows, options.minutes, options.batch)
    print(f"trained: loss {trained:.3f} nats a word")
    with torch.no_grad():
        hidden = model(heldout)[:, :-1].flatten(0, 1)[: options.rows]
        target = heldout[:, 1:].flatten()[: options.rows]
        unembedding = model.unembedding
        p = torch.softmax(hidden @ unembedding.T, 1)
        ce = -p.gather(1, target[:, None]).log().squeeze(1)
        factors = {
            "all predictions weighted alike": torch.ones_like(ce),
            "DFT, weight p of the target": (-ce).exp(),
        }
        print(f"unseen text: loss {float(ce.mean()):.3f}, median {float(ce.median()):.3f}")
        for name, factor in factors.items():
            factor = factor / factor.sum()
            full = p * factor[:, None]
            weighted = full.scatter(1, target[:, None], 0.0)  # the target's part is always added
            full.scatter_add_(1, target[:, None], -factor[:, None])
            print(f"\n{name}")
            report(weighted, hidden, unembedding, full)
            time_columns(weighted, hidden, unembedding, 1e-3)


if __name__ == "__main__":
    main()
