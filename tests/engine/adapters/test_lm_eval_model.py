"""The harness' scores on the engine are those of its hf model; a task is local files."""

import json
import random
import subprocess
import sys
import threading
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # the harness' hf model needs it

import lm_eval
from engines import save_random_model
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry
from lm_eval.tasks import TaskManager

from gemcut.engine import Engine
from gemcut.engine.adapters.lm_eval_model import GemcutLM
from gemcut.engine.checkpoints.hub import DEMO

TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}\
<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
SINGLE = [{"Sequence": {"id": "A", "type_id": 0}}]
CHOICES = [
    {"q": "It was a bright", "choices": [" cold morning", " river", " of of"], "a": 0},
    {"q": "The children", "choices": [" walked", " sang of the summer."], "a": 1},
    {"q": "a space at the end ", "choices": ["yes", "no, never"], "a": 0},
    {"q": "", "choices": ["It was", "The children"], "a": 0},
    {"q": "It was the river. " * 40, "choices": [" A", " B", " C", " D"], "a": 2},
]
CHOOSING = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
QUESTIONS = [{"q": q, "a": "x"} for q in ("It was", "The children were", "She asked", "In 1984")]
LONG = "The children walked to the river and sang of the summer. "
TEXTS = [{"q": "", "a": text} for text in ("It was", "x", LONG, "a <start_of_turn> user\n\n")]
ROLLING = {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]}
TASKS = {
    "choices": (CHOICES, CHOOSING),
    "answers": (
        QUESTIONS,
        {
            "output_type": "generate_until",
            "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {
                "until": ["e ", ". ", "<end_of_turn>"],
                "max_gen_toks": 24,
                "do_sample": False,
                "num_beams": 1,
            },
        },
    ),
    "texts": (TEXTS, ROLLING),
    # the harness' API models truncate otherwise than its hf model, and do not look for a BOS
    "long": ([{"q": "", "a": LONG * 60}], ROLLING),
    "bos": ([{"q": "<bos>She", "choices": [" asked", "<bos>It was"], "a": 0}], CHOOSING),
}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Data sets are read from files, into a cache that is thrown away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with the harness' files of the three tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (documents, settings) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_text": "{{q}}",
            "doc_to_target": "a" if "choices" in documents[0] else "{{a}}",
            "target_delimiter": "",
            **settings,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # which is YAML
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer_file, twin) -> Path:
    """A random Gemma 3 with the tokenizer and chat template of a published checkpoint."""
    folder = tmp_path_factory.mktemp("gemma3")
    save_random_model(folder, tokenizer_file, "gemma3_text", max_position_embeddings=512)
    twin.chat_template = TEMPLATE
    twin.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = {  # as the published ones say that a text begins with BOS
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, *SINGLE],
        "pair": SINGLE,
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }
    file.write_text(json.dumps(content))
    return folder


def evaluated(model: str, tasks: Path, names=tuple(TASKS), **options) -> dict:
    arguments = options.pop("model_args")
    return lm_eval.simple_evaluate(
        model=model,
        model_args={"dtype": "float32"} | arguments,
        device="cpu",
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
        **options,
    )


def assert_equal_scores(ours: dict, theirs: dict) -> None:
    for task in theirs["samples"]:
        for name, score in theirs["results"][task].items():
            if isinstance(score, float):
                assert ours["results"][task][name] == pytest.approx(score, rel=1e-4), name
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert one["doc"] == other["doc"]
            for (answer,), (expected,) in zip(one["resps"], other["resps"], strict=True):
                if isinstance(expected, str):
                    assert answer == expected
                    continue
                answer, expected = (x if isinstance(x, tuple) else (x,) for x in (answer, expected))
                assert answer[1:] == expected[1:]  # whether it is greedy
                torch.testing.assert_close(answer[0], expected[0], rtol=1e-4, atol=1e-4)


def test_scores_are_those_of_the_hf_model_on_the_demo(tasks):
    """The long document fills the model's 512 tokens more than once."""
    ours = evaluated("gemcut", tasks, model_args={"pretrained": "demo"})
    # the folder says nothing of BOS, for which transformers then adds none
    theirs = {"pretrained": str(DEMO), "add_bos_token": True}
    assert_equal_scores(ours, evaluated("hf", tasks, model_args=theirs))


@pytest.fixture(scope="module")
def scores(tasks, published) -> dict:
    return evaluated("gemcut", tasks, model_args={"pretrained": str(published)})


def test_scores_are_those_of_the_hf_model_on_a_published_folder(scores, tasks, published):
    theirs = evaluated("hf", tasks, model_args={"pretrained": str(published)})
    assert_equal_scores(scores, theirs)


def test_texts_without_bos_in_short_windows_score_as_in_the_hf_model(tasks, published):
    arguments = {"pretrained": str(published), "add_bos_token": False, "max_length": 100}
    ours = evaluated("gemcut", tasks, model_args=arguments)
    assert_equal_scores(ours, evaluated("hf", tasks, model_args=arguments))


def test_chats_are_those_of_the_hf_model(tasks, published):
    """With examples as turns; the template refuses the system message."""
    options = {
        "model_args": {"pretrained": str(published)},
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "num_fewshot": 2,
        "system_instruction": "Be brief.",
    }
    names = ("choices", "answers")
    ours, theirs = (evaluated(model, tasks, names, **options) for model in ("gemcut", "hf"))
    assert_equal_scores(ours, theirs)
    assert "<start_of_turn>model\\n" in str(ours["samples"]["answers"][0]["arguments"])


@pytest.fixture(scope="module")
def url(published):
    """A server of the published folder, in a thread."""
    pytest.importorskip("fastapi")
    import uvicorn

    from gemcut.engine.openai_api.app import create_app
    from gemcut.engine.openai_api.serve import bind, server_config

    with Engine.from_pretrained(published, dtype="float32") as engine:
        server = uvicorn.Server(server_config(create_app(engine)))
        with bind("127.0.0.1", 0) as bound:
            thread = threading.Thread(target=server.run, args=([bound],))
            thread.start()
            yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
            server.should_exit = True
            thread.join()


def test_local_completions_of_the_harness_get_the_same_scores(scores, tasks, published, url):
    """Prompts are batches of ids, whose log-probabilities are echoed."""
    names = ("choices", "answers", "texts")
    arguments = {"model": "demo", "base_url": f"{url}/completions", "tokenizer": str(published)}
    arguments |= {"tokenizer_backend": "huggingface", "add_bos_token": True, "max_length": 512}
    theirs = evaluated("local-completions", tasks, names, model_args=arguments, batch_size=4)
    assert_equal_scores(scores, theirs)


def test_local_chat_completions_of_the_harness_get_the_same_answers(tasks, published, url):
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 2}
    ours = evaluated(
        "gemcut", tasks, ["answers"], model_args={"pretrained": str(published)}, **options
    )
    arguments = {"model": "demo", "base_url": f"{url}/chat/completions"}
    theirs = evaluated(
        "local-chat-completions", tasks, ["answers"], model_args=arguments, **options
    )
    assert_equal_scores(ours, theirs)


def requests_of(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def model() -> GemcutLM:
    return GemcutLM("demo", dtype="float32", max_batch_size=4, batch_size=1)


def test_a_question_is_computed_once_for_all_its_answers(model):
    question = LONG * 8
    before = model.engine.metrics()["prefill_tokens"]
    asked = [(question, f" {answer}") for answer in "ABCD"]
    model.loglikelihood(requests_of("loglikelihood", *asked), disable_tqdm=True)
    computed = model.engine.metrics()["prefill_tokens"] - before
    assert computed < len(model.tok_encode(question)) + 4 * 4


def test_random_answers_follow_the_seed_of_the_harness(model):
    def answers(seed: int) -> list[str]:
        random.seed(seed)  # as the harness does
        settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "top_p": 0.9}
        asked = requests_of("generate_until", *[("It was", settings)] * 4)
        return model.generate_until(asked, disable_tqdm=True)

    assert answers(1) == answers(1) != answers(2)
    assert len(set(answers(1))) > 1  # repeats of a question differ


def test_every_answer_goes_to_the_cache_of_the_harness(model, tmp_path):
    cached = lm_eval.api.model.CachingLM(model, str(tmp_path / "cache.db"))
    asked = requests_of("loglikelihood", ("It", " was"), ("", "It was"))
    first = cached.loglikelihood(asked)
    texts = requests_of("generate_until", ("It was", {"until": ["."], "max_gen_toks": 8}))
    rolling = requests_of("loglikelihood_rolling", ("It was",), (LONG,))
    expected = cached.generate_until(texts), cached.loglikelihood_rolling(rolling)
    before = model.engine.metrics()["steps"]
    assert cached.loglikelihood(asked) == first
    assert (cached.generate_until(texts), cached.loglikelihood_rolling(rolling)) == expected
    assert model.engine.metrics()["steps"] == before
    model.set_cache_hook(lm_eval.api.model.CacheHook(None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length_penalty": 2.0}, "'length_penalty'"),
        ({"num_beams": 4}, "'num_beams'"),
        ({"max_gen_toks": 512}, "max_gen_toks 512 is outside 1..511"),
        ({"max_gen_toks": 0}, "max_gen_toks 0 is outside 1..511"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
    ],
    ids=str,
)
def test_what_the_engine_cannot_do_is_refused_by_name(model, settings, message):
    asked = requests_of("generate_until", ("It was", settings))
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate_until(asked, disable_tqdm=True)


def test_bad_arguments_of_the_model_are_refused_by_name(model):
    for options, message in (
        ({"max_lenght": 5}, "max_lenght"),
        ({"max_length": 513}, "max_seq_len 513"),
        ({"prefix_token_id": 3072}, "prefix_token_id 3072"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            GemcutLM("demo", **options)
    with pytest.raises(ValueError, match="tokens of a continuation"):
        model.loglikelihood(requests_of("loglikelihood", ("It", LONG * 60)), disable_tqdm=True)


def test_nothing_asked_is_nothing_answered(model):
    assert model.loglikelihood([]) == model.loglikelihood_rolling([]) == model.generate_until([])


def test_the_entry_point_is_the_model():
    """Releases of the harness that read entry points keep them in its registry."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    group = "lm_eval.models"
    entry_point = EntryPoint("gemcut", project["entry-points"][group]["gemcut"], group)
    model_registry.register("gemcut-by-entry-point", target=entry_point)
    assert get_model("gemcut-by-entry-point") is get_model("gemcut") is GemcutLM


def test_the_command_line_of_the_harness_has_the_model(tasks, tmp_path):
    command = [sys.executable, "-P", "-m", "gemcut.engine.adapters.lm_eval_model"]
    command += ["--model", "gemcut", "--tasks", "answers", "--include_path", str(tasks)]
    command += ["--model_args", "pretrained=demo,max_batch_size=8,quantization=int8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "|answers|" in done.stdout
