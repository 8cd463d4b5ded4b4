"""What `generate` returns of each step beside the ids: scores, logits, states, attentions."""

from torch import Tensor

from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.transformers_api.models.forward import States
from gemcut.engine.transformers_api.models.generation_config import GenerationConfig

Layers = tuple[Tensor, ...]


class StepOutputs:
    """The outputs that were asked for, one entry a step."""

    def __init__(self, config: GenerationConfig, model_config: ModelConfig) -> None:
        as_object = config.return_dict_in_generate
        self.wants_hidden_states = as_object and config.output_hidden_states
        self.wants_attentions = as_object and config.output_attentions
        self._model_config = model_config
        self.logits: list[Tensor] | None = [] if as_object and config.output_logits else None
        self.scores: list[Tensor] | None = [] if as_object and config.output_scores else None
        self.hidden_states: list[Layers] = []
        self.attentions: list[Layers] = []

    @property
    def wants_states(self) -> bool:
        """Whether steps must go through `forward`: graphs keep no states."""
        return self.wants_hidden_states or self.wants_attentions

    @property
    def scores_so_far(self) -> Layers | None:
        """What stopping criteria are given: the scores of each step, where they are kept."""
        return None if self.scores is None else tuple(self.scores)

    def as_tuples(self) -> dict[str, tuple | None]:
        """Each output by its name, a tuple with an entry a step; None where it is not wanted."""
        return {
            "scores": None if self.scores is None else tuple(self.scores),
            "logits": None if self.logits is None else tuple(self.logits),
            "attentions": tuple(self.attentions) if self.wants_attentions else None,
            "hidden_states": tuple(self.hidden_states) if self.wants_hidden_states else None,
        }

    def add_scores(self, logits: Tensor, scores: Tensor) -> None:
        """Keep the logits and scores [B, V] of a step, where they are wanted."""
        if self.logits is not None:
            self.logits.append(logits)
        if self.scores is not None:
            self.scores.append(scores)

    def add_states(self, states: States, times: int) -> None:
        """Keep the states of a step, each row `times` times."""

        def repeated(layers: Layers) -> Layers:
            if times == 1:
                return layers
            return tuple(x.repeat_interleave(times, dim=0) for x in layers)

        if self.wants_hidden_states and states.hidden is not None:
            self.hidden_states.append(repeated(states.hidden))
        if self.wants_attentions and states.attentions is not None:
            self.attentions.append(
                repeated(tuple(self._seen(i, x) for i, x in enumerate(states.attentions)))
            )

    def _seen(self, layer: int, weights: Tensor) -> Tensor:
        """Weights [B, HQ, T, S] without the columns that a local layer's cache has let go.

        Transformers' keeps the window's last ones before the T new; nothing sees the others.
        """
        window = self._model_config.sliding_window
        if window is None or not self._model_config.is_local(layer):
            return weights
        queries, keys = weights.shape[2:]
        return weights[..., max(0, min(keys - queries, keys - queries - window + 1)) :]
