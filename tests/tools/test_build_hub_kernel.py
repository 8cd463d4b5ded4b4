"""The folder for Hugging Face's package `kernels`: what it holds, and that it needs no gemcut."""

import ast
import base64
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import positional, small_calls
from torch import Tensor

from gemcut import kernels
from gemcut.kernels import cpu
from gemcut.tools import build_hub_kernel
from gemcut.tools.build_hub_kernel import VARIANTS, build, main, relative_imports, variant_files

ROOT = Path(__file__).parents[2]
CALLS = small_calls()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "gemcut"
    build(out)
    return out


def loaded(variant: Path):
    """The module of a variant, as `kernels` imports it."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def cloned(arguments: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)


def assert_same_bits(actual: object, expected: object) -> None:
    """Of a tensor, or of those among a call's results or arguments."""
    pair = [list(x) if isinstance(x, tuple | list) else [x] for x in (actual, expected)]
    actual, expected = ([x for x in several if isinstance(x, Tensor)] for several in pair)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_holds_the_kernels_and_imports_nothing_of_gemcut(folder, variant):
    base = folder / "build" / variant
    sources = {p.relative_to(ROOT / "kernels") for p in (ROOT / "kernels").rglob("*.py")}
    assert {p.relative_to(base / "kernels") for p in (base / "kernels").rglob("*.py")} == sources
    assert (base / "kernels" / "measured_tiles.json").exists()
    for path in base.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert not [name for name in names if name.startswith("gemcut")], path


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_metadata_names_its_backend_its_namespace_and_its_files(folder, variant):
    base = folder / "build" / variant
    metadata = json.loads((base / "metadata.json").read_text())
    assert metadata["backend"]["type"] == variant.removeprefix("torch-")
    assert re.fullmatch(r"_gemcut_(cuda|cpu)_[0-9a-f]{10}", metadata["id"])
    assert f'f"{metadata["id"]}::{{name}}"' in (base / "kernels" / "registration.py").read_text()
    left = [p for p in base.rglob("*.py") if re.search(r"gemcut::|ops\.gemcut", p.read_text())]
    assert left == []
    files = {p.relative_to(base).as_posix(): p for p in base.rglob("*") if p.suffix != ".pyc"}
    hashes = {
        place: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for place, path in files.items()
        if path.is_file() and place != "metadata.json"
    }
    assert metadata["digest"] == {"algorithm": "sha256", "files": hashes}


def test_the_same_sources_give_the_same_bytes_and_others_another_namespace(monkeypatch):
    first = variant_files("torch-cuda", 1)
    assert list(first.items()) == list(variant_files("torch-cuda", 1).items())
    ids = {json.loads(variant_files(v, 1)["metadata.json"])["id"] for v in VARIANTS}
    assert len(ids) == len(VARIANTS)
    files = build_hub_kernel.files_of_build()
    changed = files | {"kernels/norm.py": files["kernels/norm.py"] + "\n"}
    monkeypatch.setattr(build_hub_kernel, "files_of_build", lambda: dict(changed))
    assert json.loads(variant_files("torch-cuda", 1)["metadata.json"])["id"] not in ids


def test_it_loads_beside_gemcut_and_gives_the_same_bits_in_the_interpreter(folder):
    hub = loaded(folder / "build" / "torch-cpu")
    assert hub.rmsnorm is not torch.ops.gemcut.rmsnorm
    assert set(hub.__all__) == {*kernels.__all__, "gelu", "gelu_and_mul", "rotate"} | {
        "kernels",
        "layers",
    }
    for name in kernels.__all__:
        arguments = positional(name, CALLS[name])
        mine, theirs = cloned(arguments), cloned(arguments)
        expected, actual = getattr(torch.ops.gemcut, name)(*mine), getattr(hub, name)(*theirs)
        assert_same_bits(actual, expected)
        assert_same_bits(theirs, mine)


ALONE = """
import importlib.util, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path[:] = [p for p in sys.path if p != "{root}"]
try:
    import gemcut.kernels
    sys.exit("gemcut is installed")
except ImportError:
    pass
spec = importlib.util.spec_from_file_location("{name}", "{file}")
module = sys.modules["{name}"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
calls = torch.load("{calls}")
results = {{}}
for op, arguments in calls.items():
    results[op] = (getattr(module, op)(*arguments), arguments)
torch.save(results, "{out}")
"""


def alone(tmp_path: Path, file: Path, name: str) -> dict:
    """What every op gives in a process that has no gemcut and no interpreter."""
    calls = {op: cloned(positional(op, CALLS[op])) for op in CALLS}  # which share their caches
    torch.save(calls, tmp_path / "calls.pt")
    places = {"calls": tmp_path / "calls.pt", "out": tmp_path / "out.pt"}
    code = ALONE.format(root=ROOT, name=name, file=file, **places)
    command = [sys.executable, "-P", "-c", code]
    run = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return torch.load(tmp_path / "out.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="its calls are on the GPU")
def test_without_gemcut_a_cpu_runs_its_own_table_bit_for_bit(folder, tmp_path):
    base = folder / "build" / "torch-cpu"
    name = json.loads((base / "metadata.json").read_text())["id"]
    for op, (results, arguments) in alone(tmp_path, base / "__init__.py", name).items():
        mine = cloned(positional(op, CALLS[op]))
        expected = getattr(cpu, op)(*mine)
        assert_same_bits(results, expected)
        assert_same_bits(arguments, mine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its calls are on the GPU")
def test_the_inner_folder_gives_older_versions_the_same_names(folder, tmp_path):
    """Versions before 0.12 look for build/VARIANT/NAME."""
    inner = folder / "build" / "torch-cpu" / "gemcut" / "__init__.py"
    assert set(alone(tmp_path, inner, "gemcut_0")) == set(CALLS)


def test_bad_arguments_are_one_line_and_write_nothing(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    new = tmp_path / "new"
    for arguments, message in {
        (tmp_path / "full",): "is not empty",
        (tmp_path / "full" / "file",): "is a file",
        (new, "--variants", "torch-rocm"): "variant 'torch-rocm' is unknown; torch-cuda and",
        (new, "--version", "-1"): "2 variants of version -1: one at least, from 0 on",
    }.items():
        assert main([str(a) for a in arguments]) == 1
        out, err = capsys.readouterr()
        assert message in err
        assert (out, err.count("\n")) == ("", 1)
    assert not new.exists()
    assert main([str(new), "--variants", "torch-cpu"]) == 0
    assert [p.name for p in (new / "build").iterdir()] == ["torch-cpu"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk", "key"])
def test_an_interrupted_build_leaves_nothing(error, tmp_path, monkeypatch):
    write, left = Path.write_bytes, [20]

    def interrupted(self: Path, data: bytes) -> int:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(type(error)):
        build(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    paths = build(tmp_path / "new")
    assert {p for p in (tmp_path / "new").rglob("*") if p.is_file()} == set(paths)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from gemcut.engine import Engine", "imports gemcut.engine, which is not in the build"),
        ("import gemcut.kernels", "imports gemcut.kernels otherwise than"),
        ("if 1:\n    import gemcut.tools.launches as l", "otherwise than"),
    ],
)
def test_an_import_that_cannot_be_relative_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        relative_imports(source, "kernels/norm.py")


def test_imports_are_relative_to_the_place():
    source = "from gemcut.kernels.norm import rmsnorm\nfrom gemcut import kernels\n"
    source += "from gemcut.tools.hub_kernel import layers\n"
    changed = (
        "from {0}kernels.norm import rmsnorm\nfrom {0} import kernels\nfrom {0} import layers\n"
    )
    assert relative_imports(source, "layers.py") == changed.format(".")
    assert relative_imports(source, "kernels/reference/ops.py") == changed.format("...")
