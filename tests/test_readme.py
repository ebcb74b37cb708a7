"""The README's Python blocks run as written, in order, in one namespace."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import wmtp
from tests.helpers import close, grads, load_script
from tests.strategies import integers


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS: list[str] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def readme(until: str, folder: Path) -> Any:
    """What the blocks define, down to the one that says so."""
    last = next(number for number, text in enumerate(BLOCKS) if until in text)
    script = folder / "readme.py"
    script.write_text("\n".join(BLOCKS[: last + 1]), encoding="utf-8")
    return load_script(script)


def test_every_python_block_of_the_readme_runs() -> None:
    assert len(BLOCKS) >= 8
    program = "\n".join(BLOCKS)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_every_public_function() -> None:
    missing = [name for name in wmtp.__all__ if name not in README and name != "nn"]
    exceptions = {"weighted_mtp_loss_and_stats", "linear_weighted_mtp_loss_and_stats"}
    assert set(missing) <= exceptions


class Trunk(torch.nn.Embedding):
    """Hidden states of a token alone, so that it does not matter how documents are packed."""

    def forward(self, input_ids: Tensor, **options: Tensor | bool | None) -> Any:  # type: ignore[override]
        return SimpleNamespace(last_hidden_state=super().forward(input_ids))


class CausalLM(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config, self.loss_type = SimpleNamespace(hidden_size=4), "ForCausalLM"
        self.model, self.lm_head = Trunk(7, 4).double(), torch.nn.Linear(4, 7, bias=False).double()


def test_a_wrapped_model_learns_what_each_document_would_teach_by_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = readme("class WithLoss", tmp_path).WithLoss(CausalLM(), 3).double()
    torch.nn.init.normal_(model.mtp.outer)
    parameters = list(model.parameters())
    documents = [integers(n, 7, 1, length) for n, length in enumerate((5, 3, 6, 2))]
    count = sum(x.shape[1] - 1 for x in documents)
    packed = torch.cat(documents, 1)
    places = torch.cat([torch.arange(x.shape[1]) for x in documents])[None]
    firsts = packed.masked_fill(places == 0, -100)  # as collators do
    alone = sum(model(x, x, count)["loss"] for x in documents)
    together = model(packed, firsts, count, position_ids=places)["loss"]
    windows = [slice(0, 8), slice(8, None)]  # two micro-batches of two documents each
    micro = sum(model(packed[:, w], firsts[:, w], count, places[:, w])["loss"] for w in windows)
    for loss in (together, micro):
        close(loss, alone)
        for here, there in zip(grads(loss, parameters), grads(alone, parameters), strict=True):
            close(here, there)
    close(model(packed, packed, None, places)["loss"], model(packed, firsts, None, places)["loss"])


def test_head_weights_over_counts_are_each_heads_own_mean(tmp_path: Path) -> None:
    made = readme("head_weights=torch.tensor", tmp_path)
    logits = made.hidden @ made.unembedding.T
    first, *others = (
        F.cross_entropy(logits[:, :, h].flatten(0, 1), made.targets[..., h].flatten())
        for h in range(4)
    )
    close(made.loss, first + 0.3 * torch.stack(others).mean(), torch.float32)


def test_the_commands_of_ci_are_marked() -> None:
    for name in ("main", "test"):
        assert re.search(rf"<!-- ci:{name} -->\n```bash\n.+?```", README, flags=re.DOTALL), name
