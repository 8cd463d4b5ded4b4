"""What tiles are chosen for: five GPU generations, and Triton's interpreter on a CPU."""

from functools import lru_cache

import torch

# The interpreter takes as long for a large tile as for a small one: there, few programs are best.
# Tests of single kernels put a GPU's name here, to run the tiles that run there.
PART_OF_A_CPU = "interpreter"

# shared memory of one block, bytes (CUDA C++ programming guide, technical specifications)
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
}
# multiprocessors of the generation's largest: A100, RTX 4090, H100 and H200, B200, RTX 5090.  What
# is cut by them is cut alike on every GPU of the part.
PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170}


def part(device: torch.device) -> str:
    """What a device counts as, 8.6 as 8.9 for example.  ValueError for a GPU before Ampere."""
    return _generation(device) if device.type == "cuda" else PART_OF_A_CPU


@lru_cache
def _generation(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{name} is sm_{major}{minor}; the kernels need sm_80 or later")
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")
