"""`gemcut serve`: an engine, uvicorn, and an end that lets running answers finish."""

import argparse
import logging
import os
import socket
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gemcut.engine.checks import check_int
from gemcut.engine.engine import Engine
from gemcut.engine.openai_api.app import create_app
from gemcut.engine.openai_api.service import Service
from gemcut.engine.openai_api.settings import ServerSettings
from gemcut.engine.placement import in_temporary_thread
from gemcut.engine.requests.sampling_params import INT64_MAX
from gemcut.engine.terminal import note

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_HEADERS = 64 * 1024  # bytes of a request's line and headers


class DrainingServer(uvicorn.Server):
    """uvicorn, which at a first signal refuses new requests and lets those that run end.

    After `grace` seconds, or at a second signal, those that still run end with an error.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace
        self._deadline = float("inf")
        self._said = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._deadline = now if self._service.is_draining else now + self._grace
        self._service.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        service = self._service
        if service.is_draining and not self._said:
            self._said = True
            note(f"shutting down; open requests: {service.open_requests}")
        if service.is_draining and service.open_requests == 0:
            self.should_exit = True
        if time.monotonic() >= self._deadline:
            service.engine.close()  # each that runs gets its error
            self.should_exit = True
        return await super().on_tick(counter)


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """The settings of the command line; ValueError names a bad one."""
    check_int("max_waiting", args.max_waiting, 0, INT64_MAX)  # before a model is loaded
    key = os.environ.get("GEMCUT_API_KEY")
    template = args.chat_template
    name = Path(args.model).name if Path(args.model).exists() else args.model
    return ServerSettings(
        model_names=tuple(args.served_model_name or [name]),
        api_keys=tuple(args.api_key or ([key] if key else [])),
        allowed_origins=tuple(args.allowed_origin or ()),
        max_body_bytes=args.max_body_size,
        max_streams=args.max_streams,
        max_n=args.max_n,
        merge_system=args.merge_system,
        chat_template=None if template is None else Path(template).read_text(encoding="utf-8"),
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, taken before anything is loaded; OSError says why there is none."""
    check_int("port", port, 0, 65535)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(f"{host} port {port}: {error.strerror}") from error
    return bound


def run(engine: Engine, settings: ServerSettings, bound: socket.socket, grace: float) -> None:
    """Serve until a signal, and close the engine."""
    app = create_app(engine, settings)
    _log_to_standard_error()
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    note(f"{', '.join(settings.model_names)}: {_sizes(engine)}; {address}")
    if host not in LOOPBACK and not settings.api_keys:
        note(f"warning: whoever reaches {host} may use this server; --api-key asks for a key")
    try:
        DrainingServer(server_config(app), app.state.service, grace).run([bound])
    finally:
        engine.close()


def server_config(app: FastAPI) -> uvicorn.Config:
    """uvicorn, which leaves logs to others and bounds the headers of a request."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        headers=[("Server", f"gemcut/{version('gemcut')}")],
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_graceful_shutdown=5,
    )


def warm_up(engine: Engine) -> None:
    """Compile and capture what answers need, with a progress bar.

    In a thread of its own: one that has computed on a CPU would keep threads from the engine's.
    """
    in_temporary_thread(engine.warmup)


def _sizes(engine: Engine) -> str:
    """What an engine holds, in one line."""
    config, cache, model = engine.config, engine.cache, engine.model
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{config.num_parameters() / 1e6:.0f} million parameters, {dtype} on {model.device}, "
        f"{cache.num_slots} slots of {engine.max_seq_len} tokens, "
        f"{(model.weights.nbytes + cache.nbytes) / 1e9:.2f} GB"
    )


def _log_to_standard_error() -> None:
    """Lines of the access log as they are, and of others with a name before them."""
    for name, form in (("gemcut.access", "%(message)s"), (None, "%(name)s: %(message)s")):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(form))
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("gemcut.access").setLevel(logging.INFO)
