"""Rotation and GELU of the Hub kernel, against transformers' definitions."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, by_dtype, random
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import rotate_half

from gemcut.tools.hub_kernel import pointwise
from gemcut.tools.hub_kernel.pointwise import gelu, gelu_and_mul, rotate

COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
pytestmark = pytest.mark.usefixtures("poisoned")


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers' apply_rotary_pos_emb gives."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def calls(B=2, HQ=3, HK=2, T=5, K=10, dtype=torch.float32) -> dict[str, Tensor]:
    """Heads as a projection leaves them: [B, T, H, K], transposed."""
    q, k = random(B, T, HQ, K, dtype=dtype), random(B, T, HK, K, dtype=dtype)
    cos, sin = random(B, T, K, dtype=dtype), random(B, T, K, dtype=dtype)
    return {"q": q.transpose(1, 2), "k": k.transpose(1, 2), "cos": cos, "sin": sin}


FORMS = {"kernel": (rotate, gelu, gelu_and_mul)}
FORMS["cpu"] = (pointwise._rotate_on_cpu, pointwise._gelu_on_cpu, pointwise._gelu_and_mul_on_cpu)
by_form = pytest.mark.parametrize("form", FORMS)


@by_form
@by_dtype
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, id="ragged"),
        pytest.param({"T": 1, "HQ": 8, "HK": 1, "K": 16}, id="one-decode-step"),
        pytest.param({"B": 1, "HQ": 4, "HK": 4, "K": 2}, id="narrowest"),
    ],
)
def test_rotate(form, sizes, dtype):
    torch.manual_seed(0)
    given = calls(**sizes, dtype=dtype)
    assert_accurate(FORMS[form][0], **given, oracle=rotated)
    y = FORMS[form][0](**given)
    assert [x.stride() for x in y] == [torch.empty_like(given[n]).stride() for n in ("q", "k")]


@by_form
def test_rotate_by_shared_tables_and_contiguous_heads(form):
    given = calls()
    shared = {name: given[name][:1] for name in ("cos", "sin")}
    assert_accurate(FORMS[form][0], **given | shared, oracle=rotated)
    dense = {name: given[name].contiguous() for name in ("q", "k")}
    assert_accurate(FORMS[form][0], **given | dense, oracle=rotated)


@by_form
@by_dtype
@pytest.mark.parametrize("shape", [(3, 5, 700), (1, 1, 8), (0, 4)], ids=str)
def test_gelu(form, shape, dtype):
    torch.manual_seed(0)
    x, up = random(*shape, dtype=dtype, scale=3), random(*shape, dtype=dtype)
    _, alone, with_up = FORMS[form]
    assert_accurate(alone, x, oracle=lambda x: F.gelu(x, approximate="tanh"))
    assert_accurate(with_up, x, up, oracle=gated)
    assert_accurate(with_up, x[..., ::2], up[..., ::2], oracle=gated)


def test_mistakes_show():
    """The exact GELU, and a rotation the other way."""
    x, up, given = random(400, scale=3), random(400), calls()
    with pytest.raises(AssertionError, match="exceeds"):
        assert_accurate(gelu_and_mul, x, up, oracle=lambda gate, up: F.gelu(gate) * up)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_accurate(rotate, **given | {"sin": -given["sin"]}, oracle=_turned_back)


def _turned_back(q, k, cos, sin):
    return rotated(q, k, cos, -sin)


def test_opcheck():
    given, x = calls(), random(3, 20)
    for op, arguments in (
        (torch.ops.gemcut.rotate, tuple(given.values())),
        (torch.ops.gemcut.gelu, (x,)),
        (torch.ops.gemcut.gelu_and_mul, (x, x.clone())),
    ):
        assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


def test_a_backward_is_refused_by_its_name():
    x = random(8).requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.ops.gemcut.gelu(x).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": random(2, 2, 4, 10)}, r"k is \[2, 2, 4, 10\], must be \[2, HK, 5, 10\]"),
        ({"q": random(2, 5, 10)}, "not four axes"),
        ({"cos": random(3, 5, 10)}, r"cos is \[3, 5, 10\], must be \[2, 5, 10\] or \[1, 5, 10\]"),
        ({"sin": random(2, 5, 5)}, r"sin is \[2, 5, 5\]"),
        ({"q": random(2, 3, 5, 20)[..., ::2]}, "q has strides .*, the last must be 1"),
        (calls(K=7), "head_dim 7 is not even"),
        (calls(K=514), "head_dim 514 is not even, 2 to 512"),
    ],
)
def test_bad_input(change, message):
    for form in FORMS:
        with pytest.raises(ValueError, match=message):
            FORMS[form][0](**calls() | change)


def test_bad_input_to_gelu():
    with pytest.raises(ValueError, match=r"gate is \[3\], up \[4\]"):
        torch.ops.gemcut.gelu_and_mul(random(3), random(4))
    with pytest.raises(ValueError, match=r"up is torch\.bfloat16, the input torch.float32"):
        gelu_and_mul(random(3), random(3).bfloat16())


COMPILED = """
import sys, torch
from gemcut.tools.compile_report import compile_launch
from gemcut.tools.hub_kernel.pointwise import gelu, gelu_and_mul, rotate
from gemcut.tools.launches import CAPABILITY, recorded
bad = []
for arch in CAPABILITY:
    with recorded(arch) as found:
        for HQ, HK, K in ((8, 4, 256), (4, 1, 512)):
            of = lambda *s: torch.empty(*s, device="cuda", dtype=torch.bfloat16)
            q, k = of(2, 640, HQ, K).transpose(1, 2), of(2, 640, HK, K).transpose(1, 2)
            rotate(q, k, of(1, 640, K), of(1, 640, K))
        gelu(of(7, 2048))
        gelu_and_mul(of(7, 2048), of(7, 2048))
    for launch in found:
        cell = compile_launch(launch, [])
        cell.waits = []  # launched plainly: it begins when the kernel before has ended
        bad += [(launch.kernel, arch, p) for p in cell.problems()]
        print(launch.kernel, arch, cell.registers, cell.spill_bytes)
sys.exit(str(bad) if bad else 0)
"""


def test_they_compile_for_every_generation_by_the_rules_of_compile_report():
    """No spill, 16-byte loads, 64-bit addresses."""
    command = [sys.executable, "-P", "-c", COMPILED]
    run = subprocess.run(command, capture_output=True, text=True, env=COMPILING)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(run.stdout.splitlines()) == 5 * 4
