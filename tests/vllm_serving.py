"""What vLLM answers with gemcut's plugin: run by the Python of an environment with vLLM for CPUs.

    python tests/vllm_serving.py FOLDER OUTPUT REQUEST

REQUEST is JSON: `prompts`, lists of ids; `count`, tokens to generate of each; `llm`, arguments of
vLLM's LLM; `lora`, a folder; `mutations`, names of MUTATIONS, each made after the others were
answered.  OUTPUT gets, by torch.save, the classes of the model's `layers`, the `providers` of the
IR's norms in their order, and for the model as it is and by mutation `answers`: of each prompt the
generated ids, and log-probabilities [T - 1 + count, V] after each token but the last.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from vllm import LLM, SamplingParams, ir
from vllm.lora.request import LoRARequest


def no_softcap(model: torch.nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl.logits_soft_cap = 0


def no_window(model: torch.nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl.sliding_window = -1


def no_final_softcap(model: Any) -> None:
    model.logits_processor.soft_cap = None


def no_offset(model: torch.nn.Module) -> None:
    """The norms' weights are taken for factors."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data -= 1


def broken_provider(model: torch.nn.Module) -> None:
    """The norm that is ours in vLLM's IR yields the rows themselves."""
    ir.ops.rms_norm.impls["gemcut"].impl_fn = lambda x, *_: x.clone()


MUTATIONS: dict[str, Callable[[Any], None]] = {
    f.__name__: f for f in (no_softcap, no_window, no_final_softcap, no_offset, broken_provider)
}


def answers(llm: LLM, request: dict[str, Any]) -> list[tuple[list[int], torch.Tensor]]:
    params = SamplingParams(
        max_tokens=request["count"],
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        logprobs=-1,
        prompt_logprobs=-1,
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    lora = LoRARequest("adapter", 1, request["lora"]) if request.get("lora") else None
    found = []
    for output in llm.generate(prompts, params, use_tqdm=False, lora_request=lora):
        rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        logprobs = torch.tensor([[row[i].logprob for i in range(len(row))] for row in rows])
        found.append((list(output.outputs[0].token_ids), logprobs))
    return found


def classes(model: torch.nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


def main(folder: str, output: str, text: str) -> None:
    """Load the folder as `vllm serve` does, and answer."""
    request = json.loads(text)
    llm = LLM(
        folder,
        max_model_len=64,
        max_num_seqs=4,
        max_logprobs=-1,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **{"dtype": "float32", "enforce_eager": True} | request.get("llm", {}),
    )
    found: dict[str, Any] = {"answers": {"": answers(llm, request)}}
    found["layers"] = llm.apply_model(classes)[0]
    norms = (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)
    found["providers"] = {op.name: op.get_priority() for op in norms}
    for name in request.get("mutations", ()):
        llm.apply_model(MUTATIONS[name])
        found["answers"][name] = answers(llm, request)
    torch.save(found, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
