"""The bundled model: the promises of its card, and the tool that made it."""

import re

import pytest
import torch
from held_out import bits_per_byte

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.checkpoints.hub import DEMO
from gemcut.tools import train_demo


@pytest.fixture(scope="module")
def demo():
    with Engine.from_pretrained("demo") as engine:
        yield engine


def test_files_are_at_most_8_mb():
    assert sum(file.stat().st_size for file in DEMO.iterdir() if file.is_file()) <= 8_000_000


def test_every_trait_of_gemma_2_is_on(demo):
    config = demo.config
    assert config.model_type == "gemma2"
    assert config.group_size > 1
    assert config.attn_softcap
    assert config.final_softcap
    assert config.sliding_window < config.max_position_embeddings
    assert config.scale != config.head_dim**-0.5
    assert config.tie_word_embeddings
    assert demo.tokenizer.start_of_turn_id is not None
    assert demo.tokenizer.encode("\u2603", add_bos=False) == [
        demo.tokenizer.id_of(f"<0x{byte:02X}>") for byte in "\u2603".encode()
    ]


def test_it_predicts_english(demo):
    """Untrained it needs 11.6 bits a token, three a byte; the card's figure is for more text."""
    assert bits_per_byte(demo) <= 2.2


def test_the_card_states_its_bits_per_byte():
    (bits,) = re.findall(
        r"held-out bits per byte \| \*\*([\d.]+)\*\*", (DEMO / "README.md").read_text()
    )
    assert float(bits) <= 2.2


def test_its_words_are_mostly_words_of_its_training(demo):
    """Its text is made of English words: two in five are among a hundred common ones."""
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=200)
    words = re.findall(r"[a-z]+", demo.generate("It was", params).text.lower())
    common = set(re.findall(r"[a-z]+", COMMON_WORDS))
    assert len(words) > 80
    # English prose has about half; letters at random have almost none
    assert sum(word in common for word in words) / len(words) > 0.4


COMMON_WORDS = (
    "the of and to a in i that it was you he is his had have my with as at not for which be but "
    "we me this her from she him there upon said all one no so on were would been they an if what "
    "could will do then who when out our up into your are by has should some very must down man "
    "little now see them more or us any over than about time before know well back came can holmes "
    "think here may room how two only did face made away hand just where come their after door"
)


def test_it_answers_a_chat_and_ends_its_turn(demo):
    params = SamplingParams(temperature=0.7, seed=0)
    output = demo.chat([{"role": "user", "content": "Who are you?"}], params)
    assert output.finish_reason == "stop"
    assert output.token_ids[-1] == demo.tokenizer.end_of_turn_id


# The tool, on a text and a model so small that a step takes no time

PARAGRAPHS = [
    f'"Is it {i}?" asked the {a} {b}, and the {b} of the {a} went on to say number {i + 1}.'
    for i, (a, b) in enumerate(
        (a, b) for a in ("old", "red", "tall") for b in ("cat", "dog", "hen")
    )
] * 4


@pytest.fixture
def small_tool(monkeypatch):
    monkeypatch.setattr(train_demo, "VOCAB_SIZE", 330)
    monkeypatch.setattr(train_demo, "CONTEXT", 32)
    monkeypatch.setattr(train_demo, "VALIDATION_SHARE", 0.1)
    sizes = {"vocab_size": 330, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    small = train_demo.MODEL_CONFIG | sizes | {"head_dim": 8, "max_position_embeddings": 32}
    monkeypatch.setattr(train_demo, "MODEL_CONFIG", small)
    monkeypatch.setattr(torch, "compile", lambda model: model)


def test_training_resumes_where_it_stopped(small_tool, tmp_path, monkeypatch):
    recipe = train_demo.Recipe(steps=6, batch_size=2, warmup_steps=2)
    whole = train_demo.train(recipe, PARAGRAPHS, tmp_path / "whole", save_every=3)

    def stop(step, recipe):
        if step == 5:  # two steps after the state was written
            raise KeyboardInterrupt
        return learning_rate(step, recipe)

    learning_rate = train_demo.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(train_demo, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            train_demo.train(recipe, PARAGRAPHS, tmp_path / "parts", save_every=3)
    resumed = train_demo.train(recipe, PARAGRAPHS, tmp_path / "parts", save_every=3)

    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    other = train_demo.Recipe(steps=6, batch_size=2, warmup_steps=2, seed=1)
    with pytest.raises(SystemExit, match="of another text or recipe"):
        train_demo.train(other, PARAGRAPHS, tmp_path / "parts", save_every=3)


def test_vocabulary_is_the_same_bytes_wherever_it_is_trained(small_tool, tmp_path):
    for name in ("a.model", "b.model"):
        train_demo.train_tokenizer(PARAGRAPHS, tmp_path / name)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a.model").read_bytes()


def test_dialogues_are_whole_turns():
    spoken = ['"One."', '"Two."', '"Three."', "Not spoken.", '"Alone."', "And then.", *['"A."'] * 7]
    chats = list(train_demo.dialogues(spoken))
    assert [chat.count("<start_of_turn>user") for chat in chats] == [1, 3]
    assert all(chat.endswith("<end_of_turn>\n") and "model" in chat for chat in chats)
