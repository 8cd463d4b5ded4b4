"""How many launches a decode step has, in every published model; each costs its gap and its start.

Triton's interpreter makes no launches that could be counted: they are recorded in a process of
their own.
"""

import json
import os
import subprocess
import sys

import pytest

from gemcut.engine.config.model_config import PUBLISHED
from gemcut.tools.machine import H200

RECORD = """
import json
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.engine.execution.sampler import FILTERED, GREEDY, RANDOM
from gemcut.tools.launches import step_launches

def names(model, batch, features):
    step = step_launches(PUBLISHED[model], "sm_90", batch=batch, context=1024, features=features)
    return [made.name for made in step]

kinds = {"greedy": GREEDY, "random": RANDOM, "filtered": FILTERED}
found = {kind: names("gemma-3-1b", 2, kinds[kind]) for kind in kinds}
for batch in (1, 16):
    found |= {f"{model} {batch}": names(model, batch, GREEDY) for model in PUBLISHED}
print(json.dumps(found))
"""
OF_A_LAYER = [
    "linear_rope_and_store_kernel",
    "attention_decode_kernel",
    "attention_combine_kernel",
    "skinny_linear_kernel",
    "add_rmsnorm_kernel",
    "linear_geglu_kernel",
    "skinny_linear_kernel",
    "add_rmsnorm_kernel",
]
# where q and k are normalised, a head at a time, the product leaves them to the rotation
OF_A_NORMED_LAYER = ["skinny_linear_kernel", "rope_and_store_kernel", *OF_A_LAYER[1:]]
ENDS = ["lm_head_argmax_kernel", "advance_kernel"]


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[str]]:
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", RECORD], env=compiling, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("model", PUBLISHED)
def test_a_step_has_one_launch_before_its_layers_and_two_after(model, batch, recorded):
    """Nothing of torch's own is among them."""
    config = PUBLISHED[model]
    layer = OF_A_NORMED_LAYER if config.has_qk_norm else OF_A_LAYER
    assert len(layer) == (9 if config.has_qk_norm else 8)
    step = recorded[f"{model} {batch}"]
    assert step == ["begin_step_kernel", *layer * config.num_layers, *ENDS]


@pytest.mark.parametrize("model", PUBLISHED)
def test_what_is_neither_layer_nor_head_takes_at_most_15_us(model, recorded):
    """By prediction, with the gaps before these launches and before the head."""
    step = recorded[f"{model} 1"]
    fixed = [name for name in step if name not in OF_A_NORMED_LAYER + OF_A_LAYER + ENDS[:1]]
    assert fixed == ["begin_step_kernel", "advance_kernel"]
    us = sum(H200.small_us[name] for name in fixed) + (len(fixed) + 1) * H200.launch_gap_us
    assert us <= 15


def test_a_random_token_is_drawn_by_the_head(recorded):
    """Which finds the settings of the rows' slots itself; no logits are stored."""
    assert recorded["random"] == recorded["greedy"]


def test_filters_need_the_logits(recorded):
    assert "lm_head_kernel" in recorded["filtered"]
    assert "lm_head_argmax_kernel" not in recorded["filtered"]
