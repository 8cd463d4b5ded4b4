"""Devices that are not here, and GPUs that are too old."""

import pytest
import torch
from op_cases import quantized_calls, small_calls
from torch._subclasses.fake_tensor import FakeTensorMode

from gemcut import kernels
from gemcut.kernels import gpu_arch
from gemcut.kernels.checks import check_tensors
from gemcut.kernels.gpu_arch import arch_of


@pytest.fixture
def two_gpus(monkeypatch):
    """Tensors without data on either of two GPUs, of which the first is current."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode():
        yield


def test_a_gpu_that_is_not_current_is_refused(two_gpus):
    """Triton would launch on the current one, and read foreign memory there."""
    check_tensors(torch.empty(3, device="cuda:0"))
    with pytest.raises(ValueError, match=r"on cuda:1, .* current device, cuda:0; call under"):
        check_tensors(torch.empty(3, device="cuda:1"))


def test_tensors_of_two_devices_are_refused(two_gpus):
    with pytest.raises(ValueError, match="weight is on cuda:1, the input on cuda:0"):
        check_tensors(torch.empty(3, device="cuda:0"), weight=torch.empty(3, device="cuda:1"))


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
    ],
)
def test_generations(capability, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpu_arch._generation.cache_clear()
    assert arch_of(torch.device("cuda", 0)) == name
    gpu_arch._generation.cache_clear()


def test_what_is_older_than_ampere_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    gpu_arch._generation.cache_clear()
    with pytest.raises(ValueError, match="Tesla T4 is sm_75; the kernels need sm_80 or later"):
        arch_of(torch.device("cuda", 0))


@pytest.mark.parametrize("name", kernels.__all__)
def test_no_op_reads_a_tensor_for_a_message_that_nobody_sees(name, monkeypatch):
    """On a GPU that stops the device, and breaks the capture of a graph."""

    def read(self, *_):
        raise AssertionError("a tensor was formatted")

    quantised = quantized_calls("int4 in 32s").get(name)
    arguments = small_calls()[name]
    for method in ("__repr__", "__format__", "item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, method, read)
    getattr(kernels, name)(**arguments)
    if quantised is not None:
        getattr(kernels, name)(**quantised)
