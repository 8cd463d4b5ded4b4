"""Kernels with mistakes in them, for tests that must see these."""

import importlib
import inspect
import sys
from types import ModuleType

import pytest


@pytest.fixture
def mutated(tmp_path):
    """Imports the modules of an op with some of their source changed."""

    def make(module: str, changes: list[tuple[str, str, str]]) -> ModuleType:
        sources = {}
        for name in {module, *(change[0] for change in changes)}:
            sources[name] = inspect.getsource(importlib.import_module(f"gemcut.kernels.{name}"))
        for name, right, wrong in changes:
            assert sources[name].count(right) == 1, f"{name} holds {right!r} not once"
            sources[name] = sources[name].replace(right, wrong)
        for name in sources:  # the changed modules take each other's place
            for other in sources:
                sources[name] = sources[name].replace(
                    f"from gemcut.kernels.{other} import", f"from mutated_{other} import"
                )
            (tmp_path / f"mutated_{name}.py").write_text(sources[name])
        return importlib.import_module(f"mutated_{module}")

    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    yield make
    sys.path.remove(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("mutated_")]:
        del sys.modules[name]
