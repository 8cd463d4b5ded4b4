"""The splits of keys in decode attention, and their groups: sizes, without a kernel.

The bounds of a split are absolute positions.  With a window, split i holds the keys i * SPLIT to
(i + 1) * SPLIT - 1.  Without one, splits are numbered as floating-point numbers with 6 bits of
mantissa would be: the first 128 hold SPLIT keys each, and then their length doubles every 64.  So
the cut depends on no row's length and on no row's first key, and a long row has few splits.
"""

from gemcut.kernels import tiles

RULE_SPLIT = 64  # keys of the shortest split by decode_attention.py's rule; or twice as many
UNIFORM_SPLITS = 128  # of SPLIT keys each
OCTAVE = 64  # splits of one length beyond those
GROUP = 16  # splits that are added up at once: those of numbers 16 g to 16 g + 15
MAX_SPLITS = 512  # of a row: in a longer cache they begin with more keys
MAX_GROUPS = MAX_SPLITS // GROUP
# by which programs count themselves, int32: groups of a row and KV head, splits of each group
COUNTERS_PER_HEAD = 1 + MAX_GROUPS


def least_split(num_q_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Keys of the shortest split at a shape on any arch, by the rule or a measured tile."""
    key = ("attention_decode", (num_q_heads, num_kv_heads, head_dim))
    measured = [found[key] for found in tiles.TUNED.values() if key in found]
    return min([RULE_SPLIT, *(tile.get("SPLIT", RULE_SPLIT) for tile in measured)])


def count_splits(keys: int, split: int) -> int:
    """Splits of the keys 0 to `keys` - 1, at least one key, of a layer without a window."""
    x = (keys - 1) // split  # the last key's, if all had one length
    octave = max(0, x.bit_length() - 7)
    return octave * OCTAVE + (x >> octave) + 1


def most_partials(keys: int, split: int, is_local: bool) -> tuple[int, int]:
    """The most splits and groups of a row that sees `keys` keys, at least one."""
    if not is_local:
        splits = count_splits(keys, split)
        return splits, -(-splits // GROUP)
    splits = (keys - 2) // split + 2  # wherever the first key is
    return splits, (splits - 2) // GROUP + 2
