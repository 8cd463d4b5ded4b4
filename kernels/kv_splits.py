"""The splits of keys in decode attention: sizes, without a kernel.

The bounds of a split are absolute positions.  With a window, split i holds the keys i * SPLIT to
(i + 1) * SPLIT - 1.  Without one, splits are numbered as floating-point numbers with 7 bits of
mantissa would be: the first 256 hold SPLIT keys each, and then their length doubles every 128.  So
the cut depends on no row's length and on no row's first key, and a long row has few splits.
"""

from gemcut.kernels import tiles

UNIFORM_SPLITS = 256  # of SPLIT keys each
OCTAVE = 128  # splits of one length beyond those
MAX_SPLITS = 1024  # of a row: in a longer cache they begin with more keys


def rule_split(num_kv_heads: int) -> int:
    """Keys of the shortest split where none was measured.

    Of 1024 keys, splits of 32 of four heads are 128 programs, about one for each of 132 processors;
    of more heads, shorter splits would save no time and cost partial sums.
    """
    return 32 if num_kv_heads <= 4 else 64


def least_split(num_q_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Keys of the shortest split at a shape on any arch, by the rule or a measured tile."""
    key = ("attention_decode", (num_q_heads, num_kv_heads, head_dim))
    measured = [found[key] for found in tiles.TUNED.values() if key in found]
    rule = rule_split(num_kv_heads)
    return min([rule, *(tile.get("SPLIT", rule) for tile in measured)])


def count_splits(keys: int, split: int) -> int:
    """Splits of the keys 0 to `keys` - 1, at least one key, of a layer without a window."""
    x = (keys - 1) // split  # the last key's, if all had one length
    octave = max(0, x.bit_length() - 8)
    return octave * OCTAVE + (x >> octave) + 1


def most_splits(keys: int, split: int, is_local: bool) -> int:
    """The most splits of a row that sees `keys` keys, at least one."""
    if not is_local:
        return count_splits(keys, split)
    return (keys - 2) // split + 2  # wherever the first key is
