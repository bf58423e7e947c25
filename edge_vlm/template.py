"""A chat template from a bundle, rendered where it can do no harm.

Templates are programs of unknown origin. They run in jinja2's immutable sandbox, which keeps them
away from Python's internals; what the sandbox does not bound is time and memory, so the template
may only use constructs, filters and string methods that chat templates need, and every loop step,
call and output is paid from a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_vlm.errors import BundleError, PromptError

MAX_TEMPLATE_CHARS = 1 << 16
BUDGET = 50_000_000  # characters of template text walked over and of values written
MAX_VALUE_CHARS = 1 << 22

_FILTERS = (
    *("capitalize", "default", "d", "first", "int", "items", "join", "last", "length", "count"),
    *("list", "lower", "map", "max", "min", "rejectattr", "replace", "reverse", "selectattr"),
    *("string", "title", "tojson", "trim", "upper"),
)
_STRING_METHODS = (
    *("capitalize", "count", "endswith", "find", "isalpha", "isdigit", "isspace", "lower"),
    *("lstrip", "removeprefix", "removesuffix", "rstrip", "split", "splitlines", "startswith"),
    *("strip", "title", "upper"),
)
# Filters that turn a whole value into text: what they pay for is everything inside it.
_TEXT_FILTERS = frozenset(
    ("capitalize", "join", "lower", "replace", "string", "title", "tojson", "trim", "upper")
)
_OWN_NAMES = ("_steps", "_joined")
_FORBIDDEN = (
    nodes.AssignBlock,
    nodes.Block,
    nodes.CallBlock,
    nodes.Extends,
    nodes.FilterBlock,
    nodes.FromImport,
    nodes.Import,
    nodes.Include,
    nodes.ScopedEvalContextModifier,
)


class ChatTemplate:
    """One compiled template.

    Raises:
        BundleError: the template is too long, does not parse or uses a forbidden construct.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise BundleError(f"chat template: is longer than {MAX_TEMPLATE_CHARS} characters")
        self._environment = _Environment(step_cost=len(source) + 1)
        try:
            tree = self._environment.parse(source)
            self._environment.guard(tree)
            self._template = self._environment.from_string(tree)
        except (TemplateError, RecursionError, MemoryError) as error:
            raise BundleError(f"chat template: {error}") from error

    def render(self, **variables: Any) -> str:
        """The template's text for these variables.

        Raises:
            PromptError: the template refused the conversation, failed, or ran out of its budget.
        """
        self._environment.budget.refill()
        try:
            return "".join(self._template.generate(**variables))
        except SecurityError as error:
            raise PromptError(f"chat template: {error}") from error
        except Exception as error:  # the template's own code may raise anything
            raise PromptError(f"chat template: {type(error).__name__}: {error}") from error


class _Budget:
    def __init__(self) -> None:
        self.refill()

    def refill(self) -> None:
        self.left = BUDGET

    def pay(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise SecurityError("takes too long")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%", "/", "//", "-"])

    def __init__(self, step_cost: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=self._written, cache_size=0)
        self.budget = _Budget()
        self._step_cost = step_cost
        self.filters = {name: self._bounded(name, self.filters[name]) for name in _FILTERS}
        self.globals = {
            "namespace": self.globals["namespace"],
            "range": range_of_messages,
            "raise_exception": _raise_exception,
            "_steps": self._steps,
            "_joined": self._joined,
        }

    def guard(self, tree: nodes.Template) -> None:
        """Refuse forbidden constructs; make loops and ``~`` pay."""
        for forbidden in tree.find_all(_FORBIDDEN):
            raise SecurityError(f"uses {type(forbidden).__name__}, which is not allowed")
        for name in tree.find_all(nodes.Name):
            if name.name in _OWN_NAMES:
                raise SecurityError(f"uses the name {name.name}")
        for call in list(tree.find_all(nodes.For)):
            call.iter = _call("_steps", [call.iter])
        _replace_concat(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _STRING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """``format`` is not among the allowed string methods; a width could fill the memory."""

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.budget.pay(self._step_cost)
        return self._checked(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "+":
            if not numbers:
                self.budget.pay(_size(left) + _size(right))
        elif not numbers or operator == "**":
            raise SecurityError(f"uses {operator} on {type(left).__name__}")
        elif abs(left) > 1 << 62 or abs(right) > 1 << 62:
            raise SecurityError("computes with numbers that are too large")
        return self._checked(super().call_binop(context, operator, left, right))

    def _steps(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.pay(self._step_cost)
            yield value

    def _joined(self, *parts: Any) -> str:
        self._pay_deep(parts)
        return str(self._checked("".join(str(part) for part in parts)))

    def _written(self, value: Any) -> Any:
        self._pay_deep(value)
        return value

    def _pay_deep(self, value: Any) -> None:
        """Pay for every character that the text of a value may have, before it is made."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            self.budget.pay(_size(value))
            if isinstance(value, dict):
                waiting += value.keys()
                waiting += value.values()
            elif isinstance(value, list | tuple):
                waiting += value

    def _checked(self, value: Any) -> Any:
        size = _size(value)
        self.budget.pay(size)
        if size > MAX_VALUE_CHARS:
            raise SecurityError("builds a value that is too large")
        return value

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def bounded(*args: Any, **kwargs: Any) -> Any:
            values = (*args, *kwargs.values())
            if name in _TEXT_FILTERS:
                self._pay_deep(values)
            if name == "replace":
                text, old, new = (str(value) for value in args[1:4])
                self.budget.pay(len(new) * (text.count(old) if old else len(text) + 1))
            if name == "join" and len(values) > 2:
                self.budget.pay(_size(values[2]) * _size(values[1]))
            return self._checked(function(*args, **kwargs))

        # Keep the marks that tell jinja2 to pass its context or environment first.
        bounded.__dict__.update(getattr(function, "__dict__", {}))
        return bounded


def range_of_messages(*args: int) -> range:
    """``range`` for templates, which count messages and parts."""
    steps = range(*args)
    if len(steps) > 10_000:
        raise SecurityError("uses a range that is too long")
    return steps


def _raise_exception(message: object) -> None:
    raise SecurityError(str(message)[:500])


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def _call(name: str, args: list[Any]) -> nodes.Call:
    call = nodes.Call(nodes.Name(name, "load"), args, [], None, None)
    call.set_lineno(args[0].lineno if args else 1)
    return call


def _replace_concat(node: nodes.Node) -> None:
    for field, value in list(node.iter_fields()):
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _replace_concat(child)
            if isinstance(child, nodes.Concat):
                call = _call("_joined", child.nodes)
                if isinstance(value, list):
                    value[index] = call
                else:
                    setattr(node, field, call)
