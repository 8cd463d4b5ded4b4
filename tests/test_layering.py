"""Imports point one way, are absolute, and are at the top of a file, with listed exceptions."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = {"torch", "triton"}
# folder: the other folders of gemcut that it may import, and packages that it may not
RULES = {
    "kernels": (set(), set()),
    "tokenizer": (set(), TORCH),
    "engine": ({"kernels", "tokenizer"}, set()),
    "bench": ({"kernels", "tokenizer", "engine"}, set()),
    "tools": ({"kernels", "tokenizer", "engine", "bench"}, set()),
}
# the rooms of a folder in their order: a room may import those before it
ROOMS = {
    "kernels": ["reference"],
    "engine": [
        "config",
        "requests",
        "execution",
        "checkpoints",
        "serving",
        "transformers_api",
        "openai_api",
        "adapters",
    ],
    "bench": ["measure", "ops", "engines", "report"],
    "tools": ["hub_kernel", "prediction", "tuning", "visit"],
}
# Imports inside a function: torch after the arguments are read, matplotlib where a page is asked
# for, and peers only where they take part
LATE = {
    ("engine/cli.py", "gemcut.engine.commands"),
    ("engine/cli.py", "gemcut.engine.remote_chat"),
    ("bench/engines/peers.py", "transformers"),
}
LATE |= {("engine/placement.py", "gemcut.kernels.interpreter")}
LATE |= {
    ("bench/cli.py", "gemcut.bench.report.markdown_page"),
    ("bench/engines/compiled_gemma.py", "torchao"),
}
LATE |= {("bench/engines/peers.py", "gemcut.bench.engines.compiled_gemma")}
LATE |= {("bench/engines/serve.py", "gemcut.bench.engines.openai_load")}
# transformers' tokenizer of an engine, which most are never asked for
LATE |= {("engine/engine.py", "gemcut.engine.transformers_api.tokenizers.tokenizer")}
# torch, in the processes of a visit alone
LATE |= {("tools/visit/block.py", "torch"), ("tools/visit/block.py", "gemcut.engine.placement")}
# a peer's arrays, files and templates, which not every user has
LATE |= {("engine/transformers_api/tokenizers/batch_encoding.py", "jax.numpy")}
LATE |= {("tokenizer/json_vocabulary.py", "tokenizers")}
LATE |= {("engine/checkpoints/gguf_header.py", "gguf")}
# a server and its packages, where one is asked for
LATE |= {("engine/commands.py", "gemcut.engine.openai_api")}
LATE |= {
    ("bench/engines/served_steps.py", "gemcut.engine.openai_api"),
    ("bench/engines/served_steps.py", "uvicorn"),
}
LATE |= {("engine/requests/grammars.py", "llguidance")}
LATE |= {("engine/requests/grammar_probe.py", "llguidance")}
# vLLM and what needs it, once vLLM calls the plugin
LATE |= {
    ("engine/adapters/vllm_plugin.py", "vllm"),
    ("engine/adapters/vllm_plugin.py", "gemcut.engine.adapters"),
}
FILES = [path.relative_to(ROOT) for folder in RULES for path in (ROOT / folder).rglob("*.py")]


def imports(tree: ast.AST):
    """(dotted name, node) of everything that is imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            # `from gemcut import engine` names a folder too
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def problems(folder: str, source: str) -> list[str]:
    allowed, forbidden = RULES[folder]
    found = []
    for name, node in imports(ast.parse(source)):
        top, *rest = name.split(".")
        if top == "gemcut" and not rest:
            found.append(f"line {node.lineno}: gemcut itself holds nothing")
        elif top == "gemcut" and rest[0] not in allowed | {folder}:
            found.append(f"line {node.lineno}: {folder} imports {name}")
        if top in forbidden:
            found.append(f"line {node.lineno}: {folder} imports {top}")
        if top in RULES:
            found.append(f"line {node.lineno}: {top} without gemcut.")
    return found


def later_rooms(folder: str, room: str, source: str) -> list[str]:
    """What a file of a room imports from rooms that come after it."""
    later = ROOMS[folder][ROOMS[folder].index(room) + 1 :]
    names = [name.split(".") for name, _ in imports(ast.parse(source))]
    return [".".join(n) for n in names if n[:2] == ["gemcut", folder] and n[2:3] and n[2] in later]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    assert problems(path.parts[0], (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parts[1] in ROOMS.get(p.parts[0], ())], ids=str
)
def test_a_room_imports_no_later_one(path):
    folder, room, *_ = path.parts
    assert later_rooms(folder, room, (ROOT / path).read_text()) == []


def rooms_graph(folder: str, sources: dict[Path, str]) -> dict[str, set[str]]:
    """What each room, and each file beside them, imports of the others: by first name."""
    top = {path.parts[1].removesuffix(".py") for path in sources}
    graph: dict[str, set[str]] = {name: set() for name in top if name != "__init__"}
    for path, source in sources.items():
        name = path.parts[1].removesuffix(".py")
        for imported, _ in imports(ast.parse(source)):
            parts = imported.split(".")
            if parts[:2] == ["gemcut", folder] and parts[2:3] and parts[2] in graph.keys() - {name}:
                graph.setdefault(name, set()).add(parts[2])
    return graph


@pytest.mark.parametrize("folder", RULES)
def test_no_circle_of_rooms(folder):
    sources = {path: (ROOT / path).read_text() for path in FILES if path.parts[0] == folder}
    TopologicalSorter(rooms_graph(folder, sources)).prepare()  # CycleError names one


def test_a_circle_of_rooms_is_found():
    sources = {
        Path("bench/cli.py"): "from gemcut.bench.ops.cases import Case",
        Path("bench/ops/cases.py"): "import torch",
        Path("bench/ops/kernels.py"): "import gemcut.bench.cli",
    }
    with pytest.raises(CycleError):
        TopologicalSorter(rooms_graph("bench", sources)).prepare()


@pytest.mark.parametrize("folder", ROOMS)
def test_every_room_has_a_place(folder):
    rooms = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert rooms - {"demo"} == set(ROOMS[folder])  # the bundled model's files


def late_imports(source: str) -> set[str]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, kinds)]
    return {name for function in functions for name, _ in imports(function)}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_stand_at_the_top(path):
    for name in late_imports((ROOT / path).read_text()):
        assert any(str(path) == file and name.startswith(late) for file, late in LATE) or (
            str(path) == "engine/terminal.py" and name == "readline"  # alters terminals
        ), f"{path} imports {name} inside a function"


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("kernels", "from gemcut.engine.config.model_config import ModelConfig"),
        ("engine", "import gemcut.bench.measure.timing"),
        ("tokenizer", "import torch.nn"),
        ("engine", "from kernels import reference"),
        ("engine", "import gemcut"),
        ("engine", "def f():\n    from gemcut.tools import train_demo"),
    ],
)
def test_a_wrong_import_is_found(folder, source):
    assert problems(folder, source) != []


@pytest.mark.parametrize(
    ("folder", "room", "source"),
    [
        ("engine", "requests", "from gemcut.engine.execution.cache import KVCache"),
        ("engine", "execution", "from gemcut.engine.serving import worker"),
        ("bench", "measure", "from gemcut.bench.ops.cases import Case"),
        ("bench", "ops", "from gemcut.bench import engines"),
        ("bench", "engines", "def f():\n    import gemcut.bench.report.load"),
        ("tools", "prediction", "from gemcut.tools.tuning.ranking import rank"),
    ],
)
def test_an_import_of_a_later_room_is_found(folder, room, source):
    assert later_rooms(folder, room, source) != []


def test_an_earlier_room_may_be_imported():
    assert later_rooms("bench", "report", "import gemcut.bench.measure.timing") == []


def test_a_late_import_is_found():
    assert late_imports("import a\ndef f():\n    import b.c") == {"b.c"}
    assert late_imports("async def f():\n    import b.c") == {"b.c"}


def test_modules_do_not_bear_the_names_of_dependencies_or_of_the_standard_library():
    taken = set(sys.stdlib_module_names) | {"triton", "torch", "sentencepiece", "numpy", "tqdm"}
    for path in FILES:
        if path.parent.name != "kernels" or path.stem != "__init__":
            assert path.stem == "__init__" or path.stem not in taken, path


@pytest.mark.parametrize("folder", RULES)
def test_no_module_bears_the_name_of_what_its_package_exports(folder):
    """The package's attribute would be the function, and the module out of reach."""
    exported = getattr(import_module(f"gemcut.{folder}"), "__all__", [])
    modules = {path.stem for path in (ROOT / folder).glob("*.py")}
    assert modules & set(exported) == set()
