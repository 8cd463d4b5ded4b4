"""SGLang's own command line finds the backend by its entry point, and runs our server."""

import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("sglang.cli.serve_backends", exc_type=ImportError)
pytest.importorskip("fastapi")
pytest.importorskip("tomllib")

import httpx
import tomllib
from sglang.cli import serve_backends

from gemcut.engine.adapters.sglang_backend import arguments, create_backend

PROJECT = Path(__file__).parents[3] / "pyproject.toml"
GROUP = serve_backends.SERVE_BACKENDS_GROUP
VALUE = tomllib.loads(PROJECT.read_text())["project"]["entry-points"][GROUP]["gemcut"]
MAIN = "from sglang.cli.main import main; main()"
PATIENCE = 120  # seconds: SGLang's imports alone take some


@pytest.fixture
def installed(tmp_path, monkeypatch) -> None:
    """What pip writes for gemcut stands first on the path of processes."""
    metadata = tmp_path / "gemcut-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gemcut\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\ngemcut = {VALUE}\n")
    paths = [str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def sglang(*words: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-P", "-c", MAIN, *words]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **options)


def test_sglang_serves_with_the_backend_and_ends_at_a_signal(installed):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = sglang(
        "serve", "demo", "--model-type", "gemcut", "--port", str(port), "--max-batch-size", "2"
    )
    try:
        url, until = f"http://127.0.0.1:{port}/v1/completions", time.monotonic() + PATIENCE
        while True:
            try:
                asked = {"prompt": "It was", "max_tokens": 3, "model": "demo"}
                answer = httpx.post(url, json=asked, timeout=PATIENCE)
                break
            except httpx.ConnectError:
                assert server.poll() is None, server.stderr.read()
                assert time.monotonic() < until
                time.sleep(0.2)
        assert answer.json()["usage"]["completion_tokens"] == 3
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 0
    finally:
        server.kill()
        server.communicate()


def test_help_is_that_of_our_server(installed):
    process = sglang("serve", "--model-type", "gemcut", "--help", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "--max-streams" in out
    assert "gemcut serve" in out


def test_errors_end_with_their_exit_code(capsys):
    backend = create_backend()
    for options, code in ((["--port", "70000"], 1), (["--no-such-option"], 2)):
        request = serve_backends.ServeRequest(("--model-path", "demo", *options), "demo")
        with pytest.raises(SystemExit) as error:
            backend.run(request)
        assert error.value.code == code
        assert capsys.readouterr().err.splitlines()[-1].startswith(("gemcut: error:", "gemcut"))


def test_the_backend_is_of_the_version_of_sglang_and_taken_by_name_alone():
    backend = EntryPoint("gemcut", VALUE, GROUP).load()()
    assert isinstance(backend, serve_backends.ServeBackend)
    assert backend.api_version == serve_backends.SERVE_BACKEND_API_VERSION
    assert backend.detect is None


def test_the_model_is_renamed_and_nothing_else():
    given = ["--model-path", "a", "--model-path=b", "--model", "c", "--model-paths", "--port", "1"]
    expected = ["--model", "a", "--model=b", "--model", "c", "--model-paths", "--port", "1"]
    assert arguments(given) == expected
