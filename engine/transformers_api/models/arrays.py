"""Arrays in and out: torch, NumPy, and those with DLPack, such as jax.Array.

The model computes in torch; outputs come back as arrays of the kind that the inputs had.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemcut.engine.checks import shorten

Convert = Callable[[Tensor], Any]
DL_CPU = 1  # DLPack's number for host memory


def as_tensor(name: str, x: Any, device: torch.device) -> Tensor:
    """The tensor on `device` that holds `x`; ValueError where it is no array or is elsewhere.

    Arrays in host memory that are not torch's are copied to the device.
    """
    if isinstance(x, Tensor):
        if x.device != device and not (
            x.is_cuda and device.type == "cuda" and device.index is None
        ):
            raise ValueError(
                f"{name} is on {x.device}, the model on {device}; "
                f"move one of them: {name}.to({str(device)!r}) or model.to({str(x.device)!r})"
            )
        return x
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "biuf":
            raise ValueError(f"{name} is an array of {x.dtype}, not of numbers")
        return torch.tensor(x, device=device)  # a copy: torch cannot share a read-only array
    if hasattr(x, "__dlpack__"):
        return torch.from_dlpack(x).to(device)
    raise ValueError(
        f"{name} {shorten(x)} is a {type(x).__name__}; "
        f"give a torch.Tensor, a NumPy array or one that has __dlpack__"
    )


def converter_to_kind_of(x: Any) -> Convert:
    """A function from a tensor to an array of x's kind, on the host or the device as x is."""
    if isinstance(x, Tensor):
        return lambda tensor: tensor
    if isinstance(x, np.ndarray):
        return to_numpy
    namespace = x.__array_namespace__() if hasattr(x, "__array_namespace__") else None
    if namespace is None or not hasattr(namespace, "from_dlpack"):
        return lambda tensor: tensor  # DLPack alone says how to export, not how to import
    on_host = x.__dlpack_device__()[0] == DL_CPU

    def to_foreign(tensor: Tensor) -> Any:
        return namespace.from_dlpack((tensor.cpu() if on_host else tensor).contiguous())

    return to_foreign


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The same numbers in a NumPy array; NumPy has no bfloat16: that becomes float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def convert(value: Any, to_kind: Convert) -> Any:
    """`value` with every tensor in it converted; tuples stay tuples."""
    if isinstance(value, Tensor):
        return to_kind(value)
    if isinstance(value, tuple):
        return tuple(convert(item, to_kind) for item in value)
    return value
