"""Methods that are tried: members alone, copying before them, and cascades of every order with their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

LENGTHS = (2, 3, 4, 6, 8, 12, 16)
THRESHOLDS = (0.2, 0.4, 0.6, 0.8)
ENTROPIES = (0.5, 1.0, 2.0)
BLOCKS = (4, 8, 16, 24)
FIRST = (2, 4, 8, 12)


def singles(member: str, heads: Sequence[str] = ()) -> list[str]:
    """One model: fixed lengths, and stopping by confidence, by entropy and by acceptance heads of its own."""
    fixed = [f"Model({member}, length={length})" for length in LENGTHS]
    rules = [f"Confidence({each}, max=16)" for each in THRESHOLDS]
    rules += [f"Entropy({each}, max=16)" for each in ENTROPIES]
    rules += [f"AcceptanceHead({head}, {each}, max=16)" for head in heads for each in THRESHOLDS]
    return fixed + [f"Model({member}, stop={rule})" for rule in rules]


def copies(bigrams: bool) -> list[str]:
    """Copying by every policy, with fixed and growing blocks; Max-Gram."""
    found = [f"Copy(gamma={gamma})" for gamma in (2, 3, 5)]
    for gamma in (2, 3, 4):
        for source in ("latest", "longest"):
            found.append(f"Copy(gamma={gamma}, source='{source}', follow=True)")
        found += [
            f"Copy(gamma={gamma}, length={length}, longest={longest}, source='longest', follow=True)"
            for length, longest in ((4, 24), (10, 24), (10, 40))
        ]
    found.append("Copy(gamma=3, length=10, longest=40, source='longest', follow=True, backoff=1, cooldown=2)")
    found += [f"MaxGram(length={length}, least={least})" for length in (6, 10) for least in (1, 2)]
    return found + (["MaxGram(bigrams)"] if bigrams else [])


def combinations(members: Sequence[str], single: Sequence[str], copy: Sequence[str]) -> list[str]:
    """Cascades over the best single drafters and copies.

    Args:
        members: models.
        single: methods of one model each.
        copy: methods without a model.
    """
    found = [f"FirstOf({bottom}, {top})" for bottom in copy for top in single]
    for bottom in copy:
        found += [
            f"Then(({top}, {first}), ({bottom}, {block}))" for top in single for first in FIRST for block in BLOCKS[1:]
        ]
        for order in permutations(members):
            found += _cascades(order, bottom)
        if len(members) > 1:
            for top, below in permutations(members, 2):
                found += [f"Reviewed({top}, inner={each})" for each in single if f"({below}," in each]
    return list(dict.fromkeys(found))


def _cascades(order: Sequence[str], bottom: str) -> list[str]:
    """Published cascades (K matrices of increments) over the members in order, and such behind a copy."""
    top, *rest = order
    found = [f"Reviewed({top}, inner={bottom})"]
    found += [
        f"Then((Reviewed({top}, inner={bottom}), {first}), ({bottom}, {block}))" for first in FIRST for block in BLOCKS
    ]
    if rest:
        below = rest[0]
        inner = [f"Reviewed({below}, inner={bottom})"]
        inner += [f"Then((Reviewed({below}, inner={bottom}), {first}), ({bottom}, 10))" for first in (1, 4)]
        found += [f"Reviewed({top}, inner={each})" for each in inner]
        tail = f"(Reviewed({below}, inner={bottom}), {{}}), ({bottom}, 10))"
        found += [
            f"Then((Reviewed({top}, inner={each}), {first}), {tail.format(second)}"
            for each in inner
            for first in FIRST[:3]
            for second in (4, 14)
        ]
    return found + [f"FirstOf({bottom}, {each})" for each in found]
