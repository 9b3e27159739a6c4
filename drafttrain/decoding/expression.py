"""Method expressions: one string names a decoding method in YAML, on the command line and in reports.

    Autoregressive()
    Model(drafter, length=5)
    Model(drafter, stop=AcceptanceHead(head, 0.7, min=2, max=20))
    Model(drafter, length=8, stop=Confidence(0.4))
    Model(drafter, stop=Entropy(1.5))
    Model(drafter, tree=[4, 8, 8])
    Copy(gamma=3, length=10)
    LongSpec(drafter, length=5)
    LongSpec(drafter, tree=[4, 16, 16, 16, 16])
    MaxGram(bigrams)
    FirstOf(Copy(gamma=3), Model(drafter, length=5))
    Then((Model(drafter, length=2), 2), (Copy(), 10))
    Reviewed(drafter, inner=MaxGram(), lenience=2)
    my_package.MyDrafter(drafter, k=3)

Capitalised calls are constructors; bare names are members (an engine, a head) that `build` is given; dotted calls are
classes from outside, which get their members as they are. The string is parsed with `ast` and never evaluated, and a
class from outside is imported only when the caller allows it.
"""

from __future__ import annotations

import ast
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drafttrain.decoding.combined import FirstOf, Then
from drafttrain.decoding.copying import Copy
from drafttrain.decoding.drafters import Drafter, ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.longspec import BlockEngine, LongSpec, LongSpecTree
from drafttrain.decoding.max_gram import MaxGram
from drafttrain.decoding.outside import lacking, load_class, nearest
from drafttrain.decoding.reviewed import Reviewed
from drafttrain.decoding.stopping import AcceptanceHeadRule, Confidence, EntropyBound, Head, StoppingRule
from drafttrain.decoding.tree_drafter import TreeDrafter
from drafttrain.errors import UserError
from drafttrain.models.bigrams import BigramTable
from drafttrain.models.longspec import LongSpecDrafter


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
        name: of the constructor, or dotted, of a class from outside.
        arguments: by parameter name, in the constructor's order, only those that were given. Values are numbers,
            booleans, strings, `Member`, `Expression`, or tuples of these. Of a class from outside those given by place
            have no name, and the order is as written until it is `resolved`.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        """The canonical form: required parameters by place, optional ones by name."""
        by_place = {""}
        if not self.outside:
            parameters = inspect.signature(CONSTRUCTORS[self.name]).parameters.values()
            by_place = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
        parts = [
            part if name in by_place else f"{name}={part}"
            for name, value in self.arguments
            for part in (map(_part, value) if name == self.many else [_text(value)])
        ]
        return f"{self.name}({', '.join(parts)})"

    @property
    def many(self) -> str | None:
        """The parameter that takes any number of arguments, if the constructor has one."""
        if self.outside:
            return None
        parameters = inspect.signature(CONSTRUCTORS[self.name]).parameters.values()
        return next((each.name for each in parameters if each.kind is each.VAR_POSITIONAL), None)

    @property
    def outside(self) -> bool:
        """Whether it names a class from outside."""
        return "." in self.name

    @property
    def members(self) -> set[str]:
        """All member names that the method needs."""
        return set().union(*(_members(value) for _, value in self.arguments))

    @property
    def settings(self) -> int:
        """How much it says: numbers and words, its own and of the methods inside it."""
        return sum(_settings(value) for _, value in self.arguments)


def parse_method(text: str) -> Expression:
    """Parse a method expression.

    What a class from outside takes is not known here: see `resolved`.

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


def resolved(method: Expression, allow_code: bool) -> Expression:
    """The method in canonical form, once its classes from outside are found and take what they are given.

    Args:
        method: as parsed.
        allow_code: import those classes, which runs the code of their modules.

    Raises:
        UserError: there is such a class and it is not allowed, cannot be found, or takes other parameters.
    """
    if method.outside and not allow_code:
        raise UserError(
            f"{method.name} in the method is a class from outside drafttrain; importing it runs its code, which needs "
            "--allow-code"
        )
    arguments = tuple((name, _resolved(value, allow_code)) for name, value in method.arguments)
    if method.outside:
        positional = [value for name, value in arguments if not name]
        named = {name: value for name, value in arguments if name}
        bound = _bind(method.name, load_class(method.name), positional, named, str(method))
        arguments = tuple(_in_order(bound))
    return Expression(method.name, arguments)


def build(method: Expression | str, members: Mapping[str, Any], allow_code: bool = False) -> Drafter | None:
    """Make the drafter that a method describes; None for autoregressive decoding.

    Args:
        method: an expression or its string.
        members: engines and heads by the names used in it.
        allow_code: import the classes from outside that it names.

    Raises:
        UserError: a member is missing or of the wrong kind, a class from outside is not allowed or not to be had, or
            the method is no drafter.
    """
    expression = resolved(parse_method(method) if isinstance(method, str) else method, allow_code)
    drafter = _build(expression, members)
    missing = [] if drafter is None else lacking(drafter, Drafter)
    if missing and not lacking(drafter, StoppingRule):
        raise UserError(f"{expression} is no drafter; give it to one, as in Model(drafter, stop={expression})")
    if missing:
        raise UserError(
            f"{expression.name} is no drafter: it lacks {', '.join(missing)} (what one needs: Drafter in "
            "drafttrain/decoding/drafters.py)"
        )
    return drafter


# ---- constructors ----


class StandIn(ABC):
    """What may be a member in place of a model, in a method that is counted and not decoded with."""

    @abstractmethod
    def drafter(self, length: int | None, stop: StoppingRule | None, name: str) -> Drafter:
        """What proposes in its place."""


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
    drafter: _Named,
    length: int | None = None,
    stop: StoppingRule | None = None,
    check_every: int = 1,
    *,
    tree: Sequence[int] | None = None,
    drawn: bool = True,
) -> Drafter:
    if isinstance(drafter, _Named) and isinstance(drafter.value, LongSpecDrafter | BlockEngine):
        raise UserError(f"{drafter.name} is a LongSpec drafter; write LongSpec({drafter.name}, ...) instead of Model")
    _require(drafter, lambda value: isinstance(value, Engine | StandIn), "a model")
    _check_draft("Model", drafter.name, length, stop, check_every, tree)
    if isinstance(drafter.value, StandIn):
        if tree is not None:
            raise UserError("trees are not counted on recorded answers; tune their lengths as chains")
        return drafter.value.drafter(length, stop, drafter.name)
    if tree is not None:
        return TreeDrafter(drafter.value, tree, stop, drafter.name, drawn)
    return ModelDrafter(drafter.value, length, stop, drafter.name, check_every)


def _copy(
    gamma: int = 3,
    length: int = 10,
    longest: int | None = None,
    source: str = "earliest",
    follow: bool = False,
    backoff: int = 0,
    cooldown: int = 0,
) -> Drafter:
    _check_lengths("Copy", gamma=gamma, length=length, longest=length if longest is None else longest)
    _check_lengths("Copy", at_least=0, backoff=backoff, cooldown=cooldown)
    return Copy(gamma, length, longest, source, follow, backoff, cooldown)


def _longspec(
    drafter: _Named,
    length: int | None = None,
    stop: StoppingRule | None = None,
    check_every: int = 1,
    *,
    tree: Sequence[int] | None = None,
    drawn: bool = True,
) -> Drafter:
    _require(drafter, lambda value: isinstance(value, LongSpecDrafter | BlockEngine), "a LongSpec drafter")
    _check_draft("LongSpec", drafter.name, length, stop, check_every, tree)
    if tree is not None:
        return LongSpecTree(drafter.value, tree, stop, drafter.name, drawn)
    return LongSpec(drafter.value, length, stop, drafter.name, check_every)


def _max_gram(bigrams: _Named | None = None, length: int = 10, least: int = 1) -> Drafter:
    if bigrams is not None:
        _require(bigrams, lambda value: isinstance(value, BigramTable), "a bigram table (data_prep/bigrams.py)")
    _check_lengths("MaxGram", length=length, least=least)
    return MaxGram(None if bigrams is None else bigrams.value, length, least)


def _first_of(*drafters: Drafter) -> Drafter:
    _check_drafters("FirstOf", "FirstOf(Copy(), Model(drafter, length=5))", drafters)
    return FirstOf(*drafters)


def _then(*parts: tuple[Drafter, int]) -> Drafter:
    for part in parts:
        if not isinstance(part, tuple) or len(part) != 2:
            raise UserError("Then takes pairs of a drafter and its number of tokens, as in Then((Copy(), 10))")
        _check_lengths("Then", tokens=part[1])
    _check_drafters("Then", "Then((Copy(), 10))", [drafter for drafter, _ in parts])
    return Then(*parts)


def _reviewed(model: _Named, inner: Drafter, lenience: float = 1.0) -> Drafter:
    _require(model, lambda value: isinstance(value, Engine | StandIn), "a model")
    _check_drafters("Reviewed", f"Reviewed({model.name}, inner=MaxGram())", [inner])
    _check_numbers("Reviewed", lenience=lenience)
    if isinstance(model.value, StandIn):
        return Reviewed(model.value.drafter(1, None, model.name), inner, lenience)
    return Reviewed(ModelDrafter(model.value, 1, name=model.name), inner, lenience)


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
    "Copy": _copy,
    "LongSpec": _longspec,
    "MaxGram": _max_gram,
    "FirstOf": _first_of,
    "Then": _then,
    "Reviewed": _reviewed,
    "AcceptanceHead": _acceptance_head,
    "Confidence": _confidence,
    "Entropy": _entropy,
}


def _require(member: object, fits: Callable[[Any], bool], kind: str) -> None:
    if not isinstance(member, _Named) or not fits(member.value):
        raise UserError(f"{member!r} in the method is not {kind}")


def _check_draft(
    constructor: str,
    drafter: str,
    length: int | None,
    stop: StoppingRule | None,
    check_every: int,
    tree: object | None = None,
) -> None:
    """What ends a chain of drafted tokens, or is the shape of a tree of them."""
    if length is None and stop is None and tree is None:
        raise UserError(
            f"{constructor}({drafter}) needs a length or a stopping rule, as in {constructor}({drafter}, length=5)"
        )
    if tree is not None and (length is not None or not isinstance(tree, tuple)):
        wrong = f"is {tree!r}" if length is None else "has as many levels as it has widths, so it takes no length"
        raise UserError(f"{constructor}'s tree {wrong}; give it a list of widths alone, as in tree=[4, 8, 8]")
    _check_lengths(constructor, length=1 if length is None else length, check_every=check_every)
    if stop is not None and (missing := lacking(stop, StoppingRule)):
        raise UserError(
            f"{constructor}'s stop must be a stopping rule, as in stop=Confidence(0.4), but "
            f"{stop.name if isinstance(stop, _Named) else type(stop).__name__} lacks {', '.join(missing)}"
        )


def _check_drafters(constructor: str, example: str, drafters: Sequence[object]) -> None:
    for drafter in drafters:
        if drafter is None:
            raise UserError(f"Autoregressive() proposes nothing, so {constructor} has no use for it")
        if lacking(drafter, Drafter):
            what = drafter.name if isinstance(drafter, _Named) else type(drafter).__name__
            raise UserError(f"{constructor} takes drafters, as in {example}, but {what} is none")


def _check_lengths(constructor: str, at_least: int = 1, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise UserError(
                f"{constructor}'s {name} is {value!r}, but it must be a whole number of at least {at_least}"
            )


def _check_numbers(constructor: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{constructor}'s {name} is {value!r}, but it must be a number")


# ---- parsing and building ----


def _parse(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Call(func=func) if all(part.isidentifier() for part in ast.unparse(func).split(".")):
            return _parse_call(ast.unparse(func), node, text)
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
    outside = "." in name
    if not outside and name not in CONSTRUCTORS:
        raise UserError(f"method {text!r} has an unknown constructor {name}; {nearest(name, CONSTRUCTORS)}")
    if any(keyword.arg is None for keyword in node.keywords):
        raise UserError(f"method {text!r} may not use ** in {name}(...)")
    positional = [_parse(argument, text) for argument in node.args]
    named = {keyword.arg: _parse(keyword.value, text) for keyword in node.keywords}
    twice = len(named) < len(node.keywords)
    if twice:
        raise UserError(f"{name} in method {text!r} is given a parameter twice")
    if outside:
        return Expression(name, (*(("", value) for value in positional), *named.items()))
    return Expression(name, tuple(_bind(name, CONSTRUCTORS[name], positional, named, text).arguments.items()))


def _bind(
    name: str, called: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any], text: str
) -> inspect.BoundArguments:
    """Arguments by the parameters of what is called.

    Raises:
        UserError: it has no such parameter, or they do not fit.
    """
    signature = inspect.signature(called)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    unknown = [argument for argument in named if argument not in signature.parameters and not takes_any]
    if unknown:
        hint = nearest(unknown[0], signature.parameters)
        raise UserError(f"{name} in method {text!r} has no parameter {unknown[0]}; {hint}")
    try:
        return signature.bind(*positional, **named)
    except TypeError as error:
        raise UserError(f"{name}{_signature_text(signature)} in method {text!r} does not fit: {error}") from None


def _signature_text(signature: inspect.Signature) -> str:
    """Parameters as a person would write them."""
    parameters = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def _in_order(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    """Arguments of a class from outside: required ones by place, without a name, optional ones by name."""
    parameters = bound.signature.parameters
    if any(parameters[name].kind is inspect.Parameter.VAR_POSITIONAL for name in bound.arguments):
        yield from (("", value) for value in bound.args)
        yield from bound.kwargs.items()
        return
    for name, value in bound.arguments.items():
        parameter = parameters[name]
        required = parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
        if parameter.kind is parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield "" if required or parameter.kind is parameter.POSITIONAL_ONLY else name, value


def _resolved(value: Any, allow_code: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_resolved(part, allow_code) for part in value)
    return resolved(value, allow_code) if isinstance(value, Expression) else value


def _build(value: Any, members: Mapping[str, Any]) -> Any:
    if isinstance(value, Expression):
        arguments = [(name, _build(argument, members)) for name, argument in value.arguments]
        if value.outside:
            return _made_outside(value.name, arguments)
        several = dict(arguments).get(value.many, ())
        return CONSTRUCTORS[value.name](*several, **{name: made for name, made in arguments if name != value.many})
    if isinstance(value, Member):
        if value.name not in members:
            raise UserError(f"the method names {value.name}, which is not there; {nearest(value.name, members)}")
        return _Named(value.name, members[value.name])
    if isinstance(value, tuple):
        return tuple(_build(part, members) for part in value)
    return value


def _made_outside(name: str, arguments: Sequence[tuple[str, Any]]) -> Any:
    """An object of a class from outside, which is given members themselves, not their names."""
    positional = [_unnamed(value) for argument, value in arguments if not argument]
    return load_class(name)(*positional, **{argument: _unnamed(value) for argument, value in arguments if argument})


def _unnamed(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_unnamed(part) for part in value)
    return value.value if isinstance(value, _Named) else value


def _members(value: Any) -> set[str]:
    if isinstance(value, Member):
        return {value.name}
    if isinstance(value, Expression):
        return value.members
    return set().union(*map(_members, value)) if isinstance(value, tuple) else set()


def _settings(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(map(_settings, value))
    return value.settings if isinstance(value, Expression) else not isinstance(value, Member)


def _part(value: Any) -> str:
    """One of any number of arguments: pairs of drafters and numbers are written with round brackets."""
    return f"({', '.join(map(_text, value))})" if isinstance(value, tuple) else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value) if isinstance(value, Expression | Member) else repr(value)
