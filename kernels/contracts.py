"""What a caller must know of each op that its signature does not say.

Forms of tensors are written as "shape dtype strides", alternatives with a | between them:

    shape      letters are the page's (README.md); a product is written without a sign, "2 F"
    dtype      float: float32, bfloat16 or float16, the same in the whole call; int: int64 or int32;
               cache: float or float8_e4m3fn; weight: float, or a QuantizedWeight of any format;
               "as positions": that argument's; else torch's own name
    strides    dense: row-major without gaps; strided: any, but the last axis is contiguous

Cost is the least that must be moved and computed: e bytes of an element of float, w those of the
weight, scales included.  README.md is made of this by tools/document_ops.py, and
tests/kernels/test_contracts.py tries what is said on every op.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Contract:
    """The tensors of an op, its cost, and what it allocates."""

    arguments: Mapping[str, str]  # form by name; "cos, sin" have one form
    results: Mapping[str, str]  # all are dense
    moved: str  # bytes
    computed: str  # operations
    where: str = ""  # letters of the cost that no shape has
    writes: tuple[str, ...] = ()  # arguments
    scratch: str = ""  # bytes that a call allocates besides its results
    launches: str = "1"

    @property
    def forms(self) -> dict[str, list[str]]:
        """The forms of each tensor argument, by its own name."""
        return {
            name: forms.split(" | ")
            for names, forms in self.arguments.items()
            for name in names.split(", ")
        }

    @property
    def outs(self) -> tuple[str, ...]:
        """The arguments of `torch.ops.gemcut.<op>_out` that take the results, by keyword."""
        if len(self.results) == 1:
            return tuple(self.results)
        return tuple(f"out_{name}" for name in self.results)


CACHE = {
    "k_cache, v_cache": (
        "[slots, HK, C, K] cache strided | [blocks, block_size, HK, K] cache strided"
    ),
    "k_scale, v_scale": "[HK] float32 dense",
    "block_tables": "[slots, N] int32 strided",
}
ROTATION = {
    "slots, positions": "[M] int dense",
    "cos, sin": "[M, 1, K] float dense",
    "q_norm_weight, k_norm_weight": "[K] float dense",
}

CONTRACTS = {
    "add_rmsnorm_": Contract(
        {
            "residual": "[M, D] float strided",
            "x": "[M, D] float strided | [S, M, D] float32 dense",
            "post_weight, next_weight": "[D] float dense | [D] float32 dense",
        },
        {"out": "[M, D] float"},
        moved="4 M D e + n D e",
        computed="(5 n + 1) M D",
        where="n 2 with post_weight, else 1",
        writes=("residual",),
    ),
    "advance_": Contract(
        {
            "chosen": "[B] int dense | [S, B] int dense",
            "scores": "[B] float32 dense | [S, B] float32 dense",
            "slots": "[B] int dense",
            "tokens, positions, limits": "[slots] int64 dense",
            "is_end": "[slots, V] bool strided",
        },
        {"out": "[B] int64"},
        moved="12 S B + 49 B",
        computed="S B",
        writes=("tokens", "positions"),
    ),
    "attention_decode": Contract(
        {"q": "[B, T, HQ, K] float strided", "slots, positions": "[B] int dense", **CACHE},
        {"out": "[B, T, HQ, K] float"},
        moved="2 B T HQ K e + 2 B S HK K e + 16 B",
        computed="4 B T HQ K S",
        where="S keys that a row sees",
        scratch="(4 K + 8) B T HQ bytes for each split of the keys (kv_splits.py)",
        launches="2",
    ),
    "attention_prefill": Contract(
        {
            "q": "[M, HQ, K] float strided",
            "slots, starts": "[B] int dense",
            "cu_seqlens": "[B + 1] int dense",
            **CACHE,
        },
        {"out": "[M, HQ, K] float"},
        moved="2 M HQ K e + 2 S HK K e + 24 B + 8",
        computed="4 HQ K A",
        where="S keys that some query sees, A pairs of a query and a key that it sees",
    ),
    "begin_step": Contract(
        {
            "token_ids, positions": "[N] int dense",
            "rows": "[M] int dense",
            "table": "[V, D] weight dense",
            "norm_weight": "[D] float dense",
            "inv_freqs": "[K/2] float32 dense | [M, K/2] float32 dense",
        },
        {
            "positions": "[M] as positions",
            "residual": "[M, D] float",
            "normed": "[M, D] float",
            "cos": "[R, M, 1, K] float",
            "sin": "[R, M, 1, K] float",
        },
        moved="3 M D e + D e + 16 M + 2 R M K e",
        computed="6 M D + 3 R M K",
        where="M is N without rows; R kinds of layer, 1 or 2: a frequency and a scaling of each",
    ),
    "embed": Contract(
        {"token_ids": "[M] int dense", "table": "[V, D] weight dense"},
        {"out": "[M, D] float"},
        moved="2 M D e + 8 M",
        computed="M D",
    ),
    "geglu": Contract(
        {"gate_up": "[M, 2 F] float strided"},
        {"out": "[M, F] float"},
        moved="3 M F e",
        computed="2 M F",
    ),
    "linear": Contract(
        {
            "x": "[M, D] float strided",
            "weight": "[N, D] weight dense",
            "bias": "[N] float dense",
        },
        {"out": "[M, N] float"},
        moved="M D e + w + M N e",
        computed="2 M N D",
        scratch="cuBLAS's own; of a quantised weight N D e bytes, at most 64 MB, or one row",
        launches="1 of cuBLAS; of a quantised weight 2 for each part that fits the scratch",
    ),
    "linear_geglu": Contract(
        {"x": "[M, D] float strided", "gate_up_weight": "[2 F, D] weight dense"},
        {"out": "[M, F] float"},
        moved="M D e + w + M F e",
        computed="4 M F D",
    ),
    "linear_rope_and_store_": Contract(
        {
            "x": "[M, D] float strided",
            "weight": "[(HQ + 2 HK) K, D] weight dense",
            "bias": "[(HQ + 2 HK) K] float dense",
            **ROTATION,
            **CACHE,
        },
        {"out": "[M, HQ, K] float"},
        moved="M D e + w + M (HQ + 2 HK) K e + 2 M K e + 16 M + 2 n K e",
        computed="2 M (HQ + 2 HK) K D",
        where="n 1 with q_norm_weight, else 0",
        writes=("k_cache", "v_cache"),
        scratch="none; with q_norm_weight, or int4, 4 S M (HQ + 2 HK) K bytes of partial sums",
        launches="1; with q_norm_weight, or int4, 2",
    ),
    "lm_head": Contract(
        {"x": "[M, D] float strided", "weight": "[V, D] weight dense"},
        {"out": "[M, V] float32"},
        moved="M D e + w + 4 M V",
        computed="2 M V D",
    ),
    "lm_head_argmax": Contract(
        {
            "x": "[M, D] float strided",
            "weight": "[V, D] weight dense",
            "temperature": "[N] float32 dense",
            "seeds, positions": "[N] int dense",
            "rows": "[M] int dense",
        },
        {"scores": "[S, M] float32", "ids": "[S, M] int64"},
        moved="M D e + w + 12 S M",
        computed="2 M V D",
        where="S ranges of the vocabulary",
    ),
    "penalize": Contract(
        {
            "logits": "[B, V] float32 strided",
            "output_counts": "[B, V] int strided",
            "in_prompt": "[B, V] bool strided",
            "repetition, presence, frequency": "[B] float32 dense",
        },
        {"out": "[B, V] float32"},
        moved="13 B V + 12 B",
        computed="11 B V",
    ),
    "rmsnorm": Contract(
        {"x": "[..., D] float strided", "weight": "[D] float dense | [D] float32 dense"},
        {"out": "[..., D] float"},
        moved="2 M D e + D e",
        computed="5 M D",
        where="M rows, all but the last axis of x, which must view as one",
    ),
    "rope_and_store_": Contract(
        {
            "qkv": "[M, (HQ + 2 HK) K] float strided | [S, M, (HQ + 2 HK) K] float32 dense",
            **ROTATION,
            **CACHE,
        },
        {"out": "[M, HQ, K] float"},
        moved="2 M (HQ + 2 HK) K e + 2 M K e + 16 M + 2 n K e",
        computed="(3 + 5 n) M (HQ + HK) K",
        where="n 1 with q_norm_weight, else 0",
        writes=("k_cache", "v_cache"),
    ),
    "rope_tables": Contract(
        {
            "positions": "[M] int dense",
            "inv_freq": "[K/2] float32 dense | [M, K/2] float32 dense",
        },
        {"cos": "[M, 1, K] as dtype", "sin": "[M, 1, K] as dtype"},
        moved="2 M K e + 8 M + 2 K",
        computed="3 M K",
    ),
    "sample": Contract(
        {
            "logits": "[B, V] float32 strided",
            "temperature, top_p, min_p": "[B] float32 dense",
            "top_k, seeds, positions": "[B] int dense",
        },
        {"out": "[B] int64"},
        moved="4 B V + 8 B",
        computed="B V",
        where="more with temperature and filters: sampling.py",
        scratch="128 bytes a row; with top_k or top_p 4 V more, and 16 KiB for each of the two",
        launches="1 after a fill; with min_p 2; with top_k or top_p 3",
    ),
    "skinny_linear": Contract(
        {
            "x": "[M, D] float strided",
            "weight": "[N, D] weight dense",
            "bias": "[N] float dense",
        },
        {"out": "[S, M, N] float32"},
        moved="M D e + w + 4 S M N",
        computed="2 M N D",
        where="S partial sums",
    ),
}
