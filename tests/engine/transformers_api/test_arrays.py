"""Arrays in and out of the documented classes: torch, NumPy, jax and DLPack."""

import numpy as np
import pytest
import torch
from documented_twins import BATCH, LENGTH, MASKS, random_ids, twins

from gemcut.engine.transformers_api import AutoModel

IDS = random_ids()


@pytest.fixture
def model():
    return twins("AutoModelForCausalLM", "gemma2")[1]


@pytest.fixture
def jnp():
    return pytest.importorskip("jax.numpy")


class Foreign:
    """An array that only lends its memory."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class TestArrays:
    def test_numpy(self, model):
        expected = model(IDS, labels=IDS, output_hidden_states=True)
        ids = IDS.numpy().astype(np.int32)
        mask = np.ones((BATCH, LENGTH), dtype=np.int64)
        actual = model(ids, mask, labels=ids, output_hidden_states=True)
        for name in ("loss", "logits"):
            assert isinstance(actual[name], np.ndarray)
            np.testing.assert_array_equal(actual[name], expected[name])
        for one, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
            np.testing.assert_array_equal(one, other)
        new = model.generate(ids, max_new_tokens=4)
        assert isinstance(new, np.ndarray)
        np.testing.assert_array_equal(new, model.generate(IDS, max_new_tokens=4))

    def test_numpy_has_no_bfloat16(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        low = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        states = low(IDS.numpy()).last_hidden_state
        assert states.dtype == np.float32
        np.testing.assert_array_equal(states, low(IDS).last_hidden_state.float())

    def test_jax(self, model, jnp):
        import jax

        expected = model(IDS, attention_mask=MASKS["left"], labels=None)
        ids, mask = jnp.asarray(IDS.numpy()), jnp.asarray(MASKS["left"].numpy())
        actual = model(ids, attention_mask=mask)
        assert isinstance(actual.logits, jax.Array)
        by_bool = model(ids, attention_mask=mask.astype(bool), position_ids=jnp.arange(20)[None])
        np.testing.assert_array_equal(by_bool.logits, actual.logits)
        np.testing.assert_array_equal(actual.logits, expected.logits)
        cache = model.init_cache(BATCH, 40)
        model(ids, past_key_values=cache)
        assert cache.get_seq_length() == LENGTH
        new = model.generate(ids, max_new_tokens=4)
        assert isinstance(new, jax.Array)
        np.testing.assert_array_equal(new, model.generate(IDS, max_new_tokens=4))

    def test_jax_bfloat16(self, model, jnp, tmp_path):
        model.save_pretrained(tmp_path)
        low = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        states = low(jnp.asarray(IDS.numpy())).last_hidden_state
        assert states.dtype == jnp.bfloat16
        embeds = jnp.asarray(low.get_input_embeddings()(IDS).float().numpy(), dtype=jnp.bfloat16)
        again = low(inputs_embeds=embeds).last_hidden_state
        np.testing.assert_array_equal(states.astype("float32"), again.astype("float32"))

    def test_anything_with_dlpack(self, model):
        """What cannot take DLPack gets tensors."""
        logits = model(Foreign(IDS)).logits
        assert torch.equal(logits, model(IDS).logits)

    def test_read_only_memory_is_not_written_to(self, model):
        ids = IDS.numpy().copy()
        ids.flags.writeable = False
        np.testing.assert_array_equal(model(ids).logits, model(IDS).logits)

    def test_flax_masks_have_one_entry_for_each_place_of_the_cache(self, model):
        cache = model.init_cache(BATCH, 30)
        mask = torch.ones(BATCH, 30, dtype=torch.int64)
        mask[:, :3] = 0
        actual = model(IDS, attention_mask=mask, past_key_values=cache).logits
        assert torch.equal(actual, model(IDS, attention_mask=mask[:, :LENGTH]).logits)
