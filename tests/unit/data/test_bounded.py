"""Chat templates within bounds: what they write is what transformers writes, and what takes too much is refused."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lorafa.data import TEMPLATES
from lorafa.data.bounded import SECONDS, render_within_bounds
from lorafa.data.records import Message
from lorafa.data.rendering import render
from lorafa.data.templates import find_template
from lorafa.errors import DataError
from toys.language_models import byte_tokenizer
from toys.places import ROOT

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, True]}}}
TALK = [
    Message("system", "Be brief.\n  You may <think>."),
    Message("user", "Wie groß ist die Höhe? "),
    Message("assistant", "", extra={"tool_calls": [CALL], "reasoning": "I add.", "name": None}),
    Message("tool", "3.5"),
    Message("assistant", "It is 3.5 %.\n"),
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
"""Two of what templates of published models write."""
WRITTEN = [
    "{% for m in messages %}{{ m.role ~ ': ' ~ m['content'] }}\n{% endfor %}",
    "{%- for m in messages -%}\n  {{- m.content|trim }}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}\n"
    "{%- endfor %}",
    "{% for m in messages if m.role != 'system' %}{{ loop.cycle('a', 'b') }}{{ m.content }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m }}{% if loop.index == 4 %}"
    "{% break %}{% endif %}{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem else '' }}>{{ loop.nextitem is defined }}"
    "{% endfor %}",
    "{% set ns = namespace(seen=false, text='') %}{% for m in messages[1:] %}{% set ns.text = ns.text + m.content %}"
    "{% set ns.seen = true %}{% endfor %}{{ ns.text }}{{ ns.seen }}{{ ns.missing is undefined }}",
    "{% macro say(m, mark='#') -%}\n{{ mark }}{{ m.content | upper }}{{ caller() if caller }}{%- endmacro %}"
    "{{ say(messages[0]) }}{% call say(messages[1], mark='!') %}inside{% endcall %}",
    "{{ tools | tojson(indent=4) }}{{ tools|tojson }}{{ messages|map(attribute='role')|join(', ') }}",
    "{% if tools is not none and tools %}{{ tools|length }}{% for t in tools %}{{ t.function.name }}{% endfor %}"
    "{% endif %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% for m in messages|selectattr('role', 'equalto', 'user')|list + messages[:1] %}{{ m.role }}{% endfor %}",
    "{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ documents is none }}{{ nothing }}"
    "{{ nothing|default('x') }}",
    "{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.reasoning }}{{ 'name' in m }}{% endfor %}",
    "{% set x %}a{{ messages[0].content.split('\n')[-1].lstrip() }}{% endset %}"
    "{{ x|replace('think', 'x')|indent(3, true) }}",
    "{{ '%s is %05.1f' % ('it', 3) }}{{ '{:>6}|{a!r}'.format(4, a='b') }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}"
    "{{ -3 * 2 }}",
    "{{ ['a', 'b'] + [messages[0].role] }}{{ ('x', 1) }}{{ {'a': [1, {'b': none}]} }}{{ 'ab' * 3 }}{{ [1] * 3 }}",
    "{{ messages[-1].content[:4] }}{{ messages|length > 3 and 'x' in 'xy' }}{{ messages[0] is mapping }}",
    "{% filter upper %}{{ messages[0].content }} é{% endfilter %}{{ range(2, 9, 3)|list }}{{ dict(a=1).a }}",
    "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}"
    "{% endfor %}",
    "{{ messages | map(attribute='content') | reject('equalto', '') | first }}{{ [3, 1, 2]|sort|reverse|list }}",
    "{% set parts = messages[1].content.strip().split(' ') %}{{ parts|last|title }}{{ ','.join(parts) }}{{ 1.0|int }}",
    "{% raw %}{{ not me }}{% endraw %}{# nor me #}{{ '\\n' }}{{ 'a' if false }}{{ '<&>'|e }}{{ '<&>'|safe }}",
    "{{ namespace(self=1).self }}{{ joiner('-')() }}{{ messages|groupby('role')|map('first')|list }}",
]


def of_transformers(template: str, tokenizer: PreTrainedTokenizerBase, tools: Any, asks: bool) -> str:
    turns = [{**m.extra, "role": m.role, "content": m.content} for m in TALK]
    text = tokenizer.apply_chat_template(
        turns, tools=tools or None, tokenize=False, add_generation_prompt=asks, chat_template=template
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("template", WRITTEN, ids=[str(number) for number in range(len(WRITTEN))])
@pytest.mark.parametrize("asks", [False, True])
def test_templates_write_what_transformers_writes(template: str, asks: bool) -> None:
    tokenizer = byte_tokenizer(template)
    for tools in ([], TOOLS):
        text = render(TALK, tokenizer, add_generation_prompt=asks, tools=tools)
        assert text == of_transformers(template, tokenizer, tools, asks)


@pytest.mark.parametrize("name", TEMPLATES.names())
def test_our_templates_too(name: str) -> None:
    tokenizer = byte_tokenizer(find_template(name))
    turns = [{"role": m.role, "content": m.content} for m in TALK]
    given = {"start": "", "eos_token": tokenizer.eos_token, "messages": turns}
    wanted = tokenizer.apply_chat_template(turns, tokenize=False, start="")
    assert render_within_bounds(find_template(name), given) == wanted


def test_of_several_templates_the_one_for_tools_is_taken() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ tools[0].function.name }}"}
    assert render(TALK, tokenizer, add_generation_prompt=False) == "plain"
    assert render(TALK, tokenizer, add_generation_prompt=False, tools=TOOLS) == "add"


DOUBLED = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = WHAT %}{% endfor %}{{ ns.x }}"
LARGE = [
    "{{ 'x' * 10**12 }}", "{{ messages[0].content * 10**12 }}", "{{ 'x'.center(10**6).replace('', 'y' * 1000000) }}",
    "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}", "{{ ('x' * 1000000).join(['a'] * 100000) }}",
    "{{ ['a', 'b', 'c', 'd']|map('upper')|join('x' * 8000000) }}", "{{ '%999999999999d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}", "{{ '%s' % ('x' * 5000000) ~ 'y' * 5000000 }}", "{{ '{:>99999999999}'.format(1) }}",
    "{{ '{w:{h}}'.format_map({'w': 1, 'h': 10**10}) }}", "{{ '{0}{0}'.format('x' * 5000000) }}",
    "{{ '%(a)s%(a)s' % {'a': 'x' * 5000000} }}", "{{ ('\\n' * 100000)|indent(100000) }}", "{{ [[1] * 1000] * 100000 }}",
    "{{ ([1] * 100000)|tojson(indent=100000) }}", "{{ ([1] * 1000)|tojson(separators=('x' * 100000, ':')) }}",
    "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}", "{{ ('\\t' * 1000000).expandtabs(1000000) }}",
    "{{ ([[1] * 10000] * 10000)|sum(start=[]) }}",
    "{{ ('a ' * 1000000)|wordwrap(1, wrapstring='x' * 1000) }}", "{{ messages|map('replace', 'h', 'x' * 10**7)|list }}",
    "{% for i in range(100000) %}" + "y" * 1000 + "{% endfor %}",
    "{% set x %}{% for i in range(100000) %}" + "y" * 1000 + "{% endfor %}{% endset %}{{ x|length }}",
    *(DOUBLED.replace("WHAT", what) for what in (
        "ns.x ~ ns.x", "ns.x + ns.x", "[ns.x, ns.x]", "(ns.x, ns.x)", "{'a': ns.x, 'b': ns.x}", "[ns.x] + [ns.x]",
        "dict(a=ns.x, b=ns.x)", "[ns.x, ns.x]|list", "ns.x ~ ns.x|tojson", "'%s%s' % (ns.x, ns.x)",
        "'{}{}'.format(ns.x, ns.x)", "ns.x * 2", "ns.x.replace('x', 'xx')", "(ns.x, ns.x)|join",
        "ns.x|replace('x', 'xx')",
    )),
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
]  # fmt: skip
LONG = [
    ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "more than 1,000,000 steps"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "takes more"),
    ("{{ ([range(100000)] * 10000)|map('list')|list }}", "makes more than 67,108,864 bytes|more than 2 seconds"),
    ("{% for i in range(99999) %}{% set x = range(99999)|sum %}{% endfor %}", "takes more than 2 seconds"),
]
OTHERS = [
    *(pytest.param(*each, marks=pytest.mark.slow) for each in LONG[1:]),
    LONG[0],
    ("{% for i in range(99999) %}{% set x = 'y' * 1000000 %}{% endfor %}", "makes more than 67,108,864 bytes"),
    ("{% for i in range(10**9) %}{% endfor %}", "a number of more than 1,048,576"),
    ("{{ 'x'.ljust(10**10) }}", "a number of more than 1,048,576"),
    ("{{ 'x'|center(10**10) }}", "a number of more than 1,048,576"),
    ("{{ (1).to_bytes(10**10, 'big') }}", "a number of more than 1,048,576"),
    ("{{ [1]|batch(10**9, 'x')|list }}", "a number of more than 1,048,576"),
    ("{{ (2**60000) * (2**60000) }}", "a number of more than 65,536 bits"),
    ("{{ 9 ** (10 ** 6) }}", "a number of more than 65,536 bits"),
    ("{{ ('a' * 8000000).split('a') }}", "makes more than 67,108,864 bytes"),
    ("{{ ('a' * 8000000)|list }}", "makes more than 67,108,864 bytes"),
    ("{{ lipsum(100000) }}", "'lipsum' is undefined"),
    ("{{ messages|pprint }}", "No filter named 'pprint'"),
    ("{{ namespace(_x=1) }}", "no name with an underscore"),
    ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ("{{ messages[0].__class__.__mro__ }}", "unsafe|undefined|no attribute"),
]


@pytest.mark.parametrize("template", LARGE, ids=[str(number) for number in range(len(LARGE))])
def test_what_would_be_too_large_is_refused_before_it_is_made(template: str) -> None:
    refused(template, "it makes a text or a list of more than 8,388,608 characters")


@pytest.mark.parametrize(("template", "said"), OTHERS, ids=[str(number) for number in range(len(OTHERS))])
def test_what_takes_too_much_is_refused(template: str, said: str) -> None:
    refused(template, said)


def refused(template: str, said: str) -> None:
    tokenizer, start = byte_tokenizer(template), time.process_time()
    with pytest.raises(DataError, match=f"chat template refuses a conversation .*({said})") as caught:
        render([Message("user", "hello")], tokenizer, add_generation_prompt=True)
    assert time.process_time() - start < SECONDS + 1
    assert len(str(caught.value)) < 500


MEASURE = """
import resource, sys
from lorafa.data.bounded import render_within_bounds
render_within_bounds("{{ [1]|tojson }}", {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for template in sys.stdin.read().split(chr(0)):
    try:
        render_within_bounds(template, {"messages": [{"role": "user", "content": "hello"}]})
    except Exception:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_refusing_them_takes_less_than_200_mb() -> None:
    texts = "\0".join([*LARGE, *(template for template, _ in LONG)])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input=texts, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert int(done.stdout) < 200


def test_long_conversations_are_written() -> None:
    talk = [Message(role, f"{number} " * 300) for number in range(500) for role in ("user", "assistant")]
    text = render(talk, byte_tokenizer(), add_generation_prompt=False)
    assert len(text) > 1_000_000
    grown = (
        "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.content[:9] %}{% endfor %}"
        "{{ ns.x }}"
    )
    assert render(talk, byte_tokenizer(grown), add_generation_prompt=False)
