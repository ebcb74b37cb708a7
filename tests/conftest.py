"""Hypothesis profiles. `HYPOTHESIS_PROFILE=nightly pytest` searches longer."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from wmtp import operators


_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=25, **_COMMON)
# Derandomised, so that a red run on one commit is red for everybody.
settings.register_profile("ci", max_examples=40, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=2000, **_COMMON)
# For `python -m tests.mutation`: a mutant is to be noticed, not understood, so nothing is shrunk.
_HUNT = (Phase.explicit, Phase.generate)
settings.register_profile("mutation", max_examples=30, derandomize=True, phases=_HUNT, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Without a GPU the Triton kernels run in Triton's interpreter; Triton must know when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors are tiny: more threads only fight with the other test workers.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _used_up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore
    """See ``loss_forms.py``."""
    asked = getattr(request.node, "callspec", None)
    if asked is not None and asked.params.get("form") in ("used up", "lent"):
        monkeypatch.setattr(operators, "_graph_is_kept", lambda: False)
