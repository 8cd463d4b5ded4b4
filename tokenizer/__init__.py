"""Text to token ids and back, chat turns, and streamed text."""

from gemcut.tokenizer.added_tokens import AddedToken
from gemcut.tokenizer.chat import encode_chat, end_of_turn_ids, render_chat
from gemcut.tokenizer.codec import Tokenizer
from gemcut.tokenizer.stream import StopStrings, StreamDecoder

__all__ = [
    "AddedToken",
    "StopStrings",
    "StreamDecoder",
    "Tokenizer",
    "encode_chat",
    "end_of_turn_ids",
    "render_chat",
]
