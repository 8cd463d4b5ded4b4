"""generation_config.json and the ids that end a generation."""

import json

import pytest

from gemcut.engine.config.generation_file import read_generation_config, stop_token_ids
from gemcut.engine.config.model_config import ModelConfig


def test_stop_tokens_are_the_union(saved):
    config = ModelConfig.from_file(saved)
    (saved / "generation_config.json").unlink(missing_ok=True)
    assert read_generation_config(saved) == {}
    assert stop_token_ids(saved, config) == (1,)
    for value, expected in ((5, (1, 5)), ([7, 1, 5], (1, 7, 5)), (None, (1,))):
        (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert stop_token_ids(saved, config) == expected
    for value in (97, -1, "1", [True]):
        (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id"):
            stop_token_ids(saved, config)
    (saved / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json: not JSON"):
        stop_token_ids(saved, config)
