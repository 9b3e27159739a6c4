"""Replay equals a plain walk over the record, and the decoder itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stopping import AcceptanceHeadRule, Confidence, EntropyBound, FixedLength, Oracle
from drafttrain.evaluation.policies import FixedPolicy, OraclePolicy, ThresholdPolicy, policy_of
from drafttrain.evaluation.replay import replay
from drafttrain.evaluation.trace_record import Record, record_of
from drafttrain.evaluation.trace_scores import RULES, Scores, score_rows, with_run_entropy
from drafttrain.evaluation.tracing import Tracer, TraceSettings
from drafttrain.models.acceptance_head import AcceptanceHead, AcceptanceHeadConfig
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama

EOS = (5, 17, 40)
NEW_TOKENS = 40
LONGEST = 12


# --- against a plain walk -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Toy:
    """Random responses as lists, one entry a response."""

    accepted: list[np.ndarray]
    ends: list[np.ndarray]
    finished: list[bool]
    limits: list[int]
    runs: np.ndarray
    scores: Scores

    def record(self) -> Record:
        return Record.make(
            [len(row) for row in self.accepted],
            np.concatenate(self.accepted),
            np.concatenate(self.ends),
            self.runs,
            self.finished,
            self.limits,
            [f"task {index % 2}" for index in range(len(self.accepted))],
            {"score": self.scores},
        )


def toy(seed: int, run_length: int, columns: int) -> Toy:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, rng.integers(1, 6))
    accepted = [rng.random(length) < rng.choice([0.3, 0.7, 0.95]) for length in lengths]
    finished = [bool(rng.random() < 0.5) for _ in lengths]
    ends = [rng.random(length) < 0.1 for length in lengths]
    for row, end, done in zip(accepted, ends, finished, strict=True):
        end &= ~row  # an accepted end of sequence is the last token of a finished response
        end[-1] |= row[-1] and done
    limits = [
        length + int(rng.integers(0, 9)) if done else length for length, done in zip(lengths, finished, strict=True)
    ]
    total, rejected = sum(lengths), sum(int((~row).sum()) for row in accepted)
    scores = Scores(rng.random((total, columns)) ** 0.3, rng.random((rejected, run_length, columns)) ** 0.3)
    return Toy(accepted, ends, finished, limits, rng.random((rejected, run_length)) < 0.1, scores)


def walk(case: Toy, policy: object) -> list[tuple[int, int]]:
    """(drafted, accepted) of every round, token by token. The runs must be as long as any draft."""
    rounds, offset, run = [], 0, 0
    for accepted, ends, finished, limit in zip(case.accepted, case.ends, case.finished, case.limits, strict=True):
        runs_at = {place: run + number for number, place in enumerate(np.flatnonzero(~accepted))}
        run, start = run + len(runs_at), 0
        while start < len(accepted):
            rejection = next((place for place in runs_at if place >= start), len(accepted))
            budget = (limit if finished else len(accepted)) - start - 1
            row = runs_at.get(rejection)
            scores = [*case.scores.values_TC[offset + start : offset + rejection + (row is not None)]]
            stops = [*ends[start : rejection + (row is not None)]]
            if row is not None:
                scores += [*case.scores.run_values_MRC[row]]
                stops += [*case.runs[row]]
            drafted = draft(policy, scores, stops, budget, rejection - start)
            rounds.append((drafted, min(drafted, rejection - start)))
            start += rounds[-1][1] + 1
        offset += len(accepted)
    return rounds


def draft(policy, scores, stops, budget, ahead) -> int:
    """Tokens that a round drafts, given score (by step) and end of every token that the drafter would say."""
    if isinstance(policy, FixedPolicy):
        return min(policy.length, budget)
    if isinstance(policy, OraclePolicy):
        return min(policy.maximum, budget, ahead)
    longest = min(policy.maximum, budget)
    judged = []
    for step in range(longest):
        judged.append(scores[step][min(step, len(scores[step]) - 1)])
        heard = judged[: step + 1 - policy.lag]
        if stops[step] or (step + 1 >= policy.minimum and heard and exceeds(policy, heard)):
            return step + 1
    return max(longest, 0)


def exceeds(policy, scores) -> bool:
    if policy.kind == "bound":
        return scores[-1] > policy.threshold
    return 1 - (np.prod(scores) if policy.kind == "product" else scores[-1]) > policy.threshold


thresholds = st.builds(
    lambda threshold, kind, lengths, lag: ThresholdPolicy("score", threshold, kind, *sorted(lengths), lag),
    st.floats(0, 1),
    st.sampled_from(["product", "token", "bound"]),
    st.tuples(st.integers(1, LONGEST), st.integers(1, LONGEST)),
    st.integers(0, 1),
)
plain = st.builds(FixedPolicy, st.integers(0, LONGEST)) | st.builds(OraclePolicy, st.integers(1, LONGEST))


@given(st.integers(0, 2**32), st.sampled_from([1, 3, LONGEST]), st.lists(thresholds | plain, min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_replay_is_a_walk_over_the_record(seed, columns, policies):
    case = toy(seed, LONGEST, columns)
    for policy, tally in zip(policies, replay(case.record(), policies, threads=2), strict=True):
        rounds = walk(case, policy)
        expected = np.zeros_like(tally.rounds_GWW[0])
        for drafted, accepted in rounds:
            expected[drafted, accepted] += 1
        np.testing.assert_array_equal(tally.rounds_GWW.sum(0), expected, err_msg=str(policy))
        assert tally.unobserved == 0
        assert tally.tokens == sum(len(row) for row in case.accepted)
        assert (tally.drafted, tally.accepted) == tuple(map(sum, zip(*rounds, strict=True)))
        assert sum(tally.of(group).rounds for group in tally.groups) == tally.rounds


@given(st.integers(0, 2**32), st.integers(0, 4), thresholds)
@settings(max_examples=100, deadline=None)
def test_shorter_runs_are_exact_or_say_that_they_are_not(seed, run_length, policy):
    case = toy(seed, LONGEST, 1)
    [whole] = replay(case.record(), [policy])
    scores = Scores(case.scores.values_TC, case.scores.run_values_MRC[:, :run_length])
    cut = dataclasses.replace(case, runs=case.runs[:, :run_length], scores=scores)
    [tally] = replay(cut.record(), [policy])
    assert tally.accepted == whole.accepted
    assert tally.rounds == whole.rounds
    assert tally.unobserved > 0 or np.array_equal(tally.rounds_GWW, whole.rounds_GWW)


def test_policies_do_not_depend_on_their_company():
    record = toy(7, LONGEST, 1).record()
    policies = [ThresholdPolicy("score", h, maximum=m) for h in np.linspace(0, 1, 23) for m in (3, 9)]
    together = replay(record, policies, threads=3)
    for policy, tally in zip(policies, together, strict=True):
        np.testing.assert_array_equal(replay(record, [policy])[0].rounds_GWW[:, :4, :4], tally.rounds_GWW[:, :4, :4])


def test_the_oracle_discards_nothing_and_needs_fewest_rounds():
    record = toy(11, LONGEST, 1).record()
    oracle, *others = replay(record, [OraclePolicy(LONGEST), *(FixedPolicy(k) for k in range(LONGEST + 1))])
    assert oracle.discarded == 0
    assert all(oracle.rounds <= other.rounds for other in others)
    assert others[0].rounds == record.size  # never drafting is one round a token


def test_unknown_scores_and_overlong_drafts_are_refused():
    record = toy(0, 0, 1).record()
    with pytest.raises(KeyError):
        replay(record, [ThresholdPolicy("absent", 0.5)])
    with pytest.raises(ValueError, match="250"):
        replay(record, [FixedPolicy(251)])
    with pytest.raises(ValueError, match="matching"):
        Record.make([3], np.ones(2, bool), np.zeros(2, bool), np.zeros((0, 0), bool), [False])


# --- against the decoder --------------------------------------------------------------------------------------------


def perturbed(model, scale: float):
    """A drafter that mostly agrees with its target: the same weights with a little noise."""
    drafter = build_llama(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for ours, theirs in zip(drafter.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs + scale * torch.randn(theirs.shape, generator=generator))
    return drafter


class Pair:
    """Engines, prompts, and traces of a sampling setting."""

    def __init__(self, sampling: Sampling, prompts: int, scale: float) -> None:
        model = build_llama(seed=0)
        self.target, self.drafter = Engine(model), Engine(perturbed(model, scale))
        self.sampling = sampling
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(41, 300, rng.integers(3, 12)).tolist() for _ in range(prompts)]
        found = self.decode(None)
        rows = [
            {"prompt_id": str(index), "split": "tune", "task": f"task {index % 2}", "source": "", "turn": 0}
            | {"prompt_ids": prompt, "response_ids": completion.token_ids}
            for index, (prompt, completion) in enumerate(zip(self.prompts, found, strict=True))
        ]
        self.finished = [completion.finish_reason for completion in found]
        self.rows = Tracer(self.target, self.drafter, TraceSettings(sampling, run_length=LONGEST)).trace(rows)
        self.manifest = {"eos_ids": EOS, "max_new_tokens": NEW_TOKENS, "context": 512, "run_length": LONGEST}
        self.manifest["scores"] = list(RULES)

    def decode(self, stop, seed: int = 0):
        drafter = None if stop is None else ModelDrafter(self.drafter, stop=stop)
        decoder = Decoder(self.target, drafter, self.sampling, EOS, seed)
        return decoder.generate(self.prompts, NEW_TOKENS)

    def record(self, heads) -> Record:
        rows = with_run_entropy(self.rows, self.manifest)
        scored = {name: score_rows(self.drafter.model, head, rows, batch_size=5) for name, head in heads.items()}
        return record_of(self.rows, self.manifest, scored)


@pytest.fixture(scope="module")
def greedy_pair():
    return Pair(Sampling(0.0), prompts=24, scale=0.008)


def make_head(state: str, features: tuple[str, ...]) -> AcceptanceHead:
    torch.manual_seed(4)
    config = AcceptanceHeadConfig(hidden_size=32, state=state, depth=1, features=features, max_length=LONGEST)
    head = AcceptanceHead(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(head.output.bias, 2.0)
    return head.eval().requires_grad_(False)


HEADS = {
    "producing": make_head("producing", ("log_q", "entropy")),
    "consumed": make_head("consumed", ()),
    "step": make_head("producing", ("step",)),
}

RULES_TRIED = {
    "fixed 1": lambda: FixedLength(1),
    "fixed 5": lambda: FixedLength(5),
    "fixed 12": lambda: FixedLength(12),
    "confidence": lambda: Confidence(0.6),
    "confidence from 3": lambda: Confidence(0.4, min_length=3, max_length=9),
    "per token": lambda: Confidence(0.5, per_token=True, min_length=2, max_length=12),
    "entropy": lambda: EntropyBound(2.0, 1, 8),
    "producing": lambda: AcceptanceHeadRule(HEADS["producing"], 0.5, 1, 12),
    "consumed": lambda: AcceptanceHeadRule(HEADS["consumed"], 0.5, 2, 12),
    "step": lambda: AcceptanceHeadRule(HEADS["step"], 0.5, 1, 12),
}


def test_the_pair_is_worth_replaying(greedy_pair):
    record = greedy_pair.record({})
    [tally] = replay(record, [FixedPolicy(5)])
    assert 0.4 < tally.accepted / tally.drafted < 0.9
    assert 3 < greedy_pair.finished.count("eos") < len(greedy_pair.finished) - 3


@pytest.mark.parametrize("name", RULES_TRIED)
def test_counts_are_exactly_the_decoders(greedy_pair, name):
    """Greedy decoding walks the very path that was recorded, so every count must agree, not just on average."""
    stop = RULES_TRIED[name]()
    completions = greedy_pair.decode(stop)
    assert [completion.token_ids for completion in completions] == [row["response_ids"] for row in greedy_pair.rows]
    counts = sum(completion.counts for completion in completions)
    used = {name: HEADS[name]} if name in HEADS else {}
    [tally] = replay(greedy_pair.record(used), [policy_of(stop, head=name)])
    expected = dataclasses.replace(counts, prefill_seconds=0.0, decode_seconds=0.0)
    assert tally.counts() == expected
    assert tally.unobserved == 0


def test_the_oracle_is_the_decoders(greedy_pair):
    matches = {
        index: [False] * len(row["prompt_ids"])
        + [x == y for x, y in zip(row["response_ids"], row["draft_ids"], strict=True)]
        for index, row in enumerate(greedy_pair.rows)
    }
    stop = Oracle(matches, LONGEST)
    counts = sum(completion.counts for completion in greedy_pair.decode(stop))
    [tally] = replay(greedy_pair.record({}), [policy_of(stop)])
    assert tally.counts() == dataclasses.replace(counts, prefill_seconds=0.0, decode_seconds=0.0)


@pytest.mark.slow
def test_sampled_counts_agree_in_distribution():
    """Sampled runs draw other paths than the record: rates agree within their noise, and a wrong record's do not."""
    pair = Pair(Sampling(1.0), prompts=400, scale=0.02)
    rules = [FixedLength(4), Confidence(0.6), AcceptanceHeadRule(HEADS["producing"], 0.5)]
    tallies = replay(pair.record({"head": HEADS["producing"]}), [policy_of(rule) for rule in rules])
    for rule, tally in zip(rules, tallies, strict=True):
        runs = [completion.counts for completion in pair.decode(rule, seed=9)]
        rounds, tokens = np.array([[run.rounds, run.tokens] for run in runs], dtype=float).T
        rate = rounds.sum() / tokens.sum()
        noise = np.sqrt(2) * np.std(rounds - rate * tokens) / np.sqrt(len(runs)) / tokens.mean()
        assert abs(tally.rounds / tally.tokens - rate) < 5 * noise
        assert abs(tally.rounds / tally.tokens * 1.15 - rate) > 5 * noise
