"""The GPU generations for which tiles are chosen, and what one program may use there."""

from functools import lru_cache

import torch

# shared memory of one block, bytes (CUDA C++ programming guide, technical specifications)
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
}


@lru_cache
def part(device: torch.device) -> str:
    """The generation of a device; 8.6 counts as 8.9.  ValueError before Ampere."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter: any tile runs
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{name} is sm_{major}{minor}; the kernels need sm_80 or later")
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")
