"""What a server allows, and how it names its model."""

from dataclasses import dataclass

from gemcut.engine.checks import check_bool, check_int, check_number, shorten
from gemcut.engine.requests.sampling_params import INT64_MAX, LIMIT, MAX_N


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Names, keys and limits; ValueError names a value out of range."""

    model_names: tuple[str, ...] = ("demo",)  # that requests may ask for; the first is the answer's
    api_keys: tuple[str, ...] = ()  # one of them is asked for, if there are any
    allowed_origins: tuple[str, ...] = ()  # of pages on other sites; "*" is any
    max_body_bytes: int = 4 * 1024 * 1024
    max_body_seconds: float = 60  # from a request's headers to the end of its body
    max_streams: int = 256  # requests that run or wait at once; more get 429
    max_n: int = 16  # completions of one prompt
    max_prompts: int = 64  # prompts of one request
    merge_system: bool = False  # a system message that the template refuses goes before the user's
    chat_template: str | None = None  # in place of the checkpoint's

    def __post_init__(self) -> None:
        if not self.model_names:
            raise ValueError("a server needs a name for its model")
        for name in ("model_names", "api_keys", "allowed_origins"):
            for text in getattr(self, name):
                if not isinstance(text, str) or not text.strip() or not text.isprintable():
                    shown = "" if name == "api_keys" else f" {shorten(text)}"
                    raise ValueError(f"{name}: a value{shown} is empty or no line of text")
        check_int("max_body_bytes", self.max_body_bytes, 1024, INT64_MAX)
        check_number("max_body_seconds", self.max_body_seconds, above=0, below=LIMIT)
        check_int("max_streams", self.max_streams, 1, INT64_MAX)
        check_int("max_n", self.max_n, 1, MAX_N)
        check_int("max_prompts", self.max_prompts, 1, INT64_MAX)
        check_bool("merge_system", self.merge_system)
