"""What `auto` means: device, dtype, ops and the length of a slot, from what the machine has."""

import os
import re
from bisect import bisect_right
from pathlib import Path
from types import ModuleType

import torch

from gemcut import kernels
from gemcut.engine.cache import slot_bytes
from gemcut.engine.checks import check_int
from gemcut.engine.config import GemmaConfig
from gemcut.kernels import reference
from gemcut.kernels.parts import part

MEMINFO = Path("/proc/meminfo")
MEMORY_SHARE = 0.8  # of the free memory, for the cache; the rest is for activations


def choose_device(device: str | torch.device) -> torch.device:
    """The device asked for; "auto" is cuda where there is one, else cpu."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {device!r} is unknown; give 'auto', 'cpu' or 'cuda'") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; give 'auto', 'cpu' or 'cuda'")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto" is bfloat16 on cuda and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen == torch.float16:
        raise ValueError(
            "dtype float16 is refused: Gemma's activations overflow it; use bfloat16 or float32"
        )
    if chosen not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype {dtype!r} is not supported; give 'auto', 'bfloat16' or 'float32'")
    return chosen


def choose_ops(ops: str, device: torch.device) -> ModuleType:
    """The op table asked for; "auto" is the Triton kernels on cuda and the reference on a CPU."""
    if ops not in ("auto", "triton", "reference"):
        raise ValueError(f"ops {ops!r} is unknown; give 'auto', 'triton' or 'reference'")
    if ops == "reference" or (ops == "auto" and device.type == "cpu"):
        return reference
    from gemcut.kernels.interpreter import INTERPRETED  # Triton, which only Linux has

    if device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "ops 'triton' needs a GPU; on a CPU give 'reference', or set TRITON_INTERPRET=1 before "
            "Python starts to run the kernels in Triton's interpreter, slowly"
        )
    part(device)  # refuses what is older than Ampere
    return kernels


def choose_max_seq_len(
    max_seq_len: int | None,
    config: GemmaConfig,
    num_slots: int,
    prefill_chunk: int,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Tokens that a slot holds: what was asked for, or the model's limit capped by free memory."""
    limit = config.context_length
    if max_seq_len is not None:
        check_int("max_seq_len", max_seq_len, 2, limit)  # a prompt and what comes of it
        return max_seq_len
    budget = MEMORY_SHARE * free_bytes(device)
    length = longest_slot(config, num_slots, prefill_chunk, dtype, budget)
    if length < 2:
        raise MemoryError(
            f"{device} has {budget / 1e9:.2f} GB for the KV cache, "
            f"too little for {num_slots} slots; lower max_batch_size"
        )
    return length


def longest_slot(
    config: GemmaConfig, num_slots: int, prefill_chunk: int, dtype: torch.dtype, budget: float
) -> int:
    """The most tokens, up to the model's limit, that each slot can hold in `budget` bytes."""
    return bisect_right(
        range(1, config.context_length + 1),
        budget / num_slots,
        key=lambda length: slot_bytes(config, length, prefill_chunk, dtype),
    )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if MEMINFO.exists():  # counts what the page cache would give back, a checkpoint just read, say
        (available,) = re.findall(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
        return int(available) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
