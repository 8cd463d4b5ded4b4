"""The outputs of a model's call: objects that also work as a mapping and as a tuple."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar


class ModelOutput:
    """Named values in a fixed order; those that are None are left out.

    `output.logits`, `output["logits"]`, `output[0]`, `loss, logits = output[:2]`,
    `output.to_tuple()` and `**output` all work; a loop runs over the names, as over those of a
    dictionary.  `cache` is another name of `past_key_values`.  A value given as a function is
    computed when it is first asked for, or when the output is copied or pickled.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ()
    OTHER_NAMES: ClassVar[dict[str, str]] = {"cache": "past_key_values"}

    def __init__(self, **values: Any) -> None:
        assert set(values) <= set(self.FIELDS)
        self._values = {name: values.get(name) for name in self.FIELDS}

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        name = self.OTHER_NAMES.get(name, name)
        if name not in values:
            known = ", ".join(self.FIELDS)
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {known}")
        if isinstance(value := values[name], Callable):
            value = values[name] = value()
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.OTHER_NAMES.get(name, name)
        if own in self.FIELDS:
            self._values[own] = value
        else:
            super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __getstate__(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.FIELDS}
        return vars(self) | {"_values": values}

    def keys(self) -> list[str]:
        """The names of the values that are not None, in order."""
        return [name for name, value in self._values.items() if value is not None]

    def values(self) -> list[Any]:
        """The values that are not None."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Names and values."""
        return list(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, as a tuple."""
        return tuple(self.values())

    def get(self, name: str, default: Any = None) -> Any:
        """The value of that name, or the default."""
        value = getattr(self, name) if name in self else None
        return default if value is None else value

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, name: object) -> bool:
        return self.OTHER_NAMES.get(str(name), name) in self.keys()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_show(value)}" for name, value in self._values.items())
        return f"{type(self).__name__}({shown})"


def _show(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape:
        return f"<{type(value).__name__} {list(shape)}>"
    if isinstance(value, tuple):
        return f"<{len(value)} of {_show(value[0])}>"
    return "<on request>" if callable(value) else repr(value)


class BaseModelOutputWithPast(ModelOutput):
    """last_hidden_state [B, T, D]; L + 1 hidden_states; L attentions [B, HQ, T, S]."""

    FIELDS = ("last_hidden_state", "past_key_values", "hidden_states", "attentions")


class CausalLMOutputWithPast(ModelOutput):
    """logits [B, kept, V] float32; with labels, a loss."""

    FIELDS = ("loss", "logits", "past_key_values", "hidden_states", "attentions")


class SequenceClassifierOutputWithPast(ModelOutput):
    """logits [B, num_labels]."""

    FIELDS = ("loss", "logits", "past_key_values", "hidden_states", "attentions")


class TokenClassifierOutput(ModelOutput):
    """logits [B, T, num_labels]."""

    FIELDS = ("loss", "logits", "hidden_states", "attentions")


class GenerateDecoderOnlyOutput(ModelOutput):
    """sequences [B, T]; of each new token: scores and logits [B, V], attentions, hidden_states."""

    FIELDS = ("sequences", "scores", "logits", "attentions", "hidden_states", "past_key_values")
