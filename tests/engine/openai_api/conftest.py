"""A server of the demo model, which all tests of a file share."""

import time

import pytest
from servers import serving

from gemcut.engine import Engine


@pytest.fixture(scope="module")
def demo():
    with Engine.from_pretrained("demo", max_batch_size=4, max_waiting=100) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(demo):
    with serving(demo) as server:
        yield server


@pytest.fixture
def slow_steps(demo, monkeypatch):
    """Decode steps of at least 20 ms: an answer outlasts what a test does meanwhile."""
    start = demo._loop.runner.start_decode

    def slow(*args, **kwargs):
        time.sleep(0.02)
        return start(*args, **kwargs)

    monkeypatch.setattr(demo._loop.runner, "start_decode", slow)
