"""What a method's expression says: its kind, the number that a sweep varies, whose head it asks, how far it drafts."""

from __future__ import annotations

from drafttrain.decoding.expression import Expression, Member, parse_method
from drafttrain.errors import UserError
from drafttrain.evaluation.schema import Kind
from drafttrain.evaluation.trace_record import LONGEST

ORACLE = "perfect stopping"
"""Stands where a method's expression would: nothing can really run it."""

KNOWN = "known probability"
"""Likewise: stops by the true min(1, p / q) of every drafted token, which is the most that any head could predict."""

USUAL = 12
"""Most tokens that an adaptive rule drafts in a round where its expression does not say (`max`)."""


CHAINS = ("Model", "LongSpec")
"""Constructors of drafters that write a chain token by token, until a length or a stopping rule ends it."""


def head_of(method: str) -> str | None:
    """Name of the acceptance head that a method asks; None if it asks none, as `ORACLE` and `KNOWN`, no methods, do."""
    if method in (ORACLE, KNOWN):
        return None
    stop = _stop(parse_method(method))
    if stop is None or stop.name != "AcceptanceHead":
        return None
    return next((value.name for _, value in stop.arguments if isinstance(value, Member)), None)


def kind_of(method: str) -> Kind:
    """The kind of a method, from its expression."""
    expression = parse_method(method)
    if expression.name == "Autoregressive":
        return "autoregressive"
    if expression.name not in CHAINS or "tree" in dict(expression.arguments):
        return "other"
    stop = _stop(expression)
    if stop is None:
        return "fixed"
    kinds: dict[str, Kind] = {"AcceptanceHead": "head", "Confidence": "confidence", "Entropy": "entropy"}
    return kinds.get(stop.name, "other")


def family_of(method: str) -> str:
    """What methods share their costs with: their kind, with the names of a head, other models, a class from outside."""
    kind = kind_of(method)
    if kind == "other":
        expression = parse_method(method)
        return f"{kind} {(_stop(expression) or expression).name}"
    name = head_of(method)
    others = sorted(parse_method(method).members - {"drafter", name}) if kind != "autoregressive" else []
    return " ".join([kind, *([name] if name else []), *others])


def parameter_of(method: str) -> float | None:
    """The number that a sweep would vary: the length, or the stopping rule's threshold; None from outside."""
    expression = parse_method(method)
    if expression.name not in CHAINS or "tree" in dict(expression.arguments):
        return None
    stop = _stop(expression)
    if stop is not None:
        numbers = [value for _, value in stop.arguments if isinstance(value, int | float)]
        return float(numbers[0]) if numbers and not stop.outside else None
    return float(dict(expression.arguments)["length"])


def longest_of(method: str) -> int:
    """Most tokens that a method drafts in a round; 0 where that is none of its numbers."""
    expression = parse_method(method)
    if expression.name not in CHAINS or "tree" in dict(expression.arguments):
        return 0
    limits, stop = [dict(expression.arguments).get("length")], _stop(expression)
    if stop is not None and not stop.outside:
        limits.append(dict(stop.arguments).get("max", USUAL))
    return min((limit for limit in limits if isinstance(limit, int)), default=0)


def widest_of(method: str) -> int:
    """Most tokens that a method's chains or trees give the target to read in a round, as far as its numbers say."""
    return max(longest_of(method), _tree_tokens(parse_method(method)))


def _tree_tokens(value: object) -> int:
    """Tokens of the largest tree anywhere in an expression."""
    if isinstance(value, tuple):
        return max(map(_tree_tokens, value), default=0)
    if not isinstance(value, Expression):
        return 0
    own = [sum(widths) for name, widths in value.arguments if name == "tree"]
    return max([*own, *(_tree_tokens(inner) for _, inner in value.arguments)], default=0)


def _stop(expression: Expression) -> Expression | None:
    """The stopping rule of a chain."""
    stop = dict(expression.arguments).get("stop") if expression.name in CHAINS else None
    return stop if isinstance(stop, Expression) else None


def check_length(method: str) -> None:
    """Refuse a method that drafts more tokens a round than replay can count.

    Raises:
        UserError: it does.
    """
    if longest_of(method) > LONGEST:
        raise UserError(f"{method} drafts up to {longest_of(method)} tokens a round; give it {LONGEST} at most.")
