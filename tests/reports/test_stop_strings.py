"""Stop strings of the documented classes, beside transformers' StopStringCriteria."""

import random

import pytest
import torch
import transformers
from documented_twins import random_ids, twins
from real_models import real_folder
from transformers.generation.stopping_criteria import StopStringCriteria

from gemcut.engine import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer
from gemcut.engine.transformers_api.models.stop_strings import StopStringCriteria as OurCriteria

GREEDY = {"max_new_tokens": 30, "do_sample": False}
TEXTS = (
    "The children walked to the house, and <end_of_turn> then 1984.",
    "Москва é 漢字 🙂 hello  world\n\n  x",
    "def f(x):\n\treturn x+1 # ok",
)


def random_row(chance: random.Random, tokenizer) -> list[int]:
    """Ids of a text, with special and random tokens between them."""
    ids = tokenizer(chance.choice(TEXTS))["input_ids"]
    for _ in range(4):
        ids.insert(chance.randint(0, len(ids)), chance.randrange(len(tokenizer)))
    ids.insert(chance.randint(0, len(ids)), chance.choice(tokenizer.all_special_ids))
    return ids


def random_stops(chance: random.Random, tokenizer, ids: list[int]) -> list[str]:
    """Pieces of what the ids spell, and others."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    stops = [chance.choice(["<end_of_turn>", "<eos>", "é", "漢字", "  ", "\n\n"])]
    for _ in range(chance.randint(1, 3)):
        begin = chance.randrange(len(text))
        stops.append(text[begin : begin + chance.randint(1, 12)].replace("\ufffd", "x"))
    return stops


@pytest.mark.parametrize("seed", range(12))
def test_random_rows_end_where_transformers_ends_them(seed, twin, tokenizer_file, tokenizer):
    chance = random.Random(seed)
    rows = [random_row(chance, twin) for _ in range(2)]
    stops = random_stops(chance, twin, rows[0])
    theirs = StopStringCriteria(twin, stops)
    ours = [OurCriteria(t, stops) for t in (GemmaTokenizer(tokenizer_file), twin, tokenizer)]
    ended = 0
    for count in range(1, min(map(len, rows)) + 1):
        ids = torch.tensor([row[:count] for row in rows])
        expected = theirs(ids, None)
        ended += int(expected.sum())
        for criterion in ours:
            assert torch.equal(criterion(ids), expected)
    assert ended


@pytest.mark.parametrize("stops", ["<end_of_turn>", ["<end_of_turn>", "zz"]])
def test_a_special_token_stops(tokenizer_file, twin, stops):
    """The usual idiom with Gemma: no text shows the token, and generation ends with it."""
    theirs, ours = twins("AutoModelForCausalLM", "gemma", vocab_size=520, eos_token_id=None)
    end = twin.convert_tokens_to_ids("<end_of_turn>")
    ids = random_ids(2, 8)
    forced = {"forced_bos_token_id": None, "sequence_bias": [[[end], 3.0]]}
    settings = GREEDY | forced | {"stop_strings": stops, "eos_token_id": 1, "pad_token_id": 0}
    settings["prefix_allowed_tokens_fn"] = lambda b, row: [end] if len(row) == 11 + b else [40 + b]
    expected = theirs.generate(ids, tokenizer=twin, **settings)
    actual = ours.generate(ids, tokenizer=GemmaTokenizer(tokenizer_file), **settings)
    assert torch.equal(actual, expected)
    assert actual[0].tolist()[8:] == [40, 40, 40, end, 0]


def test_one_that_begins_in_the_prompt_stops(tokenizer_file, twin):
    theirs, ours = twins("AutoModelForCausalLM", "gemma", vocab_size=520, eos_token_id=None)
    ids = twin("abc", return_tensors="pt", add_special_tokens=False)["input_ids"]
    (x,) = twin("x", add_special_tokens=False)["input_ids"][-1:]
    settings = GREEDY | {"prefix_allowed_tokens_fn": lambda b, row: [x], "stop_strings": ["bcxx"]}
    expected = theirs.generate(ids, tokenizer=twin, **settings)
    actual = ours.generate(ids, tokenizer=GemmaTokenizer(tokenizer_file), **settings)
    assert torch.equal(actual, expected)
    assert actual.shape[1] == ids.shape[1] + 2


def test_with_drafts_they_end_where_they_end_without(tokenizer_file):
    _, ours = twins("AutoModelForCausalLM", "gemma", vocab_size=520, eos_token_id=None)
    ids = random_ids(1, 4).repeat(1, 3)
    tokenizer = GemmaTokenizer(tokenizer_file)
    text = ours.generate(ids, **GREEDY)[0]
    stop = tokenizer.decode(text[-20:-17].tolist(), skip_special_tokens=False)
    given = {"stop_strings": [stop], "tokenizer": tokenizer, **GREEDY}
    plain = ours.generate(ids, **given)
    assert plain.shape[1] < len(text)
    assert torch.equal(ours.generate(ids, prompt_lookup_num_tokens=7, **given), plain)


@pytest.mark.parametrize("stops", ["", ["a", ""], [3], 3])
def test_bad_ones_are_one_line(stops, tokenizer):
    _, ours = twins("AutoModelForCausalLM", "gemma", vocab_size=520, eos_token_id=None)
    with pytest.raises(ValueError, match="stop_strings"):
        ours.generate(random_ids(1, 4), stop_strings=stops, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-3-270m-json"])
def test_the_real_tokenizer_and_model(name):
    folder = real_folder(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(real_folder("gemma-3-270m-json"))
    chance = random.Random(0)
    for _ in range(3):
        ids = random_row(chance, theirs)
        stops = random_stops(chance, theirs, ids)
        expected, ours = StopStringCriteria(theirs, stops), OurCriteria(tokenizer, stops)
        for count in range(1, len(ids) + 1):
            row = torch.tensor([ids[:count]])
            assert torch.equal(ours(row), expected(row, None))
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    forced = {"prefix_allowed_tokens_fn": lambda b, row: [end] if len(row) == 8 else [1000]}
    given = {"stop_strings": "<end_of_turn>", "tokenizer": tokenizer, **GREEDY, **forced}
    assert model.generate(**prompt, **given)[0, 6:].tolist() == [1000, 1000, end]
