"""Tensors of the caller to numpy and back; torch is used only if the caller has loaded it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from sylvester.compiler.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(name: str, value: Any) -> NDArray[np.generic]:
    """A view where the memory allows it; bfloat16 becomes uint16."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return value
    if not is_tensor(value):
        hint = "convert it with numpy.array(...) or torch.tensor(...)"
        raise InputError(f"input {name!r} is a {type(value).__name__}, expected a tensor or a numpy array", hint=hint)
    if value.device.type != "cpu":
        raise InputError(f"input {name!r} is on {value.device}, expected the CPU", hint="move it with `.cpu()`")
    import torch

    value = value.detach().contiguous()
    array: NDArray[np.generic] = (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
    return array


def to_tensor(array: NDArray[np.generic], dtype: str) -> Any:
    """A tensor over the array's memory."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def floats(array: NDArray[Any], dtype: str) -> NDArray[np.floating[Any]]:
    """The array itself, or what its uint16 mean as bfloat16."""
    import numpy as np

    return (np.asarray(array).astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array
