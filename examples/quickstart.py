"""Weighted multi-token prediction in a plain PyTorch loop; runs in a few seconds on a laptop.

A tiny model learns to spell one sentence. Some letters of every batch are noise. The weights tell
the loss to ignore them; any other weights with one number per token are used the same way.
"""

import torch
from torch import nn

from wmtp import weighted_mtp_loss
from wmtp.nn import MTPHeads


TEXT = "the quick brown fox jumps over the lazy dog. "
HEADS, DIM, VOCABULARY = 4, 64, 128


class TinyModel(nn.Module):
    """Letters in, one row of logits per head out: head h predicts the letter h + 1 places on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.trunk = nn.GRU(DIM, DIM, batch_first=True)
        self.heads = MTPHeads(DIM, HEADS)  # [batch seq dim] -> [batch seq heads dim]
        self.unembedding = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.trunk(self.embedding(tokens))
        return self.unembedding(self.heads(hidden))  # [batch seq heads vocab]


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Letters `[8, 45]`, a fifth of them noise, and a weight for each: 1, or 0 for noise."""
    letters = torch.tensor([ord(letter) for letter in TEXT]).repeat(8, 1)
    noisy = torch.rand(letters.shape) < 0.2
    letters[noisy] = torch.randint(97, 123, (int(noisy.sum()),))
    return letters, (~noisy).float()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a model is fastest on one core
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(101):
        tokens, weights = make_batch()
        # labels are the tokens themselves: the loss looks 1 … H places ahead by itself
        loss = weighted_mtp_loss(model(tokens), tokens, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step:3d}   loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
