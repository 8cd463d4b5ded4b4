"""AutoModel..., which pick a class by config.json; and the classes named by the Flax documents."""

from pathlib import Path
from typing import Any, ClassVar

from gemcut.engine.checkpoints.hub import take_hub_options
from gemcut.engine.transformers_api.models import models
from gemcut.engine.transformers_api.models.configs import AutoConfig, PreTrainedConfig
from gemcut.engine.transformers_api.models.pretrained import PreTrainedModel
from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer


class _Auto:
    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} only picks a class: call {name}.from_pretrained(...)")


class _AutoModel(_Auto):
    classes: ClassVar[dict[str, type[PreTrainedModel]]]  # by model_type

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """The model in "demo", a folder or a Hugging Face id; options as those of its class."""
        config = options.get("config")
        if not isinstance(config, PreTrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            config = AutoConfig.from_pretrained(source, **take_hub_options(dict(options)))
        return cls._class_of(config).from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **options: Any) -> Any:
        """A model with random weights; options as those of its class."""
        return cls._class_of(config).from_config(config, **options)

    @classmethod
    def _class_of(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
        if config.model_type not in cls.classes:
            raise ValueError(
                f"{cls.__name__} has no class for model_type {config.model_type!r}; "
                f"it has them for {', '.join(cls.classes)}"
            )
        return cls.classes[config.model_type]


class AutoModel(_AutoModel):
    """Models without a head."""

    classes: ClassVar = {
        "gemma": models.GemmaModel,
        "gemma2": models.Gemma2Model,
        "vaultgemma": models.VaultGemmaModel,
        "gemma3_text": models.Gemma3TextModel,
    }


class AutoModelForCausalLM(_AutoModel):
    """Models that generate."""

    classes: ClassVar = {
        "gemma": models.GemmaForCausalLM,
        "gemma2": models.Gemma2ForCausalLM,
        "vaultgemma": models.VaultGemmaForCausalLM,
        "gemma3_text": models.Gemma3ForCausalLM,
    }


class AutoModelForSequenceClassification(_AutoModel):
    """Models that classify texts."""

    classes: ClassVar = {
        "gemma": models.GemmaForSequenceClassification,
        "gemma2": models.Gemma2ForSequenceClassification,
        "gemma3_text": models.Gemma3TextForSequenceClassification,
    }


class AutoModelForTokenClassification(_AutoModel):
    """Models that classify tokens."""

    classes: ClassVar = {
        "gemma": models.GemmaForTokenClassification,
        "gemma2": models.Gemma2ForTokenClassification,
    }


class AutoTokenizer(_Auto):
    """The one kind of tokenizer that Gemma has."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path, **options: Any
    ) -> GemmaTokenizer:
        """The tokenizer in "demo", a folder or a Hugging Face id; options as those of its class."""
        return GemmaTokenizer.from_pretrained(pretrained_model_name_or_path, **options)


class _Flax:
    """A model's call with the Flax documents' extra arguments: params, dropout_rng, train."""

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Any = None,
        past_key_values: Any = None,
        dropout_rng: Any = None,
        train: bool = False,
        **options: Any,
    ) -> Any:
        """`forward`, with the signature of the Flax documents."""
        if params is not None:
            raise NotImplementedError("params: a model has its own weights; see load_state_dict")
        if train or dropout_rng is not None:
            raise NotImplementedError("gemcut runs models and does not train them; leave out train")
        return self.forward(  # pyright: ignore[reportAttributeAccessIssue]  # of the other base
            input_ids, attention_mask, position_ids, past_key_values, **options
        )


class FlaxGemmaModel(_Flax, models.GemmaModel):
    """Gemma 1 without a head, by its name in the Flax documents."""


class FlaxGemmaForCausalLM(_Flax, models.GemmaForCausalLM):
    """Gemma 1 with a head, by its name in the Flax documents."""

    def generate(self, *args: Any, **settings: Any) -> Any:
        """`generate`, whose ids are in the output's `sequences`, as in Flax."""
        return super().generate(*args, **{"return_dict_in_generate": True} | settings)
