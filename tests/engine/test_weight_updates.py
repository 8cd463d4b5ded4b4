"""New weights in an engine that runs: bit for bit those of a new engine, or nothing is changed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from allocations import peak_bytes, resident, tensor_bytes, tensors
from engines import logits_of, one_line, replay, run_as_on_a_gpu
from random_models import MODEL_TYPES
from torch import Tensor
from updated_engines import PROMPT, bits, make, pair_of

from gemcut.engine import Engine, EngineFault, weight_updates
from gemcut.engine.execution.weights import checkpoint_tensors
from gemcut.engine.weight_updates import WeightUpdate
from gemcut.kernels.cpu_products import PackedHead, has_bfloat16
from gemcut.kernels.cpu_quantized import PackedInt4
from gemcut.kernels.quantized_weight import QuantizedWeight

# whole blocks of 64, which a CPU packs
BLOCKS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "vocab_size": 128}
FORMATS = [None, "int8", "int4", "fp8"]
NORM, Q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def addresses(engine: Engine) -> list[int]:
    """Where every tensor lies that a step reads."""
    found = list(tensors(engine.model.weights)) + list(tensors(engine.cache.layers))
    return sorted(x.data_ptr() for x in found)


# The same as a new engine


@pytest.mark.parametrize("sizes", [{}, BLOCKS], ids=["odd sizes", "blocks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_are_those_of_a_new_engine(model_type, quantization, dtype, sizes):
    if quantization == "int4" and not sizes:
        sizes = {"hidden_size": 96, "intermediate_size": 160}  # groups, but no blocks
    for tied in (True, False):
        first, second = pair_of(model_type, tie_word_embeddings=tied, **sizes)
        options = {"quantization": quantization, "dtype": dtype, "kv_cache_dtype": "fp8"}
        with make(first, **options) as engine, make(second, **options) as new:
            expected = logits_of(new, PROMPT)
            assert not torch.equal(logits_of(engine, PROMPT), expected)
            engine.update_weights(second.state_dict())
            assert torch.equal(logits_of(engine, PROMPT), expected)
            assert bits(engine) == bits(new)


@pytest.mark.skipif(not has_bfloat16(), reason="nothing is packed on this processor")
def test_what_a_cpu_packs_is_among_them():
    kinds = set()
    for quantization in FORMATS:
        with make(pair_of(**BLOCKS)[0], dtype="bfloat16", quantization=quantization) as engine:
            weights = engine.model.weights
            for x in (weights.lm_head, weights.layers[0].qkv):
                is_mkldnn = isinstance(x, Tensor) and x.is_mkldnn
                kinds.add("mkldnn" if is_mkldnn else type(x))
    assert kinds == {"mkldnn", PackedHead, PackedInt4, QuantizedWeight}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("quantization", FORMATS)
def test_replayed_steps_read_new_weights_where_the_old_ones_were(quantization, kv_cache_dtype):
    options = {"ops": "reference", "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    first, second = pair_of("gemma3_text", **BLOCKS)
    with make(first, **options) as engine, make(second, **options) as new:
        steps, _ = replay(engine), replay(new)
        expected = logits_of(new, PROMPT)
        logits_of(engine, PROMPT)
        captures, before = steps.captures, addresses(engine)
        engine.update_weights(second.state_dict())
        assert torch.equal(logits_of(engine, PROMPT), expected)
        assert (steps.captures, addresses(engine)) == (captures, before)


def test_the_compiled_kernels_read_them():
    first, second = pair_of("gemma2", num_hidden_layers=1)
    with make(first, ops="triton") as engine, make(second, ops="triton") as new:
        run_as_on_a_gpu(engine)
        run_as_on_a_gpu(new)
        logits_of(engine, PROMPT, 2)
        engine.update_weights(second.state_dict())
        assert torch.equal(logits_of(engine, PROMPT, 2), logits_of(new, PROMPT, 2))


def test_scales_that_are_given_stay():
    first, second = pair_of()
    with make(first, kv_cache_dtype="fp8") as engine:
        model = engine.model
        scales = [(x.k_scale * 4, x.v_scale * 4) for x in engine.cache.layers]
    with Engine(model, None, max_batch_size=1, kv_cache_dtype="fp8", kv_scales=scales) as engine:
        engine.update_weights(second.state_dict())
        assert all(
            torch.equal(x.k_scale, k) for x, (k, _) in zip(engine.cache.layers, scales, strict=True)
        )


@pytest.mark.parametrize("forgotten", ["_write_scales", "packed_head"])
def test_what_follows_from_weights_would_be_missed(forgotten, monkeypatch):
    first, second = pair_of(**BLOCKS)
    options = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    if forgotten == "packed_head" and not has_bfloat16():
        pytest.skip("nothing is packed on this processor")
    for x in second.parameters():
        x.data *= 4  # the scales are powers of two
    with make(first, **options) as engine, make(second, **options) as new:
        old = engine.model.weights.lm_head
        monkeypatch.setattr(weight_updates, forgotten, lambda *_: old)
        engine.update_weights(second.state_dict())
        assert bits(engine) != bits(new)


# Some of them


def some_of(model: Any, *ends: str) -> dict[str, Tensor]:
    return {name: x for name, x in model.named_parameters() if name.endswith(ends)}


@pytest.mark.parametrize("quantization", FORMATS)
def test_partial_updates_add_up(quantization):
    first, second = pair_of("gemma3_text", **BLOCKS)
    options = {"quantization": quantization, "kv_cache_dtype": "fp8"}
    with make(first, **options) as engine, make(second, **options) as new:
        expected = logits_of(new, PROMPT)
        for name, parameter in second.named_parameters():
            assert not torch.equal(logits_of(engine, PROMPT), expected)
            engine.update_weights([(name, parameter)], partial=True)
        assert torch.equal(logits_of(engine, PROMPT), expected)
        engine.update_weights({}, partial=True)
        assert torch.equal(logits_of(engine, PROMPT), expected)


@pytest.mark.skipif(not has_bfloat16(), reason="nothing is packed on this processor")
@pytest.mark.parametrize("quantization", FORMATS)
def test_parts_that_are_packed_together_come_together(quantization):
    first, second = pair_of(**BLOCKS)
    options = {"quantization": quantization, "dtype": "bfloat16"}
    with make(first, **options) as engine, make(second, **options) as new:
        before = bits(engine)
        if quantization != "int8":  # whose rows a kernel reads as they are
            with pytest.raises(ValueError, match=r"k_proj.weight is missing: on this CPU") as error:
                engine.update_weights(some_of(second, "q_proj.weight", NORM), partial=True)
            one_line(error)
            assert bits(engine) == before
        engine.update_weights(some_of(second, *(f"{x}_proj.weight" for x in "qkv")), partial=True)
        rest = [
            x
            for x in second.named_parameters()
            if x[0][-13:-7] not in ("q_proj", "k_proj", "v_proj")
        ]
        engine.update_weights(rest, partial=True)
        assert bits(engine) == bits(new)


def test_pairs_are_read_once_and_before_anything_changes():
    first, second = pair_of()
    with make(first) as engine, make(second) as new:
        before = bits(engine)

        def stream() -> Iterator[tuple[str, Tensor]]:
            for name, x in second.named_parameters():
                assert bits(engine) == before
                yield name, x

        engine.update_weights(stream())
        assert bits(engine) == bits(new)


# What is wrong changes nothing


def freed(tensor: Tensor) -> Tensor:
    """A tensor whose memory was given back, as FSDP does with what it shards."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def nested() -> Tensor:
    return torch._nested_tensor_from_mask(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))


BAD = {
    "missing": (lambda s: s.pop(NORM), f"tensors: {NORM} is missing"),
    "extra": (lambda s: s.update(extra=s[NORM]), "tensors: extra is not part of the model"),
    "shape": (lambda s: s.update({Q: s[Q][:, 1:]}), f"{Q} is \\[128, 63\\], the config says"),
    "dtype": (lambda s: s.update({NORM: s[NORM].int()}), f"{NORM} is int32"),
    "meta": (lambda s: s.update({NORM: s[NORM].to("meta")}), f"{NORM} is on the meta device"),
    "freed": (lambda s: s.update({NORM: freed(s[NORM])}), f"{NORM} has no memory of its own"),
    "nested": (lambda s: s.update({NORM: nested()}), f"{NORM} has no memory of its own"),
    "lines": (lambda s: s.update({"a\nb": s[NORM]}), r"tensors: 'a\\nb' is not part of the model"),
    "long": (
        lambda s: s.update({"a" * 9999: s[NORM]}),
        r"tensors: 'a+\.\.\.a+' is not part of the",
    ),
    "head": (lambda s: s.update({"lm_head.weight": 1 + s["lm_head.weight"]}), "differs from the e"),
    "nan": (
        lambda s: s.update({Q: torch.full_like(s[Q], torch.nan)}),
        f"{Q} holds a NaN or an inf",
    ),
    "infinite": (lambda s: s.update({Q: torch.full_like(s[Q], -torch.inf)}), f"{Q} holds a NaN or"),
    "too great below": (lambda s: s.update({Q: -1e300 * s[Q].double().abs()}), "has numbers up to"),
    "too great": (
        lambda s: s.update({Q: s[Q].double() * 1e300}),
        f"{Q} has numbers up to .*, too great for scales in torch.float32",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_bad_tensor_changes_nothing(kind, dtype):
    change, message = BAD[kind]
    first, second = pair_of(**BLOCKS)
    state = second.state_dict()
    change(state)
    options = {"quantization": "int8", "kv_cache_dtype": "fp8", "dtype": dtype}
    with make(first, **options) as engine:
        expected, before = logits_of(engine, PROMPT), bits(engine)
        with pytest.raises(ValueError, match=message) as error:
            engine.update_weights(state)
        one_line(error)
        assert bits(engine) == before
        logits_of(engine, PROMPT)  # of what the slots held nothing is lost either
        assert engine.metrics()["reused_tokens"] > 0
        engine.update_weights(first.state_dict())
        assert torch.equal(logits_of(engine, PROMPT), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"running": "wait"}, "running 'wait' is unknown; give refuse, abort, keep"),
        ({"partial": 1}, "partial 1 is neither True nor False"),
        ({"running": "keep"}, "running 'keep' is not for kv_cache_dtype='fp8'"),
    ],
    ids=["running", "partial", "keep"],
)
def test_a_bad_argument_changes_nothing(arguments, message):
    first, second = pair_of()
    with make(first, kv_cache_dtype="fp8") as engine:
        before = bits(engine)
        with pytest.raises(ValueError, match=message) as error:
            engine.update_weights(second.state_dict(), **arguments)
        one_line(error)
        assert bits(engine) == before


def test_memory_of_the_engine_itself_is_refused():
    (model, _), names = pair_of(), [f"model.layers.0.self_attn.{x}_proj.weight" for x in "kv"]
    with make(model) as engine:
        k, v = engine.model.weights.layers[0].qkv[-64:].split(32)
        assert torch.equal(v, model.get_parameter(names[1]))
        before = bits(engine)
        with pytest.raises(ValueError, match=rf"{names[0]} lies in the engine's own") as error:
            engine.update_weights(zip(names, (v, k), strict=True), partial=True)
        one_line(error)
        assert bits(engine) == before
        engine.update_weights(zip(names, (v.clone(), k.clone()), strict=True), partial=True)
        assert torch.equal(k, model.get_parameter(names[1]))


def test_a_tied_head_comes_with_the_embedding():
    first, second = pair_of()
    state = second.state_dict()
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    with make(first) as engine:
        before = bits(engine)
        with pytest.raises(ValueError, match=r"lm_head.weight is the embedding here: leave it out"):
            engine.update_weights({head: state[head]}, partial=True)
        assert bits(engine) == before
        engine.update_weights({head: state[head], table: state[table]}, partial=True)
        assert torch.equal(engine.model.weights.embedding, state[table])


def test_zero_points_are_refused():
    first, second = pair_of(**BLOCKS)
    with make(first, quantization="int4", ops="reference") as engine:
        layer = engine.model.weights.layers[1]
        o = layer.o
        layer.o = QuantizedWeight(o.values, o.scales, o.scales * 0, o.columns, o.dtype)
        with pytest.raises(ValueError, match=r"o_proj\.weight is held with zero points"):
            engine.update_weights(second.state_dict())


def test_an_error_in_the_midst_of_writing_ends_the_engine(monkeypatch):
    first, second = pair_of()
    with make(first) as engine:

        def fail(self, place, parts):
            raise RuntimeError("no memory")

        monkeypatch.setattr(WeightUpdate, "_write_matrix", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            engine.update_weights(second.state_dict())
        with pytest.raises(EngineFault, match="no memory"):
            engine.generate(PROMPT)
        with pytest.raises(EngineFault, match="no memory"):
            engine.update_weights(second.state_dict())


def test_an_interrupted_update_is_finished_before_the_next_step(monkeypatch):
    first, second = pair_of()
    with make(first) as engine, make(second) as new:
        expected, write = logits_of(new, PROMPT), WeightUpdate._write_matrix
        left = [7]

        def interrupted(self, place, parts):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            write(self, place, parts)

        monkeypatch.setattr(WeightUpdate, "_write_matrix", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.update_weights(second.state_dict())
        assert torch.equal(logits_of(engine, PROMPT), expected)


# Memory


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", None), ("bfloat16", None), ("bfloat16", "int4"), ("float32", "int8")],
    ids=str,
)
def test_a_hundred_updates_leak_nothing(dtype, quantization):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1024}
    first, second = pair_of(**sizes)
    states = first.state_dict(), second.state_dict()
    options = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": "fp8"}
    with make(first, **options) as engine:
        for i in range(10):
            engine.update_weights(states[i % 2])
        held, before = tensor_bytes(engine), resident()["RssAnon"]
        for i in range(100):
            engine.update_weights(states[i % 2])
        assert tensor_bytes(engine) == held
        # A model a time would be a hundred of them.  What the allocator keeps swings by 2.9 MB,
        # eight of these small ones, in 50 updates, without a trend.
        assert resident()["RssAnon"] - before < 10 * tensor_bytes(engine.model.weights)
        with make(second, **options) as new:
            assert bits(engine) == bits(new)


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", None), ("float32", "int4"), ("float32", "int8")],
    ids=str,
)
def test_beside_old_and_new_weights_there_is_less_than_a_layer(dtype, quantization, monkeypatch):
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "head_dim": 64, "vocab_size": 512}
    first, second = pair_of(**sizes)
    state = second.state_dict()
    monkeypatch.setattr(weight_updates, "in_temporary_thread", lambda work: work())
    with make(first, dtype=dtype, quantization=quantization) as engine:
        # nothing is packed: a profiler misses what is let go of that was there before
        engine.update_weights(state)
        layer = [x for x in checkpoint_tensors(engine.config) if x.layer == 0]
        size = sum(4 * torch.Size(x.shape).numel() for x in layer)
        assert peak_bytes(lambda: engine.update_weights(state)) < size


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantization", FORMATS)
def test_captured_graphs_read_tensors_that_another_stream_makes(quantization):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1024}
    first, second = (model.cuda() for model in pair_of(**sizes))
    options = {"device": "cuda", "dtype": "bfloat16", "quantization": quantization}
    with make(first, **options) as engine, make(second, **options) as new:
        expected = logits_of(new, PROMPT)
        engine.warmup()
        logits_of(engine, PROMPT)
        before, captured = addresses(engine), engine.metrics()["graph_captures"]
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(10**8)  # the tensors are not there yet when they are handed over
            state = {name: x + 0 for name, x in second.state_dict().items()}
            engine.update_weights(state)
            for x in state.values():
                x.zero_()  # in order: after they were read
        assert torch.equal(logits_of(engine, PROMPT), expected)
        assert (addresses(engine), engine.metrics()["graph_captures"]) == (before, captured)
