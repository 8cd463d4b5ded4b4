"""The `gemcut` command: what it prints where, its exit codes, and its manners on a terminal.

In-process where that is enough; a real process for signals, pipes, the first byte and a terminal.
"""

import fcntl
import inspect
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch
from processes import COMMAND, ENVIRONMENT
from safetensors.torch import load_file, save_file

from gemcut import engine as engine_package
from gemcut.engine import PUBLISHED, Delta, Engine, SamplingParams, cli, commands, info, memory
from gemcut.engine.checkpoints import hub
from gemcut.engine.cli import main
from gemcut.kernels import reference
from gemcut.tokenizer import render_chat

GREEDY = ["--temperature", "0"]
PATIENCE = 30  # seconds for a process to import torch and to answer


@pytest.fixture(scope="module")
def demo():
    with Engine.from_pretrained("demo", max_batch_size=1) as engine:
        yield engine


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the demo checkpoint."""
    return Path(shutil.copytree(hub.DEMO, tmp_path / "model"))


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `gemcut` in this process: exit code, standard output, standard error."""

    def run(*args: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        try:
            code = main(args)
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def error_line(result: tuple[int, str, str]) -> str:
    """The message of a run that ended with an error: code 1, one line, nothing printed."""
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.startswith("gemcut: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


# Arguments


def test_the_script_runs_main():
    (script,) = entry_points(group="console_scripts", name="gemcut")
    assert script.load() is main


def test_version(run):
    assert run("--version") == (0, f"gemcut {version('gemcut')}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no-command"),
        pytest.param(["serve"], id="not-there-yet"),
        pytest.param(["generate", "a", "--temprature", "1"], id="unknown-option"),
        pytest.param(["generate", "a", "--temp", "1"], id="abbreviation"),
        pytest.param(["generate", "a", "--max-tokens", "many"], id="no-number"),
        pytest.param(["info", "gemma-2b", "--model", "gemma-7b"], id="model-twice"),
    ],
)
def test_wrong_usage_exits_with_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: gemcut")


def test_help_names_the_defaults_and_does_not_wait_for_torch():
    code = (
        "import sys; from gemcut.engine.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    for default in ("demo (the default)", "(default: 0.8)", "(default: 0.95)", "(default: 256)"):
        assert default in " ".join(shown.stdout.split())


def test_the_package_gives_its_names_although_it_imports_them_late():
    assert dir(engine_package) == sorted(engine_package.__all__)
    names: dict = {}
    exec("from gemcut.engine import *", names)
    assert names.keys() == {*engine_package.__all__, "__builtins__"}
    assert names["Engine"] is Engine
    with pytest.raises(AttributeError, match="has no attribute 'Motor'"):
        engine_package.Motor  # noqa: B018


def test_every_sampling_option_reaches_the_request():
    arguments = """generate a --n 2 --temperature 0.5 --top-k 3 --top-p 0.7 --min-p 0.1
        --max-tokens 9 --min-tokens 4 --stop x --stop yy --ignore-eos --seed -5 --logprobs 2
        --repetition-penalty 1.5 --presence-penalty 0.25 --frequency-penalty -0.5"""
    asked = cli._parser().parse_args(arguments.split())
    assert commands._sampling_params(asked) == SamplingParams(
        n=2,
        temperature=0.5,
        top_k=3,
        top_p=0.7,
        min_p=0.1,
        max_tokens=9,
        min_tokens=4,
        stop=["x", "yy"],
        ignore_eos=True,
        seed=-5,
        logprobs=2,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
    )


def test_drafts_are_an_option_too():
    asked = cli._parser().parse_args(["generate", "a", "--prompt-lookup-num-tokens", "5"])
    assert commands._sampling_params(asked).prompt_lookup_num_tokens == 5


@pytest.mark.parametrize(("command", "max_tokens"), [("generate", 256), ("chat", None)])
def test_default_sampling(command, max_tokens):
    asked = commands._sampling_params(cli._parser().parse_args([command]))
    assert asked == SamplingParams(temperature=0.8, top_p=0.95, max_tokens=max_tokens)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["generate", ""], "the prompt is empty", id="empty-argument"),
        pytest.param(["generate"], "the prompt is empty", id="empty-standard-input"),
        pytest.param(["generate", "a", "--top-p", "1.5"], "top_p 1.5", id="sampling"),
        pytest.param(["generate", "a", "--temperature", "nan"], "not finite", id="nan"),
        pytest.param(["generate", "a", "--max-seq-len", "2"], "slot holds 2", id="slot-too-short"),
        pytest.param(["generate", "a", "--dtype", "float16"], "overflow", id="dtype"),
        pytest.param(["generate", "a", "--device", "tpu"], "device 'tpu'", id="device"),
        pytest.param(["generate", "a", "--ops", "cublas"], "'cublas'", id="ops"),
        pytest.param(["generate", "a", "--logprobs", "1"], "add --json", id="unshown-logprobs"),
        pytest.param(["generate", "a\udcff"], "lone surrogate U+DCFF", id="broken-argument"),
        pytest.param(["generate", "a", "--model", "gemma"], "model 'gemma'", id="generate-model"),
        pytest.param(["chat", "gemma"], "model 'gemma'", id="chat-model"),
        pytest.param(["chat", "--model", "gemma"], "model 'gemma'", id="chat-model-option"),
        pytest.param(["chat", "--max-tokens", "0"], "max_tokens 0", id="chat-sampling"),
        pytest.param(["info", "gemma"], "gemma-2-9b", id="info-names-the-published-sizes"),
        pytest.param(["info", "gemma-2b", "--check"], "size alone", id="check-without-weights"),
        pytest.param(["info", "--dtype", "float16"], "overflow", id="info-dtype"),
    ],
)
def test_an_error_is_one_line_and_exits_with_1(run, arguments, message):
    assert message in error_line(run(*arguments))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("the KV cache takes\n9 GB"), "the KV cache takes 9 GB"),
        (PermissionError(13, "Permission denied", "x"), "Permission denied: 'x'"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_errors_of_the_machine_are_one_line_too(run, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Engine, "from_pretrained", fail)
    assert message in error_line(run("generate", "a"))


def test_kernels_on_a_cpu_are_refused():
    command = [*COMMAND, "generate", "a", "--device", "cpu", "--ops", "triton"]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert "ops 'triton' needs a GPU" in error_line((run.returncode, run.stdout, run.stderr))


def test_a_defect_is_not_dressed_as_a_mistake_of_the_user(run, monkeypatch):
    monkeypatch.setattr(Engine, "from_pretrained", lambda *args, **kwargs: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run("generate", "a")


# generate


@pytest.mark.parametrize("more", [[], ["--no-stream"]], ids=["stream", "no-stream"])
def test_generate_prints_the_text_a_newline_and_nothing_else(run, demo, more):
    expected = demo.generate("It was", SamplingParams(temperature=0, max_tokens=20)).text
    result = run("generate", "It was", "--max-tokens", "20", *GREEDY, *more)
    assert expected
    assert result == (0, expected + "\n", "")


def test_several_completions_stand_apart(run):
    arguments = ["generate", "It was", "--n", "3", "--seed", "7", "--max-tokens", "8"]
    _, out, _ = run(*arguments)
    completions = json.loads(run(*arguments, "--json")[1])["outputs"]
    assert len({completion["text"] for completion in completions}) > 1
    assert out == "\n---\n".join(completion["text"] for completion in completions) + "\n"


def test_json_is_one_object_with_everything(run, demo):
    params = SamplingParams(
        temperature=0.8, top_p=0.95, seed=3, n=2, max_tokens=12, logprobs=2, ignore_eos=True
    )
    expected = demo.generate("It was", params)
    arguments = ["--seed", "3", "--n", "2", "--max-tokens", "12", "--logprobs", "2", "--json"]
    code, out, err = run("generate", "It was", "--ignore-eos", *arguments)
    assert (code, err, out.count("\n")) == (0, "", 1)
    answer = json.loads(out)
    assert answer["model"] == "demo"
    assert answer["prompt"] == "It was"
    assert answer["prompt_token_ids"] == expected.prompt_token_ids
    for shown, completion in zip([answer, answer["outputs"][1]], expected.outputs, strict=True):
        assert shown["text"] == completion.text
        assert shown["token_ids"] == completion.token_ids
        assert shown["finish_reason"] == completion.finish_reason
    assert answer["metrics"]["generated_tokens"] == 24
    first = answer["outputs"][0]
    assert len(first["logprobs"]) == 12
    assert str(first["token_ids"][0]) in first["logprobs"][0]


def test_json_tells_the_stop_string(run):
    arguments = ["generate", "It was", "--json", "--max-tokens", "30", *GREEDY]
    text = json.loads(run(*arguments)[1])["text"]
    stop = text[10:14]
    answer = json.loads(run(*arguments, "--stop", "never", "--stop", stop)[1])
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", stop)
    assert answer["text"] == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("stdin", "prompt"),
    [
        pytest.param(b"It was", "It was", id="no-newline"),
        pytest.param(b"It was\n", "It was", id="newline-of-echo"),
        pytest.param(b"It was\r\n", "It was", id="newline-of-windows"),
        pytest.param(b"It was\n\n", "It was\n", id="only-one-newline-goes"),
        pytest.param(b" \r\n a \n", " \r\n a ", id="nothing-else-is-altered"),
        pytest.param("Žižkov ☃\n".encode(), "Žižkov ☃", id="multi-byte"),
    ],
)
@pytest.mark.parametrize("dash", [[], ["-"]], ids=["absent", "dash"])
def test_the_prompt_comes_from_standard_input(run, stdin, prompt, dash):
    arguments = ["generate", *dash, "--json", "--max-tokens", "1"]
    code, out, _ = run(*arguments, stdin=stdin)
    assert code == 0
    assert json.loads(out)["prompt"] == prompt


def test_bytes_that_are_no_text_are_refused(run):
    message = error_line(run("generate", stdin=b"It \xff was"))
    assert "standard input is not utf-8: byte 0xff at position 3" in message


def test_an_output_that_lacks_a_character_gets_its_number(run, monkeypatch):
    monkeypatch.setattr(Engine, "stream", lambda *args: iter([Delta("café ☃", [1])]))
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert run("generate", "a")[0] == 0
    assert printed.getvalue() == b"caf\\xe9 \\u2603\n"


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_stream_that_the_caller_closed_is_an_empty_one(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, name, None)
    code = main(["generate", "--max-tokens", "1", *([] if name == "stdin" else ["a"])])
    out, err = capsys.readouterr()
    assert code == (1 if name == "stdin" else 0)
    assert ("the prompt is empty" in err) == (name == "stdin")
    assert bool(out) == (name == "stderr")


# chat, from a file


def chat_of(engine: Engine, *contents: str, system: str | None = None) -> list[str]:
    """The greedy answers to some turns of the user."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for content in contents:
        messages.append({"role": "user", "content": content})
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        answers.append(engine.chat(messages, params, merge_system=True).text)
        messages.append({"role": "model", "content": answers[-1]})
    return answers


BRIEF = [*GREEDY, "--max-tokens", "20", "--ignore-eos"]


def test_chat_answers_each_line_and_remembers(run, demo):
    code, out, _ = run("chat", *BRIEF, stdin="Who is it?\n\nŽižkov?\n".encode())
    answers = chat_of(demo, "Who is it?", "Žižkov?")
    assert answers[1] != chat_of(demo, "Žižkov?")[0]
    assert (code, out) == (0, "".join(f"{answer}\n" for answer in answers))


def test_chat_with_a_system_text(run, demo):
    answers = chat_of(demo, "Who is it?", "Why?", system="You are Watson.")
    assert answers != chat_of(demo, "Who is it?", "Why?")
    out = run("chat", *BRIEF, "--system", "You are Watson.", stdin=b"Who is it?\nWhy?")[1]
    assert out == "".join(f"{answer}\n" for answer in answers)


def test_chat_forgets_and_leaves_when_told(run, demo):
    _, out, _ = run("chat", *BRIEF, stdin=b"Who is it?\n/reset\nWhy?\n/exit\nWhat?\n")
    answers = chat_of(demo, "Who is it?") + chat_of(demo, "Why?")
    assert out == "".join(f"{answer}\n" for answer in answers)


def test_a_turn_of_broken_bytes_is_refused_and_the_chat_goes_on(run, demo):
    code, out, err = run("chat", *BRIEF, stdin=b"Who is it?\n\xff\nWhy?\n")
    assert out == "".join(f"{answer}\n" for answer in chat_of(demo, "Who is it?", "Why?"))
    assert [line for line in err.splitlines() if "error" in line] == [
        "gemcut: error: standard input is not utf-8: byte 0xff at position 0 (invalid start byte)"
    ]
    assert code == 1


def test_an_answer_that_is_cut_says_so(run):
    _, _, err = run("chat", *GREEDY, "--ignore-eos", "--max-tokens", "2", stdin=b"Who is it?\n")
    assert err == "gemcut: the answer was cut at --max-tokens 2\n"


def test_a_conversation_that_outgrows_its_slot_says_so_and_what_to_do(run):
    arguments = ["chat", *GREEDY, "--ignore-eos", "--max-seq-len", "40"]
    code, out, err = run(*arguments, stdin=b"Who is it?\nAnd then?\n/reset\nWho is it?\n")
    filled, refused, reset, again = err.splitlines()
    hint = "; /reset begins a new one"
    assert filled == again == "gemcut: the conversation fills its slot of 40 tokens" + hint
    assert re.match(r"gemcut: error: with this turn the conversation has \d+ tokens", refused)
    assert refused.endswith("but a slot holds 40" + hint)
    assert "forgotten" in reset
    assert out[: len(out) // 2] == out[len(out) // 2 :]  # after /reset as at the beginning
    assert code == 1


def test_a_conversation_may_fill_its_slot_but_for_one_token(run, demo):
    length = len(render_chat(demo.tokenizer, [{"role": "user", "content": "Who is it?"}]))
    refused, answered = (
        run("chat", *GREEDY, "--max-seq-len", str(room), stdin=b"Who is it?\n")
        for room in (length, length + 1)
    )
    assert error_line(refused).endswith("/reset begins a new one\n")
    assert (answered[0], answered[2].count("fills its slot")) == (0, 1)


# info


@pytest.mark.parametrize(
    ("model", "parameters", "kib_per_token"),
    [  # GEMMA.md's table
        ("gemma-2b", 2.506e9, 18),
        ("gemma-7b", 8.538e9, 448),
        ("gemma-2-2b", 2.614e9, 104),
        ("gemma-2-9b", 9.242e9, 336),
        ("gemma-2-27b", 27.227e9, 368),
        ("vaultgemma-1b", 1.039e9, 104),
    ],
)
def test_info_of_a_published_size_asks_nobody(run, monkeypatch, model, parameters, kib_per_token):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    code, out, err = run("info", model, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    facts = json.loads(out)
    assert facts["parameters"] == pytest.approx(parameters, rel=1e-3)
    assert facts["weight_bytes"]["bfloat16"] == 2 * facts["parameters"]
    assert facts["weight_bytes"]["float32"] == 4 * facts["parameters"]
    assert facts["kv_bytes_per_token"] == kib_per_token * 1024
    assert facts["config"]["num_hidden_layers"] == PUBLISHED[model].num_layers


@pytest.fixture
def set_free(monkeypatch):
    """A way to say how many bytes are free."""

    def set_free(free: float) -> None:
        for module in (info, memory):
            monkeypatch.setattr(module, "free_bytes", lambda device: int(free))

    return set_free


def test_info_for_people(run, set_free):
    set_free(60e9)
    code, out, err = run("info", "gemma-2-9b", "--device", "cpu")
    assert (code, err) == (0, "")
    assert out == (
        "model         gemma-2-9b\n"
        "family        Gemma 2 (gemma2)\n"
        "parameters    9,241,705,984\n"
        "weights       18.48 GB in bfloat16, 36.97 GB in float32\n"
        "layers        42: 21 local (window 4096), 21 global\n"
        "hidden size   3584, MLP 14336\n"
        "heads         16 query, 8 key and value, head_dim 256, scale 0.0625\n"
        "vocabulary    256000, embedding and head tied\n"
        "softcaps      attention 50, logits 30\n"
        "rope          base 10,000\n"
        "longest text  8192 tokens\n"
        "KV cache      336 KiB a token in bfloat16\n"
        "              2.20 GB a slot of 8192 tokens; 2.82 GB if local layers were no rings\n"
        "on cpu        60.00 GB free, 36.97 GB for weights in float32\n"
        "              room for 2 slots of 8192 tokens\n"
        "              longest slot, in tokens: 8192 at batch 1, 1964 at batch 8\n"
        "an engine     8 x 1964 tokens take 48.00 GB\n"
        "              36.97 GB weights, 10.81 GB KV cache, 23.04 MB sampling state, "
        "194.73 MB activations\n"
    )


def test_info_of_a_model_with_two_rotations(run):
    out = run("info", "gemma-3-1b")[1]
    assert "layers        26: 22 local (window 512), 4 global\n" in out
    assert "softcaps      none\n" in out
    assert "rope          base 1,000,000; local layers base 10,000\n" in out


def test_room_is_exact(set_free):
    config = PUBLISHED["gemma-2-2b"]
    weights = 4 * config.num_parameters()
    budget = weights + 6e9
    set_free(budget / 0.8)
    room = info.describe(config, torch.device("cpu"), torch.float32).room
    build = memory.Build(config, torch.device("cpu"), torch.float32, reference)

    def size(slots: int, length: int) -> int:
        return build.estimate(slots, length).total

    assert room.weight_bytes == weights
    assert 1 < room.slots < 8
    assert size(room.slots, 8192) <= budget < size(room.slots + 1, 8192)
    for slots, length in room.longest_slot.items():
        assert size(slots, length) <= budget
        assert length == 8192 or size(slots, length + 1) > budget
    assert room.longest_slot[1] == 8192 > room.longest_slot[8] > 0


def test_a_model_larger_than_the_memory_does_not_fit(run, set_free):
    set_free(1e9)
    assert "              does not fit\n" in run("info", "gemma-2-9b", "--device", "cpu")[1]
    facts = json.loads(run("info", "gemma-2-9b", "--device", "cpu", "--json")[1])
    room = facts["room"]
    assert (room["slots"], room["longest_slot"]) == (0, {"1": 0, "8": 0})
    assert "cpu has 1.00 GB free" in facts["engine"]["problem"]
    assert facts["engine"]["problem"].endswith("no size of this model would fit")


@pytest.mark.parametrize("command", ["info", "generate", "chat"])
@pytest.mark.parametrize("size", ["many", "1.5", ""])
def test_a_size_that_is_no_number(run, command, size):
    code, out, err = run(command, f"--max-seq-len={size}")
    assert (code, out) == (2, "")
    assert err.endswith(f"--max-seq-len: {size!r} is neither a number nor 'auto'\n")


def test_generate_with_a_slot_of_the_length_that_fits(run):
    plain = run("generate", "Once", "--max-tokens", "3", *GREEDY)
    assert run("generate", "Once", "--max-tokens", "3", *GREEDY, "--max-seq-len", "auto") == plain
    assert plain[0] == 0


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_graphs_can_be_left_out(run, monkeypatch, command):
    asked = []

    def refuse(*args, **options):
        asked.append(options["cuda_graphs"])
        raise ValueError("enough")

    monkeypatch.setattr(Engine, "from_pretrained", refuse)
    for options in ([], ["--no-cuda-graphs"]):
        assert run(command, *options)[0] == 1
    assert asked == [True, False]


def test_rings_are_as_long_as_the_engine_makes_them():
    parameters = inspect.signature(Engine.from_pretrained).parameters
    assert parameters["prefill_chunk"].default == info.PREFILL_CHUNK


def test_info_fetches_the_config_alone(run, folder, monkeypatch):
    asked = []

    def fetch(model, allow_patterns):
        asked.append((model, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert run("info", "owner/name")[0] == 0
    assert asked == [("owner/name", ["config.json"])]
    assert run("info", "owner/name", "--check")[0] == 0
    assert "*.safetensors" in asked[-1][1]


def test_a_folder_is_read_though_it_bears_the_name_of_a_published_size(run, folder, monkeypatch):
    folder.rename(folder.with_name("gemma-2b"))
    monkeypatch.chdir(folder.parent)
    assert json.loads(run("info", "gemma-2b", "--json")[1])["config"]["vocab_size"] < 256000
    assert run("info", "gemma-2b", "--check")[0] == 0


def test_check_of_a_sound_model(run):
    code, out, err = run("info", "--check")
    assert (code, err) == (0, "")
    assert out.endswith("check         names, shapes and values are right\n")
    assert json.loads(run("info", "--check", "--json")[1])["problems"] == []


def spoil(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_nan_and_infinity(tensors: dict) -> None:
    tensors["model.norm.weight"][1] = float("nan")
    tensors["model.layers.0.mlp.down_proj.weight"][2, 3] = float("-inf")


def test_check_names_every_tensor_with_nan_or_infinity(run, folder):
    spoil(folder, add_nan_and_infinity)
    code, out, err = run("info", str(folder), "--check")
    assert (code, err) == (1, "")
    assert [line for line in out.splitlines() if line.startswith("check")] == [
        f"check         {folder}: {name} holds a NaN or an infinity"
        for name in ("model.layers.0.mlp.down_proj.weight", "model.norm.weight")
    ]
    assert len(json.loads(run("info", str(folder), "--check", "--json")[1])["problems"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing", id="gone"
        ),
        pytest.param(lambda t: t.update(a=torch.ones(1)), "a is not part of the model", id="extra"),
        pytest.param(
            lambda t: t.update({"model.norm.weight": torch.ones(3)}), "is [3]", id="misshapen"
        ),
    ],
)
def test_check_finds_a_wrong_tensor(run, folder, change, message):
    spoil(folder, change)
    code, out, _ = run("info", str(folder), "--check")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("check")]
    assert message in line


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_check_finds_a_damaged_file_once(run, folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    code, out, _ = run("info", str(folder), "--check", "--json")
    assert code == 1
    (problem,) = json.loads(out)["problems"]
    assert name in problem


# Processes


@contextmanager
def process(*arguments: str):
    """A running `gemcut`, that is killed where the test fails."""
    started = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


ENDLESS = ["generate", "It was", "--ignore-eos", "--max-tokens", "500"]  # seconds of work


def test_text_comes_as_it_is_made_and_ctrl_c_ends_it():
    with process(*ENDLESS) as running:
        assert running.stdout.read(1)  # unflushed, it would come with the end: too late for Ctrl-C
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, err) == (130, b"\n")


def test_a_reader_that_leaves_is_no_error():
    with process(*ENDLESS) as running:
        assert running.stdout.read(5)
        running.stdout.close()
        assert running.wait(PATIENCE) == 141
        assert running.stderr.read() == b""


def test_help_for_a_reader_that_has_left():
    read_end, write_end = os.pipe()
    os.close(read_end)
    shown = subprocess.run(
        [*COMMAND, "--help"], stdout=write_end, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    os.close(write_end)
    assert (shown.returncode, shown.stderr) == (141, b"")


def test_a_full_disk_is_an_error():
    with open("/dev/full", "wb") as full:
        shown = subprocess.run(
            [*COMMAND, "--version"], stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
    assert shown.returncode == 1
    assert shown.stderr == b"gemcut: error: [Errno 28] No space left on device\n"


class Terminal:
    """A `gemcut` on a pseudo-terminal, as a person sees it."""

    def __init__(self, *arguments: str):
        self._person, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is a signal there
            env={**ENVIRONMENT, "TERM": "dumb"},
        )
        os.close(terminal)
        self.shown = b""

    def type(self, keys: bytes) -> None:
        os.write(self._person, keys)

    def wait_until_it_waits(self) -> None:
        """Return when the process sleeps, for input.

        CPython's readline misses a signal that comes between its last look and its sleep, and
        notices it with the next key.
        """
        stat = Path(f"/proc/{self.process.pid}/stat")
        deadline = time.monotonic() + PATIENCE
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def expect(self, pattern: bytes) -> bytes:
        """What was shown since the last call, up to the end of the pattern."""
        deadline = time.monotonic() + PATIENCE
        while (match := re.search(pattern, self.shown, re.DOTALL)) is None:
            self._read(deadline, waiting_for=pattern)
        shown, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return shown

    def end(self) -> tuple[int, bytes]:
        """The exit code, and what was shown since the last call."""
        deadline = time.monotonic() + PATIENCE
        try:
            while True:
                self._read(deadline, waiting_for=b"the end")
        except OSError:  # EIO: nobody holds the other end any more
            return self.process.wait(PATIENCE), self.shown

    def _read(self, deadline: float, *, waiting_for: bytes) -> None:
        ready, _, _ = select.select([self._person], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no {waiting_for!r} in {self.shown!r}"
        self.shown += os.read(self._person, 4096)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._person)


@pytest.fixture
def terminal():
    opened = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


PROMPT = rb">>> $"


def test_chat_on_a_terminal(terminal):
    chat = terminal("chat", "--ignore-eos", "--seed", "0")
    assert b"/reset forgets" in chat.expect(PROMPT)

    chat.type("Žižkov?\n".encode())
    chat.expect(rb"\?\r\n.*\w")  # the echo of the line, and the beginning of an answer
    chat.type(b"\x03")
    chat.expect(rb"\^C\r\n>>> $")  # Ctrl-C ends the answer, not the chat

    chat.type(b"\xff\n")
    assert re.search(rb"gemcut: error: [^\n]+\r\n>>> $", chat.expect(rb"error.*" + PROMPT))
    chat.type(b"/reset\n")
    assert b"forgotten" in chat.expect(rb"forgotten.*" + PROMPT)
    chat.type(b"And you?\n")
    chat.expect(rb"\?\r\n.*\w")
    chat.type(b"\x03")
    chat.expect(PROMPT)

    chat.type(b"\x04")
    code, shown = chat.end()
    assert code == 0
    assert shown.endswith(b"\r\n")  # the shell's prompt stands on a line of its own
    assert b"Traceback" not in shown


def test_ctrl_c_at_the_prompt_leaves(terminal):
    chat = terminal("chat")
    chat.expect(PROMPT)
    chat.type(b"half a line")
    chat.expect(rb"half a line")
    chat.wait_until_it_waits()
    chat.type(b"\x03")
    code, shown = chat.end()
    assert code == 130
    assert shown.endswith(b"\r\n")
    assert b"Traceback" not in shown
