"""GGUF files where a model's name stands: engines, the commands, conversion."""

import json
import re
import shutil
import warnings

import pytest
import torch
from gguf_files import model_for_gguf, write_gguf
from real_models import real_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.checkpoints import gguf_header
from gemcut.engine.checkpoints.convert import convert
from gemcut.engine.checkpoints.load import load_checkpoint, load_config
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
from gemcut.kernels.quantized_weight import QuantizedWeight

GREEDY = SamplingParams(temperature=0, max_tokens=8)
ARGUMENTS = ("--temperature", "0", "--max-tokens", "8", "--ops", "reference")


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3_text"])
def file(request, tmp_path_factory, tokenizer_file):
    path = tmp_path_factory.mktemp(request.param) / "model-Q8_0.gguf"
    return write_gguf(path, model_for_gguf(request.param), "Q8_0", tokenizer_file)


@pytest.fixture(scope="module")
def folder(file):
    """The same as safetensors in float32, which hold a Q8_0 weight without rounding."""
    target = file.parent / "converted"
    convert(file, target, dtype=torch.float32)
    return target


def answers(model, **options) -> list[list[int]]:
    with Engine.from_pretrained(
        model, max_batch_size=1, ops="reference", dtype="float32", **options
    ) as engine:
        chat = engine.chat([{"role": "user", "content": "a model"}], GREEDY)
        return [engine.generate("The children", GREEDY).token_ids, chat.token_ids]


def test_an_engine_of_a_file_and_of_its_folder(file, folder):
    expected = answers(folder)
    assert answers(file) == answers(str(file)) == answers(file.parent) == expected
    assert answers(f"{file.parent}:Q8_0") == expected


def test_the_converted_model_is_read_by_transformers(file, folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert load_config(file).to_dict() | {"dtype": "float32"} == load_config(folder).to_dict()
    state = load_file(folder / "model.safetensors")
    for name, tensor in theirs.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(tensor, state[name])


def test_generate(run, file, folder):
    code, out, err = run("generate", "The children", "--model", str(file), *ARGUMENTS)
    assert (code, err) == (0, "")
    assert out == run("generate", "The children", "--model", str(folder), *ARGUMENTS)[1]


def test_info(run, file):
    code, out, err = run("info", str(file), "--check")
    assert (code, err) == (0, "")
    assert "as stored, int8\n" in out
    assert out.endswith("check         names, shapes and values are right\n")
    config = load_config(file)
    values = json.loads(run("info", str(file), "--json")[1])
    assert ModelConfig.from_dict(values["config"]) == config
    weights = load_checkpoint(file, config, device="cpu", dtype=torch.bfloat16)
    assert values["weight_bytes"]["stored"] == weights.nbytes
    assert isinstance(weights.embedding, QuantizedWeight)


def test_convert(run, file, tmp_path):
    code, out, _ = run("convert", str(file), str(tmp_path / "new"))
    assert code == 0
    assert "gguf to huggingface, bfloat16, 1 file; verified" in out
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    code, _, err = run("convert", str(file), str(tmp_path / "x"), "--config", "gemma-2b")
    assert code == 1
    assert "in the config given" in err
    code, _, err = run("convert", str(tmp_path / "new"), str(tmp_path / "x"), "--from", "gguf")
    assert code == 1


def test_what_lies_beside_a_file_is_not_taken(file, folder, tmp_path):
    shutil.copy(file, tmp_path / "model.gguf")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    convert(tmp_path / "model.gguf", tmp_path / "new")
    found = {path.name for path in (tmp_path / "new").iterdir()}
    assert found == {path.name for path in folder.iterdir()}
    with Engine.from_pretrained(tmp_path / "model.gguf", ops="reference") as engine:
        assert 9 not in engine.config.eos_token_ids


def test_the_documented_tokenizer(file):
    with Engine.from_pretrained(file, max_batch_size=1, ops="reference") as engine:
        tokenizer = engine.get_tokenizer()
        assert tokenizer.encode("The children") == engine.tokenizer.encode("The children")


def test_no_vocabulary(file, tmp_path, run):
    model = model_for_gguf("gemma")
    path = write_gguf(tmp_path / "model.gguf", model, "Q8_0")
    code, _, err = run("generate", "a", "--model", str(path))
    assert code == 1
    assert "model is None, but Gemma's is 'llama'" in err
    assert "with skip_tokenizer_init=True" in err
    with Engine.from_pretrained(path, ops="reference", skip_tokenizer_init=True) as engine:
        assert len(engine.generate([5, 6], GREEDY).token_ids) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gemma.block_count": 3},
            "blk.2.attn_norm.weight and 8 more are missing|more are missing",
        ),
        ({"gemma.block_count": 1}, "more are not part of the model"),
        ({"gemma.embedding_length": 96}, r"is \[\d+, 64\], the metadata say \[\d+, 96\]"),
        ({"gemma.feed_forward_length": 64}, r"is \[96, 64\], the metadata say \[64, 64\]"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.model is 'gpt2'"),
        ({"tokenizer.chat_template": "{% if"}, "chat template"),
    ],
)
def test_bad_files_end_before_anything_is_allocated(
    tmp_path, tokenizer_file, monkeypatch, change, message
):
    model = model_for_gguf("gemma", num_hidden_layers=2)
    path = write_gguf(tmp_path / "model.gguf", model, "Q4_0", tokenizer_file, **change)
    monkeypatch.setattr(gguf_header.GgufHeader, "bytes_of", lambda *a: pytest.fail("data is read"))
    with pytest.raises(ValueError, match=message) as error:
        Engine.from_pretrained(path, ops="reference")
    assert "\n" not in str(error.value)


def test_the_part_for_images_is_left_aside(tmp_path, tokenizer_file, run):
    images = {"v.patch_embd.weight": torch.ones(4, 4), "mm.input_projection.weight": torch.ones(9)}
    path = tmp_path / "model.gguf"
    write_gguf(path, model_for_gguf("gemma3_text"), "F16", tokenizer_file, images)
    assert run("info", str(path), "--check")[0] == 0
    assert "2 tensors left aside" in run("convert", str(path), str(tmp_path / "new"))[2]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"blk\.1\.ffn_up\.weight is missing"),
        ({"rope_freqs.weight": torch.ones(8)}, r"rope_freqs\.weight is not part of the model"),
        ({"blk.0.attn_norm.weight": torch.ones(63)}, r"attn_norm\.weight is \[63\], the metadata"),
        (
            {"blk.0.attn_q.weight": torch.ones(64, 32)},
            r"is \[64, 32\], the metadata say",
        ),
        ({"blk.0.attn_q.weight": torch.ones(64, 8, 8)}, r"is \[64, 8, 8\], the metadata"),
        ({"token_embd.weight": None}, r"token_embd\.weight is missing"),
    ],
)
def test_wrong_tensors(tmp_path, tokenizer_file, tensors, message):
    path = tmp_path / "model.gguf"
    write_gguf(path, model_for_gguf("gemma3_text"), "Q4_0", tokenizer_file, tensors)
    with pytest.raises(ValueError, match=rf"model\.gguf: .*{message}") as error:
        Engine.from_pretrained(path, ops="reference")
    assert "\n" not in str(error.value)


def test_published_settings_of_sampling(tmp_path, tokenizer_file, run):
    said = {"temp": 0.7, "top_k": 64, "top_p": 0.95}
    said = {f"general.sampling.{name}": x for name, x in said.items()}
    path = tmp_path / "model.gguf"
    write_gguf(path, model_for_gguf("gemma"), "F32", tokenizer_file, **said)
    run("convert", str(path), str(tmp_path / "new"))
    for model in (path, tmp_path / "new"):
        with Engine.from_pretrained(model, ops="reference") as engine:
            params = engine.get_default_sampling_params()
        assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.7, 64, 0.95, 0)
    with Engine.from_pretrained(path, ops="reference", generation_config="none") as engine:
        assert engine.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize(
    ("key", "value"), [("temp", -0.5), ("top_p", 1.5), ("min_p", 2.0), ("penalty_repeat", 0.0)]
)
def test_a_bad_setting_of_sampling_is_named_by_its_key(tmp_path, tokenizer_file, run, key, value):
    path, key = tmp_path / "model.gguf", f"general.sampling.{key}"
    write_gguf(path, model_for_gguf("gemma"), "F32", tokenizer_file, **{key: value})
    with pytest.raises(ValueError, match=re.escape(f"{path}: {key} {value} must be")) as error:
        Engine.from_pretrained(path, ops="reference")
    assert "\n" not in str(error.value)
    code, _, err = run("convert", str(path), str(tmp_path / "new"))
    assert (code, f"{path}: {key} {value} must be" in err) == (1, True)


def test_nonfinite_values_are_found(file, run, tmp_path):
    header = gguf_header.read_header(file)
    content = bytearray(file.read_bytes())
    start = header.tensors["blk.1.ffn_up.weight"].start
    content[start : start + 2] = b"\0\x7c"  # an infinite scale
    start = header.tensors["output_norm.weight"].start
    content[start : start + 4] = b"\0\0\xc0\x7f"  # NaN
    (tmp_path / "model.gguf").write_bytes(content)
    code, out, _ = run("info", str(tmp_path / "model.gguf"), "--check")
    assert code == 1
    assert "blk.1.ffn_up.weight holds a NaN or an infinity" in out
    assert "output_norm.weight holds a NaN or an infinity" in out
    assert out.count("holds a NaN") == 2


def test_a_real_file():
    file = real_file("gemma-3-270m-q4_k_m.gguf")
    config = load_config(file)
    assert config.eos_token_ids == PUBLISHED["gemma-3-270m"].eos_token_ids
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*are read as")
        engine = Engine.from_pretrained(file, max_batch_size=1, max_seq_len=64, ops="reference")
    with engine:
        text = engine.generate("The capital of France is", GREEDY).text
        assert "France" in text or "Paris" in text
