"""Earlier calls, their results, and instructions, as the messages that chat templates take."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def with_results(
    messages: Sequence[Mapping[str, Any]],
) -> list[tuple[dict[str, Any] | None, list[dict[str, Any]]]]:
    """Each message that is no result, its calls' arguments as objects, and the results after it."""
    found: list[tuple[dict[str, Any] | None, list[dict[str, Any]]]] = []
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        if message.get("role") == "tool":
            name = message.get("name") or names.get(str(message.get("tool_call_id")))
            if not isinstance(name, str):
                raise ValueError(f"message {index} answers a call that no message before it makes")
            if not found:
                found.append((None, []))
            text = _text(message.get("content"))
            found[-1][1].append({"name": name, "response": _response(text)})
            continue
        plain = dict(message)
        if calls := plain.get("tool_calls"):
            if not isinstance(calls, Sequence):
                raise ValueError(f"message {index} has tool_calls that are no list")
            plain["tool_calls"] = [_called(index, one, names) for one in calls]
            plain["content"] = plain.get("content") or ""
        found.append((plain, []))
    return found


def _called(index: int, call: Any, names: dict[str, str]) -> dict[str, Any]:
    """An earlier call with its arguments as an object; its name goes into `names` by its id."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    given = function if isinstance(function, Mapping) else {}
    name, arguments = given.get("name"), given.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ValueError(
            f"message {index} has a tool call without a name, or whose arguments are no JSON object"
        )
    names[str(call.get("id"))] = name
    return {**call, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _response(text: str) -> dict[str, Any]:
    """A result as the object that the templates write."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return value if isinstance(value, dict) else {"value": value}


def _text(content: Any) -> str:
    if isinstance(content, str) or not isinstance(content, Sequence):
        return str(content or "")
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


def told(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls are written in its content."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {"name": one["function"]["name"], "parameters": one["function"]["arguments"]}
        for one in message["tool_calls"]
    ]
    written = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    content = _text(message.get("content"))
    return {**others, "content": f"{content}\n{written}" if content else written}


def output(result: dict[str, Any]) -> str:
    """A result in a user's turn."""
    return f"```tool_output\n{json.dumps(result, ensure_ascii=False)}\n```"


def tool_message(result: dict[str, Any]) -> dict[str, Any]:
    """A result as a message of its own."""
    text = json.dumps(result["response"], ensure_ascii=False)
    return {"role": "tool", "name": result["name"], "content": text}


def add_turn(turns: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Append a message; two of a user are one turn, since roles must alternate."""
    if turns and message.get("role") == "user" == turns[-1].get("role"):
        content = joined(turns[-1].get("content"), message.get("content"))
        turns[-1] = {**turns[-1], "content": content}
    else:
        turns.append(message)


def joined(first: Any, second: Any) -> Any:
    """Two contents with a blank line between; parts that are no text stay as they are."""
    if not isinstance(first, list) and not isinstance(second, list):
        return "\n\n".join(filter(None, (first, second)))
    before, after = _parts(first), _parts(second)
    if before and after and before[-1].get("type") == after[0].get("type") == "text":
        # in one part: templates strip each
        text = joined(before.pop().get("text"), after[0].get("text"))
        after[0] = {"type": "text", "text": text}
    return before + after


def _parts(content: Any) -> list[Any]:
    if isinstance(content, list):
        return list(content)
    return [{"type": "text", "text": content}] if content else []


def instructions(functions: Mapping[str, Any], *, named: str | None, required: bool) -> str:
    """What a model whose template knows no tools is told, in the words of Google's page."""
    if named is not None:
        wish = f"You MUST call the function {named}."
    elif required:
        wish = "You MUST call at least one of the functions."
    else:
        wish = "If no function helps, answer as usual."
    declared = [
        {key: one[key] for key in ("name", "description", "parameters") if one.get(key) is not None}
        for one in functions.values()
    ]
    return (
        "You have access to functions. If you decide to invoke any of the function(s), "
        "you MUST put it in the format of\n"
        '{"name": function name, "parameters": dictionary of argument name and its value}\n'
        "or, for several calls, a list of such objects.\n\n"
        "You SHOULD NOT include any other text in the response if you call a function. "
        f"{wish}\n{json.dumps(declared, ensure_ascii=False, indent=2)}"
    )
