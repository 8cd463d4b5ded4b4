"""The settings of every slot on the device, and the choice of each row's next token."""

from types import ModuleType

import torch
from torch import Tensor

from gemcut.engine.sequence import TokenSequence


class Sampler:
    """Sampling settings by slot, in tensors that a decode step reads by slot index.

    What no running request uses is left out of the step: `_uses` knows it without reading the
    device.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, device: torch.device, ops: ModuleType
    ) -> None:
        def by_slot(dtype: torch.dtype, *shape: int) -> Tensor:
            try:
                return torch.zeros(num_slots, *shape, dtype=dtype, device=device)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                raise MemoryError(
                    f"{device} has no memory for the sampling settings of {num_slots} slots; "
                    f"lower max_batch_size"
                ) from error

        self._ops = ops
        self._vocab_size = vocab_size
        self._uses: dict[int, set[str]] = {}
        self._temperature = by_slot(torch.float32)
        self._top_k = by_slot(torch.int64)
        self._top_p = by_slot(torch.float32)
        self._min_p = by_slot(torch.float32)
        self._seeds = by_slot(torch.int64)
        self._repetition = by_slot(torch.float32)
        self._presence = by_slot(torch.float32)
        self._frequency = by_slot(torch.float32)
        self._output_counts = by_slot(torch.int32, vocab_size)
        self._in_prompt = by_slot(torch.bool, vocab_size)
        self._bias = by_slot(torch.float32, vocab_size)
        self._is_end = by_slot(torch.bool, vocab_size)
        self._first_end = by_slot(torch.int64)  # the first position where an end token may stand

    def admit(self, slot: int, sequence: TokenSequence) -> None:
        """Write a new sequence's settings to its slot."""
        params = sequence.params
        uses = set()
        if params.temperature > 0:
            uses.add("random")
            self._seeds[slot] = sequence.seed
            if params.top_k > 0:
                uses.add("top_k")
            if params.top_p < 1:
                uses.add("top_p")
            if params.min_p > 0:
                uses.add("min_p")
        # float: a number of NumPy, or an integer past int64, is none to torch
        self._temperature[slot] = float(params.temperature)
        self._top_k[slot] = max(int(params.top_k), 0)
        self._top_p[slot] = float(params.top_p)
        self._min_p[slot] = float(params.min_p)

        self._repetition[slot] = float(params.repetition_penalty)
        self._presence[slot] = float(params.presence_penalty)
        self._frequency[slot] = float(params.frequency_penalty)
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            uses.add("penalties")
            self._output_counts[slot] = 0
            self._in_prompt[slot] = False
            known = [token_id for token_id in sequence.prompt_ids if token_id < self._vocab_size]
            self._in_prompt[slot, known] = True

        self._bias[slot] = 0
        if params.logit_bias:
            uses.add("bias")
            token_ids, values = list(params.logit_bias), map(float, params.logit_bias.values())
            self._bias[slot, token_ids] = self._bias.new_tensor(list(values))

        self._is_end[slot] = False
        end_ids = [token_id for token_id in sequence.end_ids if token_id < self._vocab_size]
        if params.min_tokens and end_ids:
            uses.add("min_tokens")
            self._is_end[slot, end_ids] = True
            self._first_end[slot] = len(sequence.prompt_ids) + params.min_tokens
        self._uses[slot] = uses

    def count(self, sequence: TokenSequence, token_id: int) -> None:
        """Note a token that a sequence has taken, for its penalties."""
        if sequence.slot is not None and "penalties" in self._uses[sequence.slot]:
            self._output_counts[sequence.slot, token_id] += 1

    def choose(
        self, logits: Tensor, sequences: list[TokenSequence], positions: Tensor
    ) -> tuple[Tensor, list[bool]]:
        """The next token of each row: logits [B, V], positions [B] of these tokens -> ids [B].

        With it, whether a row had a token to choose: NaN logits and a ban of all leave none.  An
        embedding may have more rows than the vocabulary has pieces: those are never chosen.
        """
        indices = [s.slot for s in sequences if s.slot is not None]
        slots = torch.tensor(indices, device=logits.device)
        uses = set().union(*(self._uses[slot] for slot in indices))

        logits = run_processors(logits[:, : self._vocab_size], sequences)
        if "bias" in uses:
            logits = logits + self._bias[slots]
        if "min_tokens" in uses:
            early = positions < self._first_end[slots]
            logits = logits.masked_fill(self._is_end[slots] & early.unsqueeze(-1), -torch.inf)
        if "penalties" in uses:
            logits = self._ops.penalize(
                logits,
                self._output_counts[slots],
                self._in_prompt[slots],
                self._repetition[slots],
                self._presence[slots],
                self._frequency[slots],
            )

        def setting(use: str, values: Tensor) -> Tensor | None:
            return values[slots] if use in uses else None

        chosen = self._ops.sample(
            logits,
            setting("random", self._temperature),
            setting("top_k", self._top_k),
            setting("top_p", self._top_p),
            setting("min_p", self._min_p),
            setting("random", self._seeds),
            positions,
        )
        possible = logits.gather(-1, chosen.unsqueeze(-1)).isfinite().squeeze(-1)
        return chosen, possible.tolist()


def run_processors(logits: Tensor, sequences: list[TokenSequence]) -> Tensor:
    """Logits [B, V] after each sequence's own processors; a failing one ends its sequence alone."""
    if not any(s.params.logits_processors for s in sequences):
        return logits
    logits = logits.clone()
    for row, sequence in enumerate(sequences):
        try:
            for processor in sequence.params.logits_processors or ():
                changed = processor(list(sequence.output_ids), logits[row].clone())
                if not isinstance(changed, Tensor) or changed.shape != logits[row].shape:
                    raise ValueError(
                        f"a logits processor must return a tensor of shape "
                        f"{tuple(logits[row].shape)}, not {getattr(changed, 'shape', changed)!r}"
                    )
                logits[row] = changed
        except Exception as error:
            sequence.fail(error)
    return logits
