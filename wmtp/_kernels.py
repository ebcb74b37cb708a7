"""Which tensors the Triton kernels take, and where there are any."""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor


def kernels_for(tensor: Tensor, module: str) -> ModuleType | None:
    """A module of kernels, for a tensor that they can take."""
    if tensor.is_cuda and tensor.dtype != torch.float64:
        return _loaded(module)
    return None


@functools.cache
def _loaded(module: str) -> ModuleType | None:
    """Imported when it is first wanted: it imports Triton, which comes with torch for CUDA."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"wmtp.{module}")
