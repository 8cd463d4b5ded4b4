"""Programs that give the Hub kernel's layers to transformers' models by the package `kernels`.

    python -P hub_kernel_users.py kernelize|configure|lock FOLDER

Each is run in a process of its own: a class that is marked stays so, and rotation is replaced for
every model of a family at once.
"""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accuracy import assert_within_budget
from random_models import MODEL_TYPES, random_model
from torch import Tensor, nn

IDS = torch.tensor([[2, 5, 11, 3, 7, 90, 41, 8, 8], [2, 17, 33, 96, 4, 1, 60, 12, 77]])
UNMARKED = ("GemmaRMSNorm", "GemmaMLP")  # by transformers
MARKED = {"rotary_pos_emb": "RotaryPosEmb", "GeluTanh": "GeluTanh"}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def mark(model: Any) -> None:
    """Say to `kernels` what transformers does not."""
    kernels = importlib.import_module("kernels")
    kernels.replace_kernel_forward_from_hub(type(model.model.norm), "GemmaRMSNorm")
    kernels.replace_kernel_forward_from_hub(type(model.model.layers[0].mlp), "GemmaMLP")


def used(model: nn.Module) -> list[str]:
    """The Hub kernel's layers whose forward a model runs."""
    rotary = importlib.import_module(type(model).__module__).apply_rotary_pos_emb
    forwards = [getattr(x, "forward", None) for x in (*model.modules(), rotary)]
    functions = [getattr(forward, "__func__", forward) for forward in forwards]
    ours = [f for f in functions if f is not None and f.__module__.startswith("_gemcut_")]
    return sorted(f.__qualname__.split(".")[0] for f in ours)


def kernelize(folder: Path) -> None:
    """`use_kernel_mapping` and `kernelize`: in, compiled, out again, and never in training."""
    kernels = importlib.import_module("kernels")
    Mode, kernelize = kernels.Mode, kernels.kernelize
    kernel = kernels.get_local_kernel(folder)
    y = kernel.rmsnorm(torch.ones(1, 8), torch.zeros(8), 0.0)
    assert torch.equal(y, torch.ones(1, 8))
    layers = {n: kernels.LocalLayerRepository(folder, layer_name=n) for n in UNMARKED}
    for model_type in MODEL_TYPES:
        model, exact = random_model(model_type), logits(random_model(model_type).double())
        eager = logits(model)
        mark(model)
        mapping: Any = {name: {"cpu": {Mode.INFERENCE: layers[name]}} for name in UNMARKED}
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            kernelize(model, mode=Mode.INFERENCE, device="cpu")
        norms = sum("norm" in name for name, _ in model.named_parameters())
        expected = ["GemmaMLP"] * len(model.model.layers) + ["GemmaRMSNorm"] * norms
        assert used(model) == expected, used(model)
        assert_within_budget(model_type, logits(model), eager, exact)

        mapping = {name: {"cpu": layers[name]} for name in UNMARKED}  # of any mode
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            kernelize(model, mode=Mode.INFERENCE | Mode.TORCH_COMPILE, device="cpu")
        assert used(model) == expected, used(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_within_budget(model_type, logits(compiled), eager, exact)

        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            kernelize(model.train(), mode=Mode.TRAINING, device="cpu")
        assert not used(model), "a layer without a backward trains"
        assert torch.equal(logits(model.eval()), eager)


def configure(folder: Path) -> None:
    """KernelConfig: what transformers marks itself, then with norms and MLPs."""
    KernelConfig = importlib.import_module("transformers").KernelConfig
    kernel_config = importlib.import_module("transformers.utils.kernel_config")
    kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES.append("cpu")  # it admits GPUs alone
    for model_type in MODEL_TYPES:
        model, exact = random_model(model_type), logits(random_model(model_type).double())
        eager = logits(model)
        for more in ((), UNMARKED):
            if more:
                mark(model)
            wanted = MARKED | {name: name for name in more}
            names = {name: f"{folder}:{layer}" for name, layer in wanted.items()}
            model.set_use_kernels(True, KernelConfig(names, use_local_kernel=True))
            assert set(used(model)) == set(wanted.values()), used(model)
            assert_within_budget(model_type, logits(model), eager, exact)


def lock(folder: Path) -> None:
    """From the cache, where the folder lies as if downloaded: by version and by a lock file.

    HF_HUB_OFFLINE and KERNELS_CACHE are set, which the packages read when they are imported.
    """
    kernels = importlib.import_module("kernels")
    name, commit = "me/gemcut", "a" * 40
    cached = Path(os.environ["KERNELS_CACHE"]) / "kernels--me--gemcut"
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text(commit)
    locked = {"dependency": {"repo-id": name, "version": 1}, "lock": {"commit": commit}}
    lockfile = cached.parent / "kernels.lock"
    lockfile.write_text(json.dumps([locked]))

    kernel = kernels.load_kernel(name, lockfile=lockfile)
    assert kernel.__file__.startswith(str(cached))
    assert kernels.get_locked_kernel(name, lockfile=lockfile) is kernel
    assert kernels.get_kernel(name, version=1) is kernel
    assert kernels.has_kernel(name, version=1)
    layer = {"layer_name": "GemmaRMSNorm"}
    by_lock = kernels.LockedLayerRepository(name, lockfile=lockfile, **layer)
    by_version = kernels.LayerRepository(name, version=1, **layer)
    for repository in (by_lock, by_version):
        assert repository.load() is kernel.layers.GemmaRMSNorm
    os.environ["LOCAL_KERNELS"] = f"you/gemcut={folder}"
    local = kernels.get_kernel("you/gemcut", version=1)
    assert local.__file__.startswith(str(folder))


if __name__ == "__main__":
    users = {"kernelize": kernelize, "configure": configure, "lock": lock}
    users[sys.argv[1]](Path(sys.argv[2]))
