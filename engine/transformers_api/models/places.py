"""Where a model lies, and in what dtype, as the documents let one say it."""

from collections.abc import Mapping
from typing import Any

import torch

from gemcut.engine.checks import shorten
from gemcut.engine.placement import choose_device, choose_dtype
from gemcut.engine.transformers_api.models.configs import PreTrainedConfig


def device_of(device_map: Any) -> torch.device:
    """The one device that a device_map means: None is the CPU, a number a GPU."""
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise NotImplementedError(
                f"device_map {shorten(device_map)}: a model lies on one device; give its name"
            )
        device_map = device_map[""]
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        device_map = f"cuda:{device_map}"
    place: Any = "cpu" if device_map is None else device_map
    return choose_device(place)


def dtype_of(dtype: Any, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto" is that of the stored weights."""
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    return choose_dtype(dtype, device)
