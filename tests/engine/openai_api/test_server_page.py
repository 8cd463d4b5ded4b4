"""The server's own page: its Python runs against a server, and its paths and limits are real."""

import re
from pathlib import Path

import openai
import pytest

from gemcut.engine.openai_api.settings import ServerSettings

PAGE = (Path(__file__).parents[3] / "engine" / "openai_api" / "README.md").read_text()
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
