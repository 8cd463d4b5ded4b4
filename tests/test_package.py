"""The wheel: built from the checkout, it holds every module and all data, and needs no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "tokenizer", "engine", "bench", "tools")
# modules that need an extra (`pip install gemcut[train]` and the like)
NEEDS_EXTRA = {"gemcut.tools.train_demo", "gemcut.bench.engines.openai_load"}
NEEDS_EXTRA |= {"gemcut.tools.vllm_runner", "gemcut.tools.patched_transformers"}
NEEDS_EXTRA |= {
    f"gemcut.engine.adapters.{name}"
    for name in (
        "lm_eval_model",
        "ray_deployment",
        "sglang_backend",
        "vllm_ir",
        "vllm_ops",
        "vllm_vaultgemma",
    )
}
NEEDS_EXTRA |= {f"gemcut.engine.adapters.transformers_{name}" for name in ("attention", "patch")}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("gemcut", *(part for part in parts if part != "__init__")))


MODULES = sorted({module_name(p) for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # a copy, so that no earlier build's leftovers get in, and the checkout stays clean
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(ROOT, out / "source", ignore=leftovers)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(out / "source")]
    subprocess.run(command, check=True, cwd=out)
    (built,) = out.glob("gemcut-*.whl")
    return built


def test_wheel_holds_every_module_and_the_demo_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert f"gemcut/{path.relative_to(ROOT)}" in names
        assert f"gemcut/{folder}/py.typed" in names
    assert "gemcut/kernels/measured_tiles.json" in names
    for name in ("config.json", "model.safetensors", "tokenizer.model", "README.md"):
        assert f"gemcut/engine/demo/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_module_imports_from_the_wheel_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    modules = [name for name in MODULES if name not in NEEDS_EXTRA]
    code = (
        "import importlib, sys; sys.path.insert(0, sys.argv[1])\n"
        # the editable install of the checkout must not answer
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "for name in sys.argv[2:]:\n"
        "    module = importlib.import_module(name)\n"
        "    assert module.__file__.startswith(sys.argv[1]), module.__file__\n"
        "from gemcut.engine.checkpoints.hub import DEMO\n"
        "assert (DEMO / 'model.safetensors').exists()\n"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "site"), *modules]
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)


def test_every_folder_is_a_typed_package():
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").exists()
        assert (ROOT / folder / "py.typed").exists()
