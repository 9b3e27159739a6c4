"""Procedural tasks with exact answers: seeded generators of documents, questions and their scorers.

    example = generate("recall/multi_key/prose", seed=7, length=512, count=lambda text: len(tokenizer.encode(text)))
    example.turns[0].user, example.turns[0].answer
    example.score(0, "48213")

Training takes seeds below `HELD_OUT`; evaluation takes seeds from it on.
"""

from drafttrain.evaluation.tasks import counting, facts, recall, revise, self_correct, trace
from drafttrain.evaluation.tasks.base import HELD_OUT, Count, Example, Kind, Turn, build

__all__ = ["HELD_OUT", "KINDS", "TASKS", "Count", "Example", "Kind", "Turn", "generate", "kinds"]

_MODULES = (revise, self_correct, recall, trace, counting, facts)

KINDS: dict[str, Kind] = {kind.name: kind for module in _MODULES for kind in module.KINDS}
TASKS: tuple[str, ...] = tuple(dict.fromkeys(kind.task for kind in KINDS.values()))


def kinds(task: str) -> tuple[str, ...]:
    """Names of a task's kinds, e.g. kinds("trace") == ("trace/variable", "trace/names")."""
    return tuple(name for name, kind in KINDS.items() if kind.task == task)


def generate(kind: str, seed: int, length: int, count: Count, questions: int = 1) -> Example:
    """One example of a kind: a pure function of its arguments.

    Args:
        kind: a name in `KINDS`.
        seed: any integer; `HELD_OUT` and above are reserved for evaluation.
        length: tokens of all turns together (users' and answers' text, without chat markup). The example measures at
            most this and, from about 200 on, within a tenth of it.
        count: tokens of a text, by the tokenizer of the model that will read it.
        questions: questions about the same document, one a turn (recall, trace and facts; ignored elsewhere).

    Raises:
        ValueError: unknown kind, or a length too small for the kind and the questions.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown task kind {kind!r}; known: {', '.join(KINDS)}")
    return build(KINDS[kind], seed, length, count, questions)
