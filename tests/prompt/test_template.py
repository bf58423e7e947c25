"""Chat templates from strangers: they render what real ones need, and can do no harm."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edge_vlm.errors import BundleError, EdgeVLMError, PromptError
from edge_vlm.prompt.template import ChatTemplate

FAMILIES = json.loads((Path(__file__).parent / "data" / "families.json").read_text("utf-8"))
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


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_of_model_families(family: str) -> None:
    template = ChatTemplate(FAMILIES[family]["template"])
    for case in FAMILIES[family]["cases"]:
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        text = template.render(messages=case["messages"], add_generation_prompt=True, **tokens)
        assert text == case["prompt"]


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
        ("a{% generation %}b{% set c = 1 %}{% endgeneration %}{{ c is defined }}", "abFalse"),
        ("{% for x in [1, 2] %} {%- generation -%} {{ x }} {%- endgeneration %}{% endfor %}", "12"),
        ("{% for x in range(9) %}{% if x == 1 %}{% continue %}{% endif %}"
         "{% if x == 4 %}{% break %}{% endif %}{{ x }}{% endfor %}", "023"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x ~ x }}", "a1a1"),
        ("{{ {'é': 1} | tojson(ensure_ascii=true, separators=(',', ':')) }}", '{"\\u00e9":1}'),
        ("{{ 'a<think>b'.replace('<think>', ' ') }}{{ 'aa' | replace('a', 'b', 1) }}", "a bba"),
        ("{{ [1, 2, 3] | select('odd') | list }}{{ [1, 2] | reject('even') | list }}", "[1, 3][1]"),
        ("{{ {messages[0].role: 1} }}{{ (1, 2)[1:] }}{{ [[1], {}] ~ none }}",
         "{'user': 1}(2,)[[1], {}]None"),
        ("{% macro f() %}{{ kwargs.context }}{{ varargs }}{% endmacro %}{{ f(1, context=2) }}",
         "2(1,)"),
        ("{{ 'a b\n c'.split() }}{{ 'a,b,c'.split(',', 1) }}{{ 'a\nb'.splitlines() }}",
         "['a', 'b', 'c']['a', 'b,c']['a', 'b']"),
        ("{{ strftime_now is defined }}{{ [] | string is string }}{{ 3 is odd }}", "FalseTrueTrue"),
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


def test_threads_may_share_a_template() -> None:
    template = ChatTemplate("{% for x in range(500) %}{{ name }}{% endfor %}")
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda name: template.render(name=name), "abcdefgh"))
    assert texts == [name * 500 for name in "abcdefgh"]


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
    "{{ messages.__await__ }}",
    "{{ messages.__aiter__ }}",
    "{{ (messages | map('upper')).gi_frame.f_back }}",
    "{{ raise_exception.cr_frame }}",
    "{{ dict }}{{ lipsum }}{{ cycler }}{{ joiner }}{{ environment }}{{ context }}",
    "{{ namespace(a=1)._Namespace__attrs }}",
    "{{ 'x'.split.__self__ }}",
    "{{ f.__wrapped__ }}{% macro f() %}{% endmacro %}{{ f.__call__ }}",
    "{{ [1] | tojson(default=raise_exception) }}",
    "{{ [1] | tojson(cls=namespace) }}",
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
