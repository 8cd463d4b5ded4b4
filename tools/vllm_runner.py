# pyright: reportMissingImports=false
"""A vLLM that loads one model and answers requests on its standard input: see vllm_visit.py.

    python -P -m gemcut.tools.vllm_runner '{"model": FOLDER, ...}'    arguments of vLLM's LLM

Writes a line of JSON when the model is loaded, and one for each line that it reads.  vLLM's own
output goes to standard error.
"""

import json
import os
import sys
import time
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the step loop is in this process

from torch import nn
from vllm import LLM, SamplingParams


def answer(llm: LLM, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Greedy ids of each prompt, and the seconds of all."""
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "ids": [list(output.outputs[0].token_ids) for output in outputs]}


def score(llm: LLM, prompts: list[list[int]]) -> dict[str, Any]:
    """The log-probability of each token of each prompt but the first, given those before it."""
    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    rows = [
        [at[token].logprob for at, token in zip(o.prompt_logprobs[1:], p[1:], strict=True)]
        for o, p in zip(outputs, prompts, strict=True)
    ]
    return {"logprobs": rows}


def classes(model: nn.Module) -> list[str]:
    """The model's class, with its module, and the classes of its layers."""
    own = type(model)
    names = {type(module).__name__ for module in model.modules()}
    return [f"{own.__module__}.{own.__name__}", *sorted(names)]


def main(text: str) -> None:
    """Until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to standard output
    start = time.perf_counter()
    llm = LLM(skip_tokenizer_init=True, enable_prefix_caching=False, **json.loads(text))
    loaded = {"classes": llm.apply_model(classes)[0], "seconds": time.perf_counter() - start}
    print(json.dumps(loaded), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        do = score if "count" not in request else answer
        print(json.dumps(do(llm, **request)), file=replies)


if __name__ == "__main__":
    main(*sys.argv[1:])
