"""Right drafters and rules pass; each way to be broken is caught, and named."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, ModelDrafter
from drafttrain.decoding.engine import pad
from drafttrain.decoding.stopping import Confidence
from drafttrain.testing import _engines, check_drafter, check_rule
from examples.my_drafter import MyDrafter


def answers_of(check, make, method: str) -> list[object]:
    """What a method of the things checked returned, call by call: a check that asks nothing would pass anything."""
    seen = []

    def factory(*engine):
        made = make(*engine)
        inner = getattr(made, method)

        def watched(*arguments, **named):
            seen.append(inner(*arguments, **named))
            return seen[-1]

        setattr(made, method, watched)
        return made

    check(factory)
    return seen


def test_a_model_drafter_passes():
    drafts = answers_of(check_drafter, lambda engine: ModelDrafter(engine, 4), "propose")
    assert {draft.width for draft in drafts} == {1, 2, 3, 4}


def test_the_drafter_of_the_example_passes():
    drafts = answers_of(check_drafter, lambda engine: MyDrafter(n=2), "propose")
    assert max(draft.width for draft in drafts) > 1


def test_an_adaptive_rule_passes():
    stops = answers_of(check_rule, lambda: Confidence(0.7, max_length=5), "stop")
    assert {bool(stop_B.any()) for stop_B in stops} == {True, False}


def test_the_engine_is_as_documented():
    target, drafter = _engines()
    config = drafter.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (1, 16, 4)
    assert (config.num_key_value_heads, config.vocab_size, config.max_position_embeddings) == (2, 8, 512)
    assert (drafter.vocabulary, target.vocabulary, drafter.dtype) == (8, 6, torch.float64)


class Stale(ModelDrafter):
    """Keeps what it read of rejected tokens and goes on behind it."""

    def commit(self, agreed):
        self._asked = None

    def _pending(self, committed, texts):
        return pad([text[-1:] for text in texts], self.engine.device)


class Forgetful(ModelDrafter):
    """Takes every text of a chat for a continuation of the last one."""

    def start(self, committed, setting, resume=False):
        cache = self.cache
        super().start(committed, setting)
        if resume and cache is not None and len(cache.lengths) == 1:
            cache.rollback([min(*cache.lengths, *self.cache.lengths)])
            self.cache = cache


class PrefixBlind(ModelDrafter):
    """Drafts behind the committed text though there is a prefix."""

    def propose(self, committed, prefix, *rest):
        return super().propose(committed, None, *rest)


class WrongQ(ModelDrafter):
    """Declares a sharper distribution than it draws from."""

    def propose(self, *arguments):
        draft = super().propose(*arguments)
        if draft.probs_BKV is None:
            return draft
        q_BKV = draft.probs_BKV**2.5
        return dataclasses.replace(draft, probs_BKV=q_BKV / q_BKV.sum(-1, keepdim=True))


class Median:
    def at(self, purpose, starts, width):
        return torch.full((len(starts), width), 0.5, dtype=torch.float64)


class DeclaredSampled(ModelDrafter):
    """Its tokens are a function of q, not drawn from it."""

    def propose(self, committed, prefix, budget, random, *rest):
        return super().propose(committed, prefix, budget, Median(), *rest)


class Improbable(ModelDrafter):
    """Declares a q that sums to more than one."""

    def propose(self, *arguments):
        draft = super().propose(*arguments)
        return draft if draft.probs_BKV is None else dataclasses.replace(draft, probs_BKV=2 * draft.probs_BKV)


class Spendthrift(ModelDrafter):
    """Ignores the budget."""

    def propose(self, committed, prefix, budget, *rest):
        return super().propose(committed, prefix, [9] * len(budget), *rest)


class Neighbour(MyDrafter):
    """Gives each row of a batch what belongs to the one before it."""

    def __init__(self, engine, length):
        super().__init__(1, length)

    def propose(self, committed, prefix, *rest):
        texts = committed.extended(prefix)
        return super().propose(Committed(texts[-1:] + texts[:-1], committed.sample_ids), None, *rest)


class WrongPlaces(ModelDrafter):
    """Keeps the right rows in the wrong order."""

    def keep(self, rows):
        super().keep(sorted(rows))


class Stubborn(ModelDrafter):
    """Keeps all rows."""

    def keep(self, rows):
        pass


class OwnDice(ModelDrafter):
    """Draws as it likes."""

    def propose(self, committed, prefix, budget, random, *rest):
        draft = super().propose(committed, prefix, budget, random, *rest)
        return Draft(torch.randint(0, 6, draft.tokens_BK.shape), draft.length_B)


class Widest(ModelDrafter):
    """Proposes tokens that only it knows."""

    def start(self, committed, setting, resume=False):
        super().start(committed, dataclasses.replace(setting, vocabulary=8), resume)


class Longer(ModelDrafter):
    """Proposes more tokens than it says."""

    def __init__(self, engine, length):
        super().__init__(engine, length)
        self.max_length = 2

    def propose(self, *arguments):
        self.max_length = 4
        return super().propose(*arguments)


class Eager(ModelDrafter):
    """Writes what it proposes into the text."""

    def propose(self, committed, *rest):
        draft = super().propose(committed, *rest)
        for text, more in zip(committed.tokens, draft.rows(), strict=True):
            text += more
        return draft


class Growing(ModelDrafter):
    """Drafts longer the longer it lives."""

    age = 0

    def propose(self, committed, prefix, budget, *rest):
        self.age += 1
        return super().propose(committed, prefix, [min(most, self.age) for most in budget], *rest)


class Silent(ModelDrafter):
    """Proposes nothing."""

    def propose(self, committed, *rest):
        return Draft.empty(len(committed.tokens), self.engine.device)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (Stale, "where a new drafter proposes"),
        (Forgetful, "where a new drafter proposes"),
        (PrefixBlind, r"in round 1 it proposes .* behind \[1, 2, 3, 1, 2, 3, 1\]"),
        (WrongQ, "does not follow the target"),
        (DeclaredSampled, "does not follow the target"),
        (Improbable, "no distribution"),
        (Spendthrift, r"tokens in row \d, whose budget is \d"),
        (Neighbour, "row 0 of a batch"),
        (WrongPlaces, "where a new drafter proposes"),
        (Stubborn, "in a batch that rows leave one by one, the drafter stops with"),
        (OwnDice, "the run's draws"),
        (Widest, "the target knows"),
        (Longer, "4 tokens wide, more than its max_length of 2"),
        (Eager, "changes the committed text"),
        (Growing, "where a new drafter proposes"),
        (Silent, "proposed nothing"),
    ],
)
def test_a_broken_drafter_is_caught(broken, told):
    with pytest.raises(AssertionError, match=told):
        check_drafter(lambda engine: broken(engine, 4))


def test_what_an_interface_lacks_is_named():
    class Bare:
        name, max_length = "bare", 3

    with pytest.raises(AssertionError, match="lacks start, propose, score, commit, keep"):
        check_drafter(lambda engine: Bare())
    with pytest.raises(AssertionError, match="lacks limits, begin, stop"):
        check_rule(lambda: type("Rule", (), {"min_length": 1, "max_length": 3, "adaptive": True})())
    with pytest.raises(AssertionError, match=r"max_length is 2\.5"):
        check_drafter(lambda engine: Fractional(engine, 2))


class Fractional(ModelDrafter):
    def __init__(self, engine, length):
        super().__init__(engine, length)
        self.max_length = 2.5


def test_a_factory_must_make_new_drafters():
    kept = {}
    with pytest.raises(AssertionError, match="the same drafter again"):
        check_drafter(lambda engine: kept.setdefault("one", ModelDrafter(engine, 2)))


def test_an_error_of_the_drafter_is_told_with_its_cause():
    class Failing(ModelDrafter):
        def propose(self, *arguments):
            raise ZeroDivisionError("by zero")

    with pytest.raises(AssertionError, match="the drafter stops with ZeroDivisionError: by zero") as caught:
        check_drafter(lambda engine: Failing(engine, 2))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_drafter_that_proposes_too_little_to_be_judged_is_told_so():
    class Rare(ModelDrafter):
        def propose(self, committed, prefix, budget, *rest):
            texts = committed.extended(prefix)
            rare = [min(most, int(text[-2:] == [5, 5])) for text, most in zip(texts, budget, strict=True)]
            return super().propose(committed, prefix, rare, *rest)

    with pytest.raises(AssertionError, match="so little that a wrong q would not show"):
        check_drafter(lambda engine: Rare(engine, 2))


class Remembering(Confidence):
    """Multiplies on from round to round."""

    def begin(self, rows):
        pass


def test_a_rule_that_forgets_to_begin_anew_is_caught():
    with pytest.raises(AssertionError):
        check_rule(lambda: Remembering(0.7, max_length=5))


def test_a_drafter_may_inherit_what_it_has_no_need_of():
    assert not Drafter.__abstractmethods__ - {"propose"}
    MyDrafter().commit([1])
