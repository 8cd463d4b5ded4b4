"""Token masks: the logits of tokens that a grammar does not allow next become -inf.

The host fills a bit for each row and token, one upload brings them to the device, and a table makes
eight summands of each byte: 0 where a token is allowed, else -inf.  Rows without a grammar keep
their logits.
"""

import torch
from torch import Tensor

from gemcut.engine.requests.grammars import MaskFiller
from gemcut.engine.requests.sequence import TokenSequence

BITS = 32  # of an int32, the unit of llguidance's masks


class TokenMasks:
    """Masks logits on one device; `mask` is its one call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._filler = MaskFiller()
        self._table: Tensor | None = None  # of bytes: eight summands each [256, 8]

    def mask(self, logits: Tensor, sequences: list[TokenSequence]) -> Tensor:
        """Logits [B, V] with -inf where a sequence's grammar does not allow the token next.

        A grammar that cannot go on ends its own sequence alone, with ValueError.
        """
        rows = [row for row, s in enumerate(sequences) if s.grammar is not None]
        if not rows:
            return logits
        V, on_gpu = logits.shape[1], self._device.type == "cuda"
        width = -(-V // BITS)
        bits = torch.zeros(len(rows), width, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        grammars = [s.grammar for s in sequences if s.grammar is not None]
        errors = self._filler.fill(grammars, bits.data_ptr(), width * BITS // 8)
        for row, error in zip(rows, errors, strict=True):
            if error is not None:
                sequences[row].fail(error)
        summands = self._unpack(bits.to(self._device, non_blocking=True), V)
        if len(rows) == len(sequences):
            return summands + logits
        masked = logits.clone()
        for place, row in enumerate(rows):
            masked[row] += summands[place]
        return masked

    def _unpack(self, bits: Tensor, count: int) -> Tensor:
        """What is added to the logits of the first `count` tokens: int32 [B, W] -> [B, count]."""
        if self._table is None:
            powers = 2 ** torch.arange(8, device=self._device)
            values = torch.arange(256, device=self._device).unsqueeze(-1)
            self._table = torch.where((values & powers) != 0, 0.0, -torch.inf)
        of_bytes = bits.view(torch.uint8).flatten().int()
        return self._table.index_select(0, of_bytes).view(bits.shape[0], -1).narrow(1, 0, count)
