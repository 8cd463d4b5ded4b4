"""Options of loading and saving as programs give them; folders that hold something else."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from documented_twins import random_ids, twins
from safetensors.torch import save_file

from gemcut.engine import Engine, transformers_api
from gemcut.engine.checkpoints import hub
from gemcut.engine.checks import read_size
from gemcut.engine.transformers_api import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
)

IDS = random_ids(1, 6)
NAME = "google/gemma-test"


@pytest.fixture
def ours():
    return twins("AutoModelForCausalLM", "gemma2")[1]


@pytest.fixture
def folder(ours, tmp_path) -> Path:
    ours.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def asked(folder, monkeypatch) -> list[dict]:
    """What the Hub was asked for; it answers with the saved model."""
    calls = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **k: calls.append({"name": name} | k) or folder
    )
    return calls


HUB = {"token": "hf_x", "revision": "v1", "cache_dir": "/c", "local_files_only": True}
HUB |= {"force_download": True}


@pytest.mark.parametrize(
    "load",
    [
        Gemma2ForCausalLM,
        AutoModelForCausalLM,
        AutoModel,
        Gemma2Config,
        AutoConfig,
        GenerationConfig,
    ],
    ids=lambda load: load.__name__,
)
def test_options_of_the_hub_act(load, asked):
    load.from_pretrained(NAME, **HUB, trust_remote_code=True)
    assert asked
    for call in asked:
        del call["allow_patterns"]
        assert call == HUB | {"name": NAME}
    asked.clear()
    neutral = dict.fromkeys([*HUB, "proxies", "subfolder", "code_revision", "use_auth_token"])
    load.from_pretrained(NAME, **neutral)
    for call in asked:
        assert (call["token"], call["revision"], call["cache_dir"]) == (None, None, None)
        assert (call["local_files_only"], call["force_download"]) == (False, False)


def test_a_model_in_a_cache_of_its_own(folder, tmp_path):
    """The layout of huggingface_hub; nothing asks the network."""
    repository = tmp_path / "cache" / "models--google--gemma-test"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs" / "pinned").write_text("0" * 40)
    folder.rename(repository / "snapshots" / ("0" * 40))
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(NAME, revision="pinned", **where)
    assert model.name_or_path == NAME
    with pytest.raises(ValueError, match="not in the cache, and local_files_only asks no network"):
        AutoModelForCausalLM.from_pretrained(NAME, **where)


def test_a_folder_within_a_folder(ours, folder):
    outer = folder.parent
    for load in (Gemma2ForCausalLM, AutoModelForCausalLM):
        model = load.from_pretrained(outer, subfolder="saved")
        assert torch.equal(model(IDS).logits, ours(IDS).logits)
    with pytest.raises(ValueError, match="has no folder 'other'"):
        AutoModelForCausalLM.from_pretrained(outer, subfolder="other")


def test_options_that_ask_for_nothing(ours, folder):
    neutral = {"low_cpu_mem_usage": True, "use_safetensors": True, "quantization_config": None}
    neutral |= {
        "output_loading_info": False,
        "state_dict": None,
        "variant": None,
        "max_memory": None,
    }
    neutral |= {"gguf_file": None, "load_in_8bit": False, "from_flax": False, "torch_dtype": None}
    neutral |= {"device_map": "sequential" if torch.cuda.is_available() else "auto"}
    model = AutoModelForCausalLM.from_pretrained(folder, **neutral)
    assert torch.equal(model.cpu()(IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"use_safetensors": False}, "use_safetensors=False is not supported; `gemcut convert`"),
        ({"output_loading_info": True}, "output_loading_info=True is not supported; a missing"),
        ({"ignore_mismatched_sizes": True}, "a weight of another shape is an error"),
        ({"gguf_file": "x.gguf"}, "gguf_file='x.gguf' is not supported; `gemcut convert` makes a"),
        ({"load_in_4bit": True}, "load_in_4bit=True is not supported; leave it out"),
        ({"proxies": {"https": "p"}}, "proxies=.* is not supported; set HTTPS_PROXY"),
        ({"use_auth_token": "x"}, "use_auth_token='x' is not supported; give token="),
    ],
)
def test_options_that_ask_for_something(option, message, folder):
    with pytest.raises(NotImplementedError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(folder, **option)
    assert "\n" not in str(error.value)


def test_a_config_by_its_path(ours, folder):
    for config in (folder, str(folder), folder / "config.json"):
        model = AutoModelForCausalLM.from_pretrained(folder, config=config)
        assert torch.equal(model(IDS).logits, ours(IDS).logits)


def test_the_config_of_a_loaded_model(folder):
    config = AutoConfig.from_pretrained(folder)
    assert (config.name_or_path, config.dtype) == (str(folder), torch.float32)
    cases = ({"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"config": config}, {})
    for options in cases:
        ours = AutoModelForCausalLM.from_pretrained(folder, **options)
        given = {**options, "config": transformers.AutoConfig.from_pretrained(folder)}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **given)
        assert ours.config.dtype == theirs.config.dtype == ours.dtype
        assert ours.config.name_or_path == ours.name_or_path == theirs.name_or_path == str(folder)
        assert ours.config is not config
    assert AutoModel.from_config(config, dtype=torch.bfloat16).config.dtype == torch.bfloat16


# Attention's name


def test_the_name_of_attention(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="attn_implementation 'paged' is unknown; 'eager'"):
        model.set_attn_implementation("paged")
    config = AutoConfig.from_pretrained(folder, attn_implementation="flash_attention_2")
    assert config._attn_implementation == "flash_attention_2"
    assert config == AutoConfig.from_pretrained(folder)
    assert not [key for key in config.to_dict() if "attn_impl" in key or "attention_impl" in key]
    assert Gemma2Config(attn_implementation="eager")._attn_implementation == "eager"
    made = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.bfloat16, trust_remote_code=False
    )
    assert (made.dtype, made.config._attn_implementation) == (torch.bfloat16, "eager")
    assert AutoModel.from_config(config, torch_dtype="bfloat16").dtype == torch.bfloat16


# Saving


@pytest.mark.parametrize("size", ["20KB", "0.02MB", 20_000, "20 kb"])
def test_shards(ours, size, tmp_path):
    ours.save_pretrained(tmp_path, max_shard_size=size, safe_serialization=True, push_to_hub=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_bad_options_of_saving(ours, tmp_path):
    for size in ("many", 0, "-5GB", None, "5 parsecs"):
        with pytest.raises(ValueError, match=r"max_shard_size .* is no size such as 5"):
            ours.save_pretrained(tmp_path, max_shard_size=size)
    for name in ("push_to_hub", "state_dict"):
        with pytest.raises(NotImplementedError, match=f"{name}=.* is not supported; u"):
            ours.save_pretrained(tmp_path, **{name: {1: 2} if name == "state_dict" else True})
    with pytest.raises(TypeError, match="takes no 'max_shards'; did you mean 'max_shard_size'"):
        ours.save_pretrained(tmp_path, max_shards=1)


def test_sizes():
    assert read_size("x", "5GB") == 5 * 10**9
    assert read_size("x", "2GiB") == 2**31
    assert read_size("x", " 1.5 mb ") == 1_500_000
    assert read_size("x", 300) == read_size("x", "300") == read_size("x", "300B") == 300


# Folders of something else


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


def adapter_with_config(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").write_text(Gemma2Config().to_json_string())


def gguf(folder: Path) -> None:
    (folder / "gemma-2b.Q4_K_M.gguf").write_bytes(b"GGUF")


def tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")


def pickles(folder: Path) -> None:
    (folder / "config.json").write_text(Gemma2Config().to_json_string())
    (folder / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (adapter, r"holds a PEFT adapter, no model: .* by lora=, .* `gemcut convert --lora` saves"),
        (adapter_with_config, r"holds a PEFT adapter, no model: .* by lora="),
        (gguf, r"holds a GGUF file, which Engine\.from_pretrained .* `gemcut convert` makes"),
        (tokenizer, "holds a tokenizer and no model: config.json is missing"),
        (pickles, "pickles .* are read by `gemcut convert` alone"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("load", [AutoModelForCausalLM, Gemma2ForCausalLM, Engine])
def test_what_a_folder_holds_is_said(fill, message, load, tmp_path):
    if fill is gguf and load is Engine:
        message = r"Q4_K_M\.gguf: cut short within its header"
    if fill is pickles and load is Engine:
        (tmp_path / "tokenizer.model").write_bytes((hub.DEMO / "tokenizer.model").read_bytes())
    fill(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    if fill is adapter:
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path)


def test_a_gguf_file(tmp_path):
    file = tmp_path / "gemma.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"is a GGUF file, .* `gemcut convert` makes a folder"):
        AutoModelForCausalLM.from_pretrained(str(file))
    with pytest.raises(ValueError, match=r"gemma\.gguf: cut short within its header"):
        Engine.from_pretrained(str(file))


def test_a_missing_path_is_an_error(tmp_path):
    for name in ("AutoModelForCausalLM", "AutoConfig", "AutoModel", "Gemma2ForCausalLM"):
        with pytest.raises(ValueError, match="is neither 'demo', an existing folder"):
            getattr(transformers_api, name).from_pretrained(str(tmp_path / "nowhere"))
