# pyright: reportMissingImports=false
"""gemcut's RMSNorm and GeGLU in place of vLLM's custom ops, for GEMCUT_VLLM_OPS.

Every layer of these classes that vLLM makes from then on, in any model, is one of these instead.
They run whatever `custom_ops` of vLLM's compilation config says of the op; torch.compile sees each
as one operation, into which it fuses nothing.
"""

import os
from collections.abc import Iterable

import torch
from torch import Tensor
from vllm import envs
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import GeluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from gemcut.engine.adapters.vllm_plugin import SETTING
from gemcut.kernels import registration  # noqa: F401  makes torch.ops.gemcut


class GemcutRMSNorm(GemmaRMSNorm):
    """x * rstd * (1 + weight): one launch, with the residual's sum in it."""

    @classmethod
    def enabled(cls) -> bool:
        return True

    def forward_cuda(
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rows x [..., D] -> [..., D]; with a residual, that of the sum, and the residual."""
        D = x.shape[-1]
        rows = x.reshape(-1, D)  # a copy where x is a part of other rows: heads of a qkv
        weight, eps = self.weight, self.variance_epsilon
        if residual is None:
            return torch.ops.gemcut.rmsnorm(rows, weight, eps).view(x.shape)
        y = torch.ops.gemcut.add_rmsnorm_(residual.view(-1, D), rows, None, weight, eps)
        return y.view(x.shape), residual

    forward_cpu = forward_cuda


class GemcutGeluAndMul(GeluAndMul):
    """gelu(gate) * up with the tanh approximation; vLLM's own where the model asks for exact."""

    @classmethod
    def enabled(cls) -> bool:
        return True

    def forward_cuda(self, x: Tensor) -> Tensor:
        """Rows [..., 2 F], gate first -> [..., F]."""
        if self.approximate != "tanh":
            return super().forward_cuda(x)
        y = torch.ops.gemcut.geglu(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], -1)

    def forward_cpu(self, x: Tensor) -> Tensor:
        return self.forward_cuda(x) if self.approximate == "tanh" else super().forward_cpu(x)


REPLACEMENTS = {"GemmaRMSNorm": GemcutRMSNorm, "GeluAndMul": GemcutGeluAndMul}


def replace_ops(names: Iterable[str]) -> None:
    """Let vLLM make ours where it makes layers of these classes; ValueError where others do so."""
    for name in names:
        ours, other = REPLACEMENTS[name], op_registry_oot.get(name)
        if other is None:
            ours.register_oot(ours, name=name)
        elif other is not ours:
            raise ValueError(f"{name} is already replaced by {other.__module__}.{other.__name__}")
    # a part of what vLLM's cache of compiled models goes by
    envs.environment_variables[SETTING] = lambda: os.environ.get(SETTING, "")
