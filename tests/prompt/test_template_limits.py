"""Chat templates from strangers that would fill time and memory: each ends soon, in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from edge_vlm.prompt.template import MAX_NODES, MAX_SECONDS, MAX_TEMPLATE_CHARS

START = "{% set ns = namespace(a=range(9999)|list, s='xxxxxxxxxxxxxxxx', t=(1,), u=(1,)) %}"
LONG_TEXT = START + "{% for i in range(16) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
LONG_LIST = START + "{% for i in range(2) %}{% set ns.a = ns.a + ns.a %}{% endfor %}"
NESTED = (
    START
    + "{% for i in range(13) %}{% set ns.t = (ns.t, ns.t) %}{% set ns.u = (ns.u, ns.u) %}"
    + "{% endfor %}"
)
SHARED = NESTED.replace("range(13)", "range(60)")
WIDE = "{% set ns = namespace(s='\\U000e0001x😀Ü') %}" + LONG_TEXT[len(START) :]
WORDS = "{% set ns = namespace(s='x \n-') %}" + LONG_TEXT[len(START) :]
DOTS = "{% set ns = namespace(s='0.0.') %}" + LONG_TEXT[len(START) :]
DIGITS = LONG_TEXT.replace("xxxxxxxxxxxxxxxx", "ffffffffffffffff")


def doubled(value: str, start: str = "'x'") -> str:
    """A template that makes a value larger again and again."""
    return (
        f"{{% set ns = namespace(s={start}) %}}{{% for i in range(99) %}}"
        f"{{% set ns.s = {value} %}}{{% endfor %}}"
    )


def repeated(text: str, times: int = 9999) -> str:
    return f"{{% for i in range({times}) %}}{text}{{% endfor %}}"


COSTLY = {
    "steps": repeated(repeated("")),
    "filtered steps": repeated("{% for j in range(9999) if j < 0 %}{% endfor %}"),
    "long range": "{% for i in range(1000000000) %}{% endfor %}",
    "longer range": "{% for i in range(10000000000000000000000) %}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(0) }}",
    "shallow macro": "{% macro f(n) %}{% if n < 40 %}{{ f(n+1) }}{{ f(n+1) }}{% endif %}"
    "{% endmacro %}{{ f(0) }}",
    "arguments of a macro": LONG_LIST
    + "{% macro f() %}{{ f(*varargs) }}{% endmacro %}{{ f(*ns.a) }}",
    "a loop's length": LONG_LIST
    + "{% macro f() %}{% for x in ns.a %}{{ loop.length }}{{ f() }}{% endfor %}"
    "{% endmacro %}{{ f() }}",
    "text of a macro": LONG_TEXT
    + "{% macro f() %}" + repeated("{{ ns.s }}") + "{% endmacro %}{{ f() | length }}",
    "pieces of a macro": "{% macro f() %}" + repeated(repeated("a{{ 'b' }}" * 99))
    + "{% endmacro %}{{ f() | length }}",
    "repeat": "{{ 'a' * 1000000000 }}",
    "repeat a list": "{{ [1] * 1000000000 }}",
    "power": "{{ 10 ** 1000000000 }}",
    "big numbers": "{% set ns = namespace(n=9) %}" + repeated("{% set ns.n = ns.n * ns.n %}"),
    "big sums": "{% set ns = namespace(n=9) %}" + repeated("{% set ns.n = ns.n + ns.n %}"),
    "big number of digits": DIGITS + "{{ -(ns.s | int(base=16)) }}",
    "big numbers of digits": DIGITS + "{{ [ns.s] | map('int', 0, 16) | list | length }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent in even": "{{ '%1000000000d' is even }}",
    "percent in odd": "{{ ['%1000000000d'] | select('odd') | list }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "filter format": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') | length }}",
    "indent": "{{ [1] | tojson(indent=1000000000) | length }}",
    "indent a list": LONG_LIST + "{{ [[[ns.a]]] | tojson(indent=8) | length }}" * 20,
    "filter indent": "{{ 'a' | indent(1000000000) }}",
    "separators": LONG_TEXT + "{{ ns.a | tojson(separators=(ns.s[:99], ns.s[:99])) | length }}",
    "doubling": doubled("ns.s + ns.s"),
    "doubling with ~": doubled("ns.s ~ ns.s"),
    "doubling by join": doubled("[ns.s, ns.s] | join"),
    "doubling by replace": doubled("ns.s | replace('x', 'xx')"),
    "doubling by a method": doubled("ns.s.replace('x', 'xx')"),
    "doubling in a block": doubled("ns.s").replace(
        "{% set ns.s = ns.s %}", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"
    ),
    "doubling in a macro": "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}" + doubled("f(ns.s)"),
    "doubling lists": doubled("ns.s + ns.s", "[1]"),
    "doubling tuples": doubled("ns.s + ns.s", "(1,)"),
    "doubling lists in lists": doubled("[ns.s, ns.s]"),
    "doubling dicts in dicts": doubled("{'a': ns.s, 'b': ns.s}"),
    "doubling namespaces": doubled("namespace(a=ns.s, b=ns.s)")
    + "{{ [ns.s] ~ ns.s }}{{ raise_exception(ns.s) }}",
    "a chain of namespaces": "{% set ns = namespace() %}"
    + repeated(repeated("{% set ns.s = namespace(a=ns.s, l=loop) %}")),
    "a chain of macros": "{% set ns = namespace() %}"
    + repeated(repeated("{% macro f() %}{{ i }}{% endmacro %}"
    "{% set ns.s = namespace(a=ns.s, b=f) %}")),
    "join": LONG_TEXT + "{{ range(9999) | map('string') | join(ns.s) | length }}",
    "join by name": LONG_TEXT + "{{ range(9999) | join(d=ns.s) | length }}",
    "replace": LONG_TEXT + "{{ ns.s | replace('x', ns.s) | length }}",
    "replace nothing": LONG_TEXT + "{{ ns.s | replace('', ns.s) | length }}",
    "replace by name": LONG_TEXT + "{{ ns.s | replace(new=ns.s, old='') | length }}",
    "copies of a text": LONG_TEXT + "{{ [" + "ns.s[1:], " * 300 + "] | length }}",
    "joined copies": LONG_TEXT + "{{ (" + "ns.s ~ " * 300 + "'') | length }}",
    "copies of a list": LONG_LIST + "{{ [" + "ns.a[:], " * 300 + "] | length }}",
    "copies in variables": LONG_TEXT + "".join(f"{{% set v{i} = ns.s[1:] %}}" for i in range(300)),
    "letters": LONG_TEXT + "{{ [" + "ns.s | list, " * 50 + "] | length }}",
    "wide letters": WIDE + "{{ [" + "ns.s | list, " * 50 + "] | length }}",
    "reversed letters": WIDE + "{{ [" + "ns.s | reverse | list, " * 50 + "] | length }}",
    "pieces": LONG_TEXT + "{{ [" + "ns.s.split('x'), " * 50 + "] | length }}",
    "pieces by name": LONG_TEXT + "{{ [" + "ns.s.split(sep='x'), " * 50 + "] | length }}",
    "words": WORDS + "{{ [" + "ns.s.split(), " * 50 + "] | length }}",
    "lines": WORDS + "{{ [" + "ns.s.splitlines(), " * 50 + "] | length }}",
    "titles": WORDS + "{{ [" + "ns.s | title, " * 50 + "] | length }}",
    "capitals": WIDE + "{{ [" + "ns.s | upper, " * 50 + "] | length }}",
    "capitals of lists": WIDE + "{{ [" + "[ns.s] | upper, " * 50 + "] | length }}",
    "escapes": WIDE + "{{ [" + "[ns.s] | string, " * 50 + "] | length }}",
    "escapes in JSON": WORDS + "{{ [" + "ns.s | tojson(ensure_ascii=true), " * 50 + "] | length }}",
    "joined escapes": WIDE + "{{ (" + "[ns.s] ~ " * 50 + "'') | length }}",
    "output": LONG_TEXT + "{{ ns.s }}" * 900,
    "output of lists": WIDE + "{% macro f() %}" + "{{ [ns.s] }}" * 900 + "{% endmacro %}{{ f() }}",
    "a long refusal": WORDS + "{{ raise_exception(ns.s) }}",
    "a long unknown name": WIDE + "{{ {}[ns.s].x }}",
    "search": LONG_TEXT + repeated(repeated("{% if 'b' in ns.s %}{% endif %}")),
    "search by a test": LONG_TEXT + repeated("{{ 'abc' | select('in', ns.s) | list }}"),
    "search in a list": LONG_LIST + repeated("{{ ns.a | select('in', ns.a) | list }}"),
    "search slowly": "{% set ns = namespace(s='x') %}{% for i in range(11) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}" + repeated("{{ ns.s.find(ns.s[:1000] + 'y') }}"),
    "strip": LONG_TEXT + "{{ ns.s.strip(ns.s.replace('x', 'y') + 'x') }}",
    "trim": LONG_TEXT + "{{ ns.s | trim(ns.s.replace('x', 'y') + 'x') }}",
    "trim by name": LONG_TEXT + "{{ ns.s | trim(chars=ns.s[1:]) }}",
    "a long path": DOTS + "{{ messages | map(attribute=ns.s) | list }}",
    "a long path of an item": DOTS + "{{ '0' | map(attribute=ns.s) | list }}",
    "a long path to select": DOTS + "{{ messages | selectattr(ns.s, 'eq', 1) | list }}",
    "a long path of the largest": DOTS + "{{ messages | max(false, ns.s) }}",
    "chained ==": LONG_LIST + "{% set b = ns.a[:] %}" + repeated("{{ b" + " == ns.a" * 999 + " }}"),
    "nested ==": NESTED + repeated("{{ ns.t == ns.u }}"),
    "nested <": NESTED + repeated("{{ 1 < 2 < 3 and ns.t < ns.u }}"),
    "nested in": NESTED + repeated("{{ ns.t in [ns.u] }}"),
    "nested test": NESTED + repeated("{{ ns.t is eq(ns.u) }}"),
    "nested selectattr": NESTED + "{% set d = [{'x': ns.t}] %}"
    + repeated("{{ d | selectattr('x', 'eq', ns.u) | list | length }}"),
    "nested max": NESTED + repeated("{{ [ns.t, ns.u] | max | length }}"),
    "nested key": NESTED + "{{ {" + "ns.t: 1, " * 1000 + "} | length }}",
    "nested item": NESTED + repeated(repeated("{% if {}[ns.t] %}{% endif %}")),
    "nested get": NESTED + repeated(repeated("{{ {}.get(ns.t) }}")),
    "nested output": NESTED + repeated("{{ ns.t }}"),
    "nested string": NESTED + repeated("{{ ns.t | string | length }}"),
    "nested ~": NESTED + repeated("{{ (ns.t ~ '') | length }}"),
    "nested json": NESTED + repeated("{{ ns.t | tojson | length }}"),
    "nested message": SHARED + "{{ raise_exception(ns.t) }}",
    "nested join": NESTED + repeated("{{ [ns.t] | join | length }}"),
    "shared": SHARED,
    "a long conversation": "{{ messages[0].content }}" * 99,
    "a long conversation doubled": doubled("ns.s + ns.s", "messages[0].content"),
    "a long conversation doubled in a block": doubled("ns.s", "messages[0].content").replace(
        "{% set ns.s = ns.s %}", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"
    ),
    "capitals of a long conversation": "{{ messages[0].content | upper }}" * 99,
    "letters of a long conversation": "{{ messages[0].content | list | length }}" * 99,
    "a long conversation in a list": "{{ (messages ~ messages) | length }}" * 99
    + "{{ messages[0].content | title }}",
    "deep json": START + "{% for i in range(5000) %}{% set ns.t = [ns.t] %}{% endfor %}"
    "{{ ns.t | tojson }}",
    "deep ==": START + "{% for i in range(5000) %}{% set ns.t = [ns.t] %}"
    "{% set ns.u = [ns.u] %}{% endfor %}{{ ns.t == ns.u }}",
    "deep arguments": "{% macro f(n) %}{{ f([n]) }}{% endmacro %}{{ f(1) }}",
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
import json, sys, time
from edge_vlm.errors import BundleError, PromptError
from edge_vlm.prompt.template import ChatTemplate
for name, source in json.load(sys.stdin):
    started = time.process_time()
    try:
        long = [{"content": "\u00dc\U0001f600" * 2_000_000}] * ("long conv" in name)
        ChatTemplate(source).render(messages=long)
        error = ["none", ""]
    except (BundleError, PromptError) as caught:
        error = [type(caught).__name__, str(caught)]
    seconds = time.process_time() - started
    with open("/proc/self/status") as status:
        [peak] = [int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")]
    print(json.dumps([name, [*error, seconds, peak]]), flush=True)
"""
N_PROCESSES = 4


def measure(attacks: list[tuple[str, str]]) -> str:
    try:
        return subprocess.run(
            [sys.executable, "-c", MEASURE],
            input=json.dumps(attacks).encode(),
            stdout=subprocess.PIPE,
            check=True,
            timeout=200,
        ).stdout.decode()
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode()


@pytest.fixture(scope="module")
def measured(once: Callable[..., Any]) -> dict[str, tuple[str, str, float, float]]:
    """By name: error, message, CPU seconds, and the peak memory in MiB of its process so far.

    What hangs is missing here, and all that should have come behind it in the same process.
    """

    def measure_all() -> list[Any]:
        attacks = list({**COSTLY, **TOO_MUCH}.items())
        shares = [attacks[n::N_PROCESSES] for n in range(N_PROCESSES)]
        with ThreadPoolExecutor(N_PROCESSES) as pool:
            return [json.loads(line) for line in "".join(pool.map(measure, shares)).splitlines()]

    return {name: tuple(result) for name, result in once("template-limits", measure_all)}


@pytest.mark.limits
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", [*COSTLY, *TOO_MUCH])
def test_time_and_memory_are_bounded(
    name: str, measured: dict[str, tuple[str, str, float, float]]
) -> None:
    error, message, seconds, peak = measured[name]
    assert message.startswith("chat template: ")
    assert message.isprintable()
    assert len(message) < 700
    assert error == "BundleError" or name in COSTLY
    if name.startswith("deep "):
        assert message == "chat template: nests lists too deeply"
    assert seconds < MAX_SECONDS + 1
    assert peak < 500
