"""Modules with the ops under torch.compile and torch.export, as other people write them.

A decode step of one layer, in both forms: of ops that return new tensors, and of ops that write
into the caller's.  The batch may change; bits may not.
"""

import pytest
import torch
from accuracy import DEVICE, quantized, random
from op_cases import index
from torch import Tensor

from gemcut.kernels import gpu_arch, reference
from gemcut.kernels.registration import empty_results

D, F, V, HQ, HK, K, C, SLOTS = 32, 512, 200, 4, 2, 16, 8, 6
ROWS = (HQ + 2 * HK) * K
ops = torch.ops.gemcut


@pytest.fixture(autouse=True)
def _tiles_of_a_gpu(monkeypatch):
    """Products in several parts, the vocabulary in several ranges."""
    monkeypatch.setattr(gpu_arch, "ARCH_OF_A_CPU", "sm_90")


class Step(torch.nn.Module):
    """A decode step of one layer: tokens and positions [B] of slots [B] -> logits [B, V], ids.

    Two of its weights are quantised.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in {
            "qkv": (ROWS, D),
            "o": (D, HQ * K),
            "gate_up": (2 * F, D),
            "down": (D, F),
            "table": (V, D),
        }.items():
            weight = random(*shape, scale=shape[1] ** -0.5)
            more = ()
            if name in ("qkv", "gate_up"):
                made = quantized(*shape, "int4 in 32s with zero points")
                weight, more = made.values, (made.scales, made.zero_points, made.columns)
            self.register_buffer(name, weight)
            self.more = {**getattr(self, "more", {}), name: more}
        self.register_buffer("norm", random(D, scale=0.1))
        inv_freq = 100 ** -torch.arange(0, 1, 2 / K, device=DEVICE)
        self.register_buffer("inv_freq", inv_freq)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, random(SLOTS, HK, C, K))


class Returning(Step):
    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        _, residual, h, cos, sin = ops.begin_step(
            tokens, positions, None, self.table, 2.0, self.norm, 1e-6, [self.inv_freq], [1.0]
        )
        cache = (self.k_cache, self.v_cache)
        q = ops.linear_rope_and_store_(
            h, self.qkv, None, *cache, slots, positions, cos[0], sin[0], None, None, 1e-6,
            None, None, None, *self.more["qkv"],
        )  # fmt: skip
        y = ops.attention_decode(q.unsqueeze(1), *cache, slots, positions, 0.25, 5.0, 3)
        y = ops.skinny_linear(y.view(-1, HQ * K), self.o)
        h = ops.add_rmsnorm_(residual, y, self.norm, self.norm, 1e-6)
        y = ops.linear_geglu(h, self.gate_up, *self.more["gate_up"])
        h = ops.add_rmsnorm_(residual, ops.skinny_linear(y, self.down), None, self.norm, 1e-6)
        scores, ids = ops.lm_head_argmax(h, self.table, 30.0)
        return ops.lm_head(h, self.table, 30.0), scores, ids


class Writing(Step):
    """The same with `_out`, into new tensors, or into a caller's: `outs` are these by name."""

    def __init__(self) -> None:
        """Partial sums of both products and ranges of the vocabulary are the same for any batch."""
        super().__init__()
        x, y, h = random(1, HQ * K), random(1, F), random(1, D)
        parts = [empty_results("skinny_linear", *a) for a in ((x, self.o), (y, self.down))]
        scores, _ = empty_results("lm_head_argmax", h, self.table, None)
        self.parts, self.ranges = [len(x) for x in parts], len(scores)

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        B, cache = tokens.shape[0], (self.k_cache, self.v_cache)
        parts, ranges = self.parts, self.ranges

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=tokens.device)

        row_positions, residual, h = torch.empty_like(positions), new(B, D), new(B, D)
        cos, sin, q, y = new(1, B, 1, K), new(1, B, 1, K), new(B, HQ, K), new(B, 1, HQ, K)
        ops.begin_step_out(
            tokens, positions, None, self.table, 2.0, self.norm, 1e-6, [self.inv_freq], [1.0],
            out_positions=row_positions, out_residual=residual, out_normed=h, out_cos=cos,
            out_sin=sin,
        )  # fmt: skip
        more = dict(zip(("scales", "zero_points", "columns"), self.more["qkv"], strict=False))
        ops.linear_rope_and_store_out(
            h, self.qkv, None, *cache, slots, positions, cos[0], sin[0], **more, out=q
        )
        ops.attention_decode_out(q.unsqueeze(1), *cache, slots, positions, 0.25, 5.0, 3, out=y)
        sums, normed, wide = new(parts[0], B, D), new(B, D), new(B, F)
        ops.skinny_linear_out(y.view(-1, HQ * K), self.o, out=sums)
        ops.add_rmsnorm_out(residual, sums, self.norm, self.norm, 1e-6, normed)
        more = dict(zip(("scales", "zero_points", "columns"), self.more["gate_up"], strict=False))
        ops.linear_geglu_out(normed, self.gate_up, **more, out=wide)
        sums, last, logits = new(parts[1], B, D), new(B, D), new(B, V)
        ops.skinny_linear_out(wide, self.down, out=sums)
        ops.add_rmsnorm_out(residual, sums, None, self.norm, 1e-6, last)
        scores, ids = new(ranges, B), new(ranges, B, dtype=torch.int64)
        ops.lm_head_argmax_out(last, self.table, 30.0, out_scores=scores, out_ids=ids)
        ops.lm_head_out(last, self.table, 30.0, out=logits)
        return logits, scores, ids


class Buffered(Writing):
    """The same again; `out` is memory of the module, of which a step uses the first rows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("logits", random(SLOTS, V))

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        made, *more = super().forward(tokens, positions, slots)
        out = self.logits[: tokens.shape[0]]
        ops.penalize_out(
            made,
            torch.zeros_like(made, dtype=torch.int32),
            made > 9,
            *[torch.ones_like(made[:, 0])] * 3,
            out,
        )
        return (out.clone(), *more)


FORMS = {"returning": Returning, "writing": Writing, "buffered": Buffered}
by_form = pytest.mark.parametrize("form", FORMS)


def inputs(B: int) -> tuple[Tensor, ...]:
    slots = torch.randperm(SLOTS, device=DEVICE)[:B]
    return index(*range(3, 3 + B)), index(*[2 + b % 3 for b in range(B)]), slots


def run(module, expected: Step, B: int) -> None:
    """Hold what a module gives to what eager ops give, and the caches that both leave."""
    given = inputs(B)
    for made, wanted in zip(module(*given), expected(*given), strict=True):
        assert torch.equal(made, wanted)


@by_form
def test_both_forms_are_compiled_whole(form):
    """Fullgraph: one break would raise."""
    module, expected = FORMS[form](), Returning()
    run(FORMS[form](), Returning(), 3)  # eager
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (3, 2):
        run(compiled, expected, B)
    assert torch.equal(module.k_cache, expected.k_cache)


@by_form
def test_both_forms_are_exported_with_a_batch_that_changes(form):
    module, expected = FORMS[form](), Returning()
    batch = torch.export.Dim("batch", min=2, max=SLOTS)
    dims = {name: {0: batch} for name in ("tokens", "positions", "slots")}
    program = torch.export.export(module, inputs(3), dynamic_shapes=dims)
    exported = program.module()
    for B in (3, 2, 6):
        run(exported, expected, B)
    # its cache is its own, as the module's was when it was exported, and is written in place
    assert torch.equal(dict(exported.named_buffers())["k_cache"], expected.k_cache)
    names = {str(node.target) for node in program.graph.nodes if "gemcut" in str(node.target)}
    assert len(names) >= 8


def test_an_exported_program_is_saved_and_read(tmp_path):
    module = Writing()
    program = torch.export.export(module, inputs(3))
    torch.export.save(program, tmp_path / "step.pt2")
    run(torch.export.load(tmp_path / "step.pt2").module(), Writing(), 3)


def test_the_step_is_what_the_oracles_say():
    """Each op is held to its oracle elsewhere: here that the step is one."""
    module, writing = Returning(), Writing()
    assert max(writing.parts) > 1
    assert writing.ranges > 1
    tokens, positions, slots = inputs(3)
    logits, scores, ids = module(tokens, positions, slots)
    chosen = ids.gather(0, scores.argmax(0, keepdim=True))[0]
    assert torch.equal(chosen, logits.argmax(-1))
    assert reference.sample(logits).equal(logits.argmax(-1))
