"""A chat template from a bundle, rendered where it can do no harm.

Templates are programs of unknown origin. jinja2's immutable sandbox keeps them away from Python's
internals; what it does not bound is memory and time. So a template may only use the constructs,
filters, tests and methods that chat templates need. Each value that it makes is paid for, with the
bytes of all that is inside it, out of a fixed sum; a step that could multiply memory pays first.
With every value bounded no step takes long, and between steps the clock is read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from functools import partial
from threading import Lock
from time import monotonic
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from edge_vlm.errors import BundleError, PromptError

MAX_TEMPLATE_CHARS = 1 << 16
MAX_NODES = 5_000  # of the syntax tree; the longest templates of released models have half of it
MAX_DEPTH = 32  # of lists in lists
MAX_BYTES = 32 << 20  # of all values that one rendering makes
MAX_BYTES_PER_INPUT_BYTE = 12
MAX_SECONDS = 2.0
_LARGEST = 1 << 62
_LONGEST = 200  # characters of a key, of the path of an attribute, or to strip
_CHARACTER, _SLOT, _PIECE, _OBJECT, _CALL = 4, 16, 100, 200, 500  # bytes

_FILTERS = """capitalize count d default first int items join last length list lower map max min
    reject rejectattr replace reverse select selectattr string title tojson trim upper"""
_TESTS = """!= < <= == > >= boolean defined eq equalto even false float ge greaterthan gt in integer
    iterable le lessthan lower lt mapping ne none number odd sameas sequence string true undefined
    upper"""
_METHODS = """capitalize count endswith find isalpha isdigit isspace lower lstrip removeprefix
    removesuffix replace rstrip split splitlines startswith strip title upper"""
_LOOP = "cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
_ATTRIBUTES: dict[type, list[str]] = {
    str: _METHODS.split(),
    dict: ["get", "items", "keys", "values"],
    LoopContext: _LOOP.split(),
}
_VIEWS = (KeysView, ValuesView, ItemsView)
# How many times the size of what they are given filters and methods may take while they work.
_GROWTH = {"capitalize": 4, "lower": 4, "max": 4, "min": 4, "splitlines": 24, "title": 24}
_GROWTH |= {"tojson": 8, "upper": 4}
_WRITTEN = 10  # the same for a list that becomes text
_OF_TEXT = ("capitalize", "lower", "title", "trim", "upper")
_SHORT = ("lstrip", "map", "max", "min", "rejectattr", "rstrip", "selectattr", "strip", "trim")
_FORBIDDEN: tuple[type[nodes.Node], ...] = (
    *(nodes.Block, nodes.CallBlock, nodes.Extends, nodes.FilterBlock, nodes.FromImport),
    *(nodes.Import, nodes.Include, nodes.ScopedEvalContextModifier),
)


class ChatTemplate:
    """One compiled template.

    Raises:
        BundleError: the template is too long, does not parse or uses a forbidden construct.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise BundleError(f"chat template: is longer than {MAX_TEMPLATE_CHARS} characters")
        self._environment = _Environment()
        self._lock = Lock()
        try:
            tree = self._environment.parse(source)
            _Watched().visit(tree)
            self._template = self._environment.from_string(tree)
        except Exception as error:  # also of Python's compiler: nesting, digits of a number
            raise BundleError(f"chat template: {_line(error)}") from error

    def render(self, **variables: Any) -> str:
        """The template's text for these variables.

        Raises:
            PromptError: the template refused the conversation, failed, or takes too much memory
                or time.
        """
        with self._lock:
            try:
                self._environment.start(variables)
                return self._template.render(variables)
            except SecurityError as error:
                raise PromptError(f"chat template: {_line(error)}") from error
            except Exception as error:  # the template's own code may raise anything
                name = type(error).__name__
                raise PromptError(f"chat template: {name}: {_line(error)}") from error


class _Watched(NodeTransformer):
    """Lets filters see what a template makes, loops over or compares without calling anything."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, nodes.Template) and len([*node.find_all(nodes.Node)]) >= MAX_NODES:
            raise SecurityError(f"has more than {MAX_NODES} parts")
        if isinstance(node, _FORBIDDEN):
            raise SecurityError(f"uses {type(node).__name__}, which is not allowed")
        node = self.generic_visit(node, *args, **kwargs)
        match node:
            case nodes.For(recursive=True):
                raise SecurityError("uses a recursive loop, which is not allowed")
            case nodes.For():
                n_pieces = sum(len(output.nodes) for output in node.find_all(nodes.Output))
                node.iter = _filter(node.iter, "(steps)", nodes.Const(n_pieces))
            case nodes.Pair():
                node.key = _filter(node.key, "(made)")
            case nodes.Operand():
                node.expr = _filter(node.expr, "(timed)")
            case nodes.Concat():
                return _filter(nodes.List(node.nodes), "join")
            case nodes.List() | nodes.Tuple(ctx="load") | nodes.Dict():
                return _filter(node, "(made)")
            case nodes.Getitem(arg=nodes.Slice()):
                return _filter(node, "(made)")
        return node


def _filter(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, name, list(args), [], None, None)


class _Generation(Extension):
    """``{% generation %}``, around what a model is trained to say: here it is its body alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), True), lineno=line)


class _PlainNamespace(Namespace):
    """Does not show what is in it: namespaces in namespaces, twice each, would fill the memory."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%", "/", "//", "-"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            # As it takes the context, jinja2 does not call it while it compiles.
            finalize=pass_context(lambda _, value: self._text(value)),
            cache_size=0,
            extensions=[LoopControlExtension, _Generation],
        )
        methods = {**vars(str), "replace": self._replace, "split": self._split}
        filters = {**self.filters, "join": self._join, "list": iter, "replace": self._replace}
        filters |= {"string": self._text, "tojson": _to_json}
        # With a text on its left % would fill it in; a minus refuses it.
        tests: dict[str, Any] = {**self.tests, "even": lambda n: (n - 0) % 2 == 0}
        tests["odd"] = lambda n: (n - 0) % 2 == 1
        self.filters = {name: self._bounded(name, filters[name]) for name in _FILTERS.split()}
        self.filters |= {"(made)": self.made, "(steps)": self._steps, "(timed)": self._timed}
        self.tests = {name: self._bounded(name, tests[name]) for name in _TESTS.split()}
        self._methods = {name: self._bounded(name, methods[name]) for name in _METHODS.split()}
        self.globals = {"namespace": _PlainNamespace, "range": safe_range}
        self.globals["raise_exception"] = self._raise_exception

    def start(self, variables: dict[str, Any]) -> None:
        """Start a rendering: longer conversations may take more memory."""
        self._left = sys.maxsize
        self._pay_for(variables)
        self._left = MAX_BYTES + MAX_BYTES_PER_INPUT_BYTE * (sys.maxsize - self._left)
        self._deadline = monotonic() + MAX_SECONDS

    def made(self, value: Any) -> Any:
        """The value, paid for; an iterator or a dict's view as a list."""
        if not isinstance(value, str) and isinstance(value, (Iterator, *_VIEWS)):
            return [self.made(item) for item in self._steps(value)]
        self._pay_for(value)
        return self._timed(value)

    def concat(self, pieces: Iterable[str]) -> str:
        """The text of a prompt, a macro or a block."""
        texts = []
        for text in pieces:
            self._pay(_size(text))
            texts.append(text)
        return "".join(texts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return super().is_safe_attribute(obj, attr, value)
        return any(isinstance(obj, kind) and attr in _ATTRIBUTES[kind] for kind in _ATTRIBUTES)

    def wrap_str_format(self, value: Any) -> None:
        """``format`` is not among the allowed string methods; a width could fill the memory."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            raise SecurityError("looks up a tuple")
        _check_short((argument,))
        return super().getitem(self._timed(obj), argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_short(kwargs)
        self._pay(_CALL + sum(map(_size, (*args, *kwargs.values()))))
        text = getattr(obj, "__self__", None)
        if isinstance(text, str):
            method = partial(self._methods[obj.__name__], text)
            return super().call(context, method, *args, **kwargs)
        return self.made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator != "+" and (operator == "**" or not numbers):
            raise SecurityError(f"uses {operator} on {type(left).__name__}")
        return self.made(super().call_binop(context, operator, left, right))

    def _pay(self, n_bytes: int) -> None:
        self._left -= n_bytes
        if self._left < 0:
            raise SecurityError("takes too long or too much memory")

    def _pay_for(self, value: Any, times: int = 1, depth: int = 0) -> None:
        """Pay for a value and everything inside it, also where it is there more than once."""
        self._pay(times * _size(value))
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise SecurityError("computes with numbers that are too large")
        if isinstance(value, (list, tuple, dict)):
            if depth > MAX_DEPTH:
                raise SecurityError("nests lists too deeply")
            for item in (*value, *value.values()) if isinstance(value, dict) else value:
                self._pay_for(item, times, depth + 1)

    def _timed(self, value: Any) -> Any:
        if monotonic() > self._deadline:
            raise SecurityError("takes too long")
        return value

    def _steps(self, values: Iterable[Any], n_pieces: int = 0) -> Iterator[Any]:
        """Values for a loop. A step pays for its place in a list, and those of its texts."""
        for value in values:
            self._pay(_SLOT + _SLOT * n_pieces)
            yield self._timed(value)

    def _text(self, value: Any) -> str:
        """The value as text, paid for if it was none."""
        if isinstance(value, str):
            return value
        self._pay_for(value, _WRITTEN if isinstance(value, (list, tuple, dict)) else 1)
        return self.concat([str(value)])

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter, test or method that pays for what it takes and what it makes."""
        first = int(hasattr(function, "jinja_pass_arg"))  # in front of it: jinja2's context

        def bounded(*args: Any, **kwargs: Any) -> Any:
            value, others = args[first], args[first + 1 :]
            if name in _OF_TEXT:
                value = self._text(value)
            if name in _GROWTH:
                self._pay_for(value, _GROWTH[name])
            if name in _SHORT:
                _check_short((*others, *kwargs.values()))
            return self.made(function(*args[:first], value, *others, **kwargs))

        # Keep the marks that tell jinja2 to pass its context or environment first.
        bounded.__dict__.update(getattr(function, "__dict__", {}))
        return bounded

    def _raise_exception(self, message: Any) -> None:
        raise SecurityError(self._text(message))

    def _join(self, values: Iterable[Any], d: Any = "") -> str:
        texts, separator = [self._text(value) for value in values], self._text(d)
        self._pay(_CHARACTER * len(separator) * len(texts))
        self._pay_for(texts)
        return separator.join(texts)

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, replaced, replacement = map(self._text, (value, old, new))
        self._pay(_CHARACTER * len(replacement) * text.count(replaced))
        return text.replace(replaced, replacement, -1 if count is None else count)

    def _split(self, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        self._pay(_PIECE * (text.count(sep) if sep else len(text) // 2))
        return text.split(sep, maxsplit)


def _to_json(value: Any, **style: Any) -> str:
    """As the chat templates of transformers have it: no escapes for HTML or other alphabets."""
    if not style.keys() <= {"ensure_ascii", "indent", "separators", "sort_keys"}:
        raise SecurityError(f"gives tojson {', '.join(style)}")
    separators = style.get("separators") or ()
    if style.get("indent") not in (None, *range(9)) or sum(map(len, separators)) > 16:
        raise SecurityError("spaces JSON too far")
    return json.dumps(value, **{"ensure_ascii": False, **style})


def _check_short(values: Iterable[Any]) -> None:
    """A key is also written into messages; a path or set of characters takes time each time."""
    if any(isinstance(value, str) and len(value) > _LONGEST for value in values):
        raise SecurityError(f"uses an argument of more than {_LONGEST} characters")


def _size(value: Any) -> int:
    """Bytes of a value without what is inside it; a text may become one of wide characters."""
    return _OBJECT + (_CHARACTER * len(value) if isinstance(value, str) else sys.getsizeof(value))


def _line(error: Exception) -> str:
    return " ".join(str(error)[:2000].split())[:500]
