"""The page of the ops, one by one: written into kernels/README.md from what is registered.

    python -P -m gemcut.tools.document_ops            writes it, between two marks
    python -P -m gemcut.tools.document_ops --check    exit code 1 where it is out of date

Signatures are the oracles', first lines those of the launchers' docstrings, all else is in
kernels/contracts.py, whose tests try it.
"""

import argparse
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from gemcut import kernels
from gemcut.kernels import reference
from gemcut.kernels.contracts import CONTRACTS, Contract

PAGE = Path(__file__).parents[1] / "kernels" / "README.md"
BEGIN = "<!-- begin of the ops: python -P -m gemcut.tools.document_ops -->\n"
END = "<!-- end of the ops -->\n"
WIDTH = 100


def documented(name: str) -> str:
    """The block of an op."""
    contract, launcher = CONTRACTS[name], getattr(kernels, name)
    first, *_ = inspect.cleandoc(launcher.__doc__).split("\n\n")
    file = f"{launcher.__module__.rpartition('.')[2]}.py"
    out = ", ".join(contract.outs)
    lines = [
        *textwrap.wrap(f"{name}{_signature(name)}", WIDTH, subsequent_indent="    "),
        *_table(_rows(name, contract)),
        *_wrapped(f"at least {contract.moved} bytes, {contract.computed} operations"),
        *_wrapped(contract.where),
        *_wrapped(f"launches: {contract.launches}"),
        *_wrapped(f"scratch: {contract.scratch or 'none'}"),
        *_wrapped(f"torch.ops.gemcut.{name}(...), .{name.rstrip('_')}_out(..., {out})"),
    ]
    text = "\n".join(lines)
    return f"### {name}\n\n[{file}]({file}). {' '.join(first.split())}\n\n```text\n{text}\n```\n"


def _signature(name: str) -> str:
    """The names and defaults of its arguments."""
    parameters = inspect.signature(getattr(reference, name)).parameters.values()
    plain = [p.replace(annotation=p.empty) for p in parameters]
    return str(inspect.Signature(plain))


def _rows(name: str, contract: Contract) -> Iterator[tuple[str, ...]]:
    """Names, shape, dtype, strides and remarks of arguments and results, in their order."""
    forms = contract.forms

    def described(p: inspect.Parameter) -> tuple[tuple[str, ...], ...]:
        remarks = ["written"] if p.name in contract.writes else []
        if "None" in str(p.annotation):
            remarks.append("or None")
        if "Sequence" in str(p.annotation):
            remarks.append("a sequence")
        if p.name not in forms:
            kind = getattr(p.annotation, "__name__", str(p.annotation))
            return ((kind.removeprefix("torch."), "", "", ""),)
        return tuple((*_split(form), ", ".join(remarks)) for form in forms[p.name])

    own = inspect.signature(inspect.unwrap(getattr(reference, name))).parameters.values()
    for kinds, parameters in groupby(own, described):
        names = ", ".join(p.name for p in parameters)
        for i, kind in enumerate(kinds):
            yield ("" if i else names, *kind)
    for result, form in contract.results.items():
        yield (f"-> {result}", *_split(f"{form} dense"), "")


def _split(form: str) -> tuple[str, str, str]:
    """Shape, dtype and strides of a form."""
    shape, _, rest = form.partition("] ")
    dtype, _, strides = rest.rpartition(" ")
    return f"{shape}]", dtype, strides


def _table(rows: Iterator[tuple[str, ...]]) -> list[str]:
    """Rows in columns."""
    every = list(rows)
    # a number, which has no strides, needs no column
    widths = [max(len(row[i]) for row in every if i == 0 or any(row[2:])) + 2 for i in range(5)]
    return [
        "    " + "".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip()
        for row in every
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 4, initial_indent="    ", subsequent_indent="    ")


def page(text: str) -> str:
    """A page with the ops between its marks; ValueError where they are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has not the lines {BEGIN.strip()!r} and {END.strip()!r}")
    blocks = "\n".join(documented(name) for name in kernels.__all__)
    return f"{before}{begin}\n{blocks}\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 where the page is out of date and only to be checked."""
    parser = argparse.ArgumentParser(
        prog="python -P -m gemcut.tools.document_ops", description="Write the page of the ops."
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    old = PAGE.read_text()
    new = page(old)
    if old == new:
        return 0
    if arguments.check:
        print(f"{PAGE} is out of date: run python -P -m gemcut.tools.document_ops", file=sys.stderr)
        return 1
    PAGE.write_text(new)
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
