"""Flax's msgpack, against files of msgpack and of flax itself, and hostile ones."""

import json
import os
from pathlib import Path

import msgpack
import pytest
import torch
from foreign_files import (
    assert_same_model,
    flax_state,
    nested,
    pack,
    packed,
    refused,
    save_msgpack,
    save_shards,
    small_model,
)
from hypothesis import given
from hypothesis import strategies as st
from random_models import MODEL_TYPES
from safetensors.torch import load_file

from gemcut.engine.checkpoints import flax
from gemcut.engine.checkpoints.convert import convert
from gemcut.engine.checkpoints.flax import _head, _int, _text, open_tensors, write_file

UNTIED = {"attention_bias": True, "tie_word_embeddings": False}


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def save_single(folder: Path, state) -> None:
    save_msgpack(state, folder / "flax_model.msgpack")


def without_head(folder: Path, state) -> None:
    save_single(folder, {name.removeprefix("model/"): value for name, value in state.items()})


LAYOUTS = {
    "single": save_single,
    "shards": lambda folder, state: save_shards(folder, state, save_msgpack),
    "headless": without_head,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_hugging_face(source, target, layout):
    model = small_model("gemma")
    LAYOUTS[layout](source, flax_state(model))
    model.config.save_pretrained(source)
    assert convert(source, target).source_format == "flax"
    assert_same_model(target, model)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_tensor_that_a_model_can_have(source, target, model_type):
    """Flax had Gemma 1 only; its tree has a place for the others' tensors, a head and biases."""
    model = small_model(model_type, **UNTIED)
    save_single(source, flax_state(model))
    model.config.save_pretrained(source)
    convert(source, target)
    assert_same_model(target, model)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    ("overrides", "limit"), [({}, 10**9), (UNTIED, 40_000)], ids=["whole", "shards"]
)
def test_there_and_back(source, target, tmp_path, model_type, overrides, limit):
    small_model(model_type, **overrides).save_pretrained(source)
    assert len(convert(source, target, to="flax", max_shard_bytes=limit).files) == 1 or overrides
    convert(target, tmp_path / "back")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [2**30, 1000], ids=["whole", "cut"])
def test_flax_itself(source, target, tmp_path, monkeypatch, dtype, chunk):
    """Flax's files are read here, and files written here by flax, bit for bit."""
    serialization = pytest.importorskip("flax.serialization")
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    monkeypatch.setattr(flax, "CHUNK", chunk)
    model = small_model("gemma")
    kind = {torch.float32: jax.numpy.float32, torch.bfloat16: jax.numpy.bfloat16}[dtype]
    arrays = {
        name: jax.numpy.asarray(tensor.numpy(), dtype=kind)
        for name, tensor in flax_state(model).items()
    }
    (source / "flax_model.msgpack").write_bytes(serialization.to_bytes(nested(arrays)))
    model.config.save_pretrained(source)
    assert (b"__msgpack_chunked_array__" in (source / "flax_model.msgpack").read_bytes()) == (
        chunk == 1000
    )
    convert(source, target)
    written = load_file(target / "model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(tensor, model.state_dict()[name].to(dtype)), name

    convert(target, tmp_path / "back", to="flax")
    restored = serialization.msgpack_restore((tmp_path / "back/flax_model.msgpack").read_bytes())
    theirs = {}

    def flatten(tree, path):
        for key, value in tree.items():
            if isinstance(value, dict):
                flatten(value, [*path, key])
            else:
                theirs["/".join([*path, key])] = value

    flatten(restored, [])
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert theirs[name].dtype == array.dtype
        assert theirs[name].shape == array.shape
        assert theirs[name].tobytes() == jax.device_get(array).tobytes()


def test_written_bytes_are_those_of_msgpack(tmp_path):
    state = flax_state(small_model("gemma2"))
    save_msgpack(state, tmp_path / "theirs")
    write_file(tmp_path / "ours", {name: lambda t=tensor: t for name, tensor in state.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_are_made_one_at_a_time_as_they_are_written(tmp_path):
    written = []

    def make(number):
        written.append((tmp_path / "file").stat().st_size)
        return torch.full((2**16,), float(number))

    write_file(tmp_path / "file", {f"a/{i}": lambda i=i: make(i) for i in range(4)})
    assert [size // 2**18 for size in written] == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 31, 32, 127, 128, 255, 256, 65535, 65536, 2**31])
def test_heads_are_those_of_msgpack(size):
    packer = msgpack.Packer()
    assert _head("map", size) == packer.pack_map_header(size)
    assert _head("array", size) == packer.pack_array_header(size)
    assert _int(size) == pack(size)
    if size < 2**20:
        assert _text("a" * size) == pack("a" * size)
        assert _head("bin", size) + bytes(size) == pack(bytes(size))


@pytest.mark.parametrize("elements", [0, 1, 2, 3, 4, 5, 60, 61, 62, 63, 64, 16380, 16384])
def test_arrays_of_every_length(tmp_path, elements):
    """Extension headers change with the length."""
    tensor = torch.arange(elements, dtype=torch.float32)
    write_file(tmp_path / "ours.msgpack", {"a/b": lambda: tensor})
    save_msgpack({"a/b": tensor}, tmp_path / "theirs")
    assert (tmp_path / "ours.msgpack").read_bytes() == (tmp_path / "theirs").read_bytes()
    (stored,) = open_tensors(tmp_path / "ours.msgpack").values()
    assert torch.equal(stored.load(), tensor)


def test_a_written_out_tied_head_is_left_aside(source, target):
    model = small_model("gemma")
    state = flax_state(model)
    state["lm_head/kernel"] = state["model/embed_tokens/embedding"].T.contiguous()
    save_single(source, state)
    model.config.save_pretrained(source)
    assert convert(source, target).left_aside == 1
    assert_same_model(target, model)


KERNEL = "model/layers/1/mlp/up_proj/kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda s: s.pop(KERNEL), f"{KERNEL} is missing", id="missing"),
        pytest.param(
            lambda s: s.update({"model/layers/4/x": torch.zeros(2)}),
            "flax_model.msgpack: model/layers/4/x is not part",
            id="extra",
        ),
        pytest.param(
            lambda s: s.update({KERNEL: s[KERNEL].T.contiguous()}),
            r"up_proj/kernel is \[80, 48\], the config says \[48, 80\]",
            id="as-in-torch",
        ),
        pytest.param(
            lambda s: s.update({KERNEL: s[KERNEL].to(torch.int8)}),
            "up_proj/kernel is int8; supported are bfloat16",
            id="integers",
        ),
        pytest.param(
            lambda s: s.update({"lm_head/kernel": torch.zeros(48, 97)}),
            "lm_head/kernel differs from the embedding",
            id="tied-head-differs",
        ),
        pytest.param(
            lambda s: s.update({KERNEL: s[KERNEL].half()}),
            "up_proj.weight is float16, which Gemma's",
            id="float16",
        ),
    ],
)
def test_bad_tensors(source, target, change, message):
    model = small_model("gemma")
    state = flax_state(model)
    change(state)
    save_single(source, state)
    model.config.save_pretrained(source)
    refused(source, target, message)


def array(shape=(2,), name="float32", raw: object = bytes(8), code=1) -> bytes:
    return pack({"a": msgpack.ExtType(code, pack((shape, name, raw)))})


def chunked(shape, chunks) -> bytes:
    return pack({"a": {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}})


TWO = packed(torch.zeros(2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(b"\xc1" * 99, "byte 0xc1 at 0", id="noise"),
        pytest.param(b"version https://git-lfs.github.com/spec", "a git-lfs pointer", id="lfs"),
        pytest.param(pack([1]), "a value of kind array", id="list"),
        pytest.param(pack(1), "no dictionary", id="number"),
        pytest.param(pack({"a": "b"}), "a value of kind str", id="string"),
        pytest.param(pack({"a": b"b"}), "a value of kind bin", id="bytes"),
        pytest.param(pack({"a": 1}), "a is 1, not an array", id="integer"),
        pytest.param(pack({"a": None}), "byte 0xc0", id="nil"),
        pytest.param(pack({1: 1}), "no name, but int 1", id="key"),
        pytest.param(pack({"a" * 300: 1}), "no name, but str 300", id="long-key"),
        pytest.param(pack({"a/b": 1}), "the key 'a/b'", id="path-in-a-key"),
        pytest.param(b"\x82\xa1a" + TWO.data[:0] + b"\x01\xa1a\x01", "'a' twice", id="twice"),
        pytest.param(pack({"a": {}}) + b"\0", "1 bytes behind its end", id="trailing"),
        pytest.param(b"\xdf\xff\xff\xff\xff", "more than 131072 entries", id="map-bomb"),
        pytest.param(b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "4294967295 bytes at", id="ext-bomb"),
        pytest.param(b"\x81\xdb\xff\xff\xff\xff", "no name, but str 4294967295", id="str-bomb"),
        pytest.param(b"\x81\xa1a" * 10_000, "more than 16 deep", id="deep"),
        pytest.param(array((2**40,)), "an array .1099511627776. of float32 with 8", id="shape"),
        pytest.param(array((2**32, 2**32)), "with 8 bytes", id="shape-that-overflows"),
        pytest.param(array((-2,)), "byte 0xfe at", id="negative"),
        pytest.param(array((-200, -200)), "byte 0xd1 at", id="negative-twice"),
        pytest.param(array((1,) * 9), "an array of 9 dimensions", id="dimensions"),
        pytest.param(array(name="object"), "an array of dtype 'object'", id="objects"),
        pytest.param(array(name="__class__"), "dtype '__class__'", id="attribute"),
        pytest.param(array(raw="text"), "str instead of bin", id="text-for-bytes"),
        pytest.param(array(code=2), "extension type 2, where only arrays", id="complex"),
        pytest.param(array(code=3), "extension type 3", id="scalar"),
        pytest.param(array(code=42), "extension type 42", id="unknown"),
        pytest.param(
            pack({"a": msgpack.ExtType(1, pack((1, 2)))}),
            "an array without shape, dtype and bytes",
            id="pair",
        ),
        pytest.param(
            pack({"a": msgpack.ExtType(1, TWO.data + b"\0")}),
            "an array with bytes behind its end",
            id="trailing-in-array",
        ),
        pytest.param(
            pack({"a": msgpack.ExtType(1, TWO.data[:-1])}) + bytes(99),
            "8 bytes at byte",
            id="array-beyond-its-extension",
        ),
        pytest.param(chunked({"0": 4}, {"0": TWO}), "do not make up its shape", id="chunk-short"),
        pytest.param(chunked({"0": 2}, {"1": TWO}), "not numbered from 0", id="chunk-number"),
        pytest.param(chunked({"0": 2}, {}), "not numbered from 0", id="no-chunks"),
        pytest.param(chunked({"0": True}, {"0": TWO}), "not numbered from 0", id="shape-of-bools"),
        pytest.param(chunked({"0": 2}, {"0": {}}), "not numbered from 0", id="chunk-no-array"),
        pytest.param(chunked(2, {"0": TWO}), "chunks without a shape", id="no-shape"),
        pytest.param(
            chunked({"0": 4}, {"0": TWO, "1": packed(torch.zeros(2).half())}),
            "chunks of several dtypes",
            id="chunk-dtypes",
        ),
    ],
)
def test_hostile_file(source, target, data, message):
    small_model("gemma").config.save_pretrained(source)
    (source / "flax_model.msgpack").write_bytes(data)
    refused(source, target, f"flax_model.msgpack: .*{message}")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("flax") / "whole.msgpack"
    state = {"a/b": torch.zeros(3), "a/c": torch.zeros(2, 3, dtype=torch.bfloat16)}
    save_msgpack(state, file)
    return file.read_bytes()


def test_every_cut_is_noticed(small_file, tmp_path):
    file = tmp_path / "cut.msgpack"
    for length in range(len(small_file)):
        file.write_bytes(small_file[:length])
        with pytest.raises(ValueError, match=r"cut.msgpack: damaged"):
            open_tensors(file)


@given(st.data())
def test_a_changed_byte_is_refused_or_harmless(small_file, tmp_path_factory, data):
    """Only ValueError is raised, and no array is larger than the file."""
    changed = bytearray(small_file)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "changed.msgpack"
    file.write_bytes(changed)
    try:
        stored = open_tensors(file)
    except ValueError:
        return
    assert sum(tensor.load().nbytes for tensor in stored.values()) <= len(changed)


@pytest.mark.parametrize(
    "elsewhere", ["../x.msgpack", "/etc/passwd", "sub/x.msgpack", "..", "x.bin", "", 7, None]
)
def test_index_may_not_name_a_file_outside_its_folder(source, target, elsewhere):
    model = small_model("gemma")
    save_shards(source, flax_state(model), save_msgpack)
    model.config.save_pretrained(source)
    index = source / "flax_model.msgpack.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][KERNEL] = elsewhere
    index.write_text(json.dumps(values))
    refused(source, target, f"{KERNEL} is in .*no msgpack file of its folder")


def test_shards_that_disagree_with_their_index(source, target):
    model = small_model("gemma")
    state = flax_state(model)
    save_shards(source, state, save_msgpack)
    model.config.save_pretrained(source)
    second = source / "flax_model-00002-of-00002.msgpack"
    first_name = next(iter(state))
    held = {name: state[name] for name in list(state)[1::2]}
    save_msgpack(held | {first_name: state[first_name]}, second)
    refused(source, target, f"{first_name} and .*{first_name} repeat")
    held.popitem()
    save_msgpack(held, second)
    refused(source, target, "is listed in flax_model-00002-of-00002.msgpack, but held by none")
    os.truncate(second, 1000)
    refused(source, target, f"{second.name}: damaged")
