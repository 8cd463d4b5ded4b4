"""/tokenize and /detokenize: ids of a text or a conversation, and back."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from gemcut.engine.checks import check_int
from gemcut.engine.openai_api.conversation import Conversation, read_tools
from gemcut.engine.openai_api.described import ArrayOf, ChatTool, Message
from gemcut.engine.openai_api.errors import ApiError
from gemcut.engine.openai_api.service import Service
from gemcut.engine.requests.prompts import encode_conversation


class TokenizeRequest(BaseModel):
    """A text, or the messages of a chat."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    model: str | None = None
    prompt: str | None = None
    messages: ArrayOf[Message] | None = None
    add_special_tokens: bool = True  # of a text: BOS
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: ArrayOf[ChatTool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """Token ids."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    model: str | None = None
    tokens: ArrayOf[int]


def tokenize(service: Service, request: TokenizeRequest) -> dict[str, Any]:
    """The ids as vLLM's server gives them; ValueError for bad input."""
    service.model_name(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "give either prompt or messages")
    tokenizer = service.tokenizer
    if request.prompt is not None:
        ids = tokenizer.encode(
            request.prompt, add_bos=request.add_special_tokens, parse_special=True
        )
    else:
        conversation = Conversation(service, read_tools(request.tools, None, None))
        messages, template = conversation.prepare(
            request.messages or (),
            chat_template_kwargs=request.chat_template_kwargs,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
        )
        ids = encode_conversation(tokenizer, messages, **template)
    strings = [tokenizer.piece(one) for one in ids] if request.return_token_strs else None
    limit = service.engine.max_seq_len
    return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": strings}


def detokenize(service: Service, request: DetokenizeRequest) -> dict[str, Any]:
    """The text of ids, special tokens included."""
    service.model_name(request.model)
    for one in request.tokens:
        check_int("tokens: id", one, 0, service.tokenizer.vocab_size - 1)
    return {"prompt": service.tokenizer.decode(request.tokens, skip_special_tokens=False)}
