"""The memory of an engine: the estimate counts every tensor, and the sizes chosen fit it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from allocations import SIZES, estimate_of, make_engine, tensor_bytes
from engines import save_random_model
from processes import gemcut
from random_models import MODEL_TYPES
from real_models import real_file, real_folder

from gemcut import kernels
from gemcut.engine import PUBLISHED, Engine, SamplingParams, memory
from gemcut.engine.execution.cache import KVCache
from gemcut.engine.execution.slot_state import SlotState
from gemcut.engine.execution.weights import QUANTIZATIONS, empty_weights, made_layouts
from gemcut.engine.memory import Build
from gemcut.kernels import cpu, reference
from gemcut.kernels.cpu_products import packs

CPU = torch.device("cpu")
MODELS = ["demo", *MODEL_TYPES]
SHARE = 0.05  # of the estimate, which is the promise


# The estimate counts every tensor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_an_engine_is_in_the_estimate(folders, name, dtype):
    for sizes in SIZES.values():
        with make_engine(folders[name], sizes, dtype) as engine:
            estimate = estimate_of(engine)
            assert tensor_bytes(engine.model.weights) == estimate.weights
            assert tensor_bytes(engine.cache) == estimate.kv_cache
            assert tensor_bytes(engine._loop.runner.state) == estimate.state
            lasting = estimate.weights + estimate.kv_cache + estimate.state
            assert lasting <= tensor_bytes(engine) <= lasting * (1 + SHARE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantised_weights_are_estimated_to_the_byte(tmp_path, tokenizer_file, quantization, dtype):
    save_random_model(tmp_path, tokenizer_file, hidden_size=64, intermediate_size=96)
    sizes = SIZES["one chunk"]
    with make_engine(tmp_path, sizes, dtype, quantization=quantization, ops="reference") as engine:
        layouts = made_layouts(engine.config, quantization)
        build = Build(engine.config, CPU, engine.model.dtype, reference, 128, layouts=layouts)
        estimate = build.estimate(*sizes[:2])
        assert tensor_bytes(engine.model.weights) == estimate.weights
        assert engine.generate("Once", SamplingParams(max_tokens=4)).token_ids


def test_what_fits_quantised_is_made_though_floats_would_not_fit(folders, set_free):
    arguments = {"ops": "reference", "skip_tokenizer_init": True}
    with make_engine(folders["demo"], (1, 64, 32), "bfloat16", **arguments) as engine:
        build = Build(engine.config, CPU, torch.bfloat16, reference, 32)
        set_free(build.estimate(1, 64).total - 1)
    with pytest.raises(MemoryError):
        make_engine(folders["demo"], (1, 64, 32), "bfloat16", **arguments)
    make_engine(folders["demo"], (1, 64, 32), "bfloat16", quantization="int8", **arguments).close()


@pytest.mark.parametrize("name", ["demo", "gemma3_text"])
def test_a_cache_in_fp8_takes_half_the_bytes(folders, name):
    with make_engine(folders[name], SIZES["four chunks"], "bfloat16") as engine:
        plain = tensor_bytes(engine.cache)
    with make_engine(
        folders[name], SIZES["four chunks"], "bfloat16", kv_cache_dtype="fp8"
    ) as engine:
        config = engine.config
        scales = 2 * config.num_layers * config.num_kv_heads * 4
        assert tensor_bytes(engine.cache) == engine.cache.nbytes == plain // 2 + scales
        assert estimate_of(engine).kv_cache == engine.cache.nbytes


@pytest.mark.parametrize(
    "overrides", [{"attention_bias": True}, {"tie_word_embeddings": False}], ids=str
)
def test_biases_and_a_head_of_its_own_are_in_the_estimate(tmp_path, tokenizer_file, overrides):
    save_random_model(tmp_path, tokenizer_file, "gemma", **overrides)
    with make_engine(tmp_path, SIZES["one chunk"]) as engine:
        assert tensor_bytes(engine.model.weights) == estimate_of(engine).weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_estimated_to_the_byte(name, dtype):
    config = PUBLISHED[name]
    meta = torch.device("meta")
    for slots, length, chunk in ((1, 2, 512), (8, config.context_length, 512), (3, 700, 1)):
        estimate = Build(config, CPU, dtype, cpu, chunk).estimate(slots, length)
        weights = empty_weights(config, device=meta, dtype=dtype)
        cache = KVCache(
            config,
            num_slots=slots,
            max_seq_len=length,
            prefill_chunk=chunk,
            device=meta,
            dtype=dtype,
        )
        head = weights.lm_head
        second_head = head.nbytes * packs(head.shape, dtype)
        assert tensor_bytes(weights) + second_head == estimate.weights
        assert tensor_bytes(cache) == estimate.kv_cache
        assert tensor_bytes(SlotState(slots, config.vocab_size, meta)) == estimate.state


# The sizes chosen fit


@pytest.fixture
def set_free(monkeypatch):
    """A way to say how many bytes are free."""

    def set_free(free: float) -> None:
        monkeypatch.setattr(memory, "free_bytes", lambda device: int(free))

    return set_free


def build_of(name: str, ops=cpu, **arguments) -> Build:
    return Build(PUBLISHED[name], CPU, torch.float32, ops, **arguments)


@pytest.mark.parametrize("ops", [cpu, reference, kernels], ids=["cpu", "reference", "kernels"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_an_estimate_grows_with_each_size(name, ops):
    """Or a search for the largest that fits would go astray."""
    build = build_of(name, ops)
    limit = build.config.context_length
    lengths = [*range(1, 1024), *range(1024, limit, 487), limit]
    totals = [build.estimate(3, length).total for length in lengths]
    assert totals == sorted(totals)
    totals = [build.estimate(slots, 300).total for slots in range(1, 100)]
    assert totals == sorted(totals)


def test_slots_are_the_most_that_fit(set_free):
    build = build_of("gemma-2-2b")
    for slots in (16, 8, 4, 2, 1):
        needed = build.estimate(slots, 4000).total
        set_free(needed / 0.8 + 1e6)
        assert build.choose("auto", 4000) == (slots, 4000)
        if slots > 1:
            set_free(needed / 0.8 - 1e6)
            assert build.choose("auto", 4000) == (slots // 2, 4000)


@pytest.mark.parametrize("auto", ["auto", None])
def test_slots_shrink_before_their_length(set_free, auto):
    build = build_of("gemma-2-2b")
    set_free(build.estimate(1, 8192).total / 0.8 + 1e6)
    assert build.choose("auto", auto) == (1, 8192)
    set_free(build.estimate(1, 8192).total / 0.8 - 1e6)
    slots, length = build.choose("auto", auto)
    assert slots == 1
    assert 8000 < length < 8192


@pytest.mark.parametrize("slots", [1, 8, 100])
def test_the_length_is_the_most_that_fits(set_free, slots):
    build = build_of("gemma-2-2b")
    budget = build.estimate(slots, 2).total + 1e9
    set_free(budget / 0.8)
    chosen, length = build.choose(slots, "auto")
    assert chosen == slots
    assert 2 < length < 8192
    assert build.estimate(slots, length).total <= budget < build.estimate(slots, length + 1).total


def test_plenty_of_memory_gives_the_model_s_limit(set_free):
    set_free(1e15)
    for name, config in PUBLISHED.items():
        assert build_of(name).choose("auto", "auto") == (16, config.context_length)
        assert build_of(name).choose(8, None) == (8, config.context_length)


def test_weights_that_are_loaded_are_not_needed_again(set_free):
    build = build_of("gemma-2-2b")
    estimate = build.estimate(4, 2048)
    set_free(estimate.total - estimate.weights)
    assert build.choose(4, 2048, loaded=True) == (4, 2048)
    with pytest.raises(MemoryError):
        build.choose(4, 2048)
    set_free((estimate.total - estimate.weights) / 0.8 + 1e6)
    assert build.choose("auto", 2048, loaded=True) == (4, 2048)
    set_free((estimate.total - estimate.weights) / 0.8 - 1e6)
    assert build.choose("auto", 2048, loaded=True) == (2, 2048)


def test_an_engine_of_a_loaded_model_needs_no_second_copy(folders, set_free):
    arguments = {"max_batch_size": 2, "max_seq_len": 128, "prefill_chunk": 32}
    with make_engine(folders["demo"], (2, 128, 32)) as first:
        estimate = estimate_of(first)
        set_free(estimate.total - estimate.weights)
        Engine(first.model, first.tokenizer, **arguments).close()
        set_free(estimate.total - estimate.weights - 1)
        with pytest.raises(MemoryError):
            Engine(first.model, first.tokenizer, **arguments)


def test_sizes_asked_for_may_take_all_that_is_free(set_free):
    build = build_of("gemma-2-2b")
    needed = build.estimate(8, 4096).total
    set_free(needed)
    assert build.choose(8, 4096) == (8, 4096)
    set_free(needed - 1)
    with pytest.raises(MemoryError):
        build.choose(8, 4096)


def test_the_error_names_what_is_needed_what_is_free_and_what_would_fit(set_free):
    build = build_of("gemma-2-2b")
    set_free(20e9)
    with pytest.raises(MemoryError) as error:
        build.choose(64, 8192)
    assert str(error.value) == (
        "64 slots of 8192 tokens need 100.03 GB, but cpu has 20.00 GB free; "
        "3 slots of 8192 tokens or 64 slots of 355 tokens would fit"
    )
    assert build.estimate(3, 8192).total <= 16e9 < build.estimate(4, 8192).total
    assert build.estimate(64, 355).total <= 16e9 < build.estimate(64, 356).total


def test_an_error_of_a_size_chosen_here_says_what_may_be_taken(set_free):
    build = build_of("gemma-2-2b")
    set_free(13e9)
    with pytest.raises(MemoryError) as error:
        build.choose(8, "auto")
    assert str(error.value).endswith(
        "but cpu has 13.00 GB free, of which 10.40 GB may be taken; no size of this model would fit"
    )


def test_nothing_is_loaded_that_does_not_fit(folders, set_free, monkeypatch):
    """Or a machine would swap, or kill the process, before it could say so."""
    monkeypatch.setattr(
        "gemcut.engine.loading.load_checkpoint", lambda *a, **k: pytest.fail("loaded")
    )
    set_free(2e6)
    for sizes in ((2, 128, 32), ("auto", 128, 32), (2, "auto", 32), ("auto", "auto", 32)):
        with pytest.raises(MemoryError) as error:
            make_engine(folders["demo"], sizes)
        assert len(str(error.value).splitlines()) == 1


def test_an_engine_of_automatic_sizes_is_made_and_serves(folders, set_free):
    with make_engine(folders["demo"], ("auto", "auto", 512)) as engine:
        assert (engine.cache.num_slots, engine.max_seq_len) == (16, 512)
        assert len(engine.generate("Once").token_ids) > 0
    needed = estimate_of(engine)
    set_free((needed.total - needed.kv_cache / 2) / 0.8)
    with make_engine(folders["demo"], ("auto", "auto", 512)) as smaller:
        assert (smaller.cache.num_slots, smaller.max_seq_len) == (8, 512)
        assert estimate_of(smaller).total <= needed.total - needed.kv_cache / 2


def test_free_memory_of_a_cpu_counts_what_the_page_cache_gives_back(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemFree:  100 kB\nMemAvailable:    500 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    assert memory.free_bytes(CPU) == 500 * 1024
    meminfo.unlink()
    assert memory.free_bytes(CPU) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# The whole process, with a real model

GROWTH = """
import sys
from pathlib import Path
import gemcut.engine
from gemcut.engine import Engine, SamplingParams

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])

Engine.from_pretrained("demo", dtype="bfloat16", max_seq_len=16).generate("It was")
before = resident()
engine = Engine.from_pretrained(sys.argv[1], dtype="bfloat16", max_seq_len=512, max_batch_size=1)
engine.generate("The capital of France is", SamplingParams(max_tokens=2))
print(resident() - before)
"""
SIZED = ("--dtype", "bfloat16", "--max-seq-len", "512", "--max-batch-size", "1", "--json")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize(
    "find",
    [
        pytest.param(lambda: real_file("gemma-3-270m-q4_k_m.gguf"), id="gguf"),
        pytest.param(lambda: real_folder("gemma-3-270m"), id="safetensors"),
        pytest.param(lambda: real_folder("gemma-3-270m-json"), id="tokenizer.json"),
    ],
)
def test_a_process_grows_by_what_info_says(find, run):
    """Its engine and its tokenizer, and nothing that loading has left."""
    path = find()
    info = json.loads(run("info", str(path), *SIZED)[1])
    meant = info["engine"]["bytes"]["total"] + info["tokenizer_bytes"]
    command = (sys.executable, "-P", "-W", "ignore", "-c", GROWTH)
    code, out, err = gemcut(path, command=command)
    assert code == 0, err
    assert abs(int(out) - meant) <= SHARE * meant, f"{int(out) / 1e6:.0f} MB, not {meant / 1e6:.0f}"
