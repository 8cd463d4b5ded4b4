"""generation_config.json gives an engine and the command line their defaults."""

import json
import shutil

import pytest
from engines import assert_serves, one_line

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.cli import main

SIZES = {"max_batch_size": 2, "dtype": "float32"}


@pytest.fixture
def published(folder, tmp_path):
    """A function that gives the model a generation_config.json, and returns its folder."""
    shutil.copytree(folder, tmp_path / "model")

    def publish(**settings):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
        return tmp_path / "model"

    return publish


@pytest.mark.parametrize(
    ("file", "params"),
    [
        ({}, {}),
        ({"_from_model_config": True, "transformers_version": "5", "pad_token_id": 0}, {}),
        (
            {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
            {"top_k": 64, "top_p": 0.95},
        ),
        ({"top_k": 64, "temperature": 0.5}, {"top_k": 64, "temperature": 0.5}),
        ({"do_sample": True}, {}),
        ({"do_sample": False, "top_k": 64}, {"temperature": 0, "top_k": 64}),
        ({"do_sample": False}, {"temperature": 0}),
        ({"temperature": None, "top_k": None, "min_p": 0.1}, {"min_p": 0.1}),
        (
            {"repetition_penalty": 1.5, "max_new_tokens": 7},
            {"repetition_penalty": 1.5, "max_tokens": 7},
        ),
        ({"num_beams": 1, "typical_p": 1.0, "max_length": 20, "use_cache": True}, {}),
    ],
    ids=str,
)
def test_what_a_file_publishes_is_the_default(published, file, params):
    with Engine.from_pretrained(published(**file), **SIZES) as engine:
        assert engine.get_default_sampling_params() == SamplingParams(**params)


def test_a_call_without_settings_has_them_and_one_with_settings_has_none(published):
    folder = published(do_sample=False, repetition_penalty=1.3, max_new_tokens=9)
    greedy = SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=9)
    chat = [{"role": "user", "content": "It was"}]
    with Engine.from_pretrained(folder, **SIZES) as engine:
        expected = engine.generate("It was", greedy).token_ids
        assert engine.generate("It was").token_ids == expected
        assert engine.generate(["It was"], [None])[0].token_ids == expected
        assert [i for delta in engine.stream("It was") for i in delta.token_ids] == expected
        assert engine.chat(chat).token_ids == engine.chat(chat, greedy).token_ids
        plain = SamplingParams(temperature=0, max_tokens=12)
        assert engine.generate("It was", plain).token_ids != expected
        assert len(engine.generate("It was", plain).token_ids) == 12
        assert len(engine.score("It was").logprobs) > 1


def test_none_takes_no_setting_and_a_folder_has_others(published, tmp_path):
    folder = published(do_sample=False, eos_token_id=[1, 7])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "generation_config.json").write_text('{"top_k": 3, "eos_token_id": 9}')
    for name, params, eos in (
        ("auto", SamplingParams(temperature=0), {1, 7}),
        ("none", SamplingParams(), {1, 7}),
        (tmp_path / "other", SamplingParams(top_k=3), {1, 9}),
        (str(tmp_path / "other"), SamplingParams(top_k=3), {1, 9}),
    ):
        with Engine.from_pretrained(folder, generation_config=name, **SIZES) as engine:
            assert engine.get_default_sampling_params() == params
            assert engine._builder.eos_ids == eos
    for name in ("vllm", tmp_path, 5):
        with pytest.raises(ValueError, match="generation_config") as error:
            Engine.from_pretrained(folder, generation_config=name, **SIZES)
        one_line(error)


def test_default_params_hold_where_nothing_is_published(published):
    mine = SamplingParams(temperature=0.3, top_p=0.5, max_tokens=3)
    with Engine.from_pretrained(
        published(max_new_tokens=5), default_params=mine, **SIZES
    ) as engine:
        assert engine.get_default_sampling_params() == SamplingParams(
            temperature=0.3, top_p=0.5, max_tokens=5
        )
    with Engine.from_pretrained(published(top_k=9), default_params=mine, **SIZES) as engine:
        assert engine.get_default_sampling_params() == SamplingParams(top_k=9, max_tokens=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_k", 1.5),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("do_sample", "yes"),
    ],
)
def test_a_value_out_of_range_is_refused_before_weights(published, name, value):
    folder = published(**{name: value})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"generation_config.json: {name} ") as error:
        Engine.from_pretrained(folder, **SIZES)
    one_line(error)


def test_one_warning_names_what_is_not_acted_upon(published):
    folder = published(top_kk=5, no_repeat_ngram_size=3, num_beams=4, top_k=5)
    with (
        pytest.warns(UserWarning, match="does not act on") as found,
        Engine.from_pretrained(folder, **SIZES) as engine,
    ):
        assert_serves(engine)
    (warning,) = [one for one in found if "generation_config" in str(one.message)]
    assert str(warning.message).endswith("'top_kk', 'no_repeat_ngram_size', 'num_beams'")
    assert warning.filename == __file__


def test_the_command_line_says_it_in_one_line(published, capsys):
    folder = published(top_kk=5, num_beams=4)
    assert main(["generate", "a", "--model", str(folder), "--max-tokens", "1"]) == 0
    message = "an engine does not act on 'top_kk', 'num_beams'"
    assert capsys.readouterr().err == f"gemcut: warning: generation_config.json: {message}\n"


def output(capsys, *arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_the_command_line_takes_them_where_an_option_is_not_given(published, capsys):
    folder = published(do_sample=False, repetition_penalty=1.3, max_new_tokens=9)
    with Engine.from_pretrained(folder, **SIZES) as engine:
        params = engine.get_default_sampling_params()
        expected = engine.generate("It was", params).text
        params.max_tokens = 4
        shorter = engine.generate("It was", params).text
    command = ("generate", "It was", "--model", str(folder), "--dtype", "float32")
    assert output(capsys, *command) == f"{expected}\n"
    assert output(capsys, *command, "--max-tokens", "4") == f"{shorter}\n"
    drawn = (*command, "--seed", "3", "--max-tokens", "20")
    plain = output(capsys, *drawn, "--generation-config", "none")
    named = ("--temperature", "0.8", "--top-p", "0.95", "--repetition-penalty", "1")
    assert output(capsys, *drawn, *named) == plain != output(capsys, *drawn)
