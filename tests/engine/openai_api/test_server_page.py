"""The server's own page: its Python runs against a server, and its paths and limits are real."""

import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import openai
import pytest

from gemcut.engine import cli
from gemcut.engine.cli import main
from gemcut.engine.openai_api.settings import ServerSettings

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "engine" / "openai_api" / "README.md").read_text()
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_clients_run(server, capsys):
    names: dict = {}
    exec(BLOCKS[0].replace("http://127.0.0.1:8000", server.url), names)
    printed = capsys.readouterr().out
    assert re.search(r'\{\s*"age"\s*:\s*-?\d+\s*\}', printed)
    assert "name='weather'" in printed
    assert isinstance(names["client"], openai.OpenAI)


def test_an_application_for_another_server(capsys):
    names: dict = {}
    exec(BLOCKS[1], names)
    names["engine"].close()
    assert {"/v1/chat/completions", "/v1/completions"} <= names["app"].openapi()["paths"].keys()


def test_its_paths_are_the_applications(server):
    with server.client() as client:
        described = set(client.get("/openapi.json").json()["paths"])
    rows = re.findall(r"^\| (`/.*?) \|", PAGE, re.MULTILINE)
    named = {path for row in rows for path in re.findall(r"`(/[^`]+)`", row)}
    assert named == (described | {"/openapi.json"}) - {"/v1/models/{name}"}


@pytest.mark.parametrize(
    ("name", "said"),
    [("max_streams", "256"), ("max_n", "`n` (16)"), ("max_prompts", "a request (64)")],
)
def test_its_limits_are_the_defaults(name, said):
    assert said in PAGE
    assert str(getattr(ServerSettings(), name)) in said


def commands(page: str, program: str) -> list[list[str]]:
    """The lines of a page's shell blocks that call a program, split as a shell does."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("page", [PAGE, README], ids=["server", "first"])
def test_its_shell_commands_run(server, page, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who are you?\n")))
    (curl,) = commands(page, "curl")
    answer = subprocess.run(
        [part.replace("http://127.0.0.1:8000", server.url) for part in curl],
        capture_output=True,
        check=True,
    )
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]
    chats = [line for line in commands(page, "gemcut") if "--url" in line]
    assert len(chats) == 1
    assert main([part.replace("http://127.0.0.1:8000", server.url) for part in chats[0][1:]]) == 0
    assert capfd.readouterr().out.strip()
    (serve,) = (line for line in commands(page, "gemcut") if line[1] == "serve")
    parsed = cli._parser().parse_args(serve[1:])
    assert (parsed.command, parsed.port) == ("serve", 8000)
