"""The `gemcut` command: its arguments, its exit codes and its errors."""

import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest
from processes import COMMAND, ENVIRONMENT, error_line

from gemcut import engine as engine_package
from gemcut.engine import Engine, SamplingParams, cli, commands
from gemcut.engine.cli import main


def test_the_script_runs_main():
    (script,) = entry_points(group="console_scripts", name="gemcut")
    assert script.load() is main


def test_version(run):
    assert run("--version") == (0, f"gemcut {version('gemcut')}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no-command"),
        pytest.param(["serve", "--port", "http"], id="no-port"),
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


def test_an_unknown_option_shows_its_command_and_what_it_is_called_here(run):
    code, out, err = run("serve", "demo", "--max-model-len", "512")
    assert (code, out) == (2, "")
    assert err.startswith("usage: gemcut serve ")
    assert err.endswith(
        "error: unrecognized arguments: --max-model-len 512; it is --max-seq-len here\n"
    )


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
        --repetition-penalty 1.5 --presence-penalty 0.25 --frequency-penalty -0.5 --bad-words z"""
    asked = cli._parser().parse_args(arguments.split())
    assert commands._given(asked) == SamplingParams(
        n=2,
        temperature=0.5,
        top_k=3,
        top_p=0.7,
        min_p=0.1,
        max_tokens=9,
        min_tokens=4,
        stop=["x", "yy"],
        bad_words=["z"],
        ignore_eos=True,
        seed=-5,
        logprobs=2,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
    )


def test_drafts_are_an_option_too():
    asked = cli._parser().parse_args(["generate", "a", "--prompt-lookup-num-tokens", "5"])
    assert commands._given(asked).prompt_lookup_num_tokens == 5


@pytest.mark.parametrize(("command", "max_tokens"), [("generate", 256), ("chat", None)])
def test_default_sampling(command, max_tokens):
    asked = cli._parser().parse_args([command])
    assert commands._given(asked) == SamplingParams()
    defaults = SamplingParams(**asked.unpublished)
    assert defaults == SamplingParams(temperature=0.8, top_p=0.95, max_tokens=max_tokens)


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


@pytest.mark.parametrize("command", ["info", "generate", "chat"])
@pytest.mark.parametrize("size", ["many", "1.5", ""])
def test_a_size_that_is_no_number(run, command, size):
    code, out, err = run(command, f"--max-seq-len={size}")
    assert (code, out) == (2, "")
    assert err.endswith(f"--max-seq-len: {size!r} is neither a number nor 'auto'\n")
