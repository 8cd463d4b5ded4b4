"""Every example of Hugging Face's documents of Gemma and VaultGemma, its import line changed.

Names of published models mean small random checkpoints here: `published` puts a folder of that
name under the working directory, which is where a name is looked for first.  Sizes that a test
cannot hold are cut down in the config, and nowhere else.  Not here: bitsandbytes' quantised
example, which is refused by name (test_transformers_bad_input.py), and AttentionMaskVisualizer,
which is a tool of transformers, and runs there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from documented_twins import assert_close
from random_models import random_model
from vocabulary import hugging_face_twin

import gemcut.engine
from gemcut.engine.transformers_api.models import configs
from gemcut.tokenizer import Tokenizer

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture
def published(tmp_path, monkeypatch, tokenizer_file):
    """A function that makes the checkpoint for a published name."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, model_type: str, auto_class=transformers.AutoModelForCausalLM, **sizes):
        sizes |= {"vocab_size": len(Tokenizer.from_file(tokenizer_file))}
        model = random_model(
            model_type, auto_class=auto_class, max_position_embeddings=512, **sizes
        )
        folder = Path(name)
        model.save_pretrained(folder)
        shutil.copy(tokenizer_file, folder / "tokenizer.model")
        return model

    return make


@pytest.fixture(scope="module")
def reference_tokenizer(tokenizer_file):
    """Transformers' tokenizer of the same vocabulary, as the published ones are set up."""
    twin = hugging_face_twin(tokenizer_file)
    twin.add_bos_token = True
    return twin


@pytest.fixture
def small(monkeypatch):
    """Configs whose defaults are small."""
    for cls in (configs.GemmaConfig, configs.VaultGemmaConfig):
        monkeypatch.setattr(cls, "parameters", cls.parameters | SMALL)


def test_gemma_config(small):
    from gemcut.engine import GemmaConfig, GemmaModel

    # Initializing a Gemma gemma-7b style configuration
    configuration = GemmaConfig()
    # Initializing a model from the gemma-7b style configuration
    model = GemmaModel(configuration)
    # Accessing the model configuration
    configuration = model.config
    assert configuration.num_hidden_layers == 2


def test_vault_gemma_config(small):
    from gemcut.engine import VaultGemmaConfig, VaultGemmaModel

    # Initializing a VaultGemma vaultgemma-7b style configuration
    configuration = VaultGemmaConfig()
    # Initializing a model from the vaultgemma-7b style configuration
    model = VaultGemmaModel(configuration)
    # Accessing the model configuration
    configuration = model.config
    assert configuration.attn_logit_softcapping == 50.0


def test_gemma_tokenizer_fast(published, reference_tokenizer):
    published("hf-internal-testing/dummy-gemma", "gemma")
    from gemcut.engine import GemmaTokenizerFast

    tokenizer = GemmaTokenizerFast.from_pretrained("hf-internal-testing/dummy-gemma")
    assert tokenizer.encode("Hello this is a test") == reference_tokenizer.encode(
        "Hello this is a test"
    )


@pytest.mark.skipif(
    "GEMCUT_GEMMA_TOKENIZER" not in os.environ,
    reason="GEMCUT_GEMMA_TOKENIZER names no tokenizer.model of a published Gemma",
)
def test_the_published_vocabulary():
    tokenizer = gemcut.engine.GemmaTokenizer(os.environ["GEMCUT_GEMMA_TOKENIZER"])
    assert tokenizer.encode("Hello this is a test") == [2, 4521, 736, 603, 476, 2121]


def test_gemma_pipeline(published):
    published("google/gemma-2b", "gemma")
    from gemcut.engine import pipeline

    pipeline = pipeline(
        task="text-generation",
        model="google/gemma-2b",
        dtype=torch.bfloat16,
        device_map="auto",
    )

    result = pipeline("LLMs generate text through a process known as", max_new_tokens=50)
    assert result[0]["generated_text"].startswith("LLMs generate text through a process known as")
    assert pipeline.model.dtype == torch.bfloat16


def test_gemma_auto_model(published, reference_tokenizer):
    theirs = published("google/gemma-2b", "gemma")
    from gemcut.engine import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("google/gemma-2b")
    model = AutoModelForCausalLM.from_pretrained(
        "google/gemma-2b", dtype=torch.float32, device_map="auto", attn_implementation="sdpa"
    )

    input_text = "LLMs generate text through a process known as"
    input_ids = tokenizer(input_text, return_tensors="pt").to(model.device)

    outputs = model.generate(**input_ids, max_new_tokens=50, cache_implementation="static")
    text = tokenizer.decode(outputs[0], skip_special_tokens=True)
    expected = theirs.generate(
        **reference_tokenizer(input_text, return_tensors="pt"), max_new_tokens=50
    )
    assert torch.equal(outputs.cpu(), expected)
    assert text == reference_tokenizer.decode(expected[0], skip_special_tokens=True)


def test_gemma_dynamic_cache(published):
    theirs = published("google/gemma-2b", "gemma")
    from gemcut.engine import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    tokenizer = AutoTokenizer.from_pretrained("google/gemma-2b")
    model = AutoModelForCausalLM.from_pretrained(
        "google/gemma-2b", dtype=torch.float32, device_map="auto", attn_implementation="sdpa"
    )
    input_text = "LLMs generate text through a process known as"
    input_ids = tokenizer(input_text, return_tensors="pt").to(model.device)
    past_key_values = DynamicCache(config=model.config)
    outputs = model.generate(**input_ids, max_new_tokens=50, past_key_values=past_key_values)
    print(tokenizer.decode(outputs[0], skip_special_tokens=True))
    plain = {name: x.cpu() for name, x in input_ids.items()}
    assert torch.equal(outputs.cpu(), theirs.generate(**plain, max_new_tokens=50))


@pytest.mark.parametrize(
    ("family", "class_name"),
    [("gemma", "GemmaForCausalLM"), ("vaultgemma", "VaultGemmaForCausalLM")],
)
def test_for_causal_lm(published, family, class_name):
    theirs = published("google/gemma-7b", family)
    from gemcut.engine import AutoTokenizer

    model = getattr(gemcut.engine, class_name).from_pretrained("google/gemma-7b")
    tokenizer = AutoTokenizer.from_pretrained("google/gemma-7b")

    prompt = "What is your favorite condiment?"
    inputs = tokenizer(prompt, return_tensors="pt")

    # Generate
    generate_ids = model.generate(inputs.input_ids, max_length=60)
    text = tokenizer.batch_decode(
        generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )[0]
    assert text.startswith(prompt)
    assert torch.equal(generate_ids, theirs.generate(inputs.input_ids, max_length=60))


def test_sequence_classification(published):
    published(
        "google/gemma-7b", "gemma", transformers.AutoModelForSequenceClassification, num_labels=2
    )
    from gemcut.engine import AutoTokenizer, GemmaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained("google/gemma-7b")
    model = GemmaForSequenceClassification.from_pretrained("google/gemma-7b")

    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")

    with torch.no_grad():
        logits = model(**inputs).logits

    predicted_class_id = logits.argmax().item()
    assert model.config.id2label[predicted_class_id] in ("LABEL_0", "LABEL_1")

    # To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to
    # `.from_pretrained(...)`
    num_labels = len(model.config.id2label)
    model = GemmaForSequenceClassification.from_pretrained("google/gemma-7b", num_labels=num_labels)

    labels = torch.tensor([1])
    loss = model(**inputs, labels=labels).loss
    assert round(loss.item(), 2) > 0


def test_sequence_classification_of_several_labels(published):
    published("google/gemma-7b", "gemma")
    from gemcut.engine import AutoTokenizer, GemmaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained("google/gemma-7b")
    with pytest.warns(UserWarning, match=r"has no score.weight: made at random; train it"):
        model = GemmaForSequenceClassification.from_pretrained(
            "google/gemma-7b", problem_type="multi_label_classification"
        )

    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")

    with torch.no_grad():
        logits = model(**inputs).logits

    predicted_class_ids = torch.arange(0, logits.shape[-1])[
        torch.sigmoid(logits).squeeze(dim=0) > 0.5
    ]

    # To train a model on `num_labels` classes, you can pass `num_labels=num_labels` to
    # `.from_pretrained(...)`
    num_labels = len(model.config.id2label)
    with pytest.warns(UserWarning, match=r"has no score.weight"):
        model = GemmaForSequenceClassification.from_pretrained(
            "google/gemma-7b", num_labels=num_labels, problem_type="multi_label_classification"
        )

    labels = torch.sum(
        torch.nn.functional.one_hot(predicted_class_ids[None, :].clone(), num_classes=num_labels),
        dim=1,
    ).to(torch.float)
    loss = model(**inputs, labels=labels).loss
    assert loss > 0


def test_token_classification(published):
    published(
        "google/gemma-7b", "gemma", transformers.AutoModelForTokenClassification, num_labels=2
    )
    from gemcut.engine import AutoTokenizer, GemmaForTokenClassification

    tokenizer = AutoTokenizer.from_pretrained("google/gemma-7b")
    model = GemmaForTokenClassification.from_pretrained("google/gemma-7b")

    inputs = tokenizer(
        "HuggingFace is a company based in Paris and New York",
        add_special_tokens=False,
        return_tensors="pt",
    )

    with torch.no_grad():
        logits = model(**inputs).logits

    predicted_token_class_ids = logits.argmax(-1)

    # Note that tokens are classified rather then input words which means that
    # there might be more predicted token classes than words.
    # Multiple token classes might account for the same word
    predicted_tokens_classes = [
        model.config.id2label[t.item()] for t in predicted_token_class_ids[0]
    ]
    assert len(predicted_tokens_classes) == inputs.input_ids.shape[1]

    labels = predicted_token_class_ids
    loss = model(**inputs, labels=labels).loss
    assert round(loss.item(), 2) > 0


def test_flax_gemma_model(published, reference_tokenizer):
    jax = pytest.importorskip("jax")
    theirs = published("google/gemma-2b", "gemma")
    from gemcut.engine import AutoTokenizer, FlaxGemmaModel

    tokenizer = AutoTokenizer.from_pretrained("google/gemma-2b")
    model = FlaxGemmaModel.from_pretrained("google/gemma-2b")

    inputs = tokenizer("Hello, my dog is cute", return_tensors="jax")
    outputs = model(**inputs)

    last_hidden_states = outputs.last_hidden_state
    assert isinstance(last_hidden_states, jax.Array)
    with torch.no_grad():
        expected = theirs.model(**reference_tokenizer("Hello, my dog is cute", return_tensors="pt"))
    assert_close(torch.tensor(np.asarray(last_hidden_states)), expected.last_hidden_state)


def test_flax_gemma_for_causal_lm(published, reference_tokenizer):
    theirs = published("google/gemma-2b", "gemma")
    from gemcut.engine import AutoTokenizer, FlaxGemmaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained("google/gemma-2b")
    model = FlaxGemmaForCausalLM.from_pretrained("google/gemma-2b")

    inputs = tokenizer("Hello, my dog is cute", return_tensors="np")
    outputs = model(**inputs)

    # retrieve logts for next token
    next_token_logits = outputs.logits[:, -1]
    assert isinstance(next_token_logits, np.ndarray)
    with torch.no_grad():
        expected = theirs(
            **reference_tokenizer("Hello, my dog is cute", return_tensors="pt")
        ).logits
    assert_close(torch.tensor(next_token_logits), expected[:, -1])


def test_vault_gemma_pipeline(published):
    published("google/vaultgemma-1b", "vaultgemma")
    from gemcut.engine import pipeline

    pipe = pipeline(
        task="text-generation",
        model="google/vaultgemma-1b",
        dtype="auto",
        device_map="auto",
    )

    text = "Tell me an unknown interesting biology fact about the brain."
    outputs = pipe(text, max_new_tokens=32)
    response = outputs[0]["generated_text"]
    assert response.startswith(text)


def test_vault_gemma_auto_model(published):
    theirs = published("google/vaultgemma-1b", "vaultgemma")
    from gemcut.engine import AutoModelForCausalLM, AutoTokenizer

    model_id = "google/vaultgemma-1b"
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    model = AutoModelForCausalLM.from_pretrained(model_id, device_map="auto", dtype="auto")

    text = "Tell me an unknown interesting biology fact about the brain."
    input_ids = tokenizer(text, return_tensors="pt").to(model.device)

    outputs = model.generate(**input_ids, max_new_tokens=32)
    print(tokenizer.decode(outputs[0]))
    plain = {name: x.cpu() for name, x in input_ids.items()}
    assert torch.equal(outputs.cpu(), theirs.generate(**plain, max_new_tokens=32))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("google/gemma-2b", "LLMs generate text through a process known as"),
        ("google/vaultgemma-1b-pt", "Write me a poem about Machine Learning. Answer:"),
    ],
)
def test_text_through_a_pipe(published, model, text):
    """The page's `echo -e ... | transformers run`, with gemcut's command."""
    published(model, "vaultgemma" if "vault" in model else "gemma")
    gemcut = Path(sys.executable).with_name("gemcut")
    command = f'echo -e "{text}" | {gemcut} generate --model {model} --max-tokens 5'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != ""
