"""OpenAI's API over an engine: `gemcut serve`, or `create_app` under any ASGI server."""
