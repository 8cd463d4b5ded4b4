"""The losses of the documented classes, in float32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.engine.execution.logprobs import LOGITS_ROWS, token_logprobs
from gemcut.engine.execution.model import Gemma
from gemcut.engine.transformers_api.models.inputs import IGNORED


def causal_lm_loss(model: Gemma, hidden: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
    """The mean cross entropy of each next label, by blocks of rows: never all logits at once.

    hidden [B, T, D], labels [B, T]: state t predicts label t + 1, and -100 is left out -> float32.
    NaN where no label is left, as in torch.  With `num_items` it is the sum divided by that.
    """
    following = labels[:, 1:].flatten()
    counted = following != IGNORED
    states, following = hidden[:, :-1].flatten(0, 1)[counted], following[counted]
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for few, ids in zip(states.split(LOGITS_ROWS), following.split(LOGITS_ROWS), strict=True):
        if ids.numel():
            total -= token_logprobs(model.logits(few), ids).double().sum()
    return (total / (following.numel() if num_items is None else num_items)).float()


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """The loss of one answer a row: logits [B, n] and labels as `problem_type` has them."""
    logits = logits.float()
    if problem_type == "regression":
        return F.mse_loss(logits.view(labels.shape), labels.float())
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


def token_classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of each token's label: logits [B, T, n], labels [B, T]."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
