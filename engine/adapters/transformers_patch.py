"""gemcut's ops in a model that transformers 5 has loaded: one instance, and back again.

`patch_transformers(model)` gives the modules of one Gemma, Gemma 2, VaultGemma or Gemma 3 other
forward passes:

    RMSNorm      rmsnorm: one pass over the row
    rotary       rope_tables, and rope_and_store_ in attention: q and k norm, rotation and the new
                 keys and values in the cache's layout, one pass
    attention    "gemcut" (transformers_attention.py): attention_prefill, attention_decode
    GeGLU        geglu

On a CPU torch itself rotates (transformers_cpu.py) and has the GELU, where its ops are as fast.

Weights are neither copied nor changed, and products stay torch's: on a GPU they write side by side
what the next op reads as one matrix, on a CPU they are oneDNN's (`kernels.cpu.linear`).  Caches,
`generate`, hidden states and hooks of layers work as before.  Everything is checked before anything
is changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Cache,
    Gemma2Model,
    Gemma3TextModel,
    GemmaModel,
    PreTrainedModel,
    VaultGemmaModel,
)
from transformers.activations import ACT2FN

from gemcut import kernels
from gemcut.engine.adapters.transformers_attention import (
    NAME,
    attention,
    check_no_gradients,
    ops_on,
    register_attention,
)
from gemcut.engine.adapters.transformers_cpu import rotated
from gemcut.kernels import cpu

TEXT_MODELS = (GemmaModel, Gemma2Model, VaultGemmaModel, Gemma3TextModel)
DTYPES = (torch.float32, torch.bfloat16)
STATIC_ROPE = ("default", "linear", "yarn", "llama3")  # frequencies that no length changes
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class TransformersPatch:
    """What `patch_transformers` changed.  As a context manager it is undone at the end."""

    model: Any
    text: Any  # the decoder in it
    modules: list[nn.Module]
    attn_implementation: str

    def undo(self) -> None:
        """The model as it was, bit for bit; ValueError where it is that already."""
        if getattr(self.model, "_gemcut_patch", None) is not self:
            raise ValueError(f"this {type(self.model).__name__} is not patched, or patched anew")
        for module in self.modules:
            vars(module).pop("forward", None)
        self.text.set_attn_implementation(self.attn_implementation)
        del self.model._gemcut_patch

    def __enter__(self) -> PreTrainedModel:
        return self.model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if getattr(self.model, "_gemcut_patch", None) is self:  # not undone within
            self.undo()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickled model, in a process that may not know the attention."""
        register_attention()
        vars(self).update(state)


def patch_transformers(model: Any) -> TransformersPatch:
    """Let this model compute with gemcut's ops, until `undo` of what is returned.

    For models that contain a GemmaModel, Gemma2Model, VaultGemmaModel or Gemma3TextModel, whole on
    cuda or on a CPU, in float32 or bfloat16.  ValueError, and nothing changed, for any other, for
    one that is patched or that something else has altered.  RuntimeError in a forward pass where
    gradients are asked for.
    """
    text = _text_model(model)
    forwards = [pair for pair in map(_forward, text.modules()) if pair is not None]
    _check(model, text)
    register_attention()
    patch = TransformersPatch(
        model, text, [module for module, _ in forwards], text.config._attn_implementation
    )
    text.set_attn_implementation(NAME)  # a vision tower keeps its own
    for module, forward in forwards:
        module.forward = partial(forward, module)  # which can be pickled
    model._gemcut_patch = patch
    return patch


def unpatch_transformers(model: Any) -> None:
    """Undo `patch_transformers`; ValueError where the model is not patched."""
    patch = getattr(model, "_gemcut_patch", None)
    if patch is None:
        raise ValueError(f"this {type(model).__name__} is not patched")
    patch.undo()


# What is checked before anything is changed


def _text_model(model: Any) -> Any:
    """The one decoder in a model."""
    modules = model.modules() if isinstance(model, PreTrainedModel) else ()
    found = [module for module in modules if type(module) in TEXT_MODELS]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in TEXT_MODELS)
        raise ValueError(
            f"{type(model).__name__} has {len(found)} decoders of {names}; "
            f"patch_transformers takes a model of transformers with one"
        )
    return found[0]


def _check(model: Any, text: Any) -> None:
    """ValueError unless every module of the decoder is as transformers made it, and supported."""
    name, config = type(model).__name__, text.config
    for path, module in text.named_modules():
        own = vars(module).get("forward")  # transformers 5.0 leaves the class' own, bound
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            raise ValueError(f"{name} is patched already, or altered: {path} has its own forward")
    parameters = list(text.parameters())
    for kinds, known in (
        ({p.device.type for p in parameters}, ("cuda", "cpu")),
        ({p.device for p in parameters}, None),
        ({p.dtype for p in parameters}, DTYPES),
    ):
        if len(kinds) != 1 or (known is not None and not kinds <= set(known)):
            has = ", ".join(sorted(map(str, kinds)))
            allowed = "one device" if known is None else f"one of {', '.join(map(str, known))}"
            raise ValueError(f"the weights of {name} are {has}, and must be {allowed}")
    for path, module in text.named_modules():
        if path.rpartition(".")[2] in LINEARS:
            _check_linear(module, f"{path} of {name}")
            if type(module.weight) is not nn.Parameter:
                kind = type(module.weight).__name__
                raise ValueError(f"the weight of {path} of {name} is a {kind}: not a plain one")
    act_fn = text.layers[0].mlp.act_fn
    if type(act_fn) is not type(ACT2FN["gelu_pytorch_tanh"]):
        raise ValueError(f"{name} has the activation {act_fn}, and GeGLU is gelu_pytorch_tanh")
    rope = text.rotary_emb.rope_type
    for kind in rope.values() if isinstance(rope, dict) else [rope]:
        if kind not in STATIC_ROPE:
            raise ValueError(f"{name} has rope_type {kind!r}; {', '.join(STATIC_ROPE)} are known")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"{name} has use_bidirectional_attention, and attention here is causal")
    K, HQ, HK = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    if K % 2 or K > 256 or HQ % HK or HQ // HK > 64:
        raise ValueError(
            f"{name} has {HQ} query heads on {HK} KV heads of {K}; head_dim must be even and at "
            f"most 256, and a KV head have at most 64 query heads"
        )


def _check_linear(module: nn.Module, name: str) -> None:
    """ValueError for what computes more than a product: its own forward pass would be left out."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(
            f"{name} is a {type(module).__name__}, or has hooks; a patch takes plain "
            f"torch.nn.Linear: merge adapters and load quantised weights elsewhere"
        )


# Forward passes


def _forward(module: nn.Module) -> tuple[nn.Module, Callable[..., Any]] | None:
    """The forward pass that a module of these models gets, if any."""
    for ending, forward in (
        ("RMSNorm", _rmsnorm_forward),
        ("RotaryEmbedding", _rotary_forward),
        ("Attention", _attention_forward),
        ("MLP", _mlp_forward),
    ):
        if type(module).__name__.endswith(ending):
            return module, forward
    return None


def _rmsnorm_forward(self: Any, x: Tensor) -> Tensor:
    check_no_gradients(x, self.weight)
    return ops_on(x.device).rmsnorm(x, self.weight, self.eps)


def _rotary_forward(
    self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[Tensor, Tensor]:
    """Tables of rope_tables, [B T, 1, K]: for our attention alone, as the first sines are negated.

    x [B, T, D]; position_ids [B, T] or [1, T].
    """
    of_type = "" if layer_type is None else f"{layer_type}_"
    inv_freq = getattr(self, f"{of_type}inv_freq").to(x.device, torch.float32)
    scaling = getattr(self, f"{of_type}attention_scaling")
    positions = position_ids.expand(x.shape[:2]).flatten()
    return ops_on(x.device).rope_tables(positions, inv_freq, scaling, x.dtype)


def _attention_forward(
    self: Any,
    hidden_states: Tensor,  # [B, T, D]
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    cache_position: Tensor | None = None,  # before transformers 5.4
    **kwargs: Any,
) -> tuple[Tensor, None]:
    B, T, D = hidden_states.shape
    check_no_gradients(hidden_states, self.q_proj.weight, self.o_proj.weight)
    ops, (cos, sin) = ops_on(hidden_states.device), position_embeddings
    K = self.head_dim
    x = hidden_states.reshape(B * T, D)
    qkv = _products(x, (self.q_proj, self.k_proj, self.v_proj), ops)
    norms = [getattr(self, name, None) for name in ("q_norm", "k_norm")]
    weights = [None if norm is None else norm.weight for norm in norms]
    eps = 1e-6 if norms[0] is None else norms[0].eps
    HK, rotation = self.k_proj.out_features // K, (cos, sin, weights[0], weights[1], eps)
    if ops is cpu:
        q, keys, values = rotated(qkv, B, HK, *rotation)
    else:  # the new keys and values are a cache of B slots of T tokens
        keys, values = x.new_empty(2, B, HK, T, K).unbind()
        places = torch.arange(B * T, device=x.device)
        q = ops.rope_and_store_(qkv, keys, values, places // T, places % T, *rotation)
        q = q.view(B, T, -1, K).transpose(1, 2)
    # transformers 5.24 renamed past_key_values, and continuous batching has another `cache`
    if past_key_values is None and isinstance(kwargs.get("cache"), Cache):
        past_key_values = kwargs.pop("cache")
    if past_key_values is not None:
        at = {} if cache_position is None else {"cache_kwargs": {"cache_position": cache_position}}
        keys, values = past_key_values.update(keys, values, self.layer_idx, **at)
    y, _ = attention(
        self,
        q,
        keys,
        values,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        sliding_window=getattr(self, "sliding_window", None),
        softcap=_softcap(self),
        **kwargs,
    )
    return _products(y.reshape(B * T, -1), (self.o_proj,), ops).view(B, T, -1), None


def _softcap(module: Any) -> float | None:
    """That of Gemma 2 and VaultGemma; Gemma 3's config may have one that it does not apply."""
    is_capped = module.config.model_type in ("gemma2", "vaultgemma")
    return module.attn_logit_softcapping if is_capped else None


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    check_no_gradients(x, self.gate_proj.weight, self.down_proj.weight)
    ops, rows = ops_on(x.device), x.reshape(-1, x.shape[-1])
    if ops is kernels:
        y = ops.geglu(_products(rows, (self.gate_proj, self.up_proj), ops))
    else:
        product = partial(_products, rows, ops=ops)
        y = F.gelu(product(linears=(self.gate_proj,)), approximate="tanh")
        y = y.mul_(product(linears=(self.up_proj,)))
    return _products(y, (self.down_proj,), ops).view(x.shape)


def _products(x: Tensor, linears: Sequence[nn.Linear], ops: Any) -> Tensor:
    """Products with the weights of some layers, side by side: x [M, D] -> [M, N]."""
    for one in linears:
        _check_linear(one, "a projection of this patched model")  # which may have changed since
    if ops is kernels and len(linears) > 1:
        y = x.new_empty(len(x), sum(one.out_features for one in linears))
        for one, part in zip(
            linears, y.split([one.out_features for one in linears], dim=1), strict=True
        ):
            if one.bias is None:
                torch.mm(x, one.weight.mT, out=part)
            else:
                torch.addmm(one.bias, x, one.weight.mT, out=part)
        return y
    parts = [ops.linear(x, one.weight, one.bias) for one in linears]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
