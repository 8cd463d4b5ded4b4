"""The arch of a device, for which tiles are chosen: five GPU generations, and the interpreter."""

from functools import lru_cache

import torch

# The interpreter takes as long for a large tile as for a small one: there, few programs are best.
# Tests of single kernels put a GPU's arch here, to run the tiles that run there.
ARCH_OF_A_CPU = "interpreter"

# shared memory of one block, bytes (CUDA C++ programming guide, technical specifications)
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
}
# multiprocessors of the arch's largest GPU: A100, RTX 4090, H100 and H200, B200, RTX 5090.  Work is
# cut by these, and so alike on every GPU of the arch.
PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170}


def arch_of(device: torch.device) -> str:
    """The arch that a device counts as, 8.6 as "sm_89" for example; ValueError before Ampere."""
    return _generation(device) if device.type == "cuda" else ARCH_OF_A_CPU


@lru_cache
def converts_fp8(device: torch.device) -> bool:
    """Whether a device converts to and from e4m3: a CPU, and GPUs from 8.9 on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


@lru_cache
def _generation(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{name} is sm_{major}{minor}; the kernels need sm_80 or later")
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")
