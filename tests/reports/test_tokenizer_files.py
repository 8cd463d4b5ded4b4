"""What a folder says of its tokenizer is what an engine does: files as fine-tunes have them."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import dictate, one_line, save_random_model
from transformers import AutoTokenizer
from vocabulary import hugging_face_twin

from gemcut.engine import Engine, GemmaTokenizer, SamplingParams
from gemcut.engine.checkpoints import hub
from gemcut.engine.cli import main
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.info import find_problems

IM_END, IMAGE = "<|im_end|>", "<image_soft_token>"
PROMPTS = (
    "The children<|im_end|>",
    "<|im_end|><|im_end|> a <table>",
    "walked<|im_end |>",
    "<bos>a",
)


@pytest.fixture
def fine_tune(tmp_path, tokenizer_file):
    """A folder whose embedding has a row more than its tokenizer.model has pieces."""
    save_random_model(tmp_path, tokenizer_file, vocab_size=521)
    return tmp_path


@pytest.fixture
def theirs(tokenizer_file):
    """Transformers' tokenizer with the token added."""
    twin = copy.deepcopy(hugging_face_twin(tokenizer_file))
    twin.add_tokens([IM_END])
    twin.add_bos_token = True
    twin.update_post_processor()
    return twin


def write(folder: Path, name: str, content) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)


def add_by_json(folder: Path) -> None:
    write(folder, "added_tokens.json", {IM_END: 520})


def add_by_config(folder: Path) -> None:
    decoder = {"520": {"content": IM_END, "special": False, "normalized": True}}
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": decoder})


def add_as_eos(folder: Path) -> None:
    add_by_json(folder)
    write(folder, "tokenizer_config.json", {"eos_token": IM_END})


def add_in_tokenizer_json(folder: Path, theirs) -> None:
    (folder / "tokenizer.model").unlink()
    theirs.save_pretrained(folder)


class TestAddedTokens:
    @pytest.mark.parametrize("add", [add_by_json, add_by_config, add_as_eos])
    def test_beside_a_tokenizer_model(self, fine_tune, theirs, add):
        add(fine_tune)
        if add is add_as_eos:
            theirs.add_special_tokens({"eos_token": IM_END})
        self.check(fine_tune, theirs)

    @pytest.mark.parametrize("special", [False, True])
    def test_in_a_tokenizer_json_alone(self, fine_tune, theirs, special):
        theirs.add_tokens([IM_END], special_tokens=special)
        add_in_tokenizer_json(fine_tune, theirs)
        self.check(fine_tune, AutoTokenizer.from_pretrained(fine_tune))

    def test_in_a_tokenizer_json_beside_a_model_without(self, fine_tune, theirs, tokenizer_file):
        add_in_tokenizer_json(fine_tune, theirs)
        shutil.copy(tokenizer_file, fine_tune / "tokenizer.model")
        add_by_json(fine_tune)
        self.check(fine_tune, AutoTokenizer.from_pretrained(fine_tune))

    def check(self, folder, theirs):
        ids = theirs.encode("The children", add_special_tokens=False)
        ids += [520, *theirs.encode(" walked", add_special_tokens=False)]
        with Engine.from_pretrained(folder, dtype="float32") as engine:
            for prompt in PROMPTS:
                expected = theirs.encode(prompt, add_special_tokens=False)
                expected = expected if expected[0] == 2 else [2, *expected]
                assert engine.generate(prompt).prompt_token_ids == expected
            for hide in (True, False):
                params = SamplingParams(
                    logits_processors=dictate(ids),
                    max_tokens=len(ids),
                    skip_special_tokens=hide,
                )
                chosen = engine.generate("a", params)
                assert chosen.token_ids == ids
                assert chosen.text == theirs.decode(ids, skip_special_tokens=hide)
            params = SamplingParams(
                logits_processors=dictate(ids), max_tokens=99, stop_token_ids=[520]
            )
            stopped = engine.generate("a", params).outputs[0]
            assert (stopped.text, stopped.stop_reason) == ("The children", 520)
            params = SamplingParams(logits_processors=dictate(ids), max_tokens=99, stop=[" walk"])
            assert engine.generate("a", params).outputs[0].stop_reason == " walk"

    def test_as_eos_of_the_generation(self, fine_tune):
        add_by_json(fine_tune)
        write(fine_tune, "generation_config.json", {"eos_token_id": [1, 520]})
        with Engine.from_pretrained(fine_tune, dtype="float32") as engine:
            ids = engine.tokenizer.encode("The", add_bos=False)
            params = SamplingParams(logits_processors=dictate([*ids, 520, 7]), max_tokens=99)
            assert engine.generate("a", params).outputs[0].text == "The"

    def test_on_the_command_line(self, fine_tune, theirs, capsys):
        add_in_tokenizer_json(fine_tune, theirs)
        options = ["--model", str(fine_tune), "--max-tokens", "3", "--json", "--temperature", "0"]
        assert main(["generate", *options, f"The children{IM_END}"]) == 0
        output = json.loads(capsys.readouterr().out)
        assert output["prompt_token_ids"] == theirs.encode(f"The children{IM_END}")
        assert output["text"] == theirs.decode(output["token_ids"], skip_special_tokens=True)

    @pytest.mark.parametrize("kind", ["model", "json"])
    @pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, True)])
    def test_what_is_put_around_a_prompt(self, fine_tune, tokenizer_file, kind, bos, eos):
        theirs = GemmaTokenizer(tokenizer_file, add_bos_token=bos, add_eos_token=eos)
        if kind == "json":
            theirs = copy.deepcopy(hugging_face_twin(tokenizer_file))
            theirs.add_bos_token, theirs.add_eos_token = bos, eos
            theirs.update_post_processor()
            add_in_tokenizer_json(fine_tune, theirs)
        else:
            settings = {"add_bos_token": bos, "add_eos_token": eos}
            write(fine_tune, "tokenizer_config.json", settings)
        with Engine.from_pretrained(fine_tune, dtype="float32") as engine:
            params = SamplingParams(max_tokens=1)
            ids = engine.generate("The children", params).prompt_token_ids
            assert ids == theirs.encode("The children")
            assert (ids[0] == 2, ids[-1] == 1) == (bos, eos)

    def test_in_a_check(self, fine_tune, theirs):
        add_in_tokenizer_json(fine_tune, theirs)
        config = ModelConfig.from_file(fine_tune)
        assert find_problems(str(fine_tune), config) == []
        write(fine_tune, "added_tokens.json", {"<x>": 525})
        (problem,) = find_problems(str(fine_tune), config)
        assert "leaves a gap" in problem


class TestRowsOfTheEmbedding:
    def test_logprobs_are_over_all_rows(self, tmp_path, tokenizer_file):
        """As `score` has them, and transformers."""
        model = save_random_model(tmp_path, tokenizer_file, vocab_size=600)
        with Engine.from_pretrained(tmp_path, dtype="float32") as engine:
            params = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
            output = engine.generate([2, 50, 60], params)
            ours = [
                of[i].logprob
                for of, i in zip(output.outputs[0].logprobs, output.token_ids, strict=True)
            ]
            ids = [2, 50, 60, *output.token_ids]
            scored = engine.score(ids).logprobs[-8:]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        theirs = [logits[at + 2, i].item() for at, i in enumerate(output.token_ids)]
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert scored == pytest.approx(theirs, abs=1e-4)

    @pytest.mark.parametrize("where", ["decoder", "extra", "tokenizer.json"])
    def test_a_placeholder_of_images_needs_none(self, folder, tmp_path, theirs, where):
        """Every published Gemma 3 has <image_soft_token> past the rows of its embedding."""
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        if where == "decoder":
            decoder = {"520": {"content": IMAGE, "special": True}}
            write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": decoder})
        elif where == "extra":
            extra = {"extra_special_tokens": {"image_token": "<soft>"}}
            write(tmp_path, "tokenizer_config.json", extra)
        else:
            twin = copy.deepcopy(theirs)
            add_in_tokenizer_json(tmp_path, twin)
            content = (tmp_path / "tokenizer.json").read_text().replace(IM_END, IMAGE)
            write(tmp_path, "tokenizer.json", content)
        image = "<soft>" if where == "extra" else IMAGE
        with Engine.from_pretrained(tmp_path, dtype="float32") as engine:
            assert engine.tokenizer.id_of(image) == 520
            assert engine.generate("a", SamplingParams(stop=["zz"], max_tokens=2)).token_ids
            with pytest.raises(ValueError, match=f"holds '{image}'.*no row") as error:
                engine.generate(f"What is {image}?")
            one_line(error)

    def test_another_token_needs_one(self, folder, tmp_path):
        without_weights(folder, tmp_path)
        add_by_json(tmp_path)
        with pytest.raises(ValueError, match=r"521 pieces.*520 rows: none for '<\|im_end\|>'") as e:
            Engine.from_pretrained(tmp_path)
        one_line(e)


def without_weights(folder: Path, target: Path) -> None:
    """A copy in which nobody can have read a weight."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (target / "model.safetensors").unlink()


class TestWithoutATokenizer:
    def test_ids_alone(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / "tokenizer.model").unlink()
        params = SamplingParams(temperature=0, max_tokens=5, logprobs=2, ignore_eos=True)
        with Engine.from_pretrained(folder, dtype="float32") as engine:
            expected = engine.generate([2, 50], params)
            with Engine(engine.model, None) as bare:
                assert bare.tokenizer is None
                assert bare.generate([2, 50], params).token_ids == expected.token_ids
        with Engine.from_pretrained(tmp_path, dtype="float32", skip_tokenizer_init=True) as engine:
            output = engine.generate([2, 50], params)
            assert (output.token_ids, output.text) == (expected.token_ids, "")
            assert [delta.text for delta in engine.stream([2, 50], params)] == [""] * 5
            assert engine.score([2, 50]).logprobs
            for call, message in (
                (lambda: engine.generate("text"), "no tokenizer, so a prompt is a list"),
                (lambda: engine.chat([{"role": "user", "content": "a"}]), "so no chat"),
                (lambda: engine.generate([2], SamplingParams(stop=["a"])), "stop_token_ids take"),
            ):
                with pytest.raises(ValueError, match=message) as error:
                    call()
                one_line(error)

    def test_a_missing_one_is_refused_first(self, folder, tmp_path):
        without_weights(folder, tmp_path)
        (tmp_path / "tokenizer.model").unlink()
        with pytest.raises(ValueError, match=r"neither.*skip_tokenizer_init=True") as error:
            Engine.from_pretrained(tmp_path)
        one_line(error)


def test_weights_are_fetched_last(folder, tmp_path, monkeypatch):
    """What a model's small files say is refused before gigabytes come."""
    calls = []

    def fetch(model, *, allow_patterns, **_):
        calls.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.setattr(hub, "model_info", lambda *a, **k: SimpleNamespace(siblings=None))
    without_weights(folder, tmp_path)
    write(tmp_path, "added_tokens.json", {"<x>": 525})
    with pytest.raises(ValueError, match="leaves a gap"):
        Engine.from_pretrained("owner/model")
    (only,) = calls
    assert not any("safetensors" in pattern for pattern in only)
    assert {"tokenizer.json", "added_tokens.json", "chat_template.jinja"} <= set(only)
    (tmp_path / "added_tokens.json").unlink()
    shutil.copy(folder / "model.safetensors", tmp_path)
    with Engine.from_pretrained("owner/model", dtype="float32"):
        assert "*.safetensors" in calls[-1]
