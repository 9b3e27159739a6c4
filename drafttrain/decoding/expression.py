"""Method expressions: one string names a decoding method in YAML, on the command line and in reports.

    Autoregressive()
    Model(drafter, length=5)
    Model(drafter, stop=AcceptanceHead(head, 0.7, min=2, max=20))
    Model(drafter, length=8, stop=Confidence(0.4))
    Model(drafter, stop=Entropy(1.5))

Capitalised calls are constructors; bare names are members (an engine, a head) that `build` is given. The string is
parsed with `ast` and never evaluated.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from drafttrain.decoding.drafters import Drafter, ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.stopping import AcceptanceHeadRule, Confidence, EntropyBound, Head, StoppingRule
from drafttrain.errors import UserError


@dataclass(frozen=True)
class Member:
    """A name to be looked up among the members when the method is built."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Expression:
    """A parsed method.

    Attributes:
        name: of the constructor.
        arguments: by parameter name, in the constructor's order, only those that were given. Values are numbers,
            booleans, strings, `Member`, `Expression`, or tuples of these.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        """The canonical form: required parameters by place, optional ones by name."""
        parameters = inspect.signature(CONSTRUCTORS[self.name]).parameters
        parts = []
        for name, value in self.arguments:
            required = parameters[name].default is inspect.Parameter.empty
            parts.append(_text(value) if required else f"{name}={_text(value)}")
        return f"{self.name}({', '.join(parts)})"

    @property
    def members(self) -> set[str]:
        """All member names that the method needs."""
        return set().union(*(_members(value) for _, value in self.arguments))


def parse_method(text: str) -> Expression:
    """Parse a method expression.

    Raises:
        UserError: it is malformed, or names an unknown constructor or parameter.

    Example:
        >>> str(parse_method("Model( drafter,length = 5 )"))
        'Model(drafter, length=5)'
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"method {text!r} is not an expression like 'Model(drafter, length=5)' ({error.args[0]})"
        ) from None
    parsed = _parse(tree, text)
    if not isinstance(parsed, Expression):
        raise UserError(f"method {text!r} is not a constructor like 'Model(drafter, length=5)' or 'Autoregressive()'")
    return parsed


def build(method: Expression | str, members: Mapping[str, Any]) -> Drafter | None:
    """Make the drafter that a method describes; None for autoregressive decoding.

    Args:
        method: an expression or its string.
        members: engines and heads by the names used in it.

    Raises:
        UserError: a member is missing or of the wrong kind, or the method is no drafter.
    """
    expression = parse_method(method) if isinstance(method, str) else method
    drafter = _build(expression, members)
    if drafter is not None and not hasattr(drafter, "propose"):
        raise UserError(f"{expression} is no drafter; give it to one, as in Model(drafter, stop={expression})")
    return drafter


# ---- constructors ----


@dataclass(frozen=True)
class _Named:
    """A member with the name it was asked for by, which becomes its label."""

    name: str
    value: Any

    def __repr__(self) -> str:
        return self.name


def _autoregressive() -> None:
    return None


def _model(
    drafter: _Named, length: int | None = None, stop: StoppingRule | None = None, check_every: int = 1
) -> Drafter:
    _require(drafter, lambda value: isinstance(value, Engine), "a model")
    if length is None and stop is None:
        raise UserError(
            f"Model({drafter.name}) needs a length or a stopping rule, as in Model({drafter.name}, length=5)"
        )
    _check_lengths("Model", length=1 if length is None else length, check_every=check_every)
    if stop is not None and not hasattr(stop, "limits"):
        raise UserError("Model's stop must be a stopping rule, as in stop=Confidence(0.4)")
    return ModelDrafter(drafter.value, length, stop, drafter.name, check_every)


def _acceptance_head(head: _Named, threshold: float, min: int = 1, max: int = 12) -> StoppingRule:
    _require(head, lambda value: hasattr(value, "score"), "an acceptance head")
    _check_lengths("AcceptanceHead", min=min, max=max)
    _check_numbers("AcceptanceHead", threshold=threshold)
    value: Head = head.value
    return AcceptanceHeadRule(value, threshold, min, max)


def _confidence(threshold: float, per_token: bool = False, min: int = 1, max: int = 12) -> StoppingRule:
    _check_lengths("Confidence", min=min, max=max)
    _check_numbers("Confidence", threshold=threshold)
    return Confidence(threshold, per_token, min, max)


def _entropy(bound: float, min: int = 1, max: int = 12) -> StoppingRule:
    _check_lengths("Entropy", min=min, max=max)
    _check_numbers("Entropy", bound=bound)
    return EntropyBound(bound, min, max)


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "Autoregressive": _autoregressive,
    "Model": _model,
    "AcceptanceHead": _acceptance_head,
    "Confidence": _confidence,
    "Entropy": _entropy,
}


def _require(member: object, fits: Callable[[Any], bool], kind: str) -> None:
    if not isinstance(member, _Named) or not fits(member.value):
        raise UserError(f"{member!r} in the method is not {kind}")


def _check_lengths(constructor: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{constructor}'s {name} is {value!r}, but it must be a whole number of at least 1")


def _check_numbers(constructor: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{constructor}'s {name} is {value!r}, but it must be a number")


# ---- parsing and building ----


def _parse(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            return _parse_call(name, node, text)
        case ast.Name(id=name):
            return Member(name)
        case ast.Constant(value=value) if isinstance(value, bool | int | float | str):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if isinstance(value, int | float):
            return -value
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(_parse(part, text) for part in parts)
    raise UserError(f"{ast.unparse(node)!r} in method {text!r} is neither a constructor, a member name nor a number")


def _parse_call(name: str, node: ast.Call, text: str) -> Expression:
    if name not in CONSTRUCTORS:
        raise UserError(f"method {text!r} has an unknown constructor {name}; {_nearest(name, list(CONSTRUCTORS))}")
    signature = inspect.signature(CONSTRUCTORS[name])
    if any(keyword.arg is None for keyword in node.keywords):
        raise UserError(f"method {text!r} may not use ** in {name}(...)")
    positional = [_parse(argument, text) for argument in node.args]
    named = {keyword.arg: _parse(keyword.value, text) for keyword in node.keywords}
    twice = len(named) < len(node.keywords)
    if twice:
        raise UserError(f"{name} in method {text!r} is given a parameter twice")
    unknown = [argument for argument in named if argument not in signature.parameters]
    if unknown:
        hint = _nearest(unknown[0], list(signature.parameters))
        raise UserError(f"{name} in method {text!r} has no parameter {unknown[0]}; {hint}")
    try:
        bound = signature.bind(*positional, **named)
    except TypeError as error:
        raise UserError(f"{name}{signature_text(name)} in method {text!r} does not fit: {error}") from None
    return Expression(name, tuple(bound.arguments.items()))


def signature_text(name: str) -> str:
    """The parameters of a constructor as a person would write them."""
    parameters = inspect.signature(CONSTRUCTORS[name]).parameters.values()
    empty = inspect.Parameter.empty
    return f"({', '.join(p.name if p.default is empty else f'{p.name}={p.default}' for p in parameters)})"


def _build(value: Any, members: Mapping[str, Any]) -> Any:
    if isinstance(value, Expression):
        arguments = {name: _build(argument, members) for name, argument in value.arguments}
        return CONSTRUCTORS[value.name](**arguments)
    if isinstance(value, Member):
        if value.name not in members:
            raise UserError(f"the method names {value.name}, which is not there; {_nearest(value.name, list(members))}")
        return _Named(value.name, members[value.name])
    if isinstance(value, tuple):
        return tuple(_build(part, members) for part in value)
    return value


def _members(value: Any) -> set[str]:
    if isinstance(value, Member):
        return {value.name}
    if isinstance(value, Expression):
        return value.members
    return set().union(*map(_members, value)) if isinstance(value, tuple) else set()


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value) if isinstance(value, Expression | Member) else repr(value)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known are: {', '.join(sorted(known)) or 'none'}"
