"""Facts: short statements about invented people and towns; a question takes one of them, or two in a row.

Every person of a document has every relation, so the distractors are facts of exactly the asked form. The answer quotes
the facts it rests on, the last of them being what was asked.
"""

import random
from collections.abc import Iterable, Iterator
from functools import partial

from drafttrain.evaluation.tasks.base import Kind, Room, Turn
from drafttrain.evaluation.tasks.filler import ask, fill, paragraphs, prose, scatter
from drafttrain.evaluation.tasks.words import JOBS, PEOPLE, REGIONS, TOWNS

_LEAST_PEOPLE = 3
_MOST_PEOPLE = 60
_QUESTIONS_A_PERSON = 3
_TOKENS_A_PERSON = 120  # about a third of them facts, the rest prose
MOST_QUESTIONS = _MOST_PEOPLE * _QUESTIONS_A_PERSON

_HOME = ("Where does {} live?", "In which town does {} live?")
_JOB = ("What does {} work as?", "What is the job of {}?")
_BIRTH = ("Where was {} born?", "In which town was {} born?")
_REGION = ("In which region does {} live?", "Which region does {} live in?")

World = tuple[list[str], list[Turn]]


def make(hops: str, rng: random.Random, room: Room, questions: int) -> tuple[Turn, ...]:
    """One document and its questions, no two of them alike."""
    if questions > MOST_QUESTIONS:
        raise ValueError(f"facts has people for at most {MOST_QUESTIONS} questions a document, got {questions}")
    least = max(_LEAST_PEOPLE, -(-questions // _QUESTIONS_A_PERSON))
    people = rng.sample(PEOPLE, max(least, min(_MOST_PEOPLE, room.left // _TOKENS_A_PERSON)))
    facts, askable = (_one_hop if hops == "one_hop" else _two_hop)(rng, people)
    rng.shuffle(facts)
    turns = rng.sample(askable, questions)
    for text in (*facts, *(turn.user for turn in turns), *(turn.answer for turn in turns)):
        room.take(text)
    return ask(paragraphs(scatter(rng, facts, fill(room, prose(rng)))), turns)


def _one_hop(rng: random.Random, people: list[str]) -> World:
    facts, turns = [], []
    for person in people:
        home, job, birth = rng.choice(TOWNS), rng.choice(JOBS), rng.choice(TOWNS)
        own = [_lives(person, home), _works(person, job), f"{person} was born in {birth}."]
        facts += own
        turns += _turns(rng, person, zip((_HOME, _JOB, _BIRTH), own, strict=True))
    return facts, turns


def _two_hop(rng: random.Random, people: list[str]) -> World:
    """Person to town to region, or person to friend to the friend's town or job."""
    homes = {person: rng.choice(TOWNS) for person in people}
    jobs = {person: rng.choice(JOBS) for person in people}
    regions = {town: rng.choice(REGIONS) for town in homes.values()}
    facts, turns = [_lies(town, region) for town, region in regions.items()], []
    for person, friend in zip(people, [*people[1:], people[0]], strict=True):
        home, friendship = homes[person], f"The friend of {person} is {friend}."
        facts += [_lives(person, home), _works(person, jobs[person]), friendship]
        turns += _turns(rng, person, [(_REGION, f"{_lives(person, home)} {_lies(home, regions[home])}")])
        friends = (_lives(friend, homes[friend]), _works(friend, jobs[friend]))
        answers = [f"{friendship} {fact}" for fact in friends]
        turns += _turns(rng, f"the friend of {person}", zip((_HOME, _JOB), answers, strict=True))
    return facts, turns


def _lives(person: str, town: str) -> str:
    return f"{person} lives in {town}."


def _works(person: str, job: str) -> str:
    return f"{person} works as a {job}."


def _lies(town: str, region: str) -> str:
    return f"{town} lies in {region}."


def _turns(rng: random.Random, who: str, answers: Iterable[tuple[tuple[str, ...], str]]) -> Iterator[Turn]:
    for forms, answer in answers:
        yield Turn(rng.choice(forms).format(who), answer)


KINDS = (
    Kind("facts/one_hop", 160, partial(make, "one_hop")),
    Kind("facts/two_hop", 200, partial(make, "two_hop")),
)
