"""The choice of device, dtype and op table; "auto" takes what suits the machine."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch

from gemcut import kernels
from gemcut.engine.checks import shorten
from gemcut.kernels import cpu, reference
from gemcut.kernels.checks import FP8, check_converts_fp8
from gemcut.kernels.cpu_products import has_bfloat16
from gemcut.kernels.gpu_arch import arch_of

T = TypeVar("T")


def in_temporary_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends with it, and return its result.

    Loading computes, and a thread that computes on a CPU keeps a team of OpenMP threads as long as
    it lives.  With the engine's own team there would be more threads than cores, and then they no
    longer spin: 160 tokens/s of the demo model instead of 390, measured on two cores.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def release_freed_memory() -> None:
    """Give the system what the C library keeps of memory that was freed; glibc alone does so.

    Loading frees the pieces that it converts, and much of that is kept for later: 133 MB after
    Gemma 3 270M of a GGUF file, 55 MB after its safetensors.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


_THREAD = threading.local()


def check_process() -> None:
    """Nothing, or RuntimeError where this thread would wait for threads that a fork left behind.

    A thread that has computed on a CPU has a team of OpenMP threads.  In a child process that was
    forked by it the team is gone, and its next parallel region waits for it for ever.
    """
    process = os.getpid()
    if getattr(_THREAD, "process", process) != process and torch.get_num_threads() > 1:
        raise RuntimeError(
            "this process was forked by a thread that had computed, whose helpers are not here: "
            "start it by spawn, or call torch.set_num_threads(1) in it first"
        )
    _THREAD.process = process


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Within it torch computes as it does by itself, on this device, whatever the caller has set.

    No gradients, no autocast, and tensors that may be written to outside inference mode.  A default
    device or dtype stays, for callbacks: gemcut's own tensors are made with both.
    """
    check_process()
    with ExitStack() as settings:
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.no_grad())
        settings.enter_context(
            torch.accelerator.device_index(device.index)
        )  # Triton launches there
        settings.enter_context(without_autocast(device))
        yield


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which products on this device have the dtype of their operands."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


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


def choose_device_map(device_map: Any) -> torch.device:
    """The one device that transformers' device_map means: None is the CPU, a number a GPU."""
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise NotImplementedError(
                f"device_map {shorten(device_map)}: a model lies on one device; give its name"
            )
        device_map = device_map[""]
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        device_map = f"cuda:{device_map}"
    if device_map in ("balanced", "balanced_low_0", "sequential"):  # of one device, all the same
        device_map = "auto"
    place: Any = "cpu" if device_map is None else device_map
    return choose_device(place)


def choose_dtype(
    dtype: str | torch.dtype, device: torch.device, is_quantized: bool = False
) -> torch.dtype:
    """The dtype asked for; "auto" is bfloat16 on cuda and float32 on a CPU.

    A CPU that multiplies bfloat16 takes it for a model with quantised weights: torch's integer
    kernels read it, and in float32 rows would be dequantised at each step.
    """
    if dtype == "auto":
        is_bf16 = device.type == "cuda" or (is_quantized and has_bfloat16())
        return torch.bfloat16 if is_bf16 else torch.float32
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen == torch.float16:
        raise ValueError(
            "dtype float16 is refused: Gemma's activations overflow it; use bfloat16 or float32"
        )
    if chosen not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype {dtype!r} is not supported; give 'auto', 'bfloat16' or 'float32'")
    return chosen


def choose_cache_dtype(
    kv_cache_dtype: str, dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """The dtype of the KV cache: "auto" is the model's, "fp8" float8_e4m3fn."""
    if kv_cache_dtype not in ("auto", "fp8"):
        raise ValueError(
            f"kv_cache_dtype {shorten(kv_cache_dtype)} is not supported; give 'auto' or 'fp8'"
        )
    if kv_cache_dtype == "auto":
        return dtype
    check_converts_fp8(device)
    return FP8


def choose_ops(ops: str, device: torch.device) -> ModuleType:
    """The op table asked for: "triton", "reference" or "auto".

    "triton" is the kernels.  "reference" is the definitions in plain torch, which run anywhere and
    are slow.  "auto" is the kernels on cuda; on a CPU it is what the definitions compute, by torch
    functions that are fast there (kernels/cpu.py).
    """
    if ops not in ("auto", "triton", "reference"):
        raise ValueError(f"ops {ops!r} is unknown; give 'auto', 'triton' or 'reference'")
    if ops == "reference":
        return reference
    if ops == "auto" and device.type == "cpu":
        return cpu
    from gemcut.kernels.interpreter import INTERPRETED  # Triton, which only Linux has

    if device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "ops 'triton' needs a GPU; on a CPU give 'reference', or set TRITON_INTERPRET=1 before "
            "Python starts to run the kernels in Triton's interpreter, slowly"
        )
    arch_of(device)  # refuses what is older than Ampere
    return kernels


def is_plain_torch(ops: ModuleType) -> bool:
    """Whether ops are plain torch: they read numbers on the host and keep all scores of a chunk."""
    return ops in (reference, cpu)
