"""pipeline("text-generation") beside transformers': options, chats, what comes back."""

import pytest
import torch
import transformers
from vocabulary import hugging_face_twin

from gemcut.engine import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

GREEDY = {"max_new_tokens": 6, "do_sample": False}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ASKED = [{"role": "user", "content": "Hi"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "It was"}]

# options of construction, prompts, options of the call
CASES = {
    "in construction": (GREEDY, "The children", {}),
    "several": ({}, ["a b", "Москва in 1984"], GREEDY),
    "together": ({"batch_size": 2, **GREEDY}, ["a b", "Москва in 1984", "x"], {}),
    "new text": ({"return_full_text": False}, "The", GREEDY),
    "whole text": ({"return_full_text": False}, "The", {**GREEDY, "return_full_text": True}),
    "ids": ({}, "The", {**GREEDY, "return_tensors": True}),
    "text": ({}, "The", {**GREEDY, "return_text": True}),
    "prefix": ({}, "The", {**GREEDY, "prefix": "It was "}),
    "prefix within a length": ({}, "The", {"max_length": 12, "do_sample": False, "prefix": "It "}),
    "length": ({}, "The", {"max_length": 12, "do_sample": False, "truncation": True}),
    "cut": (
        {},
        "The children walked",
        {**GREEDY, "truncation": True, "tokenizer_encode_kwargs": {"max_length": 4}},
    ),
    "tidied": ({}, "The", {**GREEDY, "clean_up_tokenization_spaces": True}),
    "special tokens": ({}, "The", {**GREEDY, "skip_special_tokens": False}),
    "no bos": ({}, "The", {**GREEDY, "add_special_tokens": False}),
    "empty": ({}, "", {**GREEDY, "add_special_tokens": False}),
    "chat": ({}, ASKED, GREEDY),
    "chat goes on": ({}, BEGUN, GREEDY),
    "chat goes on, end alone": ({}, BEGUN, {**GREEDY, "return_full_text": False}),
    "chat does not": ({}, BEGUN, {**GREEDY, "continue_final_message": False}),
    "chats": ({"batch_size": 2}, [ASKED, BEGUN], GREEDY),
    "config": ({}, "The", {"config": {"max_new_tokens": 3, "do_sample": False}}),
    "config for all": ({"config": {"max_new_tokens": 3, "do_sample": False}}, "The", {}),
    "config and a setting": (
        {"config": {"max_new_tokens": 3, "do_sample": False}},
        "The",
        {"max_new_tokens": 4},
    ),
    "config in place of settings": ({"max_new_tokens": 9}, "The", {"config": {"do_sample": False}}),
    "ids in place of new text": (
        {"return_full_text": False},
        "The",
        GREEDY | {"return_tensors": True},
    ),
    "text in place of ids": ({"return_tensors": True}, "The", GREEDY | {"return_full_text": True}),
    "stop": (GREEDY, "The", {"stop_sequence": "e"}),
    "stops": ({"stop_sequence": ["e", "x"], **GREEDY}, "The", {}),
    "several answers": ({}, "The", {"top_k": 1, "num_return_sequences": 3, "max_new_tokens": 5}),
    "defaults": ({}, "The", {"top_k": 1}),
}


@pytest.fixture(scope="module")
def pipes(folder, tokenizer_file):
    """The makers of transformers' pipeline and of gemcut's, over one model."""
    twin = hugging_face_twin(tokenizer_file)
    twin.add_bos_token = True
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    ours, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    twin.chat_template = tokenizer.chat_template = TEMPLATE

    def make_theirs(**options):
        return transformers.pipeline("text-generation", model=theirs, tokenizer=twin, **options)

    def make_ours(**options):
        return pipeline(model=ours, tokenizer=tokenizer, **options)

    return make_theirs, make_ours


def with_config(options: dict, config_class) -> dict:
    options = dict(options)
    if "config" in options:
        options["generation_config"] = config_class(**options.pop("config"))
    return options


@pytest.mark.parametrize("case", CASES)
def test_what_comes_back(pipes, case):
    made, prompts, asked = CASES[case]
    answers = []
    for make, config_class in zip(
        pipes, (transformers.GenerationConfig, GenerationConfig), strict=True
    ):
        pipe = make(**with_config(made, config_class))
        answers.append(pipe(prompts, **with_config(asked, config_class)))
    assert answers[0] == answers[1]


def test_an_iterable_is_read_as_it_is_asked_for(pipes):
    theirs, ours = (make(**GREEDY) for make in pipes)
    asked = []

    def prompts():
        for prompt in ("a", "b c", "d"):
            asked.append(prompt)
            yield prompt

    answers = ours(prompts(), batch_size=2)
    next(answers)
    assert asked == ["a", "b c"]
    assert list(answers) == list(theirs(x for x in ("b c", "d")))
    assert ours(message for message in ASKED) == theirs(message for message in ASKED)


def test_a_dataset_gives_an_answer_for_each(pipes):
    class Prompts(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return ["a", "b c"][index % 2]

    theirs, ours = (make(**GREEDY) for make in pipes)
    assert list(ours(Prompts())) == list(theirs(Prompts()))


def test_scores_come_with_the_text(pipes):
    asked = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    (theirs,), (ours,) = (make()("The", **asked) for make in pipes)
    assert ours["generated_text"] == theirs["generated_text"]
    torch.testing.assert_close(torch.tensor(ours["scores"]), torch.tensor(theirs["scores"]))


def test_a_streamer_gets_the_tokens(pipes, twin, capsys):
    shown = []
    for make in pipes:
        make()("The", streamer=transformers.TextStreamer(twin), **GREEDY)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


@pytest.mark.filterwarnings("ignore:a text has")
def test_a_long_prompt_is_cut_on_the_left(pipes):
    theirs, ours = (make(**GREEDY) for make in pipes)
    prompt = "The children walked to the house. " * 3
    for pipe in (theirs, ours):
        pipe.tokenizer.model_max_length = 20
    asked = {"handle_long_generation": "hole", "return_tensors": True}
    try:
        assert ours(prompt, **asked) == theirs(prompt, **asked)
        assert len(ours(prompt, **asked)[0]["generated_token_ids"]) == 20
    finally:
        for pipe in (theirs, ours):
            pipe.tokenizer.model_max_length = 10**6


def test_options_of_loading_say_that_a_model_is_loaded(pipes, folder):
    with pytest.warns(UserWarning, match=r"^device_map='auto' has no effect: the model is loaded$"):
        pipes[1](device_map="auto")
    neutral = {"token": None, "use_fast": True, "trust_remote_code": True, "framework": "pt"}
    assert pipeline("text-generation", folder, device=-1, **neutral).device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_text": True, "return_tensors": True}, "return_text and return_tensors exclude"),
        ({"return_text": True, "return_full_text": True}, "return_text and return_full_text excl"),
        ({"return_tensors": True, "return_full_text": True}, "return_full_text and return_tensors"),
        ({"handle_long_generation": "x"}, "handle_long_generation 'x' is neither"),
        ({"batch_size": 0}, "batch_size 0 is outside 1"),
    ],
)
def test_bad_options_are_one_line(pipes, options, message):
    with pytest.raises(ValueError, match=message):
        pipes[1]()("The", **options)
