"""The dtype of all arithmetic here: float64 stays, everything narrower becomes float32; and autocast's."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """A tensor in that dtype, itself if it is."""
    return tensor.to(wide_dtype(tensor.dtype))


def autocasts(like: Tensor) -> bool:
    """Whether products on this device are cast; some devices do not know the question."""
    kind = like.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
