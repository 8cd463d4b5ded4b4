"""Planted contestants, and a small setup, for the tests of engine benchmarks."""

import argparse
from dataclasses import replace

from gemcut.bench.engines import peers
from gemcut.bench.engines.peers import EnginePeer, Gemcut, Workload
from gemcut.bench.engines.setup import choose_setup

CEILINGS = {"read_gbps": 10.0, "copy_gbps": 10.0, "matmul_tflops": 0.1}
TINY = Workload(batch=2, prompt_tokens=5, new_tokens=4)
SIZES = ["--context", "5", "--new-tokens", "4", "--batch", "2", "--device", "cpu"]


def demo_setup(**options):
    """The demo model on a CPU."""
    usual = {"model": None, "random": None, "layers": None, "device": "cpu", "dtype": "float32"}
    return choose_setup(argparse.Namespace(**(usual | options)))


def skip_ceilings(monkeypatch):
    """Replace the measured ceilings by constants."""
    for module in ("case_runner", "serve_sim"):
        monkeypatch.setattr(
            f"gemcut.bench.engines.{module}.measure_ceilings", lambda device, dtype: dict(CEILINGS)
        )


class Planted(Gemcut):
    """Gemcut's answers, changed before they are given."""

    def __init__(self, stage, change):
        super().__init__(stage)
        self.version, self.settings, self.change = "0", "planted", change

    def generate(self, prompts, new_tokens):
        generation = super().generate(prompts, new_tokens)
        return replace(generation, token_ids=self.change(generation.token_ids))


def plant(monkeypatch, **changes):
    """Let each peer of these names (underscores for dashes) answer as its function says."""
    for name, change in changes.items():
        peer = EnginePeer(lambda stage, change=change: Planted(stage, change))
        monkeypatch.setitem(peers.CONTESTANTS, name.replace("_", "-"), peer)


def one_token_off(rows):
    """The last row's third token is another."""
    return [*rows[:-1], [*rows[-1][:2], rows[-1][2] ^ 1, *rows[-1][3:]]]
