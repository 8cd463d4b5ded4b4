"""SGLang's command line on our server: `sglang serve MODEL --model-type gemcut` is `gemcut serve`.

SGLang 0.5.23 reads the entry points `sglang.serve_backends` (the page "Add an out-of-tree serve
backend" of its developer guide); without SGLang nobody imports this.  Options are those of
`gemcut serve`.  The backend is taken by its name alone, as a Gemma runs in SGLang itself too.
"""

import re
from collections.abc import Sequence

from sglang.cli.serve_backends import (  # pyright: ignore[reportMissingImports]
    ServeBackend,
    ServeRequest,
)

from gemcut.engine.cli import main

API_VERSION = 1  # of ServeBackend, as implemented here; SGLang refuses one that is not its own


def create_backend() -> ServeBackend:
    """What the entry point names."""
    return ServeBackend(api_version=API_VERSION, run=run)


def run(request: ServeRequest) -> None:
    """Serve until a signal; SystemExit with the exit code of `gemcut serve` if that is an error."""
    if code := main(["serve", *arguments(request.argv)]):
        raise SystemExit(code)


def arguments(argv: Sequence[str]) -> list[str]:
    """SGLang's arguments with the model's option as `gemcut serve` spells it."""
    return [re.sub(r"^--model-path(?=$|=)", "--model", argument) for argument in argv]
