"""Calls as programs written for vLLM make them: names, forms of prompts, batches of chats."""

import asyncio

import numpy as np
import pytest
import torch
from engines import assert_serves, one_line

from gemcut.engine import Engine, SamplingParams, TextPrompt, TokensPrompt
from gemcut.engine.checkpoints import hub

PARAMS = SamplingParams(temperature=0, max_tokens=4)
CHAT = [{"role": "user", "content": "The children"}]


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.from_pretrained(folder, max_batch_size=3, dtype="float32") as engine:
        yield engine


def ids(outputs):
    """The prompts and the new tokens of outputs, a list or a single one."""
    return [(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]


def test_both_names_of_an_argument_mean_it(engine):
    expected = ids(engine.generate(["It was", "Once"], PARAMS))
    assert ids(engine.generate(prompts=["It was", "Once"], sampling_params=PARAMS)) == expected
    assert ids(engine.generate(["It was", "Once"], sampling_params=PARAMS)) == expected
    assert ids(engine.generate(prompts=["It was", "Once"], params=[PARAMS] * 2)) == expected
    assert ids(asyncio.run(engine.agenerate(prompts="It was", sampling_params=PARAMS))) == [
        expected[0]
    ]
    streamed = [id_ for d in engine.stream("It was", sampling_params=PARAMS) for id_ in d.token_ids]
    assert streamed == expected[0][1]
    answers = ids(engine.chat(CHAT, PARAMS))
    assert ids(engine.chat(messages=CHAT, sampling_params=PARAMS, use_tqdm=False)) == answers


@pytest.mark.parametrize(
    "both",
    [{"prompt": "a", "prompts": "a"}, {"params": PARAMS, "sampling_params": PARAMS}],
    ids=str,
)
def test_both_names_at_once_are_refused(engine, both):
    with pytest.raises(ValueError, match="are names of one argument: give one of them") as error:
        engine.generate(**({"prompt": "a"} | both))
    one_line(error)
    assert_serves(engine)


def test_a_single_prompt_can_be_read_as_a_list_of_itself(engine):
    output = engine.generate("It was", PARAMS)
    assert output[0] is output
    assert [one.prompt for one in output] == ["It was"]
    (answer,) = engine.chat(CHAT, PARAMS)
    assert answer.outputs[0].text == answer.text
    with pytest.raises(IndexError):
        output[1]


@pytest.mark.parametrize(
    "form",
    [
        lambda text, ids: text,
        lambda text, ids: {"prompt": text},
        lambda text, ids: TextPrompt(prompt=text),
        lambda text, ids: ids,
        lambda text, ids: tuple(ids),
        lambda text, ids: {"prompt_token_ids": ids},
        lambda text, ids: TokensPrompt(prompt_token_ids=ids),
        lambda text, ids: {"prompt_token_ids": np.array(ids)},
        lambda text, ids: np.array(ids),
        lambda text, ids: list(np.array(ids)),
        lambda text, ids: torch.tensor(ids),
        lambda text, ids: list(torch.tensor(ids)),
        lambda text, ids: {"prompt": text, "multi_modal_data": None},
    ],
)
def test_every_form_of_a_prompt_is_the_same_prompt(engine, tokenizer, form):
    prompt = form("It was", tokenizer.encode("It was"))
    expected = ids(engine.generate("It was", PARAMS))
    assert ids(engine.generate(prompt, PARAMS)) == expected
    assert ids(engine.generate([prompt], PARAMS)) == expected
    assert isinstance(engine.generate([prompt], PARAMS), list)


def test_a_batch_may_mix_forms_and_be_an_array(engine, tokenizer):
    known = tokenizer.encode("It was")
    mixed = ["It was", {"prompt": "It was"}, {"prompt_token_ids": known}, known, np.array(known)]
    outputs = engine.generate(mixed, PARAMS)
    assert ids(outputs) == ids(engine.generate("It was", PARAMS)) * 5
    assert [output.prompt for output in outputs] == ["It was", "It was", None, None, None]
    rows = np.array([known, known])
    for batch in (rows, torch.tensor(rows), tuple(mixed[:2])):
        assert ids(engine.generate(batch, PARAMS)) == ids(outputs[:2])


def test_the_text_beside_ids_is_shown_and_not_encoded(engine):
    output = engine.generate({"prompt_token_ids": [2, 9], "prompt": "shown"}, PARAMS)
    assert (output.prompt, output.prompt_token_ids) == ("shown", [2, 9])


BAD_PROMPTS = {
    "no key": ({}, "has neither 'prompt' nor 'prompt_token_ids'"),
    "an image": ({"prompt": "a", "multi_modal_data": {"image": 1}}, "'multi_modal_data'"),
    "embeddings": ({"prompt_embeds": torch.zeros(2, 4)}, "'prompt_embeds' is not supported"),
    "text as ids": ({"prompt_token_ids": "ab"}, "is not a list of token ids"),
    "no text": ({"prompt": 5}, "is not a string"),
    "an empty text": ({"prompt": ""}, "the prompt is empty"),
    "a number": (np.array(5), "neither a string nor a list"),
    "floats": (np.array([2.0, 3.0]), "token id 2.0"),
    "ids of a batch": ({"prompt_token_ids": [[2], [3]]}, "not a list of lists"),
    "three dimensions": (np.ones((2, 2, 2), int), "not a list of lists"),
    "a number among texts": (["a", 5], "prompt 5 is neither"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_forms_are_refused_in_one_line(engine, name):
    prompt, message = BAD_PROMPTS[name]
    with pytest.raises(ValueError, match=message) as error:
        engine.generate(prompt, PARAMS)
    one_line(error)
    assert_serves(engine)


def test_a_batch_of_chats_is_answered_in_order(engine):
    other = [{"role": "user", "content": "It was"}]
    alone = [engine.chat(CHAT, PARAMS), engine.chat(other, PARAMS)]
    assert ids(engine.chat([CHAT, other], PARAMS)) == ids(alone)
    assert ids(engine.chat((tuple(CHAT), other), [PARAMS, PARAMS])) == ids(alone)
    assert ids(asyncio.run(engine.achat([CHAT, other], PARAMS))) == ids(alone)
    assert isinstance(engine.chat([CHAT], PARAMS), list)
    with pytest.raises(ValueError, match="1 SamplingParams for 2 conversations"):
        engine.chat([CHAT, other], [PARAMS])
    with pytest.raises(ValueError, match="a stream takes one conversation"):
        engine.chat([CHAT], PARAMS, stream=True)


def test_parts_of_text_are_joined_by_newlines(engine):
    parts = [{"type": "text", "text": "The"}, {"type": "text", "text": "children"}, "sang"]
    joined = [{"role": "user", "content": "The\nchildren\nsang"}]
    answer = engine.chat([{"role": "user", "content": parts}], PARAMS)
    assert ids(answer) == ids(engine.chat(joined, PARAMS))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "part of type 'image_url'"),
        ({"type": "text"}, "part without text"),
        (5, "part without text: 5"),
    ],
)
def test_other_parts_are_refused_in_one_line(engine, part, message):
    with pytest.raises(ValueError, match=message) as error:
        engine.chat([{"role": "user", "content": [part]}], PARAMS)
    one_line(error)
    assert_serves(engine)


def test_a_chat_may_leave_the_last_turn_open(engine, tokenizer):
    begun = [*CHAT, {"role": "assistant", "content": "They walked"}]
    answer = engine.chat(begun, PARAMS, add_generation_prompt=False, continue_final_message=True)
    assert answer.prompt.endswith("<start_of_turn>model\nThey walked")
    assert answer.prompt_token_ids == tokenizer.encode(answer.prompt, parse_special=True)
    closed = engine.chat(CHAT, PARAMS, add_generation_prompt=False)
    assert closed.prompt.endswith("The children<end_of_turn>\n")
    with pytest.raises(ValueError, match="continue_final_message=True goes on"):
        engine.chat(begun, PARAMS, continue_final_message=True)
    with pytest.raises(TypeError, match="chat takes no 'add_generation_promt'; did you mean"):
        engine.chat(CHAT, PARAMS, add_generation_promt=False)
    assert_serves(engine)


def test_a_chat_may_bring_its_template(engine):
    def prompt(template, messages=CHAT, **options):
        return engine.chat(messages, PARAMS, chat_template=template, **options).prompt

    turns = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    assert prompt(turns) == "<bos>[user] The children"
    assert prompt("{{ bos_token }}{{ x }}", chat_template_kwargs={"x": "sang"}) == "<bos>sang"
    assert "river" in prompt("{{ bos_token }}{{ tools }}", tools=[{"name": "river"}])
    # parts are joined, unless the template goes through them
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}]
    through = "{{ bos_token }}{% for message in messages %}{% for item in message['content'] %}"
    through += "({{ item['text'] }}){% endfor %}{% endfor %}"
    assert prompt(turns, parts) == "<bos>[user] a\nb"
    assert prompt(through, parts) == "<bos>(a)(b)"
    string = {"chat_template_content_format": "string"}
    assert prompt(through, parts, **string) == "<bos>()()()"
    with pytest.raises(ValueError, match="is neither 'auto', 'string' nor 'openai'"):
        engine.chat(CHAT, chat_template_content_format="text")
    with pytest.raises(ValueError, match="tools: the checkpoint has no chat template"):
        engine.chat(CHAT, tools=[])
    for wrong in ({"chat_template": 5}, {"chat_template_kwargs": "x"}, {"chat_template": "{{"}):
        with pytest.raises(ValueError, match=r"chat.template"):
            engine.chat(CHAT, **wrong)
    with pytest.raises(ValueError, match="'messages' is no variable of a template"):
        engine.chat(CHAT, chat_template=turns, chat_template_kwargs={"messages": []})
    assert_serves(engine)


def test_the_tokenizer_has_the_methods_of_transformers(engine, tokenizer):
    theirs = engine.get_tokenizer()
    assert theirs.encode("It was") == tokenizer.encode("It was")
    text = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert engine.generate(text, PARAMS).prompt_token_ids == engine.chat(CHAT).prompt_token_ids


def test_options_of_the_hub_reach_it(folder, monkeypatch):
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    options = {"token": "hf_x", "revision": "v2", "cache_dir": "/c", "local_files_only": True}
    Engine.from_pretrained("google/gemma", max_batch_size=1, **options).close()
    assert [name for name, _ in asked] == ["google/gemma"] * 2  # small files, then weights
    for _, given in asked:
        assert {name: given[name] for name in options} == options
    assert "*.safetensors" not in asked[0][1]["allow_patterns"]
    assert "*.safetensors" in asked[1][1]["allow_patterns"]
