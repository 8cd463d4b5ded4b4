"""Layers that take the place of transformers' in a Gemma model: `forward` alone, no state.

    GemmaRMSNorm    every RMSNorm of Gemma, Gemma 2, VaultGemma and Gemma 3: times 1 + w
    GemmaMLP        their MLP: GELU and the product with up in one launch
    RotaryPosEmb    apply_rotary_pos_emb, which transformers marks as "rotary_pos_emb"
    GeluTanh        the activation, which it marks as "GeluTanh"

What a `forward` reads of the module it is given to stands as an annotation: the package `kernels`
allows no more.  The ops are registered, so torch.compile traces a layer whole; they have no
backward, and say so when one is asked for.
"""

import torch
from torch import Tensor, nn

TANH_GELU = "GELUTanh"  # transformers' class of it


class GemmaRMSNorm(nn.Module):
    """y = x * rsqrt(mean(x ** 2) + eps) * (1 + weight) over the last axis."""

    can_torch_compile = True
    has_backward = False

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """The normalised rows of x [..., D], in its shape."""
        if x.dim() == 4 and not x.is_contiguous():  # heads [B, H, T, K] of tokens that lie in order
            rows = x.transpose(1, 2).contiguous()
            return torch.ops.gemcut.rmsnorm(rows, self.weight, self.eps).transpose(1, 2)
        return torch.ops.gemcut.rmsnorm(x.contiguous(), self.weight, self.eps)


class GemmaMLP(nn.Module):
    """down_proj(gelu(gate_proj(x)) * up_proj(x))."""

    can_torch_compile = True
    has_backward = False

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of x [..., D], in its shape; ValueError where the activation is another."""
        activation = type(self.act_fn).__name__
        if activation != TANH_GELU:
            raise ValueError(f"the MLP's activation is {activation}, must be {TANH_GELU}")
        return self.down_proj(torch.ops.gemcut.gelu_and_mul(self.gate_proj(x), self.up_proj(x)))


class RotaryPosEmb(nn.Module):
    """Rotary embedding of queries and keys by tables of cos and sin."""

    can_torch_compile = True
    has_backward = False

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Rotated q, k [B, H, T, K], [B, T, H, K] with unsqueeze_dim=2; cos, sin [B, T, K]."""
        if unsqueeze_dim == 1:
            return torch.ops.gemcut.rotate(q, k, cos, sin)
        if unsqueeze_dim != 2:
            raise ValueError(f"unsqueeze_dim is {unsqueeze_dim}, must be 1 or 2")
        q, k = torch.ops.gemcut.rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)


class GeluTanh(nn.Module):
    """GELU by its tanh approximation."""

    can_torch_compile = True
    has_backward = False

    def forward(self, input: Tensor) -> Tensor:
        """GELU of each number, in the shape of the input."""
        return torch.ops.gemcut.gelu(input)
