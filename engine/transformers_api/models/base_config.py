"""The base of the documented configs: a model's parameters by their documented names.

Users write and change these; the engine computes with ModelConfig (engine/config/model_config.py),
whose validation is the only one: `model_config` runs it, at construction and again when a model is
made.
"""

import copy
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from gemcut.engine.checkpoints.hub import (
    CONFIG_FILES,
    check_holds_model,
    resolve_checkpoint,
    take_hub_options,
)
from gemcut.engine.checks import check_int, refuse_unknown, shorten
from gemcut.engine.config.config_file import check_model_type, read_json_object
from gemcut.engine.config.model_config import ModelConfig

C = TypeVar("C", bound="PreTrainedConfig")

# attention is gemcut's, whichever of transformers' a program names
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# what a call reads from the config, or what no call needs; the rest is fixed when a model is made
_READ_LATE = {"architectures", "dtype", "id2label", "problem_type", "use_cache", "return_dict"}
_READ_LATE |= {"output_hidden_states", "output_attentions", "initializer_range"}
_READ_LATE |= {"pad_token_id", "eos_token_id", "bos_token_id", "attention_dropout"}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
DEFAULT_LABELS = 2
# Older spellings of what rope_parameters and dtype hold now.
_OLDER = ("rope_theta", "rope_scaling", "rope_local_base_freq", "torch_dtype")
_OLDER += ("sliding_window_pattern", "num_labels", "label2id")
# of these, what can only be given: later nobody would read it
_OF_FILES = {"rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern"}


class PreTrainedConfig:
    """The parameters of one family, as attributes; ValueError names a value out of range.

    A subclass lists its documented parameters, with their defaults, as annotated attributes.
    """

    model_type: ClassVar[str]
    parameters: ClassVar[dict[str, Any]] = {}
    is_encoder_decoder: ClassVar[bool] = False

    architectures: list[str] | None = None
    dtype: torch.dtype | None = None  # of the stored weights
    id2label: dict[int, str] | None = None  # None: LABEL_0 and LABEL_1
    problem_type: str | None = None  # of a sequence classifier; None: as the labels suggest
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True

    def __init_subclass__(cls) -> None:
        own = [name for name in cls.__annotations__ if name != "model_type"]
        of_class = ("model_type", "parameters", "is_encoder_decoder")
        shared = [name for name in PreTrainedConfig.__annotations__ if name not in of_class]
        cls.parameters = {name: getattr(cls, name) for name in own + shared}
        keyword = inspect.Parameter.KEYWORD_ONLY
        cls.__signature__ = inspect.Signature(  # for help() and editors
            [inspect.Parameter(n, keyword, default=value) for n, value in cls.parameters.items()]
        )

    def __init__(self, **values: Any) -> None:
        attention = values.pop("attn_implementation", None)
        self.name_or_path = values.pop("name_or_path", "")
        extra: dict[str, Any] = {}
        if "model_type" in values:  # these are the entries of a `to_dict()`
            values, extra = self._read(values)
        refuse_unknown(type(self).__name__, values, (*self.parameters, *_OLDER))
        self._fill(values, extra)
        if attention is not None:
            self._attn_implementation = attention

    def _fill(self, values: dict[str, Any], extra: dict[str, Any]) -> None:
        older = {key: values.pop(key) for key in _OLDER if values.get(key) is not None}
        self.extra = extra  # other keys of config.json, as they came
        for name, default in self.parameters.items():
            setattr(self, name, values.get(name, default))
        if (older_dtype := older.pop("torch_dtype", None)) is not None and self.dtype is None:
            self.dtype = older_dtype
        indices = older.pop("label2id", None)
        if (count := older.pop("num_labels", None)) is not None:
            if self.id2label is not None and len(self.id2label) != count:
                raise ValueError(
                    f"num_labels {count} contradicts id2label of {len(self.id2label)} entries"
                )
            if self.id2label is None:
                self.num_labels = count
        if self.id2label is None:
            self.num_labels = DEFAULT_LABELS
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type {shorten(self.problem_type)} is unknown; "
                f"there are {', '.join(PROBLEM_TYPES)}"
            )
        written = ModelConfig.from_dict(self._values() | older).to_dict()
        for name in self.parameters:  # defaults that depend on others are filled in
            if name != "architectures" and written.get(name) is not None:
                setattr(self, name, written[name])
        assert self.id2label is not None
        self.id2label = {int(index): label for index, label in self.id2label.items()}
        if indices is not None and indices != self.label2id:
            raise ValueError(f"label2id {shorten(indices)} contradicts id2label")

    @property
    def num_labels(self) -> int:
        """How many classes a classifier tells apart; setting it names them LABEL_0, LABEL_1, ..."""
        return len(self.id2label or ())

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        check_int("num_labels", count, 1, 2**20)
        self.id2label = _numbered(count)

    @property
    def label2id(self) -> dict[str, int]:
        """The index of each label."""
        return {label: index for index, label in (self.id2label or {}).items()}

    def fixed_values(self, is_classifier: bool) -> dict[str, Any]:
        """What a model made now can't change: values by name, in memory of their own."""
        names = [name for name in self.parameters if name not in _READ_LATE]
        names += ["num_labels"] if is_classifier else []
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    @property
    def name_or_path(self) -> str:
        """What `from_pretrained` was given; no file has it."""
        return self.__dict__.get("_name_or_path", "")

    @name_or_path.setter
    def name_or_path(self, name: str | Path) -> None:
        self._name_or_path = str(name)

    @property
    def use_return_dict(self) -> bool:
        """`return_dict` by its other name."""
        return self.return_dict

    @property
    def _attn_implementation(self) -> str:
        """The attention that a program has asked for; gemcut has one of its own."""
        return self.__dict__.get("_asked_attention", "sdpa")

    @_attn_implementation.setter
    def _attn_implementation(self, name: str) -> None:
        if name not in ATTENTIONS:
            raise ValueError(
                f"attn_implementation {shorten(name)} is unknown; "
                f"{', '.join(map(repr, ATTENTIONS))} all stand for gemcut's own"
            )
        self._asked_attention = name

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype of the stored weights, by its older name."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, dtype: Any) -> None:
        self.dtype = dtype

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_FILES:
            raise ValueError(
                f"config.{name} is what older files call a part of rope_parameters or layer_types; "
                f"set that, or give {name} when the config is made"
            )
        super().__setattr__(name, _dtype_of(value) if name == "dtype" else value)

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> "PreTrainedConfig":
        """The config itself: these models have only text, and one half."""
        return self

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Set these parameters; TypeError names one that is unknown."""
        refuse_unknown(
            f"{type(self).__name__}.update", config_dict, (*self.parameters, "num_labels")
        )
        for name, value in config_dict.items():
            setattr(self, name, value)

    def model_config(self, architecture: str | None = None) -> ModelConfig:
        """The ModelConfig that the engine computes with; ValueError names a value out of range."""
        names = self.architectures if architecture is None else [architecture]
        return ModelConfig.from_dict(self._values() | {"architectures": names})

    def to_dict(self) -> dict[str, Any]:
        """The object of config.json, as transformers and this package read it."""
        values = self.model_config().to_dict()
        if self.architectures is None:
            del values["architectures"]
        if "id2label" in values:
            values["label2id"] = self.label2id
        for name in ("problem_type", "output_hidden_states", "output_attentions"):
            if getattr(self, name) != self.parameters[name]:
                values[name] = getattr(self, name)
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing in it is the default of all families."""
        return self.to_dict()

    def to_json_string(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write the JSON to a file; defaults are written too."""
        Path(json_file_path).write_text(self.to_json_string())

    @classmethod
    def from_json_file(cls: type[C], json_file: str | Path) -> C:
        """The config in a file, whatever its name."""
        try:
            return cls.from_dict(read_json_object(Path(json_file)))
        except ValueError as error:
            raise ValueError(f"{json_file}: {error}") from None

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> None:
        """Write config.json to a folder, which is made if need be."""
        if push_to_hub:
            raise NotImplementedError("push_to_hub=True is not supported; upload the folder")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / "config.json")

    @classmethod
    def from_dict(cls: type[C], config_dict: Mapping[str, Any], **overrides: Any) -> C:
        """The config that a parsed config.json describes, in the newer or the older spelling."""
        refuse_unknown(cls.__name__, overrides, (*cls.parameters, *_OLDER))
        if "num_labels" in overrides:  # the file's labels are of another task
            config_dict = {key: x for key, x in config_dict.items() if key != "id2label"}
        named, extra = cls._read(config_dict)
        config = cls.__new__(cls)
        config._fill(named | overrides, extra)
        return config

    @classmethod
    def _read(cls, config_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters in a parsed config.json by their newer names, and its other keys."""
        model_type = model_type_of(config_dict)
        if model_type != cls.model_type:
            raise ValueError(
                f"model_type {shorten(model_type)} is not that of {cls.__name__}, "
                f"{cls.model_type!r}; AutoConfig picks the class by it"
            )
        written = ModelConfig.from_dict(config_dict).to_dict()
        del written["model_type"]
        if not config_dict.get("architectures"):
            del written["architectures"]
        written.pop("label2id", None)  # follows from id2label
        named = {key: value for key, value in written.items() if key in cls.parameters}
        return named, {key: x for key, x in written.items() if key not in named}

    @classmethod
    def from_pretrained(
        cls: type[C], pretrained_model_name_or_path: str | Path, **overrides: Any
    ) -> C:
        """The config of "demo", of a folder or its config.json, or of a Hugging Face id.

        token, revision, cache_dir, local_files_only, force_download and subfolder are those of
        huggingface_hub; other keywords are parameters that come before the file's.
        """
        path = config_file_of(pretrained_model_name_or_path, take_hub_options(overrides))
        attention = overrides.pop("attn_implementation", None)
        try:
            config = cls.from_dict(read_json_object(path), **overrides)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        config.name_or_path = pretrained_model_name_or_path
        if attention is not None:
            config._attn_implementation = attention
        return config

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name not in extra:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return extra[name]

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and _public(other) == _public(self)

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # its values change

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def _values(self) -> dict[str, Any]:
        """The values that are set, as keys of config.json."""
        skipped = ("output_hidden_states", "output_attentions", "return_dict", "problem_type")
        own = {name: getattr(self, name) for name in self.parameters if name not in skipped}
        own["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        if own["id2label"] == _numbered(DEFAULT_LABELS):
            del own["id2label"]
        if not own.get("use_bidirectional_attention"):
            own.pop("use_bidirectional_attention", None)
        own["architectures"] = self.architectures or []
        return {**self.extra, **own, "model_type": self.model_type}


def model_type_of(config_dict: Mapping[str, Any]) -> str:
    """The family that a parsed config.json describes; of a multimodal Gemma 3, its text part."""
    model_type = config_dict.get("model_type")
    if model_type == "gemma3":
        return "gemma3_text"
    check_model_type(model_type)
    return str(model_type)


def config_file_of(model: str | Path, from_hub: Mapping[str, Any]) -> Path:
    """The config.json of "demo", of a folder or the file itself, or of a Hugging Face id."""
    if isinstance(model, str | Path) and os.path.isfile(model) and Path(model).suffix == ".json":
        return Path(model)
    folder = resolve_checkpoint(model, files=CONFIG_FILES, **from_hub)
    check_holds_model(folder)
    return folder / "config.json"


def _numbered(count: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(count)}


def _dtype_of(value: Any) -> Any:
    """The dtype of torch of that name; another value as it came, which the validation refuses."""
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else value


def _public(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: x for name, x in vars(config).items() if not name.startswith("_")}
