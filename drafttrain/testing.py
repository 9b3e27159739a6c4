"""Checks for drafters and stopping rules of your own: state, rows, budgets, and the target's text.

    from drafttrain.testing import check_drafter

    def test_my_drafter():
        assert check_drafter(lambda engine: MyDrafter(engine, k=3)).accepted

The models are tiny and random, so all of it takes seconds on a CPU. Whatever fails raises an AssertionError with a
sentence that says what is broken.
"""

# B batch, K drafted tokens, V vocabulary

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from drafttrain.decoding.counts import Completion, Counts
from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, ModelDrafter, Setting
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Conversation, Decoder
from drafttrain.decoding.outside import lacking
from drafttrain.decoding.stopping import StoppingRule
from drafttrain.decoding.target_view import TargetView
from drafttrain.evaluation.reference import tree
from drafttrain.evaluation.statistics import chi_square
from drafttrain.ops.random import Draws
from drafttrain.ops.sampling import Sampling, seen_tokens
from drafttrain.ops.tree import ABSENT, ROOT, depth_of

VOCABULARY = 6
"""Tokens that the target emits: 0 to 5."""

FALSE_ALARM = 1e-7
"""A right drafter fails a test of sampled text with this probability."""

_ROWS = 8  # of both models' embeddings: the last two tokens are the drafter's alone, as padding rows are
_GREEDY = Sampling(0.0)
_SAMPLED = Sampling(0.9, top_p=0.95, repetition_penalty=1.2)
_DRAWN = (Sampling(), Sampling(1.3, top_k=5, top_p=0.9))
_EOS = 5

_PROMPTS = [[1, 2, 3, 1, 2], [4], [0, 5, 0, 5, 0, 3, 4], [3, 3, 3], [2, 0, 4, 1, 2, 0]]
_LIMITS = [9, 40, 17, 26, 1]
"""Rows leave the batch one by one, from its middle too, the last one before anything is drafted for it."""

_ANSWERS = 2500
_DEPTH = 3  # tokens of each answer that are looked at
_HOTTER = 1.6


class Checked(NamedTuple):
    """What passed: how much there was to check, and how much of the checks was itself checked.

    Attributes:
        drafted: tokens proposed in watched rounds.
        accepted: of them.
        controls: wrong distributions that the test of sampled text rejected; for every sampling a hotter target's, and
            a wrong q's where any is declared.
    """

    drafted: int
    accepted: int
    controls: int


def check_drafter(factory: Callable[[Engine], Drafter]) -> Checked:
    """Hold a drafter to its interface.

    * state: after every round, with rows of unlike lengths leaving the batch, behind a prefix, after rounds in which
      it was not asked and in later turns of a chat, it proposes what a new drafter proposes that is given the same
      text: its cache and what it has still to read are the committed text and the prefix, nothing else;
    * drafts: no more tokens than `max_length` and each row's budget, none where that is 0, all in the vocabulary;
      a declared q is a distribution in which the tokens are possible;
    * rows: each row of a batch is drafted and decoded as it is alone;
    * text: greedy, the target's own in float64; sampled, its exact distribution by chi-square, and the same test must
      reject that of a hotter target and, where q is declared, a drafter that declares a wrong one.

    Args:
        factory: makes a new drafter at every call, from an engine of a Llama of random float64 weights: one layer,
            hidden size 16, 4 heads, 2 of keys and values, 8 tokens, 512 positions. It often agrees with the target,
            whose disturbed copy it is and which has 6 tokens (`Setting.vocabulary`).

    Raises:
        AssertionError: something is broken; the sentence says what.
    """
    target, engine = _engines()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other over models this small
    try:
        return _check(target, lambda: factory(engine))
    finally:
        torch.set_num_threads(threads)


def check_rule(factory: Callable[[], StoppingRule]) -> Checked:
    """Hold a stopping rule to its interface: `check_drafter` of a model that drafts under it.

    Args:
        factory: makes a new rule at every call.

    Raises:
        AssertionError: something is broken; the sentence says what.
    """
    missing = lacking(factory(), StoppingRule)
    if missing:
        raise AssertionError(f"the rule lacks {', '.join(missing)}")
    return check_drafter(lambda engine: ModelDrafter(engine, stop=factory()))


def _check(target: Engine, make: Callable[[], Drafter]) -> Checked:
    with _during("made by the factory"):
        _check_interface(make)
    counts, controls = Counts(), 0
    for sampling in (_GREEDY, _SAMPLED):
        with _during("in a batch that rows leave one by one"):
            counts += _check_rounds(target, make, sampling)
        with _during("behind a prefix, or after a round in which it was not asked"):
            _check_prefixes(target, make, sampling)
        with _during("in the turns of a chat"):
            _check_turns(target, make, sampling)
        with _during("in a batch"):
            _check_rows(target, make, sampling)
    if not counts.drafted:
        raise AssertionError(f"it proposed nothing behind any of {_PROMPTS}, so nothing was tested")
    with _during("decoding greedily"):
        _check_greedy(target, make)
    for sampling in _DRAWN:
        with _during("sampling"):
            controls += _check_distribution(target, make, sampling)
    return Checked(counts.drafted, counts.accepted, controls)


# ---- the models ----


def _engines() -> tuple[Engine, Engine]:
    """Engines of the target and of the drafter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_ROWS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        target = LlamaForCausalLM(config).double().eval()
        drafter = copy.deepcopy(target)
        with torch.no_grad():
            for weight in drafter.parameters():
                weight += 0.6 * weight.std() * torch.randn_like(weight)
    return Engine(target, VOCABULARY), Engine(drafter)


# ---- the drafter, watched ----


@contextmanager
def _during(what: str) -> Iterator[None]:
    """Say what was done when something else than a check raised."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what}, the drafter stops with {type(error).__name__}: {error}") from error


class _Wrapped:
    """A drafter behind which something is done."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.name, self.max_length = drafter.name, drafter.max_length

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        self.drafter.start(committed, setting, resume)

    def commit(self, agreed: Sequence[int], *paths: Sequence[Sequence[int]]) -> None:
        self.drafter.commit(agreed, *paths)

    def keep(self, rows: Sequence[int]) -> None:
        self.drafter.keep(rows)


class _Watched(_Wrapped):
    """Every proposal is checked, and compared with that of a new drafter on the same text."""

    def __init__(self, make: Callable[[], Drafter]) -> None:
        super().__init__(make())
        self._make = make
        self._setting: Setting | None = None
        self._round = 0

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        self._setting, self._round = setting, 0
        super().start(committed, setting, resume)

    def propose(
        self, committed: Committed, prefix: Draft | None, budget: Sequence[int], random: Draws, *more: object
    ) -> Draft:
        self._round += 1
        texts = [list(text) for text in committed.extended(prefix)]
        draft = self.drafter.propose(committed, prefix, budget, random, *more)
        _check_draft(draft, budget, self.max_length, self._setting.vocabulary)
        new = self._make()
        fresh = _committed(texts, committed.sample_ids, self._setting.sampling)
        new.start(fresh, self._setting)
        expected = new.propose(fresh, None, budget, random, *more)
        for row, (mine, theirs) in enumerate(zip(_by_row(draft), _by_row(expected), strict=True)):
            if not mine.same(theirs):
                raise AssertionError(
                    f"in round {self._round} it proposes {mine} behind {texts[row]} (row {row}), where a new drafter "
                    f"proposes {theirs}: after start, commit and keep its state must be that of the committed text and "
                    "the prefix, and what it draws must come from the run's draws"
                )
        if committed.extended(prefix) != texts:
            raise AssertionError("it changes the committed text, which is the loop's")
        return draft


@dataclasses.dataclass(frozen=True)
class _Proposal:
    """What was proposed in a row: tokens, q of those that were sampled, and the parents of a tree."""

    tokens: list[int]
    q_KV: Tensor | None
    parents: list[int] | None = None

    def same(self, other: _Proposal) -> bool:
        if (self.tokens, self.parents) != (other.tokens, other.parents) or (self.q_KV is None) != (other.q_KV is None):
            return False
        return self.q_KV is None or (
            self.q_KV.shape == other.q_KV.shape and torch.allclose(self.q_KV, other.q_KV, atol=1e-6)
        )

    def __str__(self) -> str:
        return f"{self.tokens}" if self.q_KV is None else f"{self.tokens} with q {self.q_KV.amax(-1).tolist()} at most"


def _by_row(draft: Draft) -> list[_Proposal]:
    """The proposals of a draft without its padding (that of a tree says nothing either)."""
    if draft.parents_BK is not None:
        q = [None] * len(draft.tokens_BK) if draft.probs_BKV is None else draft.probs_BKV
        trees = zip(draft.rows(), q, draft.parents_BK.tolist(), strict=True)
        return [_without_padding(*tree) for tree in trees]
    if draft.probs_BKV is None:
        return [_Proposal(tokens, None) for tokens in draft.rows()]
    return [_Proposal(row, q_KV[: len(row)]) for row, q_KV in zip(draft.rows(), draft.probs_BKV, strict=True)]


def _without_padding(tokens: list[int], q_PV: Tensor | None, parents: list[int]) -> _Proposal:
    """A tree's proposal; levels that a row has not are missing when it is alone."""
    last = max((node for node, parent in enumerate(parents) if parent != ABSENT), default=-1)
    inner = max((parent for parent in parents), default=ROOT)
    return _Proposal(tokens[: last + 1], None if q_PV is None else q_PV[: inner + 2], parents[: last + 1])


def _check_draft(draft: Draft, budget: Sequence[int], longest: int, vocabulary: int) -> None:
    if not isinstance(draft, Draft):
        raise AssertionError(f"propose gives {type(draft).__name__}, not a Draft")
    if draft.tokens_BK.dtype != torch.int64 or len(draft.tokens_BK) != len(budget):
        raise AssertionError(
            f"its draft for {len(budget)} rows has tokens {list(draft.tokens_BK.shape)} of {draft.tokens_BK.dtype}, "
            "which must be [rows, K] of int64"
        )
    if draft.width > longest:
        raise AssertionError(f"its draft is {draft.width} tokens wide, more than its max_length of {longest}")
    lengths = map(len, draft.rows()) if draft.parents_BK is None else map(depth_of, draft.parents_BK.tolist())
    for row, (tokens, length, most) in enumerate(zip(draft.rows(), lengths, budget, strict=True)):
        if length > most:
            raise AssertionError(f"it proposes {length} tokens in row {row}, whose budget is {most}")
        if any(not 0 <= token < vocabulary for token in tokens):
            raise AssertionError(f"it proposes {tokens}, but the target knows the tokens 0 to {vocabulary - 1} alone")
    if draft.probs_BKV is not None:
        _check_declared(draft, vocabulary)


def _check_declared(draft: Draft, vocabulary: int) -> None:
    """Of the tokens that were sampled: q is a distribution over the target's tokens, and they are possible in it."""
    if draft.probs_BKV.shape[-1] > vocabulary:
        raise AssertionError(f"q is declared for {draft.probs_BKV.shape[-1]} tokens, but the target knows {vocabulary}")
    if draft.parents_BK is not None:
        _check_tree(draft)
        return
    sampled_BK = torch.ones_like(draft.tokens_BK, dtype=torch.bool)
    for mask_BK in (draft.inside(), draft.sampled_BK):
        sampled_BK = sampled_BK if mask_BK is None else sampled_BK & mask_BK
    total_N = draft.probs_BKV.sum(-1)[sampled_BK]
    if (draft.probs_BKV < 0).any() or ((total_N - 1).abs() > 1e-5).any():
        raise AssertionError("a declared q is no distribution: its probabilities must be positive and sum to 1")
    q_BK = draft.probs_BKV.gather(2, draft.tokens_BK.clamp(max=draft.probs_BKV.shape[-1] - 1).unsqueeze(2)).squeeze(2)
    if (q_BK[sampled_BK] <= 0).any():
        raise AssertionError("a token is proposed that is impossible in the q declared for it")


def _check_tree(draft: Draft) -> None:
    """Of a drawn tree: every parent has a q in which its children are possible."""
    for tokens, parents, q_PV in zip(draft.rows(), draft.parents_BK.tolist(), draft.probs_BKV, strict=True):
        for token, parent in zip(tokens, parents, strict=True):
            if parent == ABSENT:
                continue
            if abs(q_PV[parent + 1].sum() - 1) > 1e-5 or not q_PV[parent + 1, token] > 0:
                raise AssertionError("a token is proposed that is impossible in the q declared for its parent")


# ---- interface and state ----


def _check_interface(make: Callable[[], Drafter]) -> None:
    one, two = make(), make()
    if one is two:
        raise AssertionError("the factory gives the same drafter again; it must make a new one at every call")
    missing = lacking(one, Drafter)
    if missing:
        raise AssertionError(f"the drafter lacks {', '.join(missing)}")
    if not isinstance(one.max_length, int) or one.max_length < 1:
        raise AssertionError(f"max_length is {one.max_length!r}, but it must be a whole number of at least 1")
    if not isinstance(one.name, str):
        raise AssertionError(f"name is {one.name!r}, but it must be text")


def _committed(texts: Sequence[Sequence[int]], ids: Sequence[int], sampling: Sampling) -> Committed:
    """A text as the loop hands it out."""
    rows = [list(text) for text in texts]
    seen_BV = seen_tokens(rows, VOCABULARY, torch.device("cpu")) if sampling.penalised else None
    return Committed(rows, list(ids), seen_BV)


def _grow(committed: Committed, tokens: Sequence[Sequence[int]]) -> None:
    for row, more in enumerate(tokens):
        committed.tokens[row] += more
        if committed.seen_BV is not None:
            committed.seen_BV[row, more] = True


@torch.inference_mode()
def _check_prefixes(target: Engine, make: Callable[[], Drafter], sampling: Sampling) -> None:
    committed = _committed(_PROMPTS[:3], [7, 8, 9], sampling)
    view = TargetView(target, target.new_cache(3))

    def propose(prefix: Draft | None, budget: Sequence[int]) -> None:
        unread = zip(committed.tokens, view.lengths, strict=True)
        target.read(view.cache, [text[length:-1] for text, length in unread])
        drafter.propose(committed, prefix, budget, draws, view)

    draws = Draws(1, committed.sample_ids, committed.lengths, torch.device("cpu"))
    drafter = _Watched(make)
    drafter.start(committed, Setting(sampling, frozenset(), VOCABULARY, 64, target_view=view))
    prefix = Draft(torch.tensor([[3, 1], [3, 0], [0, 0]]), torch.tensor([2, 1, 0]))
    propose(prefix, [3, 3, 3])
    _grow(committed, [[3, 2], [3, 0], [5]])
    drafter.commit([1, 1, 0])  # one token of each prefix that there is, and the target's own
    propose(None, [3, 0, 2])
    for _ in range(2):  # a draft that is rejected, and a round in which this drafter was not asked
        _grow(committed, [[4], [2, 1], [0, 5, 0]])
        drafter.commit([0, 0, 0])
    propose(None, [3, 3, 3])


def _check_rounds(target: Engine, make: Callable[[], Drafter], sampling: Sampling) -> Counts:
    """Decode with every round watched."""
    total = Counts()
    for eos in ((), (_EOS,)):
        completions = Decoder(target, _Watched(make), sampling, eos).generate(_PROMPTS, _LIMITS)
        total = sum((completion.counts for completion in completions), total)
    return total


def _check_turns(target: Engine, make: Callable[[], Drafter], sampling: Sampling) -> None:
    """Later turns, an edited history, and another use of the decoder in between."""
    decoder = Decoder(target, _Watched(make), sampling)
    chat = Conversation(decoder)
    text: list[int] = []
    for turn, added in enumerate(([1, 2, 3], [2, 4, 1], [5, 0], [1])):
        if turn == 2:
            text = text[:5]  # the person edits what was said
        if turn == 3:
            decoder.generate(_PROMPTS[:2], 3)
        prompt = [*text, *added]
        reply = chat.reply(prompt, 8)
        [expected] = Decoder(target, make(), sampling).generate([prompt], 8)
        _compare(reply, expected, f"turn {turn + 1} of a chat", "with a new drafter")
        text = prompt + reply.token_ids


def _check_rows(target: Engine, make: Callable[[], Drafter], sampling: Sampling) -> None:
    ids = [3, 1, 4, 15, 9]
    together = Decoder(target, make(), sampling, (_EOS,)).generate(_PROMPTS, _LIMITS, ids)
    for row, (prompt, limit) in enumerate(zip(_PROMPTS, _LIMITS, strict=True)):
        [alone] = Decoder(target, make(), sampling, (_EOS,)).generate([prompt], limit, [ids[row]])
        _compare(together[row], alone, f"row {row} of a batch", "alone")


def _compare(own: Completion, expected: Completion, what: str, otherwise: str) -> None:
    """The text, and what was drafted and accepted for it."""
    if own.token_ids != expected.token_ids:
        raise AssertionError(f"{what} is {own.token_ids}, {otherwise} {expected.token_ids}")
    drafts = [(each.counts.drafted_at, each.counts.accepted_at, each.sources) for each in (own, expected)]
    if drafts[0] != drafts[1]:
        raise AssertionError(
            f"{what} has {own.counts.drafted} tokens drafted and {own.counts.accepted} accepted, {otherwise} "
            f"{expected.counts.drafted} and {expected.counts.accepted}, or others of them: a row's drafts must not "
            "depend on other rows or on what came before"
        )


# ---- the target's text ----


def _check_greedy(target: Engine, make: Callable[[], Drafter]) -> None:
    """Against the model's own forward, which reads the whole text again for every token."""
    for eos in ((), (_EOS,)):
        completions = Decoder(target, make(), _GREEDY, eos).generate(_PROMPTS, _LIMITS)
        for prompt, limit, completion in zip(_PROMPTS, _LIMITS, completions, strict=True):
            expected = _greedy_text(target, prompt, limit, eos)
            if completion.token_ids != expected:
                raise AssertionError(f"greedy, {prompt} goes on {completion.token_ids}, by the target {expected}")


@torch.inference_mode()
def _greedy_text(target: Engine, prompt: Sequence[int], limit: int, eos: Collection[int]) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + limit and (len(text) == len(prompt) or text[-1] not in eos):
        text.append(int(target.model(torch.tensor([text])).logits[0, -1, :VOCABULARY].argmax()))
    return text[len(prompt) :]


class _Misdeclaring(_Wrapped):
    """Declares another q than the tokens were drawn from."""

    declared = False

    def propose(self, *arguments: object) -> Draft:
        draft = self.drafter.propose(*arguments)
        if draft.probs_BKV is None:
            return draft
        self.declared = True
        tilted_BKV = draft.probs_BKV * torch.arange(1, draft.probs_BKV.shape[-1] + 1)
        return dataclasses.replace(draft, probs_BKV=tilted_BKV / tilted_BKV.sum(-1, keepdim=True))


def _check_distribution(target: Engine, make: Callable[[], Drafter], sampling: Sampling) -> int:
    """Hold text to the target's distribution; gives the number of wrong ones that were rejected."""
    hotter = dataclasses.replace(sampling, temperature=_HOTTER * sampling.temperature)
    answers = _answers(target, make(), sampling)
    found = _p_value(target, sampling, answers)
    if found < FALSE_ALARM:
        raise AssertionError(
            f"text sampled with it does not follow the target ({sampling}, p = {found:.1g}): each token must be drawn "
            "from the q declared for it, whatever its value, or be declared deterministic (no q)"
        )
    if _p_value(target, hotter, answers) >= FALSE_ALARM:
        raise AssertionError("the test of sampled text proves nothing here: it takes a hotter target for this one")
    wrong = _Misdeclaring(make())
    answers = _answers(target, wrong, sampling)
    if wrong.declared and _p_value(target, sampling, answers) >= FALSE_ALARM:
        raise AssertionError(
            "the test of sampled text proves nothing of it: it proposes so little that a wrong q would not show"
        )
    return 2 if wrong.declared else 1


def _answers(target: Engine, drafter: Drafter, sampling: Sampling) -> list[list[int]]:
    completions = Decoder(target, drafter, sampling, seed=2).generate([_PROMPTS[0]] * _ANSWERS, _DEPTH + 3)
    return [completion.token_ids for completion in completions]


def _p_value(target: Engine, sampling: Sampling, answers: Sequence[Sequence[int]]) -> float:
    """Of the first tokens of the answers, against their exact probabilities."""
    exact = tree(target.model, _PROMPTS[0], sampling, frozenset(), VOCABULARY, _DEPTH, VOCABULARY)
    return chi_square(exact.count(answers), exact.leaves).p_value
