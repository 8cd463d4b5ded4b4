"""The decoder of a documented model and its heads; models.py has the families' names for them.

Signatures, names and shapes are those of the Hugging Face documents.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.engine.transformers_api.models.arrays import as_tensor
from gemcut.engine.transformers_api.models.forward import Run
from gemcut.engine.transformers_api.models.generation import GenerativeModel
from gemcut.engine.transformers_api.models.inputs import (
    IGNORED,
    INTEGERS,
    check_sees_tokens,
    keep_columns,
    read_columns,
    read_labels,
)
from gemcut.engine.transformers_api.models.losses import (
    causal_lm_loss,
    classification_loss,
    token_classification_loss,
)
from gemcut.engine.transformers_api.models.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from gemcut.engine.transformers_api.models.parameters import Embedding, Head
from gemcut.engine.transformers_api.models.pretrained import PreTrainedModel, on_its_device


class TextModel(PreTrainedModel):
    """The decoder without a head."""

    is_bare = True

    @property
    def embed_tokens(self) -> Embedding:
        """The input embeddings, as a function from ids, and their table."""
        return self.get_input_embeddings()

    @on_its_device
    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Hidden states of a batch: input_ids [B, T] -> last_hidden_state [B, T, D], and more.

        attention_mask [B, past + T]: 1 for a token, 0 for padding, whose outputs are zero.
        position_ids [B, T]: by default the columns' numbers.  inputs_embeds [B, T, D], scaled, in
        place of ids.  past_key_values: the cache of an earlier call, which the new ids continue.
        output_attentions computes attention in plain torch, by the oracle, not by a kernel.  Arrays
        come back in the kind of the ids.  ValueError names an argument that is invalid.
        """
        with self._run(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            **options,
        ) as run:
            return run.answer(BaseModelOutputWithPast, last_hidden_state=run.states.last)


class WithHead(PreTrainedModel):
    """A decoder with a head on it."""

    base_class: ClassVar[type[TextModel]]

    @property
    def model(self) -> TextModel:
        """The decoder alone, on the same weights."""
        base = self.base_class.__new__(self.base_class)
        vars(base).update(vars(self))
        return base

    @property
    def base_model(self) -> TextModel:
        """The same, by its other name."""
        return self.model


class CausalLM(WithHead, GenerativeModel):
    """The decoder with its language-model head."""

    @property
    def lm_head(self) -> Head:
        """The head, as a function from states to scores, and its weight."""
        return Head(self._gemma)

    def get_output_embeddings(self) -> Head:
        """The language-model head."""
        return self.lm_head

    @on_its_device
    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Any = 0,
        num_items_in_batch: Any = None,
        **options: Any,
    ) -> Any:
        """Logits of a batch: input_ids [B, T] -> logits [B, kept, V] float32, and more.

        labels [B, kept]: the ids themselves, -100 where none is asked for; the loss is the mean
        cross entropy of each next one, or their sum over num_items_in_batch.  A row's first token
        after padding is predicted from nothing, and does not count.  With labels, logits are
        computed when they are first accessed: a loss alone never holds all of them.
        logits_to_keep: 0 keeps all columns, n the last n, an array [kept] or [B, kept] these, a
        bool array [B, T] those that are true (then logits are [kept, V]).  Otherwise as the model
        without a head.
        """
        with self._run(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            **options,
        ) as run:
            chosen = read_columns(logits_to_keep, run.batch.shape, self.device)
            targets = None if labels is None else self._read_targets(labels, chosen, run)
            kept = keep_columns(run.states.last, chosen)
            if targets is None:
                return run.answer(CausalLMOutputWithPast, logits=self._logits(kept))
            loss = causal_lm_loss(self._gemma, kept, targets, num_items_in_batch)
            return run.answer(
                CausalLMOutputWithPast, loss=loss, logits=lambda: run.kind(self._logits(kept))
            )

    @on_its_device
    def _logits(self, states: Tensor) -> Tensor:
        flat = self._gemma.logits(states.reshape(-1, states.shape[-1]))
        return flat.view(*states.shape[:-1], -1)

    def _read_targets(self, labels: Any, chosen: Tensor, run: Run) -> Tensor:
        """Labels [B, kept] of the columns that are kept; none is predicted from padding."""
        if chosen.dtype == torch.bool:
            raise ValueError("labels need rows: give logits_to_keep as a number or as columns")
        shape = (run.batch.shape[0], chosen.shape[-1])
        targets = read_labels(labels, shape, self.config.vocab_size, self.device)
        if run.batch.mask is None:
            return targets
        following = F.pad(targets[:, 1:], (0, 1), value=IGNORED)
        columns = chosen.cpu().expand(shape)
        # nothing predicts a row's first token, after padding
        first = run.batch.mask.long().argmax(1, keepdim=True) - run.past
        is_first = F.pad(columns[:, 1:] == first, (0, 1)) & (columns == first - 1)
        following = following.masked_fill(is_first.to(self.device), IGNORED)
        lost = run.ask_for(columns, (following != IGNORED).cpu())
        check_sees_tokens(lost, columns, "labels: the next one is predicted from")
        return F.pad(following[:, :-1], (1, 0), value=IGNORED)


class SequenceClassifier(WithHead):
    """The decoder with one answer a row."""

    @on_its_device
    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Logits of a batch: input_ids [B, T] -> logits [B, num_labels], and more.

        A row's answer is read at its rightmost token that is not pad_token_id; with inputs_embeds,
        at the last column that attention_mask does not hide.  labels: config.problem_type says
        what they are, or else their kind: [B] classes, [B, num_labels] of zeros and ones as floats,
        or, where there is one label, [B] numbers.  Otherwise as the model without a head.
        """
        with self._run(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            **options,
        ) as run:
            rows = torch.arange(run.batch.shape[0], device=self.device)
            columns = self._pooled_columns(run)
            target = None if labels is None else self._read_targets(labels, len(rows))
            logits = F.linear(run.states.last[rows, columns], self._score())
            loss = None if target is None else classification_loss(logits, *target)
            return run.answer(SequenceClassifierOutputWithPast, loss=loss, logits=logits)

    def _score(self) -> Tensor:
        score = self._gemma.weights.score
        assert score is not None
        return score

    def _pooled_columns(self, run: Run) -> Tensor:
        """The column that each row's answer is read at: int64 [B]."""
        (B, T), ids, seen = run.batch.shape, run.batch.token_ids, run.seen
        pad = self.config.pad_token_id
        if ids is None or pad is None:
            if ids is not None and B != 1:
                raise ValueError(
                    f"a batch of {B} rows needs config.pad_token_id to find their ends"
                )
            candidates = seen
            if candidates is None:
                candidates = torch.ones(B, T, dtype=torch.bool, device="cpu")
        else:
            candidates = (ids != pad).cpu()
        columns = (torch.arange(T, device="cpu") * candidates).argmax(-1, keepdim=True)
        lost = run.ask_for(columns, torch.ones_like(columns, dtype=torch.bool))
        what = f"the answer is read at the last that is not pad_token_id {pad},"
        check_sees_tokens(lost, columns, what, "give another mask")
        return columns.squeeze(1).to(self.device)

    def _read_targets(self, labels: Any, rows: int) -> tuple[Tensor, str]:
        """Labels of the shape that the problem needs, and which problem that is."""
        count, tensor = self.config.num_labels, as_tensor("labels", labels, self.device)
        problem_type = self.config.problem_type
        if problem_type is None:
            if count == 1:
                problem_type = "regression"
            elif tensor.dtype in INTEGERS:
                problem_type = "single_label_classification"
            else:
                problem_type = "multi_label_classification"
        if problem_type == "single_label_classification":
            flat = tensor.flatten() if tensor.shape == (rows, 1) else tensor
            return read_labels(flat, (rows,), count, self.device), problem_type
        shapes = (
            [(rows, count)] if count > 1 or problem_type != "regression" else [(rows,), (rows, 1)]
        )
        if tuple(tensor.shape) not in shapes:
            raise ValueError(
                f"labels are {list(tensor.shape)}, must be {list(shapes[0])} for {problem_type}"
            )
        return tensor.view(rows, count), problem_type


class TokenClassifier(WithHead):
    """The decoder with one answer a token."""

    @on_its_device
    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Logits of a batch: input_ids [B, T] -> logits [B, T, num_labels], and more.

        labels [B, T]: classes, -100 where none is asked for.  Otherwise as the model without a
        head.
        """
        with self._run(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            **options,
        ) as run:
            weights = self._gemma.weights
            assert weights.score is not None
            targets = None
            if labels is not None:
                targets = read_labels(labels, run.batch.shape, self.config.num_labels, self.device)
                columns = torch.arange(targets.shape[1], device="cpu").expand(targets.shape)
                lost = run.ask_for(columns, (targets != IGNORED).cpu())
                check_sees_tokens(lost, columns, "labels: there is one at")
            logits = F.linear(run.states.last, weights.score, weights.score_bias)
            loss = None if targets is None else token_classification_loss(logits, targets)
            return run.answer(TokenClassifierOutput, loss=loss, logits=logits)
