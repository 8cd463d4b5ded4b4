"""GemmaModel, GemmaForCausalLM, the classifiers, and the same classes of the other families.

Signatures, names and shapes are those of the Hugging Face documents.  A family's class says which
config it takes; the computation is the same for all.
"""

from numbers import Integral
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.engine.transformers_api.models.arrays import as_tensor
from gemcut.engine.transformers_api.models.configs import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    VaultGemmaConfig,
)
from gemcut.engine.transformers_api.models.forward import Run
from gemcut.engine.transformers_api.models.generation import GenerativeModel
from gemcut.engine.transformers_api.models.inputs import (
    IGNORED,
    INTEGERS,
    check_targets_are_seen,
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
from gemcut.engine.transformers_api.models.pretrained import PreTrainedModel, on_its_device


class TextModel(PreTrainedModel):
    """The decoder without a head."""

    is_bare = True

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
        run = self._run(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            **options,
        )
        return run.answer(BaseModelOutputWithPast, last_hidden_state=run.states.last)


class WithHead(PreTrainedModel):
    """A decoder with a head on it."""

    base_class: ClassVar[type[TextModel]]

    @property
    def model(self) -> TextModel:
        """The decoder alone, on the same weights."""
        base = self.base_class.__new__(self.base_class)
        vars(base).update(config=self.config, _gemma=self._gemma, _ops_name=self._ops_name)
        return base


class CausalLM(WithHead, GenerativeModel):
    """The decoder with its language-model head."""

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
        **options: Any,
    ) -> Any:
        """Logits of a batch: input_ids [B, T] -> logits [B, kept, V] float32, and more.

        labels [B, kept]: the ids themselves, -100 where none is asked for; the loss is the mean
        cross entropy of each next one.  With labels, logits are computed when they are first
        accessed: a loss alone never holds all of them.  logits_to_keep: 0 keeps all columns, n
        the last n, an array [kept] or [B, kept] these, a bool array [B, T] those that are true
        (then logits are [kept, V]).  Otherwise as the model without a head.
        """
        run = self._run(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            **options,
        )
        chosen = _read_columns(logits_to_keep, run.batch.shape, self.device)
        targets = None if labels is None else self._read_targets(labels, chosen, run)
        kept = _keep(run.states.last, chosen)
        if targets is None:
            return run.answer(CausalLMOutputWithPast, logits=self._logits(kept))
        loss = causal_lm_loss(self._gemma, kept, targets)
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
        following = F.pad(targets[:, 1:], (0, 1), value=IGNORED)
        seen = run.seen
        if seen is not None:
            seen = _keep(seen.unsqueeze(-1), chosen.cpu()).squeeze(-1)
        check_targets_are_seen(following, seen, "the next one is predicted from")
        return targets


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
        run = self._run(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            **options,
        )
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
            candidates = torch.ones(B, T, dtype=torch.bool) if seen is None else seen
        else:
            candidates = (ids != pad).cpu()
        columns = (torch.arange(T) * candidates).argmax(-1)
        for row in range(B):
            if seen is not None and not seen[row, columns[row]]:
                raise ValueError(
                    f"row {row} is read at column {int(columns[row])}, its last that is not "
                    f"pad_token_id {pad}, but attention_mask hides it"
                )
        return columns.to(self.device)

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
        run = self._run(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            **options,
        )
        weights = self._gemma.weights
        assert weights.score is not None
        targets = None
        if labels is not None:
            targets = read_labels(labels, run.batch.shape, self.config.num_labels, self.device)
            check_targets_are_seen(targets, run.seen, "there is one at")
        logits = F.linear(run.states.last, weights.score, weights.score_bias)
        loss = None if targets is None else token_classification_loss(logits, targets)
        return run.answer(TokenClassifierOutput, loss=loss, logits=logits)


def _read_columns(which: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The columns of which logits are wanted: int64 [kept] or [B, kept], or bool [B, T]."""
    T = shape[1]
    if isinstance(which, Integral) and not isinstance(which, bool):
        if which < 0:
            raise ValueError(f"logits_to_keep {which} is negative; 0 keeps all columns")
        return torch.arange(T, device=device)[-int(which) :]
    columns = as_tensor("logits_to_keep", which, device)
    if columns.dtype == torch.bool and tuple(columns.shape) == shape:
        return columns
    if columns.dtype not in INTEGERS or columns.dim() not in (1, 2):
        raise ValueError(
            f"logits_to_keep is {columns.dtype} {list(columns.shape)}, must be a number, columns "
            f"[kept] or [{shape[0]}, kept], or a bool for each of {list(shape)}"
        )
    if columns.dim() == 2 and columns.shape[0] != shape[0]:
        raise ValueError(f"logits_to_keep has {columns.shape[0]} rows, the batch {shape[0]}")
    columns = columns.to(torch.int64)
    if columns.numel() and not (int(columns.min()) >= -T and int(columns.max()) < T):
        raise ValueError(f"logits_to_keep names a column outside {-T}..{T - 1}")
    return columns % T


def _keep(x: Tensor, columns: Tensor) -> Tensor:
    """The columns of x [B, T, D] that `_read_columns` has chosen: [B, kept, D] or [kept, D]."""
    if columns.dtype == torch.bool:
        return x[columns]
    if columns.dim() == 1:
        return x.index_select(1, columns)
    return x.take_along_dim(columns.unsqueeze(-1), dim=1)


class GemmaModel(TextModel):
    """Gemma 1 without a head."""

    config_class = GemmaConfig


class GemmaForCausalLM(CausalLM):
    """Gemma 1 with a head: logits, losses, text."""

    config_class = GemmaConfig
    base_class = GemmaModel


class GemmaForSequenceClassification(SequenceClassifier):
    """Gemma 1 that classifies texts."""

    config_class = GemmaConfig
    base_class = GemmaModel


class GemmaForTokenClassification(TokenClassifier):
    """Gemma 1 that classifies tokens."""

    config_class = GemmaConfig
    base_class = GemmaModel


class Gemma2Model(TextModel):
    """Gemma 2 without a head."""

    config_class = Gemma2Config


class Gemma2ForCausalLM(CausalLM):
    """Gemma 2 with a head: logits, losses, text."""

    config_class = Gemma2Config
    base_class = Gemma2Model


class Gemma2ForSequenceClassification(SequenceClassifier):
    """Gemma 2 that classifies texts."""

    config_class = Gemma2Config
    base_class = Gemma2Model


class Gemma2ForTokenClassification(TokenClassifier):
    """Gemma 2 that classifies tokens."""

    config_class = Gemma2Config
    base_class = Gemma2Model


class VaultGemmaModel(TextModel):
    """VaultGemma without a head."""

    config_class = VaultGemmaConfig


class VaultGemmaForCausalLM(CausalLM):
    """VaultGemma with a head: logits, losses, text."""

    config_class = VaultGemmaConfig
    base_class = VaultGemmaModel


class Gemma3TextModel(TextModel):
    """Gemma 3's text part without a head."""

    config_class = Gemma3TextConfig


class Gemma3ForCausalLM(CausalLM):
    """Gemma 3's text part with a head: logits, losses, text."""

    config_class = Gemma3TextConfig
    base_class = Gemma3TextModel


class Gemma3TextForSequenceClassification(SequenceClassifier):
    """Gemma 3's text part that classifies texts."""

    config_class = Gemma3TextConfig
    base_class = Gemma3TextModel
