"""CompiledGemma: Gemma in plain torch, written for torch.compile; a peer of the engine.

After gpt-fast: a static KV cache, and `prefill` and `decode` as two free functions, each compiled
to one program, which a GPU replays as a CUDA graph.

    sequence [B, S]    every row's token ids: its prompt, then what was chosen; S is max_seq_len
    position [1]       the column of the newest token, whose key is not in the cache yet

Both live on the device, and the host reads nothing before the end.  Norms, rotation and softmax
are float32; what is between them is rounded to the weights' dtype where it passes through memory.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._inductor import list_mode_options, list_options
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.rope import Rope
from gemcut.engine.execution.weights import LayerWeights, Weights, plain

FLEX_BLOCK = 128  # keys that FlexAttention reads or skips together


class CompiledGemma:
    """Greedy decoding of `batch` prompts of one length, by kernels that inductor writes.

    The weights are shared, not copied, unless they are quantised.  Decode reads the whole cache:
    `max_seq_len` should be prompt and new tokens, no more.  With `flex` it reads what is filled, in
    one more kernel a layer: better for long contexts, and for batches where heads share keys.  The
    first call with a prompt length compiles, which takes minutes on a GPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        batch: int,
        max_seq_len: int,
        compiled: bool = True,
        quantization: str | None = None,
        flex: bool = False,
    ) -> None:
        """NotImplementedError gives the reason where torchao does not quantise."""
        if quantization not in (None, "int8", "int4"):
            raise ValueError(f"quantization {quantization!r} is unknown; there are int8 and int4")
        self.batch, self.max_seq_len, self.compiled = batch, max_seq_len, compiled
        self.model = Transformer(config, weights, batch, max_seq_len, flex)
        if quantization is not None:
            quantize(self.model, quantization)
        self.device = weights.embedding.device
        self.sequence = torch.zeros((batch, max_seq_len), dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._prefills: dict[int, Callable[[], None]] = {}  # by the prompts' length
        self._decode: Callable[[], None] | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        new_tokens: int,
        on_first_token: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """Exactly `new_tokens` ids for each prompt: [B][T] -> [B][new_tokens].

        An end of sequence ends nothing.  `on_first_token` is called once the device has chosen the
        first token of every row.  ValueError if the prompts are not what this was built for.
        """
        T = self._prompt_length(prompts, new_tokens)
        if T not in self._prefills:
            inputs = [kind.of_prompt(T) for kind in self.model.kinds]
            self._prefills[T] = self._program(prefill, inputs)
        if self._decode is None:
            self._decode = self._program(decode, self.position)
        self.sequence[:, :T] = torch.tensor(prompts)
        self.position.fill_(T)
        self._prefills[T]()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        on_first_token()
        for _ in range(new_tokens - 1):
            self._decode()
        return self.sequence[:, T : T + new_tokens].tolist()

    def _prompt_length(self, prompts: list[list[int]], new_tokens: int) -> int:
        lengths = sorted({len(prompt) for prompt in prompts})
        if len(prompts) != self.batch:
            raise ValueError(f"there are {len(prompts)} prompts; the batch is {self.batch}")
        if len(lengths) != 1:
            raise ValueError(f"prompts are of {lengths} tokens; all must be of one length")
        T, S = lengths[0], self.max_seq_len
        if min(T, new_tokens) < 1:
            raise ValueError(f"prompt tokens {T} and new tokens {new_tokens} must be 1 or more")
        if T + new_tokens > S:
            raise ValueError(f"prompt and new tokens are {T + new_tokens}; max_seq_len is {S}")
        return T

    def _program(self, function: Callable[..., None], inputs: Any) -> Callable[[], None]:
        """`prefill` or `decode`, ready to run: compiled, and captured where there is a GPU."""
        if not self.compiled:
            return partial(function, self.model, self.sequence, inputs)
        options = inductor_options(self.device)
        function = torch.compile(function, fullgraph=True, dynamic=False, options=options)
        program = partial(function, self.model, self.sequence, inputs)
        with dynamo_config.patch(recompile_limit=64):  # else 8 lengths and models in one process
            for _ in range(2):  # the first compiles and tunes; the second is as all that follow
                self.position.zero_()  # decode moves on, and must stay inside the cache
                program()
        if self.device.type != "cuda":
            return program
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            program()
        return graph.replay


def inductor_options(device: torch.device) -> dict[str, Any]:
    """What inductor is told, as far as this version knows it, for these programs alone."""
    options = {
        **list_mode_options("max-autotune-no-cudagraphs"),  # graphs are captured above
        "coordinate_descent_check_all_directions": True,
        "triton.unique_kernel_names": True,
    }
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        # Programmatic dependent launch.  Up to torch 2.13 inductor's kernels do not wait for what
        # the one before writes into a tensor of the caller's, nor for anything if they read none.
        options["triton.enable_pdl"] = True
    return {name: options[name] for name in options.keys() & set(list_options())}


def quantize(model: nn.Module, quantization: str) -> None:
    """Give each nn.Linear a quantised weight of torchao's; the tensors it replaces stay as is."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    # torchao would set inductor's options for all: those above hold what it recommends
    config = Int8WeightOnlyConfig(set_inductor_config=False)  # one scale a row
    if quantization == "int4":
        packing = Int4PackingFormat.TILE_PACKED_TO_4D  # others need kernels from more packages
        config = Int4WeightOnlyConfig(int4_packing_format=packing, set_inductor_config=False)
    try:
        quantize_(model, config)
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        raise NotImplementedError(f"torchao cannot quantise to {quantization}: {error}") from error
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight.data) is Tensor:
            raise NotImplementedError(f"{name} is not quantised to {quantization}: {module}")


def prefill(model: "Transformer", sequence: Tensor, inputs: list["KindInputs"]) -> None:
    """Read the prompts in the first T columns of sequence [B, S]; write column T."""
    T = inputs[0].cos.shape[0]
    sequence[:, T] = choose(model(sequence[:, :T], inputs))


def decode(model: "Transformer", sequence: Tensor, position: Tensor) -> None:
    """Read the column of sequence [B, S] at position [1]; write the next one, and move on."""
    inputs = [kind.of_step(position, model.flex) for kind in model.kinds]
    logits = model(sequence.index_select(1, position), inputs)
    sequence.index_copy_(1, position + 1, choose(logits).unsqueeze(1))
    position.add_(1)


def choose(logits: Tensor) -> Tensor:
    """The likeliest token, the first of equals: [B, V] -> [B]."""
    # in two steps: inductor leaves a row's argmax to one block of threads
    parts = math.gcd(logits.shape[1], 256)
    best = logits.unflatten(1, (parts, -1)).max(-1)  # [B, parts]
    part = best.values.argmax(-1, keepdim=True)
    return (part * (logits.shape[1] // parts) + best.indices.gather(1, part)).squeeze(1)


Mask = Tensor | BlockMask | None  # which keys are seen: [C] bool, by blocks, or all up to the query


class KindInputs(NamedTuple):
    """The inputs for T new tokens that layers of one kind, global or local, share."""

    cos: Tensor  # [T, 1, K]
    sin: Tensor  # its first half negated: see rotated
    places: Tensor  # in the cache, for as many of the last tokens as it holds
    mask: Mask
    from_cache: bool  # or else a prompt, which sees itself alone


class Kind:
    """Rotation and cache size of the layers of one kind.

    A local layer's cache is a ring of W places: a full one holds just what is in the window.
    """

    def __init__(self, config: ModelConfig, is_local: bool, max_seq_len: int, like: Tensor) -> None:
        self.window = config.sliding_window if is_local else None
        self.capacity = min(max_seq_len, self.window or max_seq_len)
        self.has_softcap = config.attn_softcap is not None
        rope = config.rope_local if is_local else config.rope
        self.rope = Rope(rope, config.head_dim, config.max_position_embeddings, like.device)
        self.dtype = like.dtype
        self.positions = torch.arange(max_seq_len, device=like.device)
        self.cos, self.sin = self._rotation(self.positions, self.positions + 1)  # for decode
        self.blocks = self.positions[: math.ceil(self.capacity / FLEX_BLOCK)].int()

    def _rotation(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin of float32 angles, rounded as activations are: [T] -> [T, 1, K]."""
        angles = (positions.unsqueeze(1).float() * self.rope.inv_freq(lengths)).unsqueeze(1)
        scaling = self.rope.attention_scaling
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        return torch.cat([cos, cos], -1).to(self.dtype), torch.cat([-sin, sin], -1).to(self.dtype)

    def of_prompt(self, T: int) -> KindInputs:
        positions, window = self.positions[:T], min(self.window or T, T)
        mask = None
        if self.has_softcap or window < T:
            mask = create_block_mask(
                lambda _b, _h, q, k: (k <= q) & (k > q - window), None, None, T, T, positions.device
            )
        places = positions[-self.capacity :] % self.capacity
        rotation = self._rotation(positions, torch.full_like(positions, T))
        return KindInputs(*rotation, places, mask, from_cache=False)

    def of_step(self, position: Tensor, flex: bool) -> KindInputs:
        mask = torch.arange(self.capacity, device=position.device) <= position
        if flex:  # the blocks that hold keys, all as if partly: it spreads those over the GPU
            newest, blocks = position.squeeze(0), self.blocks.shape[0]
            mask = BlockMask.from_kv_blocks(
                (position // FLEX_BLOCK + 1).clamp(max=blocks).int().view(1, 1, 1),
                self.blocks.view(1, 1, 1, blocks),
                BLOCK_SIZE=FLEX_BLOCK,
                mask_mod=lambda _b, _h, _q, k: k <= newest,
                seq_lengths=(1, self.capacity),
                compute_q_blocks=False,
            )
        rotation = self.cos.index_select(0, position), self.sin.index_select(0, position)
        return KindInputs(*rotation, position % self.capacity, mask, from_cache=True)


class Transformer(nn.Module):
    def __init__(
        self, config: ModelConfig, weights: Weights, batch: int, max_seq_len: int, flex: bool
    ) -> None:
        super().__init__()
        self.embedding = table = plain(weights.embedding)
        # sqrt(hidden_size) is rounded to the table's dtype first: 55.5 for 3072 in bf16
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=table.dtype).item()
        self.kinds = [Kind(config, local, max_seq_len, table) for local in (False, True)]
        self.kind_of = [int(config.is_local(layer)) for layer in range(config.num_layers)]
        self.layers = nn.ModuleList()
        for layer, kind in zip(weights.layers, self.kind_of, strict=True):
            shape = (2, batch, config.num_kv_heads, self.kinds[kind].capacity, config.head_dim)
            self.layers.append(Layer(config, layer, table.new_zeros(shape)))
        self.norm, self.eps = weights.norm, config.rms_norm_eps
        self.head = Linear(plain(weights.head_table))
        self.final_softcap, self.flex = config.final_softcap, flex

    def forward(self, token_ids: Tensor, inputs: list[KindInputs]) -> Tensor:
        """Logits after the last of the tokens: token_ids [B, T] -> [B, V] float32."""
        x = F.embedding(token_ids, self.embedding) * self.embedding_scale  # [B, T, D]
        for layer, kind in zip(self.layers, self.kind_of, strict=True):
            x = layer(x, inputs[kind])
        last = rmsnorm(x[:, -1], self.norm, self.eps)
        return softcapped(self.head(last).float(), self.final_softcap)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, weights: LayerWeights, kv_cache: Tensor) -> None:
        super().__init__()
        self.config, self.weights = config, weights
        self.kv_cache = kv_cache  # [2, B, HK, C, K]: keys, then values
        self.qkv = Linear(plain(weights.qkv), weights.qkv_bias)
        self.o = Linear(plain(weights.o), weights.o_bias)
        gate, up = plain(weights.gate_up).chunk(2)
        self.gate, self.up, self.down = Linear(gate), Linear(up), Linear(plain(weights.down))
        self.qk_norm = None  # a row for each head: one kernel normalises and rotates q and k
        if weights.q_norm is not None and weights.k_norm is not None:
            rows = [weights.q_norm] * config.num_q_heads + [weights.k_norm] * config.num_kv_heads
            self.qk_norm = torch.stack(rows)

    def forward(self, x: Tensor, inputs: KindInputs) -> Tensor:
        w, eps = self.weights, self.config.rms_norm_eps
        branch = self._attention(rmsnorm(x, w.input_norm, eps), inputs)
        x = x + rmsnorm(branch, w.post_attention_norm, eps)
        h = rmsnorm(x, w.pre_mlp_norm, eps)
        # two products, for inductor to join: GeGLU of two halves of one would be another kernel
        h = stored(F.gelu(self.gate(h), approximate="tanh") * self.up(h))
        return x + rmsnorm(self.down(h), w.post_mlp_norm, eps)

    def _attention(self, x: Tensor, inputs: KindInputs) -> Tensor:
        HQ, HK, places = self.config.num_q_heads, self.config.num_kv_heads, inputs.places
        qk, v = self.qkv(x).unflatten(-1, (HQ + 2 * HK, -1)).split([HQ + HK, HK], dim=2)
        qk = rotated(rmsnorm(qk, self.qk_norm, self.config.rms_norm_eps), inputs)  # [B, T, H, K]
        q, k = qk.transpose(1, 2).split([HQ, HK], dim=1)
        v = v.transpose(1, 2)

        # a choice where a stack would do, since inductor makes one kernel of it
        half, kept = torch.arange(2, device=x.device), places.shape[0]
        kv = torch.where(half.view(2, 1, 1, 1, 1) == 0, k, v)
        self.kv_cache.index_copy_(3, places, kv[:, :, :, -kept:])

        if inputs.from_cache:
            keys, values = self.kv_cache.unbind()
            if isinstance(inputs.mask, Tensor):
                # the newest is not read back: it may not be there yet (see inductor_options)
                is_newest = (torch.arange(keys.shape[2], device=x.device) == places).unsqueeze(1)
                keys, values = torch.where(is_newest, k, keys), torch.where(is_newest, v, values)
            k, v = keys, values
        y = self._attend(q, k, v, inputs.mask)
        return self.o(y.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Queries [B, HQ, T, K] over keys and values [B, HK, C, K] -> [B, HQ, T, K]."""
        scale, softcap = self.config.scale, self.config.attn_softcap
        if mask is None:
            return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        if isinstance(mask, BlockMask):
            if q.is_cpu:  # up to torch 2.13 inductor's CPU kernel computes other numbers of views
                q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            y = flex_attention(
                q, k, v, lambda s, *_: softcapped(s, softcap), mask, scale, enable_gqa=True
            )
            assert isinstance(y, Tensor)  # more is returned only on request
            return y
        # One query of a row over all its cache.  Written as sums, which inductor spreads over the
        # GPU and fuses with all around; a masked SDPA gives a head to one block of threads.
        q_wide = q.unflatten(1, (k.shape[1], -1)).float()  # [B, HK, G, 1, K]
        scores = (q_wide * k.unsqueeze(2).float()).sum(-1) * scale  # [B, HK, G, C]
        # the softcap comes before the mask: a capped -inf would be -softcap, and leak
        scores = stored(softcapped(scores, softcap).masked_fill(~mask, -torch.inf))
        p = stored(scores.softmax(-1))
        y = (p.unsqueeze(-1) * v.unsqueeze(2).float()).sum(-2)  # [B, HK, G, K]
        return y.flatten(1, 2).unsqueeze(2).to(q.dtype)


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x * rsqrt(mean(x ** 2) + eps) * (1 + weight)`, rounded once; x itself without a weight."""
    if weight is None:
        return x
    x_wide = x.float()
    y = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (y * (1 + weight.float())).to(x.dtype)


class Linear(nn.Linear):
    """A product with tensors that it shares, until torchao replaces one."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight: Any = nn.Parameter(weight, requires_grad=False)
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        scale = getattr(self.weight, "scale", None)
        if scale is None:
            return super().forward(input)
        # int8, and not by F.linear: for many rows that becomes ATen's kernel, one thread an output
        y = (input @ self.weight.qdata.t().to(input.dtype)).float() * scale.flatten()
        return (y if self.bias is None else y + self.bias).to(input.dtype)


def stored(x: Tensor) -> Tensor:
    """`x` itself, which inductor then computes once, and not again for each use of an element."""
    return x.as_strided(x.shape, x.stride())


def rotated(x: Tensor, inputs: KindInputs) -> Tensor:
    """Heads [B, T, H, K], turned by their positions: dimension i pairs with i + K/2."""
    turned = x.float().roll(x.shape[-1] // 2, -1)
    return stored((x.float() * inputs.cos + turned * inputs.sin).to(x.dtype))


def softcapped(x: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(x / softcap)`, or x itself."""
    # tanh(x) = 2 sigmoid(2 x) - 1: on a GPU inductor's tanh branches, its sigmoid does not
    return x if softcap is None else softcap * (2 * torch.sigmoid(x * (2 / softcap)) - 1)
