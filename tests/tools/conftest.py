"""What the tests of tools/tune.py share: small shapes, planted candidates, launches noted."""

import pytest
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from gemcut.bench.ops.cases import Grid
from gemcut.kernels import tiles
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.tools.tuning import search_space

LAUNCHED = InterpretedFunction if INTERPRETED else JITFunction


@pytest.fixture
def small_grid(monkeypatch):
    """Sizes that a small model holds."""
    monkeypatch.setattr(search_space, "DECODE", Grid((1, 3), (40,), (), 1, 8))
    monkeypatch.setattr(search_space, "PREFILL", Grid((), (40,), (20,), 1, 8))


@pytest.fixture
def try_tiles(monkeypatch):
    """Makes these the only candidates of a kernel."""
    monkeypatch.setattr(tiles, "TUNED", {})

    def replace(kernel, *tiles):
        monkeypatch.setitem(search_space.CANDIDATES, kernel, lambda shape: iter(tiles))

    return replace


@pytest.fixture
def launches(monkeypatch):
    """The arguments of every launch, which is made all the same."""
    made = []
    run = LAUNCHED.run

    def noted(self, *args, **kwargs):
        made.append((self.fn.__name__, kwargs))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(LAUNCHED, "run", noted)
    return made
