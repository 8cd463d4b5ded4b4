"""The sandbox of chat templates: what it writes, and what it stops."""

import threading

import jinja2
import pytest

from gemcut.tokenizer import template_sandbox
from gemcut.tokenizer.template_sandbox import Template, TemplateStopped

DOUBLED = "{% set n = namespace(x='a') %}{% for i in range(99) %}@{% endfor %}"
TREE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"


def test_what_ends_is_written():
    text = "{% macro f(x) %}<{{ x ~ 1 }}>{% endmacro %}{% for x in xs if x %}{{ f(x) }}{% endfor %}"
    text += "{% set a %}{{ 'b' * 3 }}{% endset %}{{ a }}{{ '%05d' % 7 }}{{ 2 ** 5 }}{{ [1] + [2] }}"
    template = Template(text)
    assert template.render({"xs": ["a", "", "b"]}) == "<a1><b1>bbb0000732[1, 2]"
    assert template.variables == {"xs"}


def test_generated_text_is_marked():
    template = Template("a{% generation %}b{% if x %}c{% endif %}{% endgeneration %}d")
    assert template.render({"x": 1}) == "abcd"
    assert template.render({}, "[", "]") == "a[b]d"


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(9999) %}{% for i in range(9999) %}{% endfor %}{% endfor %}",
        TREE,
        "{% for i in x recursive %}{{ loop(x) }}{{ loop(x) }}{% endfor %}",
    ],
    ids=["loops", "macros", "recursive"],
)
def test_steps_are_counted(text, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 300)
    with pytest.raises((TemplateStopped, RecursionError)):
        Template(text).render({"x": [1]})
    short = Template("{% for i in range(200) %}{% endfor %}")
    threads = [threading.Thread(target=short.render, args=({},)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert short.render({}) == short.render({}) == ""  # each rendering has its own count


def test_time_is_bounded(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.05)
    with pytest.raises(TemplateStopped, match=r"more than 0\.05 seconds"):
        Template(TREE).render({})


@pytest.mark.parametrize(
    "text",
    [
        DOUBLED.replace("@", "{% set n.x = n.x + n.x %}"),
        DOUBLED.replace("@", "{% set n.x = n.x ~ n.x %}"),
        DOUBLED.replace("@", "{% set n.x = n.x * 2 %}"),
        DOUBLED.replace("@", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
        DOUBLED.replace("@", "{% set n.x = n.x.replace('a', 'aa') %}"),
        DOUBLED.replace("@", "{% set n.x = n.x | replace('a', 'aa') %}"),
        DOUBLED.replace("@", "{{ 'a' * 99999 }}"),
        "{{ 'a' * 10 ** 10 }}", "{{ [1] * 10 ** 10 }}", "{{ 'a'.center(10 ** 10) }}",
        "{{ 'a' | center(10 ** 10) }}", "{{ '%9999999999d' % 1 }}", "{{ '%*d' % (10 ** 10, 1) }}",
        "{{ messages | tojson(indent=10 ** 10) }}", "{{ 10 ** (10 ** 10) }}",
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    ],
)  # fmt: skip
def test_sizes_are_bounded(text, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_SIZE", 2**20)
    with pytest.raises(TemplateStopped):
        Template(text).render({"messages": [1]})


LONG = "('a' * 65536)"


@pytest.mark.parametrize(
    "text",
    [
        f"{LONG}.replace('a', {LONG})", f"{LONG} | replace('a', {LONG})",
        f"{LONG}.join({LONG} | list)", f"{LONG} | join({LONG})", f"range(65536) | join({LONG})",
        f"{LONG}.join(range(65536) | map('string'))",
        "('\t' * 65536).expandtabs(65536)", "'{:>4000000000}'.format('a')",
        "'{:{}}'.format('a', 4 * 10 ** 9)", f"('{{0}}' * 65536).format({LONG})",
        "'%9999999999d' | format(1)", f"('%(a)s' * 65536) % {{'a': {LONG}}}",
        f"('a\n' * 65536) | indent({LONG})", f"{LONG} | wordwrap(1, wrapstring={LONG})",
        "[1] | slice(2 ** 26) | list", "range(90000) | list | tojson(indent=2 ** 20)",
        "range(65536) | map('center', 60000) | list", f"([{LONG}] * 65536) | length",
        "([range(9999) | list] * 9999) | sum(start=[])",
    ],
)  # fmt: skip
def test_what_two_large_values_make_is_bounded(text):
    with pytest.raises(TemplateStopped):
        Template(f"{{{{ {text} }}}}").render({})


@pytest.mark.parametrize("made", ["[@, @]", "(@, @)", "{1: @, 2: @}", "dict(a=@, b=@)", "[@] * 2"])
@pytest.mark.parametrize("used", ["{{ @ }}", "{{ @ == [@] }}", "{{ '%s' % [@] }}"])
def test_what_values_hold_is_bounded(made, used):
    double = (
        "{% set n = namespace(x=[1]) %}{% for i in range(50) %}{% set n.x = MADE %}{% endfor %}"
    )
    with pytest.raises(TemplateStopped):
        Template((double.replace("MADE", made) + used).replace("@", "n.x")).render({})


def test_a_namespace_does_not_show_what_it_holds():
    text = "{% set n = namespace(x=1) %}{% for i in range(60) %}"
    text += "{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}"
    assert Template(text).render({}) == "<Namespace>"


def test_numbers_are_no_widths_where_they_are_shown():
    text = "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(n) }} {{ n | string }} {{ n | tojson }} "
    text += "{{ 'a%5d' % n }} {{ '{:>3}{}'.format('a', n) }} {{ '%d' | format(n) }}"
    assert Template(text).render({"n": 1700000000}).replace("1700000000", "n") == "n n n an   an n"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{{ range(10 ** 9) | list }}", "larger"), ("{{ lipsum(9999) }}", "undefined")],
)
def test_what_jinja_gives_is_bounded(text, message):
    with pytest.raises((TemplateStopped, jinja2.UndefinedError, OverflowError), match=message):
        Template(text).render({})
