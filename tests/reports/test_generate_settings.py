"""Settings of `generate` beside those of transformers: where they come from, which act or not."""

import copy
import json

import pytest
import torch
import transformers
from documented_twins import VOCAB, assert_close, random_ids, twins

from gemcut.engine import AutoModelForCausalLM, GenerationConfig
from gemcut.engine.transformers_api import StaticCache
from gemcut.engine.transformers_api.models.generation_config import NAMES

LENGTH = 10
FILE = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": [5, 6], "temperature": 0.5}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Transformers' model and gemcut's, loaded from one folder with a generation_config.json."""
    theirs, _ = twins("AutoModelForCausalLM", "gemma3_text", tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(FILE | {"eos_token_id": [1, 9]}))
    return (
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ),
        AutoModelForCausalLM.from_pretrained(folder),
    )


@pytest.fixture
def own(pair):
    """Both models' own settings, which a test may change."""
    before = [copy.deepcopy(model.generation_config) for model in pair]
    yield [model.generation_config for model in pair]
    for model, config in zip(pair, before, strict=True):
        model.generation_config = config


def same(pair, *given, **settings) -> torch.Tensor:
    """What both models generate; `given`: the settings of a config object."""
    ids = random_ids(2, LENGTH)
    classes = transformers.GenerationConfig, GenerationConfig
    expected, actual = (
        model.generate(ids, *(config_class(**x) for x in given), **settings)
        for model, config_class in zip(pair, classes, strict=True)
    )
    assert torch.equal(actual, expected)
    return actual


class TestWhereSettingsComeFrom:
    def test_the_file_is_the_default(self, pair):
        assert same(pair).shape[1] == LENGTH + 6
        assert not {5, 6} & set(same(pair)[:, LENGTH:].flatten().tolist())

    def test_a_config_lays_over_the_file(self, pair, own):
        for config in own:
            config.update(do_sample=True, top_k=1)  # one token to choose among
        torch.manual_seed(0)
        assert same(pair, {"max_new_tokens": 3}).shape[1] == LENGTH + 3
        drawn = pair[1].generate(
            random_ids(1, LENGTH),
            GenerationConfig(max_new_tokens=1, top_k=40),
            num_return_sequences=200,
            temperature=9.0,
        )
        assert len(set(drawn[:, -1].tolist())) > 10  # it samples, as the file says
        assert not {5, 6} & set(drawn[:, -1].tolist())

    def test_a_call_comes_first(self, pair):
        assert same(pair, {"max_new_tokens": 3}, max_new_tokens=4).shape[1] == LENGTH + 4
        same(pair, {"suppress_tokens": [7]}, suppress_tokens=[8, 9])
        same(pair, suppress_tokens=None)

    def test_max_new_tokens_decides_wherever_it_is_from(self, pair):
        with pytest.warns(UserWarning, match="^max_length=30 has no effect beside max_new_tokens"):
            assert same(pair, max_length=30).shape[1] == LENGTH + 6
        assert same(pair, max_length=LENGTH + 9, max_new_tokens=None).shape[1] == LENGTH + 9

    def test_the_files_ends_are_in_place_of_the_configs(self, pair):
        assert pair[1].generation_config.eos_token_id == [1, 9]

    def test_transformers_own_object_is_taken(self, pair, own):
        given = transformers.GenerationConfig(max_new_tokens=4, no_repeat_ngram_size=1)
        ids = random_ids(2, LENGTH)
        expected, actual = (model.generate(ids, given) for model in pair)
        assert torch.equal(actual, expected)
        pair[1].generation_config = given
        assert torch.equal(
            pair[1].generate(ids, eos_token_id=[1, 9], suppress_tokens=[5, 6]), expected
        )
        with pytest.raises(ValueError, match="is no GenerationConfig"):
            pair[1].generate(ids, {"max_new_tokens": 3})

    def test_a_random_pile_of_settings(self, pair, own):
        generator = torch.Generator().manual_seed(0)

        def some() -> dict:
            values = {
                "max_new_tokens": [None, 2, 5],
                "max_length": [None, LENGTH + 4],
                "min_new_tokens": [None, 3],
                "repetition_penalty": [None, 1.0, 1.6],
                "no_repeat_ngram_size": [None, 0, 1],
                "suppress_tokens": [None, [7, 8, 9]],
                "eos_token_id": [None, 4, list(range(30))],
                "pad_token_id": [None, 3],
                "temperature": [None, 1.0],
            }
            picked = {}
            for name, choice in values.items():
                if torch.rand((), generator=generator) < 0.4:
                    picked[name] = choice[int(torch.randint(len(choice), (), generator=generator))]
            return picked

        for _ in range(25):
            of_model = some()
            for config in own:
                config.update(**of_model)
            call = some() | {"max_length": LENGTH + 5}
            same(pair, some(), **call)


class TestSettingsOfTheModel:
    """What is assigned to model.generation_config acts, or is refused."""

    def test_they_act(self, pair, own):
        before = same(pair)
        for config in own:
            config.no_repeat_ngram_size, config.suppress_tokens = 1, before[0, LENGTH:].tolist()
        assert not torch.equal(same(pair), before)

    def test_beams_are_refused_by_the_next_call(self, pair, own):
        own[1].num_beams = 4
        with pytest.raises(
            NotImplementedError, match=r"^num_beams=4 is not supported; leave it out$"
        ):
            pair[1].generate(random_ids(1, LENGTH))

    def test_a_typo_is_refused_at_once(self, own):
        with pytest.raises(TypeError, match="GenerationConfig takes no 'temprature'; did you mean"):
            own[1].temprature = 0.7
        with pytest.raises(TypeError, match="takes no 'max_tokens'"):
            GenerationConfig(max_tokens=3)
        with pytest.raises(AttributeError, match="no 'temprature'"):
            own[1].temprature  # noqa: B018


def test_every_setting_of_transformers_has_a_name_here():
    theirs = {name for name in vars(transformers.GenerationConfig()) if name[0] != "_"}
    assert theirs - {"transformers_version"} <= NAMES
    config = GenerationConfig()
    assert all(getattr(config, name) is None for name in theirs & NAMES)


def test_none_is_unset_everywhere(pair):
    expected = same(pair)
    model, ids = pair[1], random_ids(2, LENGTH)
    for name in sorted(NAMES - {"suppress_tokens", "max_new_tokens", "eos_token_id"}):
        assert torch.equal(model.generate(ids, **{name: None}), expected), name


def test_a_sampling_setting_of_none_filters_nothing(pair):
    ids = random_ids(1, LENGTH)
    asked = {"do_sample": True, "return_dict_in_generate": True, "output_scores": True}
    out = pair[1].generate(ids, top_k=None, top_p=None, temperature=None, **asked)
    assert int(out.scores[0].isfinite().sum()) == VOCAB - 2  # but for the file's bans
    default = pair[1].generate(ids, temperature=2.0, **asked)
    assert int(default.scores[0].isfinite().sum()) == 50


@pytest.mark.parametrize("end", [9, [9], torch.tensor(9), torch.tensor([9, 1]), None])
def test_ends_of_every_kind(pair, end):
    same(pair, eos_token_id=end, pad_token_id=0)


def test_rows_are_filled_up_with_the_first_end(pair):
    ends = [*pair[1].generate(random_ids(2, LENGTH), max_new_tokens=3)[0, -1:].tolist(), 0]
    padded = same(pair, eos_token_id=ends, max_new_tokens=8)
    assert padded[0, LENGTH + 2 :].tolist() == [ends[0]] * 6


def test_an_end_below_zero_ends_nothing_and_is_said(pair):
    with pytest.warns(UserWarning, match="^eos_token_id=-1: no token is below 0$"):
        ours = pair[1].generate(random_ids(2, LENGTH), eos_token_id=-1, pad_token_id=0)
    assert torch.equal(ours, same(pair, eos_token_id=None, pad_token_id=0))


def test_end_and_pad_below_zero_are_none(pair, own):
    for config in own:
        config.eos_token_id = config.pad_token_id = -1
    assert same(pair).shape[1] == LENGTH + 6
    stop = {"stopping_criteria": [lambda ids, scores: ids[:, -1] % 2 == 0], "max_new_tokens": 9}
    out = pair[1].generate(random_ids(3, LENGTH), return_dict_in_generate=True, **stop)
    new = random_ids(3, 1, seed=4)
    longer = torch.cat([out.sequences.clamp(min=0), new], dim=1)
    mask = torch.cat([out.sequences >= 0, torch.ones(3, 1, dtype=torch.bool)], dim=1).long()
    cache = out.past_key_values
    actual = pair[1](longer[:, -2:], attention_mask=mask, past_key_values=cache).logits[:, -1:]
    expected = pair[0](longer, attention_mask=mask).logits[:, -1:]
    assert_close(actual, expected)


def test_a_length_that_nobody_set_is_said(pair, own):
    own[1].max_new_tokens = None
    with pytest.warns(
        UserWarning, match="^no length is set: at most 20 new tokens; give max_new_t"
    ):
        assert pair[1].generate(random_ids(1, LENGTH)).shape[1] == LENGTH + 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7}, "temperature=0.7 has no effect without do_sample=True"),
        ({"top_k": 3}, "top_k=3 has no effect without do_sample=True"),
        ({"output_scores": True}, "output_scores=True has no effect without return_dict_in_gen"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 has no effect without beams"),
        ({"max_length": 12, "max_new_tokens": 3}, "max_length=12 has no effect beside"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens=9 is above max_new_tokens=3"),
    ],
)
def test_a_setting_without_effect_is_said_once(pair, settings, message):
    with pytest.warns(UserWarning, match=message) as said:
        same(pair, **settings)
    assert sum("has no effect" in str(w.message) or "is above" in str(w.message) for w in said) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"typical_p": 1.5}, "typical_p 1.5 must be at most 1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size -1 is outside 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be above 0"),
        ({"suppress_tokens": [VOCAB]}, "suppress_tokens 97 is outside 0..96"),
        ({"bad_words_ids": 3}, "bad_words_ids 3 is no list of lists"),
        ({"eos_token_id": "<eos>"}, "eos_token_id '<eos>' is not an integer"),
        ({"suppress_tokens": "x"}, "suppress_tokens 'x' is not an integer"),
        ({"bad_words_ids": [3]}, "bad_words_ids: 3 is no list of token ids"),
        ({"bad_words_ids": [[VOCAB]]}, "bad_words_ids: id 97 is outside"),
        ({"sequence_bias": [3]}, "sequence_bias .* is no list of"),
        ({"forced_eos_token_id": 5, "suppress_tokens": [5]}, "is in suppress_tokens too"),
        ({"do_sample": 1}, "do_sample 1 is neither True nor False"),
        ({"max_time": 0}, "max_time 0 must be above 0"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is for one row, not for 2"),
    ],
)
def test_values_out_of_range_are_one_line(pair, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        pair[1].generate(random_ids(2, LENGTH), **settings)
    assert "\n" not in str(caught.value)


def test_a_config_as_keywords(pair):
    """What an object leaves unset is switched off; transformers 5.24 fails over None."""
    ids = random_ids(2, LENGTH)
    own = pair[1].generation_config.to_dict()
    assert torch.equal(pair[1].generate(ids, **own), same(pair))
    given = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=1).to_dict()
    expected = same(pair, max_new_tokens=3, eos_token_id=1, suppress_tokens=None)
    assert torch.equal(pair[1].generate(ids, **given), expected)


class TestFiles:
    def test_a_missing_file_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match=r"has no generation_config\.json"):
            GenerationConfig.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="nowhere"):
            GenerationConfig.from_pretrained(tmp_path / "nowhere")

    def test_unknown_keys_are_named_once_and_kept(self, tmp_path):
        file = tmp_path / "generation_config.json"
        file.write_text('{"top_k": 3, "foo": 1, "bar": 2, "_from_model_config": true}')
        with pytest.warns(UserWarning, match="nothing here reads 'foo', 'bar'$") as said:
            config = GenerationConfig.from_pretrained(tmp_path)
        assert len(said) == 1
        config.save_pretrained(tmp_path / "again")
        written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
        assert written == json.loads(file.read_text())

    def test_what_is_saved_is_read_here_and_there(self, tmp_path):
        config = GenerationConfig(top_k=3, eos_token_id=torch.tensor([1, 9]), do_sample=True)
        config.sequence_bias = {(3, 4): -2.0}
        config.save_pretrained(tmp_path)
        again = GenerationConfig.from_pretrained(tmp_path, top_p=0.5)
        theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
        assert (again.top_k, again.eos_token_id, again.top_p) == (3, [1, 9], 0.5)
        assert (theirs.top_k, theirs.eos_token_id) == (3, [1, 9])
        assert again.to_dict()["temperature"] is None
        assert again.update(top_k=4, foo=1) == {"foo": 1}
        assert again.top_k == 4
        assert copy.deepcopy(again) == again != GenerationConfig()


def test_a_long_max_length_takes_memory_as_it_goes(pair):
    ids = random_ids(1, LENGTH)
    cache = StaticCache()
    sizes = []

    def note(ids, scores):
        sizes.append(cache.kv.max_seq_len)
        return ids.shape[1] >= 1300

    settings = {"max_length": 131072, "max_new_tokens": None, "eos_token_id": None}
    long = pair[1].generate(ids, past_key_values=cache, stopping_criteria=[note], **settings)
    assert long.shape[1] == 1300
    assert sizes[0] < 1300 <= sizes[-1] < 3000
    fixed = StaticCache(max_cache_len=1400)
    again = pair[1].generate(ids, past_key_values=fixed, max_new_tokens=1290, eos_token_id=None)
    assert torch.equal(again, long)


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True, "top_p": 0.5}],
    ids=str,
)
def test_the_mode_and_the_validity_of_settings(settings):
    ours, theirs = GenerationConfig(**settings), transformers.GenerationConfig(**settings)
    assert ours.get_generation_mode() == theirs.get_generation_mode().value
    for config in (ours, theirs):
        config.validate(strict=True)


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"num_return_sequences": 2}], ids=str)
def test_settings_out_of_range(wrong):
    (name, value), ours, theirs = (
        *wrong.items(),
        GenerationConfig(),
        transformers.GenerationConfig(),
    )
    for config in (ours, theirs):
        setattr(config, name, value)
        with pytest.raises(ValueError, match=name):
            config.validate()


@pytest.mark.parametrize("idle", [{"temperature": 0.5}, {"top_k": 5}, {"length_penalty": 2.0}])
def test_settings_without_effect(idle):
    ours, theirs = GenerationConfig(**idle), transformers.GenerationConfig(**idle)
    for config in (ours, theirs):
        with pytest.raises(ValueError, match=next(iter(idle))):
            config.validate(strict=True)
    with pytest.warns(UserWarning, match="has no effect without"):
        ours.validate()


def test_modes_that_are_not_there():
    for config in (GenerationConfig(num_beams=2), GenerationConfig(num_beams=2, do_sample=True)):
        with pytest.raises(NotImplementedError, match="beams and assistant models"):
            config.get_generation_mode()
