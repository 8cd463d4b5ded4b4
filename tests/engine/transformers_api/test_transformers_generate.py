"""`generate` beside that of transformers: tokens, padding, settings, caches."""

import pytest
import torch
from documented_twins import BATCH, MASKS, VOCAB, assert_close, random_ids, twins
from engines import replayed_steps
from random_models import MODEL_TYPES
from transformers import (
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TextStreamer,
)

from gemcut.engine.execution.runner import Runner
from gemcut.engine.execution.slot_state import SlotState
from gemcut.engine.transformers_api import DynamicCache, GenerationConfig, StaticCache

by_family = pytest.mark.parametrize("model_type", MODEL_TYPES)
LENGTH = 12
GREEDY = {"max_new_tokens": 30, "do_sample": False}


def untied(model_type: str = "gemma2"):
    """Twins with untied heads and no EOS: tied random models repeat one token for ever."""
    return twins("AutoModelForCausalLM", model_type, tie_word_embeddings=False, eos_token_id=None)


@pytest.fixture
def pair():
    return untied()


def mask_of(name: str) -> dict:
    return {} if MASKS[name] is None else {"attention_mask": MASKS[name][:, -LENGTH:]}


def with_eos(model, ids, **settings) -> int:
    """A token that ends some rows early, and others not."""
    new = model.generate(ids, **GREEDY, **settings)[:, ids.shape[1] :]
    return int(new[0, 4])


@by_family
@pytest.mark.parametrize("mask", ["none", "left", "holes"])
def test_greedy_tokens(model_type, mask):
    theirs, ours = untied(model_type)
    ids = random_ids(length=LENGTH)
    expected, actual = (m.generate(ids, **mask_of(mask), **GREEDY) for m in (theirs, ours))
    assert torch.equal(actual, expected)
    assert all(len(row.unique()) > 10 for row in actual[:, LENGTH:])
    eos = with_eos(ours, ids, **mask_of(mask))
    given = {**mask_of(mask), **GREEDY, "eos_token_id": eos, "pad_token_id": 0}
    expected, actual = (m.generate(ids, **given) for m in (theirs, ours))
    assert torch.equal(actual, expected)
    assert (actual == 0).any() or len(set(map(int, (actual == eos).sum(1)))) == 1


@by_family
def test_padding_on_the_right_changes_nothing(model_type):
    """Transformers warns, and samples the first token from the state of a pad."""
    _, ours = untied(model_type)
    ids = random_ids(length=LENGTH)
    mask = torch.ones_like(ids)
    mask[0, -5:], mask[1, -8:] = 0, 0
    padded = ours.generate(ids, attention_mask=mask, **GREEDY)
    for row, real in enumerate((7, 4, 12)):
        alone = ours.generate(ids[row : row + 1, :real], **GREEDY)
        assert torch.equal(padded[row, LENGTH:], alone[0, real:])


def test_pads_are_found_where_no_mask_is_given(pair):
    ids = random_ids(length=LENGTH)
    ids[0, :4], ids[1, :2] = 0, 0
    expected, actual = (m.generate(ids, pad_token_id=0, **GREEDY) for m in pair)
    assert torch.equal(actual, expected)
    # a pad that is also an EOS masks nothing
    given = {"pad_token_id": 0, "eos_token_id": 0, **GREEDY}
    expected, actual = (m.generate(ids, **given) for m in pair)
    assert torch.equal(actual, expected)


def test_lengths(pair):
    ids = random_ids(length=LENGTH)
    for given in ({"max_length": 20}, {"max_new_tokens": 3}, {}, {"max_length": LENGTH + 1}):
        expected, actual = (m.generate(ids, **given) for m in pair)
        assert torch.equal(actual, expected)
    eos = with_eos(pair[1], ids)
    for given in ({"min_new_tokens": 9}, {"min_length": LENGTH + 9}):
        settings = {**GREEDY, **given, "eos_token_id": eos}
        expected, actual = (m.generate(ids, **settings) for m in pair)
        assert torch.equal(actual, expected)


def test_several_ends(pair):
    ids = random_ids(length=LENGTH)
    ends = pair[1].generate(ids, **GREEDY)[:, LENGTH + 6].tolist()
    given = {**GREEDY, "eos_token_id": ends, "pad_token_id": 1}
    expected, actual = (m.generate(ids, **given) for m in pair)
    assert torch.equal(actual, expected)


def test_repetition_penalty_and_processors(pair):
    ids = random_ids(length=LENGTH)
    banned = pair[1].generate(ids, **GREEDY)[:, LENGTH : LENGTH + 3].flatten().tolist()
    for given in (
        {"repetition_penalty": 1.7},
        {"logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor(banned)])},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(LENGTH + 5)])},
        {"stopping_criteria": [lambda ids, scores: ids[:, -1] % 7 == 0]},
    ):
        # without any end transformers fills up rows that a criterion has ended with more tokens
        settings = {**GREEDY, **given, "pad_token_id": 0, "eos_token_id": VOCAB - 1}
        expected, actual = (m.generate(ids, **settings) for m in pair)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("mask", ["none", "left", "holes"])
def test_raw_logits_of_every_step(pair, mask):
    ids = random_ids(length=LENGTH)
    settings = {**GREEDY, **mask_of(mask), "output_logits": True, "return_dict_in_generate": True}
    expected, actual = (m.generate(ids, **settings) for m in pair)
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(actual.logits) == len(expected.logits) == 30
    assert_close(torch.stack(actual.logits), torch.stack(expected.logits))


def test_sampling_follows_torchs_seed_and_the_distribution(pair):
    _, ours = pair
    ids = random_ids(1, LENGTH)
    drawn = {"do_sample": True, "max_new_tokens": 1, "temperature": 0.7, "top_k": 5}
    torch.manual_seed(3)
    first = ours.generate(ids, num_return_sequences=1000, **drawn)
    torch.manual_seed(3)
    assert torch.equal(ours.generate(ids, num_return_sequences=1000, **drawn), first)
    assert not torch.equal(ours.generate(ids, num_return_sequences=1000, **drawn), first)
    assert torch.equal(first[:, :LENGTH], ids.expand(1000, -1))
    # 1000 draws of five tokens: each share within five standard deviations
    best = ours(ids).logits[0, -1].topk(5)
    shares = first[:, -1].bincount(minlength=VOCAB)[best.indices] / 1000
    exact = (best.values / 0.7).softmax(-1)
    assert shares.sum() == 1
    assert ((shares - exact).abs() <= 5 * (exact * (1 - exact) / 1000).sqrt()).all()


def test_several_sequences_of_each_prompt(pair):
    _, ours = pair
    ids = random_ids(length=LENGTH)
    given = {"do_sample": True, "top_k": 1, "max_new_tokens": 20, **mask_of("left")}
    repeated = ours.generate(ids, num_return_sequences=3, **given)  # one token to choose among
    assert torch.equal(repeated, ours.generate(ids, **given).repeat_interleave(3, dim=0))
    cache = ours.init_cache(3 * BATCH, LENGTH + 20)
    assert torch.equal(
        ours.generate(ids, num_return_sequences=3, past_key_values=cache, **given), repeated
    )
    assert cache.get_seq_length() == LENGTH + 19
    spread = ours.generate(ids, num_return_sequences=4, **given | {"top_k": 0, "temperature": 5.0})
    assert len({tuple(row) for row in spread.tolist()}) == 4 * BATCH


@by_family
@pytest.mark.parametrize("make", [DynamicCache, StaticCache, lambda: StaticCache(None, 90)])
def test_a_cache_of_the_callers_holds_all_but_the_newest(model_type, make):
    theirs, ours = untied(model_type)
    ids, cache = random_ids(1, LENGTH), make()
    first = ours.generate(ids, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == first.shape[1] - 1
    assert torch.equal(first, theirs.generate(ids, **GREEDY))
    longer = torch.cat([first, random_ids(1, 3, seed=5)], dim=1)
    settings = {**GREEDY, "attention_mask": torch.ones_like(longer)}  # 0 is a token here
    again = ours.generate(longer, past_key_values=cache, **settings)
    assert torch.equal(again, theirs.generate(longer, **settings))


def test_a_cache_that_forward_has_filled(pair):
    theirs, ours = pair
    ids = random_ids(length=LENGTH)
    results = []
    for model in (theirs, ours):
        past = model(ids[:, :8], use_cache=True).past_key_values
        results.append(model.generate(ids, past_key_values=past, **GREEDY))
    assert torch.equal(*results)


def test_embeddings_give_new_ids_alone(pair):
    theirs, ours = pair
    embeds = theirs.get_input_embeddings()(random_ids(length=LENGTH))
    for mask in ("none", "left"):
        expected, actual = (
            m.generate(inputs_embeds=embeds, **mask_of(mask), **GREEDY) for m in (theirs, ours)
        )
        assert actual.shape == (BATCH, 30)
        assert torch.equal(actual, expected)


def test_streamers_get_what_transformers_gives_them(pair, twin, capsys):
    class Recorder:
        def __init__(self):
            self.seen = []

        def put(self, ids):
            self.seen.append(ids.tolist())

        def end(self):
            self.seen.append("end")

    records = []
    for model in pair:
        recorder = Recorder()
        model.generate(random_ids(1, LENGTH), streamer=recorder, **GREEDY)
        records.append(recorder.seen)
    assert records[0] == records[1]
    records = []
    for model in pair:
        model.generate(random_ids(1, LENGTH), streamer=TextStreamer(twin), **GREEDY)
        records.append(capsys.readouterr().out)
    assert records[0] == records[1] != ""


def test_a_rows_tokens_are_those_that_it_gets_alone(pair):
    _, ours = pair
    ids, given = random_ids(length=LENGTH), {**GREEDY, **mask_of("left")}
    together = ours.generate(ids, **given)
    for row in range(BATCH):
        mask = given["attention_mask"][row : row + 1]
        alone = ours.generate(ids[row : row + 1], **{**given, "attention_mask": mask})
        assert torch.equal(alone[0], together[row])


def test_steps_replayed_and_read_late_as_on_a_gpu(pair):
    """With the stand-in for CUDA graphs: rows end at different times, and one step runs ahead."""
    _, ours = pair
    ids = random_ids(length=LENGTH)
    settings = {**GREEDY, "eos_token_id": with_eos(ours, ids), "pad_token_id": 0}
    expected = ours.generate(ids, **settings)
    for cache in (StaticCache(), StaticCache()):
        cache.prepare(ours._gemma.config, BATCH, 60, ours.device, ours.dtype)
        state = SlotState(BATCH, VOCAB, ours.device)
        cache.runner = Runner(replayed_steps(ours._gemma, cache.kv, state), None)
        cache.runner.depth = 1
        assert torch.equal(ours.generate(ids, past_key_values=cache, **settings), expected)
        assert cache.get_seq_length() == expected.shape[1] - 1
        assert cache.runner.steps.captures > 0


def test_processors_see_each_token_where_steps_could_run_ahead(pair):
    """On a GPU too, a step that shows its logits begins when all ids before it are known."""
    _, ours = pair
    ids = random_ids(1, LENGTH)
    cache, seen = StaticCache(), []
    cache.prepare(ours._gemma.config, 1, 60, ours.device, ours.dtype)
    state = SlotState(1, VOCAB, ours.device)
    cache.runner = Runner(replayed_steps(ours._gemma, cache.kv, state), None)
    cache.runner.depth = 1

    def note(ids, logits):
        seen.append(ids.shape[1])
        return logits

    out = ours.generate(
        ids,
        past_key_values=cache,
        logits_processor=[note],
        return_dict_in_generate=True,
        output_logits=True,
        **GREEDY,
    )
    new = out.sequences.shape[1] - LENGTH
    assert seen == list(range(LENGTH, LENGTH + new))
    assert len(out.logits) == new


def test_memory_and_graphs_outlive_a_call(pair):
    _, ours = pair
    ids = random_ids(length=LENGTH)
    ours.generate(ids, max_new_tokens=5)
    (kept,) = ours._spare_caches
    before = kept.kv, kept.runner
    assert torch.equal(
        ours.generate(ids, max_new_tokens=9)[:, : LENGTH + 5], ours.generate(ids, max_new_tokens=5)
    )
    assert (kept.kv, kept.runner) == before


def test_settings_come_from_the_call_the_object_the_file_and_the_default(pair, tmp_path):
    _, ours = pair
    ids = random_ids(1, LENGTH)
    ours.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"max_new_tokens": 4, "eos_token_id": [1, 9], "pad_token_id": 3, "_from": "x"}'
    )
    model = type(ours).from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == [1, 9]
    assert model.generate(ids).shape[1] == LENGTH + 4
    with pytest.warns(UserWarning, match=r"^max_length=18 has no effect beside max_new_tokens=4"):
        assert model.generate(ids, max_length=LENGTH + 6).shape[1] == LENGTH + 4
    assert model.generate(ids, GenerationConfig(max_new_tokens=2)).shape[1] == LENGTH + 2
    assert model.generate(ids, GenerationConfig(max_new_tokens=2), max_new_tokens=3).shape[1] == 15
    # an object that names no EOS has the model's
    model.generation_config.eos_token_id = int(model.generate(ids)[0, LENGTH + 1])
    assert model.generate(ids, GenerationConfig(max_new_tokens=4)).shape[1] == LENGTH + 2
    model.generation_config.eos_token_id = [1, 9]
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(tmp_path / "again")
    again = GenerationConfig.from_pretrained(tmp_path / "again")
    assert (again.max_new_tokens, again.eos_token_id) == (8, [1, 9])
    assert again.extra == {"_from": "x"}
