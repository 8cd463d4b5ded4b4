"""A patched model of transformers: its logits by the rule, its times beside the plain model.

Some layers of two models with random weights.  The logits of the patched model may err twice as
much as those of the plain one, against the plain one in float64, and two units in the last place of
the greatest.  Then the same prefills and decode steps are timed in turns, as
tools/patched_transformers.py times them.
"""

import importlib
import importlib.util

import torch

from gemcut.bench.engines.peers import Stage, Workload
from gemcut.bench.engines.random_model import published_config
from gemcut.bench.engines.setup import Setup
from gemcut.engine.checkpoints.hub import DEMO
from gemcut.engine.config.model_config import ModelConfig
from gemcut.tools.visit.block import Visit

MODELS, LAYERS, TOKENS = ("gemma-2-2b", "gemma-3-1b"), 4, 48
ROUNDS, STEPS = 5, 40
CPU_CASE = (2, 6)  # of the demo


def run(visit: Visit) -> None:
    """Keep a record of each model's logits, and a line for each phase of each case."""
    if importlib.util.find_spec("transformers") is None:
        visit.skip("patched", "transformers is not installed")
        return
    tool = importlib.import_module("gemcut.tools.patched_transformers")
    dtype = torch.bfloat16
    for name in MODELS if visit.on_gpu else ("demo",):
        with visit.attempt(name), torch.inference_mode():
            if visit.on_gpu:
                setup = Setup(name, published_config(name, LAYERS), visit.device, dtype)
            else:
                setup = Setup(name, ModelConfig.from_file(DEMO), visit.device, dtype, DEMO)
            model = Stage(setup, Workload(1, 16, 2)).transformers_model
            patched, plain = tool.errors(model, 2, TOKENS)
            budget = 2 * plain + 2 * torch.finfo(dtype).eps
            detail = f"an error of {patched:.1e}, where {budget:.1e} is allowed"
            visit.check(f"{name} logits", patched <= budget, detail)
            rounds, steps = (ROUNDS, STEPS) if visit.on_gpu else (1, 1)
            for case in tool.CASES if visit.on_gpu else (CPU_CASE,):
                for speed in tool.speeds(model, *case, rounds, steps):
                    visit.add(f"{name} {speed.name}", line=f"{name} {speed.line}")
