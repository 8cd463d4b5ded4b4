"""Token masks: the logits of tokens that a grammar does not allow next become -inf.

The host fills a bit for each token and row, one upload brings them to the device, which unpacks
them.  Rows without a grammar keep their logits.
"""

import torch
from torch import Tensor

from gemcut.engine.requests.sequence import TokenSequence

BITS = 32  # of an int32, the unit of llguidance's masks


def mask_tokens(logits: Tensor, sequences: list[TokenSequence]) -> Tensor:
    """Logits [B, V] with -inf where a sequence's grammar allows no token.

    A grammar that cannot go on ends its own sequence alone.
    """
    rows = [row for row, s in enumerate(sequences) if s.grammar is not None]
    if not rows:
        return logits
    device, (_, V) = logits.device, logits.shape
    width = -(-V // BITS)
    # the last number of a row is the row: one upload
    bits = torch.zeros(
        len(rows), width + 1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
    )
    for place, row in enumerate(rows):
        sequence = sequences[row]
        assert sequence.grammar is not None
        bits[place, width] = row
        try:
            sequence.grammar.fill(bits[place].data_ptr(), width * BITS // 8)
        except ValueError as error:
            sequence.fail(error)
    allowed, where = bits.to(device, non_blocking=True).split([width, 1], dim=1)
    masked = logits.index_select(0, where.squeeze(1)).masked_fill(~unpack(allowed, V), -torch.inf)
    return (
        masked
        if len(rows) == len(sequences)
        else logits.index_copy(0, where.squeeze(1).long(), masked)
    )


def unpack(bits: Tensor, count: int) -> Tensor:
    """The first `count` bits of each row, the lowest first: int32 [B, W] -> bool [B, count]."""
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    of_bytes = bits.contiguous().view(torch.uint8).unsqueeze(-1) & powers  # [B, 4 W, 8]
    return of_bytes.flatten(1).narrow(1, 0, count) != 0
