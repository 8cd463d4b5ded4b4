"""The chunks of a prefill: how long each is, and to which size a GPU pads it.

Running requests decode between two chunks, so a chunk is `prefill_chunk` tokens long while any
request decodes.  While none does, it is up to LONG times as long: on a GPU, products of 512 rows
leave processors without work.  The ring of a local layer sets a limit.  It has room for its window
and a chunk of `prefill_chunk`, so a longer one fits only before it has turned:

    tokens from position n that overwrite nothing they see  =  capacity - min(n, window - 1)

Gemma 2 (window 4096, ring 4608) takes its first 4096 tokens in two chunks of 2048 and the others
in chunks of 512, Gemma 3 1B (512, ring 1024) its first 1024 in one, Gemma 1 all in chunks of 2048.
Rings with room for the longest chunk after every window would make the cache of Gemma-2-9b at 8192
tokens 12 % larger, that of Gemma 3 1B at 32768 by 22 %.

A captured chunk has a fixed number of rows; those after the prompt's tokens are padding.  The
number of rows of a product decides which of cuBLAS's kernels computes it, so the sizes follow from
the model and from `prefill_chunk` alone, and a chunk of one length is always padded to one size.
"""

from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.requests.prefix_reuse import Ring

LONG = 4  # times prefill_chunk
LONGEST = 2048  # tokens, unless prefill_chunk is longer
# Rows of a product's tile in cuBLAS, or half of them: fewer cost hardly less
SIZE_STEP = 64
# Multiply-adds of a layer from which on a chunk outlasts the host's work for it: 9 ops of 20 us, at
# 400 TFLOP/s.  Predictions for an H200, not yet measured.
HOST_BOUND = 9 * 20e-6 * 400e12 / 2


def next_chunk(
    prefill_chunk: int, ring: Ring | None, start: int, end: int, *, may_be_long: bool
) -> int:
    """The number of tokens of the chunk at position `start` of a prompt that ends at `end`."""
    count = prefill_chunk
    if may_be_long:
        longest = max(prefill_chunk, min(LONG * prefill_chunk, LONGEST))
        room = longest if ring is None else min(longest, ring.room(start))
        if room >= 2 * prefill_chunk:  # a few tokens more would only make more sizes
            count = room
    return min(count, end - start)


def padded_sizes(config: ModelConfig, prefill_chunk: int, max_seq_len: int) -> list[int]:
    """Rows of the chunks that are padded and captured, the fewest first.

    Longer chunks are computed as they are: their products outlast the host's work, and padding
    would cost more than graphs gain.
    """
    limit = min(prefill_chunk, max_seq_len)
    q_size = (config.num_q_heads + config.num_kv_heads) * config.head_dim * 2  # q, k, v and o
    weights = config.hidden_size * (q_size + 3 * config.intermediate_size)  # of a layer
    worth = HOST_BOUND / weights
    return [size for size in (*range(SIZE_STEP, limit, SIZE_STEP), limit) if size <= worth]
