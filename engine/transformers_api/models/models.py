"""GemmaModel, GemmaForCausalLM, the classifiers, and the same classes of the other families.

A family's class says which config it takes; the computation is the same for all (heads.py).
"""

from gemcut.engine.transformers_api.models.configs import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    VaultGemmaConfig,
)
from gemcut.engine.transformers_api.models.heads import (
    CausalLM,
    SequenceClassifier,
    TextModel,
    TokenClassifier,
)


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
