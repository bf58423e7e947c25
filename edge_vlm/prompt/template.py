"""A chat template from a bundle, rendered where it can do no harm.

Templates are programs of unknown origin. They run in jinja2's immutable sandbox, which keeps them
away from Python's internals; what the sandbox does not bound is time and memory. So a template may
only use the constructs, filters, tests and methods that chat templates need, and everything that
takes time or memory is paid for from a budget before it is done: loop steps and calls by the size
of the template, operations on values by the bytes of the values.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edge_vlm.errors import BundleError, PromptError

MAX_TEMPLATE_CHARS = 1 << 16
MAX_NODES = 5_000  # of the syntax tree; the longest templates of released models have half of it
MAX_DEPTH = 100  # of lists in lists
BUDGET = 30_000_000  # of one rendering; a unit is a byte of a value or about 10 ns
BUDGET_PER_INPUT_BYTE = 64
_NODE = 40
_CALL = 1000
_OBJECT = 200

# Filters, and whether they walk over everything inside their arguments.
_FILTERS = {
    **dict.fromkeys(("capitalize", "join", "lower", "max", "min", "replace", "string"), True),
    **dict.fromkeys(("title", "tojson", "trim", "upper"), True),
    **dict.fromkeys(("d", "default", "count", "first", "int", "items", "last", "length"), False),
    **dict.fromkeys(("list", "map", "rejectattr", "reverse", "selectattr"), False),
}
_TESTS = (
    *("!=", "<", "<=", "==", ">", ">=", "boolean", "defined", "eq", "equalto", "even", "false"),
    *("float", "ge", "greaterthan", "gt", "in", "integer", "iterable", "le", "lessthan", "lower"),
    *("lt", "mapping", "ne", "none", "number", "odd", "sameas", "sequence", "string", "true"),
    *("undefined", "upper"),
)
_STRING_METHODS = (
    *("capitalize", "count", "endswith", "find", "isalpha", "isdigit", "isspace", "lower"),
    *("lstrip", "removeprefix", "removesuffix", "rstrip", "split", "splitlines", "startswith"),
    *("strip", "title", "upper"),
)
_LOOP_ATTRIBUTES = (
    *("cycle", "depth", "depth0", "first", "index", "index0", "last", "length", "nextitem"),
    *("previtem", "revindex", "revindex0"),
)
_ATTRIBUTES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (str, _STRING_METHODS),
    (dict, ("get", "items", "keys", "values")),
    (LoopContext, _LOOP_ATTRIBUTES),
)
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}
_OWN_NAMES = ("_steps", "_joined", "_compared", "_paid", "_paid_once")
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
        self._environment = _Environment()
        try:
            tree = self._environment.parse(source)
            self._environment.guard(tree)
            self._template = self._environment.from_string(tree)
        except Exception as error:  # also of Python's compiler: nesting, digits of a number
            raise BundleError(f"chat template: {_line(error)}") from error

    def render(self, **variables: Any) -> str:
        """The template's text for these variables.

        Raises:
            PromptError: the template refused the conversation, failed, or ran out of its budget.
        """
        self._environment.refill(variables)
        try:
            return "".join(self._template.generate(**variables))
        except SecurityError as error:
            raise PromptError(f"chat template: {_line(error)}") from error
        except Exception as error:  # the template's own code may raise anything
            raise PromptError(f"chat template: {type(error).__name__}: {_line(error)}") from error


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%", "/", "//", "-"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=self._paid, cache_size=0)
        self._left = BUDGET
        self._macro_cost = _CALL
        functions = {**self.filters, "tojson": _to_json}
        self.filters = {
            name: self._filter(name, functions[name], deep) for name, deep in _FILTERS.items()
        }
        self.tests = {name: self._test(self.tests[name]) for name in _TESTS}
        self.globals = {
            "namespace": self.globals["namespace"],
            "range": range_of_messages,
            "raise_exception": _raise_exception,
            **{name: getattr(self, name) for name in _OWN_NAMES},
        }

    def refill(self, variables: dict[str, Any]) -> None:
        """Start a rendering: longer conversations take more work."""
        self._left = sys.maxsize
        self._pay_inside(variables)
        self._left = BUDGET + BUDGET_PER_INPUT_BYTE * (sys.maxsize - self._left)

    def guard(self, tree: nodes.Template) -> None:
        """Refuse forbidden constructs; make those pay that the sandbox does not intercept."""
        n_nodes = _count(tree)
        if n_nodes > MAX_NODES:
            raise SecurityError(f"has more than {MAX_NODES} parts")
        for forbidden in tree.find_all(_FORBIDDEN):
            raise SecurityError(f"uses {type(forbidden).__name__}, which is not allowed")
        for name in tree.find_all(nodes.Name):
            if name.name in _OWN_NAMES:
                raise SecurityError(f"uses the name {name.name}")
        self._macro_cost = _CALL + _NODE * n_nodes
        _rewrite(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return super().is_safe_attribute(obj, attr, value)
        return any(isinstance(obj, kind) and attr in names for kind, names in _ATTRIBUTES)

    def wrap_str_format(self, value: Any) -> None:
        """``format`` is not among the allowed string methods; a width could fill the memory."""

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, Macro):
            self._pay(self._macro_cost)
        elif getattr(obj, "__self__", None) is not self:
            self._pay(_CALL)
            self._pay_inside((args, kwargs))
            self._pay_method(obj, args)
        result = super().call(context, obj, *args, **kwargs)
        return self._listed(result) if isinstance(result, Iterable) else result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "+":
            if not numbers:
                # Markup would escape what is added to it.
                self._pay(6 * (_size(left) + _size(right)))
        elif not numbers or operator == "**":
            raise SecurityError(f"uses {operator} on {type(left).__name__}")
        elif abs(left) > 1 << 62 or abs(right) > 1 << 62:
            raise SecurityError("computes with numbers that are too large")
        return super().call_binop(context, operator, left, right)

    def _steps(self, values: Iterable[Any], cost: int) -> Iterator[Any]:
        for value in values:
            self._pay(cost)
            yield value

    def _joined(self, *parts: Any) -> str:
        self._pay_inside(parts)
        return "".join(str(part) for part in parts)

    def _compared(self, left: Any, *rest: Any) -> bool:
        result = True
        for name, right in zip(rest[::2], rest[1::2], strict=True):
            self._pay_inside((left, right))
            if isinstance(left, str) and isinstance(right, str):
                self._pay(_search_cost(right, left))
            result = _COMPARISONS[name](left, right)
            if not result:
                break
            left = right
        return result

    def _paid(self, value: Any) -> Any:
        """The value, after paying for everything inside it."""
        self._pay_inside(value)
        return value

    def _paid_once(self, value: Any) -> Any:
        """The value, after paying for a copy of it that shares what is inside."""
        self._pay(_size(value))
        return value

    def _pay(self, cost: int) -> None:
        self._left -= cost
        if self._left < 0:
            raise SecurityError("takes too long")

    def _pay_inside(self, value: Any, depth: int = 0) -> None:
        if depth > MAX_DEPTH:
            raise SecurityError("nests lists too deeply")
        self._pay(_size(value))
        if isinstance(value, dict):
            for key, item in value.items():
                self._pay_inside(key, depth + 1)
                self._pay_inside(item, depth + 1)
        elif isinstance(value, list | tuple):
            for item in value:
                self._pay_inside(item, depth + 1)

    def _pay_method(self, method: Any, args: tuple[Any, ...]) -> None:
        text = getattr(method, "__self__", None)
        if not isinstance(text, str):
            return
        self._pay(3 * _size(text))  # some capitals are three letters
        name = method.__name__
        if name in ("count", "find", "split") and args and isinstance(args[0], str):
            self._pay(_search_cost(text, args[0]))
        if name == "split" and args and isinstance(args[0], str) and args[0]:
            self._pay(_OBJECT * text.count(args[0]))
        elif name in ("split", "splitlines"):
            self._pay(_OBJECT * len(text))

    def _listed(self, values: Iterable[Any]) -> Any:
        """The values of an iterator or a dict's view as a list, each paid for."""
        if isinstance(values, str | list | tuple | dict | range | Namespace):
            return values
        return list(self._steps(values, _OBJECT))

    def _filter(self, name: str, function: Callable[..., Any], deep: bool) -> Callable[..., Any]:
        first = int(hasattr(function, "jinja_pass_arg"))  # in front of it: jinja2's context

        def bounded(*args: Any, **kwargs: Any) -> Any:
            args = tuple(
                self._listed(value) if isinstance(value, Iterator) else value for value in args
            )
            self._pay(_CALL)
            if deep:
                self._pay_inside((args, kwargs))
            if name in ("list", "reverse"):
                value = args[first]
                self._pay(_OBJECT * len(value) if isinstance(value, str) else _size(value))
            elif name == "replace":
                text, old, new = (str(value) for value in args[first : first + 3])
                self._pay(_search_cost(text, old) + 4 * len(new) * (text.count(old) + 1))
            elif name == "join":
                separator = args[first + 1] if len(args) > first + 1 else kwargs.get("d", "")
                self._pay(4 * len(str(separator)) * len(args[first]))
            elif name in ("capitalize", "lower", "title", "tojson", "upper"):
                self._pay_inside((args, kwargs))
                self._pay_inside((args, kwargs))
            result = function(*args, **kwargs)
            return self._listed(result) if isinstance(result, Iterator) else result

        # Keep the marks that tell jinja2 to pass its context or environment first.
        bounded.__dict__.update(getattr(function, "__dict__", {}))
        return bounded

    def _test(self, function: Any) -> Callable[..., Any]:
        def bounded(*args: Any) -> Any:
            if len(args) > 1:
                self._pay_inside(args)
                if isinstance(args[0], str) and isinstance(args[1], str):
                    self._pay(_search_cost(args[1], args[0]))
            self._pay(_size(args[0]))
            return function(*args)

        bounded.__dict__.update(getattr(function, "__dict__", {}))
        return bounded


def range_of_messages(*args: int) -> range:
    """``range`` for templates, which count messages and parts."""
    steps = range(*args)
    if len(steps) > 10_000:
        raise SecurityError("uses a range that is too long")
    return steps


def _raise_exception(message: object) -> None:
    raise SecurityError(str(message))


def _to_json(
    value: Any,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As the chat templates of transformers have it: no escapes for HTML or other alphabets."""
    if indent is not None and indent not in range(9):
        raise SecurityError("indents JSON too far")
    if separators is not None and sum(len(separator) for separator in separators) > 16:
        raise SecurityError("separates JSON too far")
    return json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _size(value: Any) -> int:
    """Bytes of a value without what is inside it."""
    if isinstance(value, str | bytes | list | tuple | dict):
        return sys.getsizeof(value) + _OBJECT
    return _OBJECT


def _search_cost(text: str, wanted: str) -> int:
    """For short texts, looking for one string in another takes the product of their lengths."""
    return len(text) * min(len(wanted), 2500) // 16


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _count(tree: nodes.Node) -> int:
    return 1 + sum(1 for _ in tree.find_all(nodes.Node))


def _call(name: str, args: list[Any]) -> nodes.Call:
    call = nodes.Call(nodes.Name(name, "load"), args, [], None, None)
    call.set_lineno(args[0].lineno if args else 1)
    return call


def _rewrite(node: nodes.Node) -> None:
    """Put calls into a syntax tree that pay for loops, comparisons, ``~``, slices and keys."""
    if isinstance(node, nodes.For):
        if node.recursive:
            raise SecurityError("uses a recursive loop, which is not allowed")
        node.iter = _call("_steps", [node.iter, nodes.Const(_NODE * (1 + _count(node)))])
    elif isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            node.node = _call("_paid_once", [node.node])
        elif not isinstance(node.arg, nodes.Const):
            node.arg = _call("_paid", [node.arg])
    elif isinstance(node, nodes.Pair) and not isinstance(node.key, nodes.Const):
        node.key = _call("_paid", [node.key])
    for field, value in list(node.iter_fields()):
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _rewrite(child)
            call = _paying(child)
            if call and isinstance(value, list):
                value[index] = call
            elif call:
                setattr(node, field, call)


def _paying(node: nodes.Node) -> nodes.Call | None:
    if isinstance(node, nodes.Concat):
        return _call("_joined", node.nodes)
    if isinstance(node, nodes.Compare):
        args = [node.expr]
        for operand in node.ops:
            args += [nodes.Const(operand.op), operand.expr]
        return _call("_compared", args)
    return None
