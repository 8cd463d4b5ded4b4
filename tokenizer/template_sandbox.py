"""The sandbox of chat templates: jinja2's own, in which a template also comes to an end.

A template is code of strangers.  Each of its loops and macros counts its steps, and no value that
it makes may grow beyond a limit.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
MAX_SECONDS = 10.0
MAX_SIZE = 2**26  # characters of a text, items of a list
MAX_BITS = 2**16  # of a number
# a variable that no template can spell: what belongs to one rendering
_RUN = "gemcut's run"


class TemplateStopped(Exception):
    """A template went beyond a limit."""


@dataclass
class _Run:
    """What one rendering has used so far, and the marks around {% generation %} blocks."""

    begin: str
    end: str
    steps: int = 0
    started: float = field(default_factory=time.monotonic)

    def count_step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TemplateStopped(f"it took more than {MAX_STEPS} steps")
        if time.monotonic() - self.started > MAX_SECONDS:
            raise TemplateStopped(f"it took more than {MAX_SECONDS:g} seconds")


class Template:
    """A compiled template; `variables` are the names that it reads."""

    def __init__(self, source: str) -> None:
        environment = _Environment()
        tree = environment.parse(source)
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
        self._compiled = environment.from_string(_WithLimits().visit(tree))

    def render(self, variables: dict[str, Any], begin: str = "", end: str = "") -> str:
        """The text, with `begin` and `end` around what {% generation %} blocks have written."""
        chunks, size = [], 0
        for chunk in self._compiled.generate(variables | {_RUN: _Run(begin, end)}):
            chunks.append(chunk)
            size += len(chunk)
            _check_size(size)
        return "".join(chunks)


class _WithLimits(NodeTransformer):
    """Puts a count into the bodies of loops and macros, and looks at texts that are joined."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def _counted(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        count = nodes.ExprStmt(_call("count_step")).set_lineno(node.lineno)
        node.body.insert(0, count)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", *node.nodes).set_lineno(node.lineno)


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the model's own words for training."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: Any) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([_call("mark", nodes.Const(name))]).set_lineno(line)
            for name in ("begin", "end")
        )
        return [begin, *body, end]


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded(filter_) for name, filter_ in self.filters.items()}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _check_arguments(args, kwargs)
        result = super().call(context, obj, *args, **kwargs)
        _check_value(result)
        return result

    @jinja2.pass_context
    def count_step(self, context: Context) -> None:
        context.parent[_RUN].count_step()

    @jinja2.pass_context
    def mark(self, context: Context, name: str) -> str:
        return getattr(context.parent[_RUN], name)

    def joined(self, *values: Any) -> str:
        return self.concat(map(str, values))

    def concat(self, texts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return "".join(_within_limit(texts))


def _within_limit(texts: Iterable[str]) -> Iterator[str]:
    size = 0
    for text in texts:
        size += len(text)
        _check_size(size)
        yield text


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes no value beyond the limit."""

    @wraps(function)  # with jinja2's attributes of it
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(args, kwargs)
        result = function(*args, **kwargs)
        _check_value(result)
        return result

    return checked


def _check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            _check_size(abs(value))  # a width, or a count


def _check_operation(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits, other = left.bit_length(), right.bit_length()
        made = {"*": bits + other, "**": bits * max(right, 0)}.get(operator, 0)
        if made > MAX_BITS:
            raise TemplateStopped(f"a number would have more than {MAX_BITS} bits")
    elif operator == "+":
        _check_size(_size(left) + _size(right))
    elif operator == "*":
        count, value = (left, right) if isinstance(left, int) else (right, left)
        _check_size(_size(value) * count if isinstance(count, int) else 0)
    elif operator == "%" and isinstance(left, str):
        # a width may stand in the text, or among the values
        digits = "".join(letter if letter.isdecimal() else " " for letter in left).split()
        values = right if isinstance(right, tuple) else (right,)
        _check_arguments((*map(int, digits), *values), {})


def _check_value(value: Any) -> None:
    _check_size(_size(value))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TemplateStopped(f"a text, a list or a count would be larger than {MAX_SIZE}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes <, > and & for web pages
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
