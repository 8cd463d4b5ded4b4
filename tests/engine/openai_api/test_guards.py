"""What stands before the application: keys, origins, ids, limits, the log and the metrics."""

import json
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import serving, wait_until

ASK = {"prompt": "It was", "max_tokens": 3}


def test_a_key_is_asked_for(demo):
    with serving(demo, api_keys=("secret-1", "secret-2")) as server, server.client() as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret-1"}):
            response = client.post("/v1/completions", json=ASK, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "secret" not in response.text
        for key in ("secret-1", "secret-2"):
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
                assert client.post("/v1/completions", json=ASK, headers=headers).status_code == 200
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == 200


def test_a_key_may_have_any_letters(demo):
    """A browser writes them in Latin-1, and others in UTF-8."""
    with serving(demo, api_keys=("schlüssel",)) as server, server.client() as client:
        for coding in ("utf-8", "latin-1"):
            headers = [(b"authorization", "Bearer schlüssel".encode(coding))]
            assert client.get("/v1/models", headers=headers).status_code == 200
        wrong = [(b"authorization", b"Bearer schl\xffssel")]
        assert client.get("/v1/models", headers=wrong).status_code == 401


def test_other_sites_may_not_ask_unless_they_are_named(server, demo):
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with server.client() as client:
        closed = client.options("/v1/completions", headers=preflight)
        assert "access-control-allow-origin" not in closed.headers
    with serving(demo, allowed_origins=("https://a.example",)) as open_, open_.client() as client:
        allowed = client.options("/v1/completions", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        asked = client.post("/v1/completions", json=ASK, headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in asked.headers


def test_a_page_that_may_ask_reads_why_it_is_refused(demo):
    site = "https://a.example"
    with serving(demo, allowed_origins=(site,), api_keys=("secret",)) as server:
        for body, headers, status in (
            (ASK, {}, 401),
            ({}, {"x-api-key": "secret"}, 400),
            (b"x" * (5 << 20), {"x-api-key": "secret"}, 413),
        ):
            refused = server.post("/v1/completions", body, origin=site, **headers)
            assert refused.status_code == status
            assert refused.headers["access-control-allow-origin"] == site
            assert "access-control-allow-credentials" not in refused.headers


def test_an_answer_and_the_log_have_the_id_of_the_request(server, caplog):
    caplog.set_level("INFO", "gemcut.access")
    response = server.post("/v1/completions", ASK, **{"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "cmpl-mine-1"
    own = server.post("/v1/completions", ASK | {"temperature": -1}, **{"x-request-id": "bad\tid"})
    assert own.headers["x-request-id"].isalnum()
    ids = ("mine-1", own.headers["x-request-id"])
    wait_until(lambda: all(f'"id": "{one}"' in caplog.text for one in ids))
    lines = {line["id"]: line for line in map(json.loads, caplog.messages)}
    good, bad = (lines[one] for one in ids)
    assert (good["id"], good["status"], good["path"]) == ("mine-1", 200, "/v1/completions")
    assert (good["prompt_tokens"], good["completion_tokens"]) == (3, 3)
    assert good["ms"] >= good["first_token_ms"] > 0
    assert (bad["status"], bad["error"]) == (400, "temperature -1.0 must be at least 0")


def test_a_server_answers_so_many_requests_at_once(demo, slow_steps):
    with serving(demo, max_streams=1) as server, server.client() as client:
        body = {"prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # dropping it would close the connection
            next(lines)
            refused = server.post("/v1/completions", ASK)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert server.post("/tokenize", {"prompt": "x"}).status_code == 200
        wait_until(lambda: server.service.open_requests == 0)
        assert server.post("/v1/completions", ASK).status_code == 200


@pytest.mark.parametrize("sent", [b"", b'{"prompt": '])
def test_half_a_body_does_not_hold_a_place(demo, sent):
    with serving(demo, max_streams=1, max_body_seconds=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=10) as silent:
            silent.sendall(head + sent)
            wait_until(lambda: server.service.open_requests == 1)
            assert silent.recv(100).startswith(b"HTTP/1.1 408 ")
            wait_until(lambda: server.service.open_requests == 0)
            assert server.post("/v1/completions", ASK).status_code == 200


def test_a_draining_server_refuses_and_says_so(demo):
    with serving(demo) as server:
        server.service.is_draining = True
        refused = server.post("/v1/completions", ASK)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        with server.client() as client:
            assert client.get("/health").status_code == 503


def test_metrics_are_what_prometheus_reads(server):
    with server.client() as client:
        before = families(client.get("/metrics").text)
        server.post("/v1/completions", ASK)
        after = families(client.get("/metrics").text)

    def grown(name, **labels):
        return sum(
            sign * sample.value
            for sign, found in ((1, after), (-1, before))
            for sample in found[name].samples
            if sample.name.endswith(("_total", "_count"))
            and labels.items() <= sample.labels.items()
        )

    assert grown("gemcut_generated_tokens") == 3
    assert grown("gemcut_time_to_first_token_seconds") == 1
    assert grown("gemcut_time_between_tokens_seconds") == 2
    assert grown("gemcut_request_seconds") == 1
    assert grown("gemcut_http_requests", path="/v1/completions", status="200") == 1
    assert grown("gemcut_completions", reason="length") == 1


def families(text: str) -> dict:
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "It was", "add_special_tokens": False}, "It was"),
        ({"prompt": "It was<end_of_turn>"}, "<bos>It was<end_of_turn>"),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "<bos><start_of_turn>user\nx<end_of_turn>\n<start_of_turn>model\n",
        ),
    ],
)
def test_tokens_go_there_and_back(server, body, text):
    found = server.post("/tokenize", body | {"return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == server.engine.max_seq_len
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}


def test_probes_ask_by_head_and_leave_no_line(server, caplog):
    caplog.set_level("INFO", "gemcut.access")
    with server.client() as client:
        assert client.head("/health").status_code == client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == client.head("/").status_code == 200
    wait_until(lambda: caplog.messages)
    assert [json.loads(line)["path"] for line in caplog.messages] == ["/"]
