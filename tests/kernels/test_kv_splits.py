"""Splits of keys in decode attention: as many on the device as the host has counted."""

from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from accuracy import DEVICE

from gemcut.kernels.kv_combine import split_begin, split_of
from gemcut.kernels.kv_splits import count_splits, most_splits


@triton.jit
def cut_kernel(keys_ptr, splits_ptr, begins_ptr, N: tl.constexpr, IS_LOCAL: tl.constexpr):
    offs = tl.program_id(0) * N + tl.arange(0, N)
    key = tl.load(keys_ptr + offs)
    tl.store(splits_ptr + offs, split_of(key, 16, IS_LOCAL))
    tl.store(begins_ptr + offs, split_begin(offs, 16, IS_LOCAL))


@pytest.mark.parametrize("is_local", [False, True], ids=["global", "local"])
def test_splits_of_keys(is_local):
    """A plain table of the keys of all splits, up to 2 ** 20."""
    begins, length = [0], 16
    while begins[-1] < 2**20:
        doubles = not is_local and len(begins) >= 256 and len(begins) % 128 == 0
        begins.append(begins[-1] + length)
        length *= 1 + doubles
    lengths = [end - begin for begin, end in pairwise(begins)]
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[: 2**20]
    keys = torch.arange(2**20, device=DEVICE, dtype=torch.int32)
    splits, found = torch.empty_like(keys), torch.empty_like(keys)
    cut_kernel[(64,)](
        keys_ptr=keys, splits_ptr=splits, begins_ptr=found, N=2**14, IS_LOCAL=is_local
    )
    assert torch.equal(splits.cpu().long(), number)
    count = min(len(begins), 1280)  # below 2 ** 31 keys
    assert found[:count].tolist() == begins[:count]
    if not is_local:
        for length in (1, 16, 17, 4095, 4096, 4097, 4128, 4129, 8192, 99_999, 2**20):
            assert count_splits(length, 16) == number[length - 1] + 1
            assert most_splits(length, 16, False) == count_splits(length, 16)


@pytest.mark.parametrize("split", [16, 64])
@pytest.mark.parametrize("seen", [1, 2, 15, 16, 17, 18, 255, 256, 257, 258, 1000])
def test_room_for_the_splits_of_a_window(seen, split):
    """Wherever it begins: the most that any place takes, and no more."""
    places = [(first // split, (first + seen - 1) // split) for first in range(32 * split)]
    splits = max(last - first + 1 for first, last in places)
    assert most_splits(seen, split, True) == splits
