"""Steps whose tokens go through the server to as many clients, in a process of their own.

    python -m gemcut.bench.engines.served_steps URL STREAMS TOKENS

is that process: it prints the median of its streams' seconds between two tokens.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import threading
from urllib.parse import urlsplit

from gemcut.bench.measure.timing import clock
from gemcut.engine import Engine


def time_serve(engine: Engine, batch: int, new_tokens: int) -> float:
    """Microseconds of a step whose tokens go to as many HTTP clients, one by one."""
    import uvicorn  # the extra `serve`

    from gemcut.engine.openai_api.app import create_app
    from gemcut.engine.openai_api.serve import bind, server_config

    server = uvicorn.Server(server_config(create_app(engine)))
    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
        thread.start()
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        client = [sys.executable, "-P", "-m", __name__, url, str(batch), str(new_tokens)]
        try:
            done = subprocess.run(client, check=True, capture_output=True, text=True)
        finally:
            server.should_exit = True
            thread.join()
    return 1e6 * float(done.stdout)


async def consume(url: str, number: int, new_tokens: int) -> float:
    """Seconds between two tokens of one stream."""
    asked = {"prompt": [2, 5 + number], "max_tokens": new_tokens, "temperature": 0}
    body = json.dumps(asked | {"ignore_eos": True, "stream": True}).encode()
    at = urlsplit(url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    times = []
    while b"[DONE]" not in (line := await reader.readline()):
        assert line, "the server has closed the connection"
        if line.startswith(b"data: "):
            times.append(clock())
    writer.close()
    return (times[-1] - times[0]) / (len(times) - 1)


async def consume_all(url: str, streams: int, new_tokens: int) -> float:
    """The median of several streams at once."""
    each = [consume(url, number, new_tokens) for number in range(streams)]
    return statistics.median(await asyncio.gather(*each))


if __name__ == "__main__":
    url, streams, new_tokens = sys.argv[1:]
    print(asyncio.run(consume_all(url, int(streams), int(new_tokens))))
