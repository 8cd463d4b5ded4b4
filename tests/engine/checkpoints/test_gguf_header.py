"""Headers of GGUF files: sound ones, and damaged ones, each refused in one line and at once."""

import struct
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import file_of, gguf, key, model_for_gguf, string, tensor, write_gguf
from hypothesis import given
from hypothesis import strategies as st

from gemcut.engine.checkpoints.gguf_config import read_config
from gemcut.engine.checkpoints.gguf_header import read_header
from gemcut.engine.checkpoints.gguf_weights import stored_weights
from gemcut.engine.checkpoints.load import load_config

F32, F16, Q8_0 = 0, 1, 8
U32, STRING, ARRAY = 4, 8, 9
HUGE = 2**60


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer_file) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, model_for_gguf("gemma3_text"), "Q4_0", tokenizer_file)


def test_all_that_the_package_reads(sound):
    header, theirs = read_header(sound), gguf.GGUFReader(sound)
    own = {name for name in theirs.fields if name.startswith("GGUF.")}
    assert header.values.keys() == theirs.fields.keys() - own
    for name, value in header.values.items():
        found = value.tolist() if isinstance(value, np.ndarray) else value
        assert found == theirs.fields[name].contents(), name
    assert list(header.tensors) == [x.name for x in theirs.tensors]
    for x in theirs.tensors:
        ours = header.tensors[x.name]
        assert ours.shape == tuple(x.shape.tolist()[::-1])
        assert (ours.type, ours.nbytes, ours.start) == (x.tensor_type, x.n_bytes, x.data_offset)
        assert header.bytes_of(ours).tobytes() == x.data.tobytes()


@pytest.mark.parametrize("kind", ["B", "b", "H", "h", "I", "i", "f", "?", "Q", "q", "d"])
def test_every_type_of_number(tmp_path, kind):
    code = dict(zip("BbHhIif?Qqd", (*range(8), 10, 11, 12), strict=True))[kind]
    array = struct.pack("<IQ", code, 3) + struct.pack(f"<3{kind}", 1, 0, 1)
    keys = [key("one", code, struct.pack(f"<{kind}", 1)), key("three", ARRAY, array)]
    (tmp_path / "x.gguf").write_bytes(file_of(keys, []))
    header = read_header(tmp_path / "x.gguf")
    assert header.values["one"] == 1
    assert header.values["three"].tolist() == [1, 0, 1]


def test_version_2_is_version_3(tmp_path, sound):
    content = sound.read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[:4] + struct.pack("<I", 2) + content[8:])
    assert load_config(tmp_path / "x.gguf") == load_config(sound)


def of_keys(*keys: bytes, **options) -> bytes:
    return file_of(list(keys), [], **options)


def of_tensors(*tensors: bytes, data: bytes = bytes(256), **options) -> bytes:
    return file_of([], list(tensors), data, **options)


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


ALIGNED = struct.pack("<I", 24)
BAD = {
    "empty": (b"", "begins with b''"),
    "no GGUF file": (b"PK\3\4" + bytes(60), "no GGUF file; it begins with b'PK"),
    "GGML": (b"lmgg" + bytes(60), "of the time before GGUF, which is not read; make it anew"),
    "magic alone": (b"GGUF\3", "cut short within its header"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "version 1": (of_keys(version=1), "GGUF version 1, but 2 and 3 are read; make it anew"),
    "version 4": (of_keys(version=4), "GGUF version 4, but 2 and 3 are read"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian, which is not read; llama"),
    "no counts": (b"GGUF" + struct.pack("<IQ", 3, 0), "the number of keys goes past its end"),
    "2**60 keys": (of_keys(counts=(0, HUGE)), f"the number of keys is {HUGE}"),
    "2**60 tensors": (of_keys(counts=(HUGE, 0)), f"the number of tensors is {HUGE}"),
    "more keys than bytes": (of_keys(counts=(0, 9)), "the number of keys is 9"),
    "one key too many": (of_keys(key("a", U32, bytes(4)), counts=(0, 2)), "key 1 '' is empty"),
    "2**60 letters": (of_keys(struct.pack("<Q", HUGE) + bytes(30)), f"length of key 0 is {HUGE}"),
    "key twice": (of_keys(*2 * [key("a", U32, bytes(4))]), "key 1 'a' is empty, or there"),
    "key not UTF-8": (of_keys(key(b"\xff", U32, bytes(4))), r"key 0 is not UTF-8: b'\\xff'"),
    "value not UTF-8": (of_keys(key("a", STRING, string(b"\xff"))), "a is not UTF-8"),
    "item not UTF-8": (
        of_keys(key("a", ARRAY, array(STRING, 2, string("b") + string(b"c\xff")))),
        r"a\[1\] is not UTF-8: b'c",
    ),
    "unknown type": (of_keys(key("a", 13, bytes(8))), "'a' is of type 13, which is unknown"),
    "array of arrays": (of_keys(key("a", ARRAY, array(ARRAY, 1, bytes(12)))), "array of type 9"),
    "2**60 items": (of_keys(key("a", ARRAY, array(0, HUGE))), f"items of 'a' is {HUGE}"),
    "2**60 strings": (of_keys(key("a", ARRAY, array(STRING, HUGE))), f"items of 'a' is {HUGE}"),
    "a string too long": (
        of_keys(key("a", ARRAY, array(STRING, 2, string("b") + struct.pack("<Q", 99)))),
        "a goes past its end",
    ),
    "2**63 letters of a string": (
        of_keys(key("a", ARRAY, array(STRING, 1, struct.pack("<Q", 2**63)))), "a goes past its end"
    ),
    "alignment": (of_keys(key("general.alignment", U32, ALIGNED)), "alignment 24 is no power of 2"),
    "no alignment": (of_keys(key("general.alignment", U32, bytes(4))), "alignment 0 is no power"),
    "alignment a float": (
        of_keys(key("general.alignment", 6, struct.pack("<f", 32))), "alignment 32.0 is no power"
    ),
    "alignments": (
        of_keys(key("general.alignment", ARRAY, array(U32, 1, struct.pack("<I", 32)))),
        "general.alignment .*32.* is no power of 2",
    ),
    "tensor twice": (of_tensors(*2 * [tensor("a", (4,), F32, 0)]), "name 'a' is empty, or there"),
    "tensors overlap": (
        of_tensors(tensor("b", (4,), F32, 32), tensor("a", (16,), F32, 0)), "a and b overlap"
    ),
    "tensor outside": (of_tensors(tensor("a", (65,), F32, 0)), "a ends at .*, and the file at"),
    "offset outside": (of_tensors(tensor("a", (4,), F32, 2**63)), "a ends at"),
    "offset not aligned": (of_tensors(tensor("a", (4,), F32, 8)), "begins at 8, no multiple of 32"),
    "2**60 rows": (of_tensors(tensor("a", (HUGE, 2), F32, 0)), "a ends at"),
    "2**64 elements": (of_tensors(tensor("a", (2**63, 2, 1), F32, 0)), "a ends at"),
    "no rows": (of_tensors(tensor("a", (0, 4), F32, 0)), r"tensor 'a' is \[0, 4\]"),
    "no dimensions": (of_tensors(tensor("a", (), F32, 0)), "tensor 'a' has 0 dimensions"),
    "five dimensions": (of_tensors(tensor("a", (1,) * 5, F32, 0)), "has 5 dimensions"),
    "2**32 - 1 dimensions": (
        of_tensors(string("a") + struct.pack("<I", 2**32 - 1)), "has 4294967295 dimensions"
    ),
    "part of a block": (of_tensors(tensor("a", (2, 40), Q8_0, 0)), r"\[2, 40\], in blocks of 32"),
    "unknown kind": (of_tensors(tensor("a", (4,), 99, 0)), "is of type 99, unknown to the gguf"),
    "removed kind": (of_tensors(tensor("a", (4,), 4, 0)), "is of type 4, unknown to the gguf"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_headers(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as error:
            load_config(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 5
    assert peak < 2**24


def test_a_file_cut_anywhere(tmp_path, sound):
    content, path = sound.read_bytes(), tmp_path / "x.gguf"
    first = min(x.start for x in read_header(sound).tensors.values())
    for size in (*range(0, first, 97), *range(first, len(content), 4999), len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"x\.gguf: (cut short|no GGUF file)"):
            read_header(path)


@given(data=st.data())
def test_no_damage_ends_in_another_error(tmp_path_factory, sound, data):
    """Bytes of the header are changed: it is read, or refused in one line."""
    content = bytearray(sound.read_bytes())
    end = min(x.start for x in read_header(sound).tensors.values())
    places = st.one_of(st.integers(8, end - 1), st.integers(8, 1200), st.integers(end - 9000, end))
    for place in data.draw(st.lists(places, min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    message = f"{path}: "
    try:
        header = read_header(path)
        stored_weights(header, read_config(header, {}), torch.float32)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_without_the_package(sound, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="GGUF files need the gguf package: pip install gguf"):
        load_config(sound)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"x\.gguf: cannot be read"):
        read_header(tmp_path / "x.gguf")
