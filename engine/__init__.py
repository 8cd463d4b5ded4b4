"""The engine: `Engine` takes prompts and yields text; beside it, the classes of transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemcut.engine.public import *


def __getattr__(name: str) -> Any:
    # On first use: the command line is in this package too, and `gemcut --help` should not wait two
    # seconds for torch.
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("gemcut.engine.public"), name)


def __dir__() -> list[str]:
    return import_module("gemcut.engine.public").__all__
