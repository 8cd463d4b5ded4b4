"""The state of each slot on the device: newest token, position, limits and sampling settings.

A step takes no number from the host that changes from step to step: it is given the slots that take
part, reads their tokens, positions and settings here, and writes the new ones here.  Row
`num_slots` belongs to no slot: it pads a batch to the size of its graph, and is never active.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gemcut.engine.requests.sequence import TokenSequence

INACTIVE = -1  # as a position: nothing reads what the row computes


class SlotState:
    """Tokens, positions, limits and sampling settings of `num_slots` slots."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        """Allocate it; MemoryError says so where the device has no room."""
        self.num_slots, self.vocab_size, self.device = num_slots, vocab_size, device

        def by_slot(*shape: int, dtype: torch.dtype, dim: int = 0) -> Tensor:
            shape = (*shape[:dim], num_slots + 1, *shape[dim:])
            return torch.zeros(shape, dtype=dtype, device=device)

        try:
            self.integers = by_slot(6, dtype=torch.int64, dim=1)  # what the next line names
            self.floats = by_slot(6, dtype=torch.float32, dim=1)
            self.output_counts = by_slot(vocab_size, dtype=torch.int32)
            self.in_prompt = by_slot(vocab_size, dtype=torch.bool)
            self.bias = by_slot(vocab_size, dtype=torch.float32)
            self.is_end = by_slot(vocab_size, dtype=torch.bool)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise MemoryError(
                f"{device} has no memory for the sampling settings of {num_slots} slots; "
                f"lower max_batch_size"
            ) from error
        # tokens: the newest, not yet in the cache; positions: its position; limits: that of the
        # last token allowed; first_end: the first position at which an end is allowed
        self.newest = self.integers.narrow(0, 0, 2)  # tokens and positions, which every step reads
        self.tokens, self.positions, self.limits, _, self.seeds, _ = self.integers.unbind()
        self.temperature, *_ = self.floats.unbind()
        self.positions.fill_(INACTIVE)
        self._ends: list[frozenset[int]] = [frozenset()] * num_slots
        self._biased: set[int] = set()

    def admit(self, slot: int, sequence: TokenSequence) -> None:
        """Write the position and the settings of a sequence whose prompt is in the cache."""
        params = sequence.params
        newest = sequence.output_ids[-1] if sequence.output_ids else 0
        last = len(sequence.prompt_ids) - 1
        first_end = len(sequence.prompt_ids) + params.min_tokens
        top_k = max(int(params.top_k), 0)
        # in the order of `integers` and `floats`; float(): torch takes no NumPy number
        integers = [newest, sequence.length - 1, last + sequence.max_tokens]
        integers += [top_k, sequence.seed, first_end]
        floats = [params.temperature, params.top_p, params.min_p]
        floats += [params.repetition_penalty, params.presence_penalty, params.frequency_penalty]
        self.integers[:, slot] = upload(integers, self.device)
        self.floats[:, slot] = upload([float(x) for x in floats], self.device, torch.float32)

        if "penalties" in sequence.uses:
            self.output_counts[slot] = 0
            if sequence.output_ids:
                ids = upload(sequence.output_ids, self.device)
                self.output_counts[slot] = ids.bincount(minlength=self.vocab_size)
            self._mark(self.in_prompt[slot], sequence.prompt_ids)
        if slot in self._biased:
            self.bias[slot] = 0
            self._biased.remove(slot)
        if "bias" in sequence.uses:
            self._biased.add(slot)
            self._write_bias(self.bias[slot], params.allowed_token_ids, sequence.bias)
        if self._ends[slot] != sequence.end_ids:
            self._ends[slot] = sequence.end_ids
            self._mark(self.is_end[slot], sequence.end_ids)

    def _write_bias(
        self, row: Tensor, allowed: Sequence[int] | None, bias: Mapping[int, float]
    ) -> None:
        """-inf where a token is not allowed, and these biases: row [V], zero before."""
        if allowed is not None:
            row.fill_(-torch.inf)
            row[upload([int(token_id) for token_id in allowed], self.device)] = 0
        if bias:
            token_ids = upload([int(token_id) for token_id in bias], self.device)
            values = [float(value) for value in bias.values()]
            row[token_ids] += upload(values, self.device, torch.float32)

    def _mark(self, row: Tensor, token_ids: Sequence[int] | frozenset[int]) -> None:
        """True for these tokens and for no others: row [V]."""
        row.zero_()
        known = sorted({token_id for token_id in token_ids if token_id < self.vocab_size})
        if known:
            row[upload(known, self.device)] = True


def upload(values: Sequence, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor on the device of these numbers; the host does not wait for a GPU."""
    on_gpu = device.type == "cuda"
    on_host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=on_gpu)
    return on_host.to(device, non_blocking=True)
