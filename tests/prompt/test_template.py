"""Chat templates from strangers: they render what real ones need, and can do no harm."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from edge_vlm.errors import BundleError, EdgeVLMError, PromptError
from edge_vlm.prompt.template import MAX_NODES, MAX_TEMPLATE_CHARS, ChatTemplate

HELLO = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": " A <cat> & more. "},
    {"role": "user", "content": "Sure?"},
]


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source).render(**{"messages": HELLO, **variables})


def refused(source: str, **variables: Any) -> str:
    """The message, of one line, with which a template is refused."""
    with pytest.raises((BundleError, PromptError)) as caught:
        render(source, **variables)
    assert caught.value.exit_code == 2
    assert_one_line(str(caught.value))
    return str(caught.value)


def assert_one_line(message: str) -> None:
    assert message.startswith("chat template: ")
    assert message.isprintable()
    assert len(message) < 700


# What real templates do


QWEN = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}{{- message.content }}{%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part %}{{- '<|image|>' }}
            {%- elif 'text' in part %}{{- part.text }}{%- endif %}
        {%- endfor %}{%- endif %}
        {{- '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if loop.index0 > ns.last_query_index and loop.last %}{{- 'never' }}{%- endif %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content.strip() ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

LLAMA = """
{%- macro header(role) -%}<|start|>{{ role }}<|end|>{{ "\\n\\n" }}{%- endmacro -%}
{%- if not date is defined -%}{%- set date = "26 Jul 2024" -%}{%- endif -%}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{{- header('system') + 'Date: ' + date + ', users: ' ~ users | length -}}
{%- for message in messages if message['role'] != 'system' -%}
{{- header(message['role']) }}
{%- if message['content'] is string %}{{ message['content'] | trim }}{% else -%}
{%- for part in message['content'] | selectattr('type', '==', 'text') -%}
{{- part['text'] | trim }}{% if not loop.last %}, {% endif %}
{%- endfor -%}{%- endif -%}
<|eot|>
{%- endfor -%}
"""


def test_a_template_like_qwens() -> None:
    assert render(QWEN, messages=TURNS, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|image|>What?<|im_end|>\n"
        "<|im_start|>assistant\nA <cat> & more.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_template_like_llamas() -> None:
    assert render(LLAMA, messages=TURNS) == (
        "<|start|>system<|end|>\n\nDate: 26 Jul 2024, users: 2"
        "<|start|>user<|end|>\n\nWhat?<|eot|>"
        "<|start|>assistant<|end|>\n\nA <cat> & more.<|eot|>"
        "<|start|>user<|end|>\n\nSure?<|eot|>"
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for x in 'abc' %}{{ loop.index }}{{ x }}{{ loop.last }} {% endfor %}",
         "1aFalse 2bFalse 3cTrue "),
        ("{% for x in [1, 2, 3] if x > 1 %}{{ x }}{% else %}none{% endfor %}", "23"),
        ("{% for x in [] %}{{ x }}{% else %}none{% endfor %}", "none"),
        ("{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "a1b2"),
        ("{% for k, v in {'a': 1}|items %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% set ns = namespace(n=0) %}{% for x in range(4) %}{% set ns.n = ns.n + x %}"
         "{% endfor %}{{ ns.n }}", "6"),
        ("{% macro f(a, b='x') %}[{{ a }}{{ b }}]{% endmacro %}{{ f(1) }}{{ f(2, b=3) }}",
         "[1x][23]"),
        ("{{ 'yes' if 1 < 2 <= 2 and not false else 'no' }}", "yes"),
        ("{{ 1 < 2 > 3 }}{{ 3 < 2 < 5 }}{{ 'a' in 'cat' }}{{ 2 not in [1] }}",
         "FalseFalseTrueTrue"),
        ("{{ {'b': 'é<&>', 'a': [1, none, true]} | tojson }}",
         '{"b": "é<&>", "a": [1, null, true]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ ('<a>' | tojson) + '&' + '<' }}", '"<a>"&<'),
        ("{{ messages[0]['content'][0].text }}{{ messages[-1].role }}", "Hellouser"),
        ("{{ messages[0].content | map(attribute='text') | join(', ') }}", "Hello"),
        ("{{ ['b', 'a'] | map('upper') | list | join('-') }}", "B-A"),
        ("{{ [1, 2, 3] | max }}{{ [1, 2] | last }}{{ 'abc' | first }}{{ 'ab' | length }}", "32a2"),
        ("{{ messages | rejectattr('role', 'equalto', 'user') | list | length }}", "0"),
        ("{{ messages | selectattr('role', 'in', ['user', 'tool']) | list | length }}", "1"),
        ("{{ ' x '.strip() ~ 'a-b'.split('-')[1] ~ 'abc'[1:] ~ 'abc'[::-1] }}", "xbbccba"),
        ("{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}", "b"),
        ("{{ 'Hi %s' | replace('%s', name | default('you')) }}", "Hi you"),
        ("{{ nothing is defined }}{{ nothing is none }}{{ 'x' is string }}{{ [] is iterable }}",
         "FalseFalseTrueTrue"),
        ("{{ messages is mapping }}{{ messages is sequence }}{{ 4 is even }}", "FalseTrueTrue"),
        ("{{ messages[0].get('name', 'anon') }}{{ 'x' | title }}{{ 'user' | capitalize }}",
         "anonXUser"),
        ("{{ 7 // 2 }}{{ 7 % 2 }}{{ -1 }}{{ 2 * 3 }}{{ '3' | int + 1 }}", "31-164"),
        ("{% for x in [1, 2] %}{{ loop.cycle('a', 'b') }}{{ loop.previtem }}{% endfor %}", "ab1"),
        ("{# a comment #}{% raw %}{{ x }}{% endraw %}\n", "{{ x }}"),
    ],
)  # fmt: skip
def test_what_chat_templates_use(source: str, text: str) -> None:
    assert render(source) == text


def test_long_conversations_are_rendered() -> None:
    """The budget grows with the conversation: a thousand turns, and the longest text taken."""
    turns = TURNS[1:] * 333
    assert render(QWEN, messages=turns).count("<|im_end|>") == 999
    text = "x" * 4_000_000
    assert text in render(LLAMA, messages=[{"role": "user", "content": text}])


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(PromptError, match=r"^chat template: no tools please$"):
        render("{{ raise_exception('no\ntools   please') }}")
    assert refused("{{ raise_exception('x' * 3) }}").endswith("uses * on str")
    assert len(refused("{{ raise_exception('%s') }}" % ("x" * 5000))) < 600


def test_each_rendering_has_a_budget_of_its_own() -> None:
    template = ChatTemplate("{% for x in range(9000) %}{{ x }}{% endfor %}")
    texts = {template.render() for _ in range(15)}
    assert len(texts) == 1


# What must not work: reaching Python


CODE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|map(attribute='content.__class__')|list }}",
    "{{ messages|selectattr('__class__')|list }}",
    "{{ '{0.__class__.__base__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ '%s'|format(messages) }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(a=1).__class__ }}",
    "{{ range.__self__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ _steps.__self__ }}",
    "{{ _paid.__self__ }}",
    "{{ _compared }}",
    "{% macro f() %}{% endmacro %}{{ f.__globals__ }}",
    "{% macro f() %}{% endmacro %}{{ f._func }}",
    "{{ (1).__class__ }}",
    "{{ (1).to_bytes(1, 'big') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ 'x'.encode() }}",
    "{{ 'x'.translate({}) }}",
    "{% for x in messages %}{{ loop.__init__ }}{% endfor %}",
    "{% for x in messages %}{{ loop._iterator }}{% endfor %}",
    "{% for x in messages %}{{ loop.changed(x) }}{% endfor %}",
    "{% for x in messages %}{{ loop._recurse }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'x' as x %}",
    "{% from 'x' import y %}",
    "{% extends 'x' %}",
    "{% block x %}{% endblock %}",
    "{% set x %}y{% endset %}",
    "{% filter upper %}x{% endfilter %}",
    "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}x{% endcall %}",
    "{% autoescape true %}x{% endautoescape %}",
    "{% for x in [1] recursive %}{{ loop([2]) }}{% endfor %}",
    "{{ 'x'|pprint }}",
    "{{ 'x'|center(9) }}",
    "{{ 'x'|indent(9) }}",
    "{{ 'x' is callable }}",
    "{{ 'x' is filter }}",
]  # fmt: skip


@pytest.mark.parametrize("source", CODE)
def test_no_way_to_python(source: str) -> None:
    message = ""
    try:
        text = render(source)
    except EdgeVLMError as error:
        message = str(error)
    else:
        assert text.strip("[]") in ("", "Undefined"), text  # an unknown name is just empty
    assert "subclasses" not in message
    assert "root:" not in message


def test_nothing_of_a_conversation_can_be_changed() -> None:
    before = json.dumps(TURNS)
    for change in ("messages.clear()", "messages[0].update(role='x')", "messages.insert(0, 1)",
                   "messages[0].setdefault('x', 1)", "messages.sort()"):  # fmt: skip
        refused(f"{{{{ {change} }}}}", messages=TURNS)
    assert json.dumps(TURNS) == before


# What must not work: filling time and memory


START = "{% set ns = namespace(a=range(9999)|list, s='xxxxxxxxxxxxxxxx', t=(1,), u=(1,)) %}"
LONG_TEXT = START + "{% for i in range(17) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
LONG_LIST = START + "{% for i in range(8) %}{% set ns.a = ns.a + ns.a %}{% endfor %}"
NESTED = (
    START
    + "{% for i in range(60) %}{% set ns.t = (ns.t, ns.t) %}{% set ns.u = (ns.u, ns.u) %}"
    + "{% endfor %}"
)
COSTLY = {
    "steps": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "long range": "{% for i in range(1000000000) %}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(0) }}",
    "shallow macro": "{% macro f(n) %}{% if n < 40 %}{{ f(n+1) }}{{ f(n+1) }}{% endif %}"
    "{% endmacro %}{{ f(0) }}",
    "repeat": "{{ 'a' * 1000000000 }}",
    "repeat a list": "{{ [1] * 1000000000 }}",
    "power": "{{ 10 ** 1000000000 }}",
    "big numbers": "{% set ns = namespace(n=9) %}{% for i in range(9999) %}"
    "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "filter format": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') | length }}",
    "indent": "{{ [1] | tojson(indent=1000000000) | length }}",
    "separators": LONG_TEXT + "{{ ns.a | tojson(separators=(ns.s, ns.s)) | length }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(99) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling with ~": "{% set ns = namespace(s='x') %}{% for i in range(99) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling by join": "{% set ns = namespace(s='x') %}{% for i in range(99) %}"
    "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "doubling by replace": "{% set ns = namespace(s='xx') %}{% for i in range(99) %}"
    "{% set ns.s = ns.s | replace('x', 'xx') %}{% endfor %}",
    "doubling lists": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "join": LONG_TEXT + "{{ range(9999) | map('string') | join(ns.s) | length }}",
    "replace": LONG_TEXT + "{{ ns.s | replace('x', ns.s) | length }}",
    "replace nothing": LONG_TEXT + "{{ ns.s | replace('', ns.s) | length }}",
    "copies of a text": LONG_TEXT + "{{ [" + "ns.s[1:], " * 700 + "] | length }}",
    "copies of a list": LONG_LIST + "{{ [" + "ns.a[:], " * 700 + "] | length }}",
    "letters": LONG_TEXT + "{{ [" + "ns.s | list, " * 50 + "] | length }}",
    "pieces": LONG_TEXT + "{{ [" + "ns.s.split('x'), " * 50 + "] | length }}",
    "output": LONG_TEXT + "{{ ns.s }}" * 900,
    "search": LONG_TEXT + "{% for i in range(9999) %}{% if 'b' in ns.s %}{% endif %}{% endfor %}",
    "search slowly": "{% set ns = namespace(s='x') %}{% for i in range(11) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}{% for i in range(9999) %}"
    "{{ ns.s.find(ns.s[:1000] + 'y') }}{% endfor %}",
    "nested ==": NESTED + "{{ ns.t == ns.u }}",
    "nested <": NESTED + "{{ 1 < 2 < 3 and ns.t < ns.u }}",
    "nested in": NESTED + "{{ ns.t in [ns.u] }}",
    "nested test": NESTED + "{{ ns.t is eq(ns.u) }}",
    "nested selectattr": NESTED + "{{ [{'x': ns.t}] | selectattr('x', 'eq', ns.u) | list }}",
    "nested max": NESTED + "{{ [ns.t, ns.u] | max | length }}",
    "nested key": NESTED + "{{ {ns.t: 1} | length }}",
    "nested item": NESTED + "{{ {}[ns.t] }}",
    "nested get": NESTED + "{{ {}.get(ns.t) }}",
    "nested output": NESTED + "{{ ns.t }}",
    "nested string": NESTED + "{{ ns.t | string | length }}",
    "nested ~": NESTED + "{{ (ns.t ~ '') | length }}",
    "nested json": NESTED + "{{ ns.t | tojson | length }}",
    "nested message": NESTED + "{{ raise_exception(ns.t) }}",
    "nested join": NESTED + "{{ [ns.t] | join | length }}",
    "deep json": START + "{% for i in range(5000) %}{% set ns.t = [ns.t] %}{% endfor %}"
    "{{ ns.t | tojson }}",
    "deep ==": START + "{% for i in range(5000) %}{% set ns.t = [ns.t] %}"
    "{% set ns.u = [ns.u] %}{% endfor %}{{ ns.t == ns.u }}",
}  # fmt: skip


TOO_MUCH = {
    "characters": "x" * (MAX_TEMPLATE_CHARS + 1),
    "parts": "{{ a }}" * MAX_NODES,
    "variables": "{% if x %}{% set y = 1 %}{% endif %}" * 1500,
    "digits": "{{ " + "9" * 5000 + " }}",
    "loops in loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "lists": "{{ " + "[" * 20_000 + "1" + "]" * 20_000 + " }}",
    "not": "{{ " + "not " * 15_000 + "1 }}",
    "sums": "{{ 1" + " + 1" * 15_000 + " }}",
    "attributes": "{{ a" + ".b" * 20_000 + " }}",
    "elif": "{% if 0 %}" + "{% elif 0 %}" * 5000 + "{% endif %}",
    "ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "open": "{% if 1 %}",
    "syntax": "{{ 1 + }}",
    "brace": "{{",
    "tag": "{% unknown %}",
    "bad assignment": "{% set 1 = 2 %}",
    "bad loop": "{% for x y in z %}{% endfor %}",
}


MEASURE = """
import json, resource, sys, time
from edge_vlm.errors import BundleError, PromptError
from edge_vlm.prompt.template import ChatTemplate
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
ChatTemplate("{{ x }}").render()
before, results = used(), {}
for name, source in json.load(sys.stdin).items():
    started = time.process_time()
    try:
        ChatTemplate(source).render(messages=[])
        error = ["none", ""]
    except (BundleError, PromptError) as caught:
        error = [type(caught).__name__, str(caught)]
    results[name] = [*error, time.process_time() - started, used() - before]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[str, str, float, float]]:
    """By name: error, message, CPU seconds, MiB that the peak memory has risen so far."""
    found = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=json.dumps({**COSTLY, **TOO_MUCH}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=100,
    )
    return {name: tuple(result) for name, result in json.loads(found.stdout).items()}


linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere peak memory has another unit")


@linux
@pytest.mark.parametrize("name", [*COSTLY, *TOO_MUCH])
def test_time_and_memory_are_bounded(
    name: str, measured: dict[str, tuple[str, str, float, float]]
) -> None:
    error, message, seconds, rise = measured[name]
    assert_one_line(message)
    assert error == "BundleError" or name in COSTLY
    if name.startswith("deep "):
        assert message == "chat template: nests lists too deeply"
    assert seconds < 1
    assert rise < 100
