"""The outputs of the documented classes: mapping, index, tuple, and logits on request."""

import pytest
from documented_twins import BATCH, LENGTH, VOCAB, random_ids, twins

from gemcut.engine.transformers_api import AutoModel

IDS = random_ids()


@pytest.fixture
def model():
    return twins("AutoModelForCausalLM", "gemma2")[1]


class TestOutputs:
    def test_mapping_index_and_tuple(self, model):
        output = model(IDS, labels=IDS)
        assert output.keys() == ["loss", "logits", "past_key_values"]
        loss, logits, cache = output.to_tuple()
        assert list(output) == output.keys()
        assert loss is output.loss is output["loss"] is output[0]
        assert logits is output.logits is output[1] is output.get("logits")
        assert cache is output.past_key_values is output.to_tuple()[-1]
        assert output[:2] == (loss, logits)
        assert "hidden_states" not in output
        assert output.hidden_states is None
        assert len(output) == 3
        assert dict(**output)["loss"] is loss
        with pytest.raises(KeyError):
            output["hidden_states"]
        with pytest.raises(AttributeError, match="it has loss, logits, past_key_values"):
            _ = output.logit
        assert "logits=<Tensor [3, 20, 97]>" in repr(output)

    def test_tuples(self, model):
        loss, logits, _ = model(IDS, labels=IDS, return_dict=False)
        assert loss.shape == ()
        assert logits.shape == (BATCH, LENGTH, VOCAB)
        (states,) = AutoModel.from_config(model.config)(IDS, use_cache=False, return_dict=False)
        assert states.shape == (BATCH, LENGTH, model.config.hidden_size)

    def test_a_loss_alone_computes_no_logits_for_the_output(self, model, monkeypatch):
        output = model(IDS, labels=IDS)
        asked = []
        monkeypatch.setattr(model._gemma, "logits", lambda h: asked.append(len(h)) or h)
        assert "on request" in repr(output)
        assert asked == []
        _ = output.logits, output.logits
        assert asked == [BATCH * LENGTH]
