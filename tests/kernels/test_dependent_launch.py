"""When a launch is a dependent one, and what it asks L2 for.  The waits themselves are read from
compiled code, in tests/tools/test_launch_wait.py.
"""

import threading
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from accuracy import DEVICE

from gemcut.kernels import dependent_launch as module
from gemcut.kernels import gpu_arch, rmsnorm
from gemcut.kernels.dependent_launch import (
    dependent_launch,
    prefetched_addresses,
    prefetched_bytes,
)
from gemcut.kernels.launch_switch import dependent_launches, is_on
from gemcut.kernels.product_tiles import leaves_places

ON, OFF = ({"DEPENDENT": yes, "launch_pdl": yes} for yes in (True, False))
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", False)


@pytest.mark.parametrize(
    ("arch", "options"),
    [("sm_80", OFF), ("sm_89", OFF), ("sm_90", ON), ("sm_100", ON), ("sm_120", ON)],
)
def test_by_arch(monkeypatch, arch, options):
    monkeypatch.setattr(module, "arch_of", lambda device: arch)
    assert dependent_launch(GPU) == options
    with dependent_launches(False):
        assert dependent_launch(GPU) == OFF
        with dependent_launches(True):
            assert dependent_launch(GPU) == options
        assert not is_on()
    assert dependent_launch(GPU) == options


def test_what_leaves_places_begins_on_empty_processors(monkeypatch):
    """And lets the next kernel begin: its code is that of a dependent launch."""
    monkeypatch.setattr(module, "arch_of", lambda device: "sm_90")
    assert dependent_launch(GPU, leaves_places=True) == {"DEPENDENT": True, "launch_pdl": False}
    with dependent_launches(False):
        assert dependent_launch(GPU, leaves_places=True) == OFF


@pytest.mark.parametrize(
    ("programs", "rows", "columns", "stages", "leaves"),
    [
        pytest.param(376, 64, 128, 3, True, id="three to a processor, a twentieth free"),
        pytest.param(377, 64, 128, 3, False, id="three to a processor"),
        pytest.param(448, 64, 64, 5, True, id="four, some free"),
        pytest.param(512, 64, 64, 5, False, id="four"),
        pytest.param(128, 32, 128, 6, True, id="qkv of gemma-2-2b"),
    ],
)
def test_places_on_an_h200(monkeypatch, programs, rows, columns, stages, leaves):
    monkeypatch.setattr(gpu_arch, "ARCH_OF_A_CPU", "sm_90")
    x = torch.empty(1, 64, dtype=torch.bfloat16)
    tile = {"BLOCK_D": columns, "num_stages": stages}
    assert leaves_places(x, x, programs, rows, tile) == leaves
    monkeypatch.setattr(gpu_arch, "ARCH_OF_A_CPU", "interpreter")
    assert not leaves_places(x, x, programs, rows, tile)


def test_every_arch_is_decided():
    assert set(module.ARCHS) <= set(gpu_arch.SHARED_MEMORY)


def test_none_where_kernels_are_interpreted(monkeypatch):
    """Even with the tiles of a GPU, which tests put on a CPU; and tensors may be on a GPU."""
    monkeypatch.setattr(gpu_arch, "ARCH_OF_A_CPU", "sm_90")
    monkeypatch.setattr(module, "INTERPRETED", True)
    monkeypatch.setattr(module, "arch_of", lambda device: "sm_90")
    assert dependent_launch(torch.device("cpu")) == OFF
    assert dependent_launch(GPU) == OFF


def test_the_switch_is_the_thread_s_own(monkeypatch):
    monkeypatch.setattr(module, "arch_of", lambda device: "sm_90")
    found = []
    with dependent_launches(False):
        thread = threading.Thread(target=lambda: found.append(dependent_launch(GPU)))
        thread.start()
        thread.join()
    assert found == [ON]


def test_the_switch_comes_back_after_an_error():
    with pytest.raises(ValueError, match="no hidden size"), dependent_launches(False):
        raise ValueError("no hidden size")
    assert is_on()


def weight(N, D, dtype=torch.bfloat16):
    return torch.empty(N, D, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("given", "is_even", "wanted"),
    [
        pytest.param(weight(2 * 6912, 1152), True, 256, id="vaultgemma-1b, gained"),
        pytest.param(weight(1152, 6912), True, 256, id="vaultgemma-1b down, gained"),
        pytest.param(weight(2 * 9216, 2304), True, 0, id="gemma-2-2b, cost"),
        pytest.param(weight(2304, 9216), True, 0, id="gemma-2-2b down, cost"),
        pytest.param(weight(2304, 2048), False, 0, id="steps that reach beyond"),
        pytest.param(weight(64, 127), True, 0, id="rows of fewer bytes"),
        pytest.param(weight(64, 128), True, 256, id="rows of as many"),
    ],
)
def test_what_is_prefetched(given, is_even, wanted):
    assert prefetched_bytes(given, is_even) == wanted


@triton.jit
def addresses_kernel(w_ptr, y_ptr, column, D, PREFETCH: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS).to(tl.int64)
    tl.store(y_ptr + rows, prefetched_addresses(w_ptr, rows, column, D, PREFETCH))


@pytest.mark.parametrize("offset", [0, 1, 7], ids=["aligned", "one-past", "odd"])
@pytest.mark.parametrize(("D", "column"), [(128, 0), (320, 128), (320, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prefetched_bytes_begin_in_their_row(dtype, D, column, offset):
    """The last split of a row may be shorter than what is prefetched."""
    storage = torch.empty(offset + 4 * D, dtype=dtype, device=DEVICE)
    w, y = storage[offset:], torch.empty(4, dtype=torch.int64, device=DEVICE)
    addresses_kernel[(1,)](w_ptr=w, y_ptr=y, column=column, D=D, PREFETCH=256, ROWS=4)
    row_bytes = D * w.itemsize
    for row, address in enumerate(y.tolist()):
        assert address % 16 == 0
        begin = address - w.data_ptr() - row * row_bytes  # within the row
        assert -16 < begin <= row_bytes - 256
        assert begin > min(column * w.itemsize, row_bytes - 256) - 16


def test_a_launcher_passes_both_keywords(monkeypatch):
    """One of them alone is a wait for nothing, or a launch that does not wait."""
    seen = {}

    class Kernel(SimpleNamespace):
        def __getitem__(self, grid):
            return lambda **arguments: seen.update(arguments)

    monkeypatch.setattr("gemcut.kernels.norm.rmsnorm_kernel", Kernel())
    monkeypatch.setattr("gemcut.kernels.norm.dependent_launch", lambda device: ON)
    rmsnorm(torch.ones(1, 8), torch.ones(8), 1e-6)
    assert (seen["DEPENDENT"], seen["launch_pdl"]) == (True, True)
