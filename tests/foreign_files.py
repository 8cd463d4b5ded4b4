"""Checkpoints in foreign formats, made from transformers models, and their conversion checked."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from random_models import random_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from twins import all_logits, assert_same_logits, load_model, random_ids

from gemcut.engine.checkpoints.convert import convert
from gemcut.kernels import reference

ORIGINAL_TYPES = ["gemma", "gemma2", "gemma3_text"]
small_model = functools.cache(random_model)


def original_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model as google/gemma_pytorch names and fuses it."""
    state = {"embedder.weight": model.model.embed_tokens.weight}
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
        held = {
            "self_attn.qkv_proj": torch.cat([q, k, v]),
            "self_attn.o_proj": attention.o_proj.weight,
            "mlp.gate_proj": mlp.gate_proj.weight,
            "mlp.up_proj": mlp.up_proj.weight,
            "mlp.down_proj": mlp.down_proj.weight,
        }
        if hasattr(attention, "q_norm"):
            held["self_attn.query_norm"] = attention.q_norm.weight
            held["self_attn.key_norm"] = attention.k_norm.weight
        for name, child in layer.named_children():
            if name.endswith("layernorm"):
                held[name] = child.weight
        state |= {f"model.layers.{number}.{name}.weight": w for name, w in held.items()}
    state["model.norm.weight"] = model.model.norm.weight
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def quantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix as int8 rows and a scaler for each."""
    result = {}
    for name, tensor in state.items():
        if tensor.dim() == 1:
            result[name] = tensor
            continue
        scaler = tensor.abs().amax(1) / 127
        result[name] = (tensor / scaler[:, None]).round().to(torch.int8)
        result[name.removesuffix(".weight") + ".weight_scaler"] = scaler
    return result


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """A model with the weights that its quantised state encodes."""
    copy = random_model(model.config.model_type)
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.dim() == 2:
                scaler = parameter.abs().amax(1) / 127
                parameter.copy_(
                    (parameter / scaler[:, None]).round().to(torch.int8).float() * scaler[:, None]
                )
    return copy


class Harmful:
    """The content of a hostile pickle: reading it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save_ckpt(file: Path, state: dict[str, Any]) -> Path:
    torch.save({"model_state_dict": state, "step": 7}, file)
    return file


def save_shards(
    folder: Path, state: dict[str, Any], save: Callable[[dict[str, Any], Path], Any]
) -> None:
    """Two files and an index, as both Google's loader and transformers 4 named them."""
    single, index = {
        torch.save: ("pytorch_model-{:05d}-of-00002.bin", "pytorch_model.bin.index.json"),
        save_msgpack: ("flax_model-{:05d}-of-00002.msgpack", "flax_model.msgpack.index.json"),
    }[save]
    names = list(state)
    weight_map = {}
    for number, group in enumerate((names[::2], names[1::2]), start=1):
        save({name: state[name] for name in group}, folder / single.format(number))
        weight_map |= dict.fromkeys(group, single.format(number))
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def flax_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's arrays by their paths in transformers 4's tree."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        path = name.replace(".", "/")
        if name == "model.embed_tokens.weight":
            path = "model/embed_tokens/embedding"
        elif name.endswith(("proj.weight", "lm_head.weight")):
            path, tensor = path.removesuffix("weight") + "kernel", tensor.T
        state[path] = tensor.detach().clone().contiguous()
    return state


def nested(state: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in state.items():
        *branch, leaf = path.split("/")
        node = tree
        for step in branch:
            node = node.setdefault(step, {})
        node[leaf] = value
    return tree


def pack(value: Any) -> bytes:
    data = msgpack.packb(value)
    assert data is not None
    return data


def packed(tensor: Tensor) -> msgpack.ExtType:
    """An array as flax packs it: a tuple of shape, dtype and bytes."""
    name = str(tensor.dtype).removeprefix("torch.")
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(1, pack((tuple(tensor.shape), name, raw)))


def save_msgpack(state: dict[str, Tensor], file: Path) -> None:
    tree = nested({path: packed(tensor) for path, tensor in state.items()})
    file.write_bytes(pack(tree))


@torch.no_grad()
def assert_same_model(folder: Path, model: PreTrainedModel) -> None:
    """Transformers and gemcut read `model` from `folder`: every bit, and the logits."""
    again, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ids = random_ids(40, model.config.vocab_size)
    expected = model(ids[None]).logits
    assert torch.equal(again(ids[None]).logits, expected)
    assert_same_logits(
        all_logits(load_model(folder, reference, torch.float32, "cpu"), ids), expected[0]
    )


def write_config(folder: Path, model) -> Path:
    model.config.save_pretrained(folder)
    return folder / "config.json"


def refused(source: Path, target: Path, message: str, **options) -> str:
    """The message, of one line, with which a conversion was refused; nothing was written."""
    with pytest.raises(ValueError, match=message) as error:
        convert(source, target, **options)
    assert "\n" not in str(error.value)
    assert not target.exists()
    return str(error.value)
