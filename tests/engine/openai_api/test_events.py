"""Events that are written around a text are those that the types write."""

from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk

from gemcut.engine.openai_api.events import MARK, TextEvents, event


def write(choice: int, text: str) -> str:
    delta = {"index": choice, "delta": {"content": text}, "finish_reason": None}
    fields = {"id": "chatcmpl-1", "created": 1, "model": 'a "model"', "choices": [delta]}
    return event(ChatCompletionChunk.model_validate({**fields, "object": "chat.completion.chunk"}))


# no half of a surrogate pair: no text of a token has one
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    [
        '"',
        "\\",
        "\n\n",
        "data: [DONE]",
        "\x7f\x80\u2028\u2029\x1f",
        "😀",
        MARK,
        MARK * 2,
        "</script>",
    ]
)


@given(st.lists(st.tuples(st.integers(0, 2), TEXTS), max_size=6))
def test_the_same_bytes(pieces):
    quick = TextEvents(write)
    for choice, text in pieces:
        assert quick(choice, text) == write(choice, text)
