"""pipeline("text-generation"): prompts, chats and options, beside transformers'."""

import pytest
import torch
import transformers
from vocabulary import hugging_face_twin

from gemcut.engine import transformers_api
from gemcut.engine.transformers_api import AutoModelForCausalLM, pipeline


class TestPipeline:
    def test_prompts_and_lists(self, folder):
        pipe = pipeline("text-generation", model=folder)
        settings = {"max_new_tokens": 6, "do_sample": False}
        (one,) = pipe("The children", **settings)
        assert one["generated_text"].startswith("The children")
        several = pipe(["The children", "In 1984 there were"], batch_size=2, **settings)
        assert several[0] == [one]
        assert [len(x) for x in several] == [1, 1]
        (rest,) = pipe("The children", return_full_text=False, **settings)
        assert "The children" + rest["generated_text"] == one["generated_text"]
        (ids,) = pipe("The children", return_tensors=True, **settings)
        assert pipe.tokenizer.decode(ids["generated_token_ids"], True) == one["generated_text"]
        # a row that has ended is filled up beside one that goes on
        prompts = ["The children", "In 1984 there were"]
        settings |= {"return_tensors": True, "eos_token_id": ids["generated_token_ids"][-3]}
        alone = [pipe(prompt, **settings) for prompt in prompts]
        assert pipe(prompts, batch_size=2, **settings) == alone
        new = [
            len(one["generated_token_ids"]) - len(pipe.tokenizer.encode(prompt))
            for prompt, (one,) in zip(prompts, alone, strict=True)
        ]
        assert new[0] != new[1]
        drawn = pipe("It", num_return_sequences=3, max_new_tokens=6)
        assert len({x["generated_text"] for x in drawn}) == 3

    def test_it_is_transformers_pipeline(self, folder, tokenizer_file):

        twin = hugging_face_twin(tokenizer_file)
        twin.add_bos_token = True
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        theirs = transformers.pipeline("text-generation", model=model, tokenizer=twin)
        ours = pipeline("text-generation", model=folder)
        for prompt in ("The children walked", ["It was", "Москва"]):
            given = {"max_new_tokens": 12, "do_sample": False}
            assert ours(prompt, **given) == theirs(prompt, **given)

    def test_chats(self, folder):
        pipe = pipeline(model=folder)
        chat = [{"role": "user", "content": "Who are you?"}]
        (answer,) = pipe(chat, max_new_tokens=5, do_sample=False)
        *before, said = answer["generated_text"]
        assert before == chat
        assert said["role"] == "assistant"
        (alone,) = pipe(chat, max_new_tokens=5, do_sample=False, return_full_text=False)
        assert alone["generated_text"] == said["content"]

    def test_a_model_that_is_there(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers_api.AutoTokenizer.from_pretrained(folder)
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        assert pipe.model is model
        assert pipe("It", max_new_tokens=2)[0]["generated_text"].startswith("It")

    @pytest.mark.parametrize(
        ("options", "kind", "message"),
        [
            ({"task": "fill-mask"}, NotImplementedError, "task 'fill-mask' is not there"),
            ({"device": 0, "device_map": "auto"}, ValueError, "give device or device_map"),
            ({"dtyp": "auto"}, TypeError, "takes no 'dtyp'; did you mean 'dtype'"),
        ],
    )
    def test_bad_options(self, folder, options, kind, message):
        with pytest.raises(kind, match=message):
            pipeline(**{"model": folder} | options)

    def test_bad_prompts(self, folder):
        pipe = pipeline(model=folder)
        for prompt in ([], None, 5):
            with pytest.raises(ValueError, match="is neither a text nor a list that holds one"):
                pipe(prompt)
        with pytest.raises(TypeError, match="generate takes no 'max_tokens'"):
            pipe("It", max_tokens=4)
