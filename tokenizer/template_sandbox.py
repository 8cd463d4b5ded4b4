"""The sandbox of chat templates: jinja2's own, in which a template also comes to an end.

A template is code of strangers.  Each of its loops and macros counts its steps, and no value that
it makes may grow beyond a limit.
"""

import json
import re
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    ValuesView,
)
from dataclasses import dataclass, field
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 250_000
MAX_SECONDS = 10.0
MAX_SIZE = 2**24  # characters of a text
ITEM = 64  # an item of a list, in these characters
MAX_BITS = 2**16  # of a number
# a variable that no template can spell: what belongs to one rendering
_RUN = "gemcut's run"
# filters and methods of strings whose result may be as large as the product of what they are given
_MULTIPLY = {"batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust"}
_MULTIPLY |= {"replace", "rjust", "slice", "sum", "tojson", "translate", "wordwrap", "zfill"}


# what jinja2 hands to some filters before the value
_OF_JINJA = (Context, EvalContext, jinja2.Environment)


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

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._made(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._made(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        if node.ctx == "load":
            return self._made(node)
        self.generic_visit(node)  # names that are assigned
        return node

    def _made(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _call("made", node).set_lineno(node.lineno)

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
        self.globals["namespace"] = _Namespace
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters["tojson"] = _to_json
        self.filters = {name: _bounded(name, one) for name, one in self.filters.items()}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        method = getattr(obj, "__wrapped__", obj)  # jinja2 wraps str.format
        value = getattr(method, "__self__", None)
        if isinstance(value, str) and method.__name__ in _MULTIPLY:
            args = _with_lists(args)
            _check_product(value, args, kwargs)
        result = super().call(context, obj, *args, **kwargs)
        _check_value(result)
        return result

    @jinja2.pass_context
    def count_step(self, context: Context) -> None:
        context.parent[_RUN].count_step()

    @jinja2.pass_context
    def mark(self, context: Context, name: str) -> str:
        return getattr(context.parent[_RUN], name)

    def made(self, value: Any) -> Any:
        _check_value(value)
        return value

    def joined(self, *values: Any) -> str:
        return self.concat(map(str, values))

    def concat(self, texts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return "".join(_within_limit(texts))


def _within_limit(values: Iterable[Any]) -> Iterator[Any]:
    size = 0
    for value in values:
        size += _size(value)
        _check_size(size)
        yield value


class _Namespace(Namespace):
    """jinja2's, which writes all that it holds, and what that holds, where it is shown."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes no value beyond the limit."""

    @wraps(function)  # with jinja2's attributes of it
    def checked(*args: Any, **kwargs: Any) -> Any:
        if name in _MULTIPLY:
            args = _with_lists(args)
            value, *others = (one for one in args if not isinstance(one, _OF_JINJA))
            _check_product(value, others, kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return _within_limit(result)
        _check_value(result)
        return result

    return checked


def _check_product(value: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """TemplateStopped where a value, each part of it as large as an argument, would be too large.

    An argument that is a number is a width or a count.  In a layout, such as "%5d", the numbers are
    widths; arguments are only where it says so, as "%*d" and "{:{}}" do.
    """
    others = [*args, *kwargs.values()]
    if isinstance(value, str) and ("%" in value or "{" in value):
        if not re.search(r"\*|\{[^}]*\{", value):
            others = [one for one in others if not isinstance(one, int)]
        others += map(int, re.findall(r"\d{1,20}", value))
    sizes = [abs(one) if isinstance(one, int) else _size(one) for one in others]
    _check_size(_size(value) * max([1, *sizes]))


def _with_lists(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of which each has a size: what yields its items one by one is a list."""
    kinds = Iterator | range | KeysView | ValuesView | ItemsView
    return tuple(list(one) if isinstance(one, kinds) else one for one in args)


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
        values = right if isinstance(right, tuple) else (right,)
        _check_product(left, values, {})


def _check_value(value: Any) -> None:
    _check_size(_size(value))


def _size(value: Any) -> int:
    """The characters of a value, of all that it holds too; beyond the limit it stops counting."""
    size, left = 0, [value]
    while left and size <= MAX_SIZE:
        one = left.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, list | tuple | dict):
            size += ITEM * len(one)
            left.extend(one)
            left.extend(one.values() if isinstance(one, dict) else ())
    return size


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TemplateStopped(f"a text or a list would be larger than {MAX_SIZE} characters")


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
