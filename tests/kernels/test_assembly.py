"""The assembly that turns bytes into bfloat16, instruction by instruction: nothing else runs it.

The interpreter takes plain arithmetic in its place, and a GPU is not at hand.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gemcut.kernels import quantized_tiles

SOURCE = Path(quantized_tiles.__file__).read_text()
BYTES = np.arange(256, dtype=np.uint32)


def assembly_of(function: str) -> list[list[str]]:
    """The instructions of a device function's assembly, each as its words."""
    body = SOURCE[SOURCE.index(f"def {function}(") :]
    found = re.search(r'"""\s*\{(.*?)\}\s*"""', body[body.index("inline_asm_elementwise") :], re.S)
    assert found is not None
    lines = [line.strip().rstrip(";") for line in found[1].strip().splitlines()]
    return [line.replace(",", " ").split() for line in lines if not line.startswith(".reg")]


def bfloat16(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A * b + c of both halves of registers, which is exact here."""
    result = np.zeros_like(a)
    for shift in (0, 16):
        x, y, z = (bfloat16(r >> shift & 0xFFFF).astype(np.float64) for r in (a, b, c))
        exact = x * y + z
        bits = exact.astype(np.float32).view(np.uint32)
        assert np.array_equal((bits & np.uint32(0xFFFF0000)).view(np.float32), exact)
        result |= bits >> 16 << shift
    return result


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Bytes 0 to 3 of a and 4 to 7 of b, as four digits of the selector choose them."""
    choices = [a >> 8 * i & 0xFF for i in range(4)] + [b >> 8 * i & 0xFF for i in range(4)]
    digits = [int(selector[0]) >> 4 * i & 7 for i in range(4)]
    chosen = [choices[digit] << np.uint32(8 * i) for i, digit in enumerate(digits)]
    return np.bitwise_or.reduce(chosen)


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    assert int(table[0]) == (0xF0 & 0xCC) | 0xAA
    return a & b | c


OPERATIONS = {
    "mov.b32": lambda a: a,
    "prmt.b32": prmt,
    "shr.u32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": fma,
}


def run(function: str, register: np.ndarray, outputs: int) -> list[np.ndarray]:
    """The output registers of a function's assembly for registers of four bytes."""
    registers = {f"${outputs}": register}

    def value(word: str) -> np.ndarray:
        if word in registers:
            return registers[word]
        return np.full_like(register, int(word, 0))

    for operation, target, *operands in assembly_of(function):
        registers[target] = OPERATIONS[operation](*map(value, operands))
    return [registers[f"${i}"] for i in range(outputs)]


def four_of(registers: list[np.ndarray]) -> np.ndarray:
    """The four numbers in two registers: [256, 4]."""
    return np.stack([bfloat16(r >> s & 0xFFFF) for r in registers for s in (0, 16)], 1)


@pytest.mark.parametrize("place", range(4))
def test_fp8(place):
    """Every byte but the two NaN, at each place of a register beside others."""
    others = 0x3C8155E7 & ~(0xFF << 8 * place)
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    found = four_of(run("numbers", BYTES << np.uint32(8 * place) | np.uint32(others), 2))
    known = ~np.isnan(expected)
    assert known.sum() == 254
    assert np.array_equal(found[known, place], expected[known])
    assert np.array_equal(np.signbit(found[known, place]), np.signbit(expected[known]))


@pytest.mark.parametrize("place", range(4))
def test_int4(place):
    others = 0x3C8155E7 & ~(0xFF << 8 * place)
    registers = run("two_numbers", BYTES << np.uint32(8 * place) | np.uint32(others), 4)
    low, high = four_of(registers[:2]), four_of(registers[2:])
    assert np.array_equal(low[:, place], (BYTES & 15).astype(np.float32) - 8)
    assert np.array_equal(high[:, place], (BYTES >> 4).astype(np.float32) - 8)
