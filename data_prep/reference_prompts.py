"""Prompts of the reference world: procedural tasks and library code, no download.

Training prompts take seeds below `HELD_OUT` and code of the training modules; prompts for tuning and testing take seeds
from it on and code of the held-out modules. So whatever was trained on this world, the reference target included, has
seen none of them.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.presets import Conversation, chat
from drafttrain.config import PromptsConfig, nearest
from drafttrain.errors import UserError
from drafttrain.evaluation.tasks import HELD_OUT, KINDS, TASKS, Example, generate, kinds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE = "code"

DEFAULT_MIXTURE: dict[str, int] = {
    CODE: 160,
    "revise": 160,
    "self_correct": 60,
    "recall": 132,
    "trace": 40,
    "common_words": 20,
    "frequent_words": 20,
    "facts": 40,
}
"""Prompts of each task when the recipe names none: half of the work is code and revision, where answers are long."""

_ASKED_AGAIN = ("recall", "trace", "facts")  # tasks that take several questions about one document
_QUESTIONS = (1, 1, 2, 3)
_LEAST_LENGTH_ASKED_AGAIN = 256
_LEAST_LENGTH = 16


@dataclass(frozen=True)
class World:
    """What every prompt of one recipe is made with.

    Attributes:
        tokenizer: the target's; sizes are counted by it.
        count: tokens of a text; one function object, for the tasks cache word costs by it.
        length: tokens of all turns of a task example; code takes half of it as prefix.
        seed: of the choice of prompts.
    """

    tokenizer: "PreTrainedTokenizerBase"
    count: Callable[[str], int]
    length: int
    seed: int


def reference_conversations(settings: PromptsConfig, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Conversation]:
    """The prompts of a mixture, each with its split.

    Args:
        settings: `mixture` maps `code`, a task or a kind to a number of prompts (a task's go round its kinds) and
            `lengths` some of them to their own `length`; `held_out` is the share of each entry for test, and again for
            tuning, at least one each if there are three prompts; `seed` is of the choice.
        tokenizer: the target's.

    Raises:
        UserError: unknown entry, or a length too small for a kind.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    mixture = settings.mixture or DEFAULT_MIXTURE
    for name, length in settings.lengths.items():
        if name not in mixture or length < _LEAST_LENGTH:
            raise UserError(
                f"prompts.lengths gives {name} {length} tokens; name an entry of the mixture ({', '.join(mixture)}) "
                f"and at least {_LEAST_LENGTH}."
            )
    for name, number in mixture.items():
        world = World(tokenizer, count, settings.lengths.get(name, settings.length), settings.seed)
        entries = _kinds_of(name)
        splits = _splits(f"{settings.seed}/{name}", number, settings.held_out)
        for at in range(number):
            yield _conversation(world, entries[at % len(entries)], f"{name}/{at}", splits[at])


def _kinds_of(name: str) -> tuple[str, ...]:
    if name == CODE or name in KINDS:
        return (name,)
    if name in TASKS:
        return kinds(name)
    known = (CODE, *TASKS, *KINDS)
    raise UserError(
        f"prompts.mixture: unknown task {name!r}; did you mean {nearest(name, known)}? "
        f"Tasks: {', '.join((CODE, *TASKS))}; a kind such as recall/single/prose may be named too."
    )


def _splits(name: str, number: int, held_out: float) -> list[str]:
    """The split of each of `number` prompts: shares are kept exactly, places are drawn."""
    share = max(1, round(number * held_out)) if held_out > 0 and number >= 3 else 0
    order = sorted(range(number), key=lambda at: _digest(f"{name}/{at}"))
    splits = ["train"] * number
    for at in order[:share]:
        splits[at] = "test"
    for at in order[share : 2 * share]:
        splits[at] = "tune"
    return splits


def _conversation(world: World, kind: str, name: str, split: str) -> Conversation:
    drawn = _digest(f"{world.seed}/{kind}/{name}") % HELD_OUT
    seed = drawn if split == "train" else HELD_OUT + drawn
    if kind == CODE:
        return _code(world, seed, split)
    example = _example(world, kind, seed)
    return Conversation(
        where=f"{kind}, seed {seed}",
        task=example.task,
        name=f"{kind}/{seed}",
        messages=chat([turn.user for turn in example.turns]),
        reference={"answers": [turn.answer for turn in example.turns]},
        kind=kind,
        seed=seed,
        length=world.length,
        split=split,
    )


def _example(world: World, kind: str, seed: int) -> Example:
    several = KINDS[kind].task in _ASKED_AGAIN and world.length >= _LEAST_LENGTH_ASKED_AGAIN
    wanted = _QUESTIONS[seed % len(_QUESTIONS)] if several else 1
    for questions in range(wanted, 0, -1):  # a narrow document is asked fewer questions
        try:
            return generate(kind, seed, world.length, world.count, questions)
        except ValueError as error:
            reason = str(error)
    raise UserError(f"prompts.length {world.length} does not do ({reason}); raise it or leave the kind out.")


def _code(world: World, seed: int, split: str) -> Conversation:
    from data_prep.corpus import code_prefix

    prefix = code_prefix(seed, max(16, world.length // 2), world.tokenizer, held_out=split != "train")
    ids = tuple(token for token in prefix if token is not None)  # None: a tokenizer without BOS
    return Conversation(
        where=f"code, seed {seed}",
        task=CODE,
        name=f"{CODE}/{seed}",
        text=world.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        kind=CODE,
        seed=seed,
        length=world.length,
        prompt_ids=ids,
        split=split,
    )


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
