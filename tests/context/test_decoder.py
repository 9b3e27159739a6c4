"""Where the approximate decoder is exact, that batches are single runs, and that models are left as they were."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

from drafttrain.context.ahead import DraftAhead
from drafttrain.context.budgets import Budget, Protected
from drafttrain.context.compression import PromptCompression
from drafttrain.context.decoder import ApproximateDecoder, OracleDecoder
from drafttrain.context.dropping import KVDropping
from drafttrain.context.prefill import Prefill, prompt_attention
from drafttrain.context.scorers import LastWindow, LookaheadAttention, Oracle, Random, Recency
from drafttrain.context.scoring import attention_mass
from drafttrain.context.study import Candidate, DensePass, Reader
from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import build as built
from drafttrain.decoding.longspec import LongSpec
from drafttrain.decoding.loop import Conversation, Decoder
from drafttrain.decoding.tree_drafter import TreeDrafter
from drafttrain.errors import UserError
from drafttrain.ops.sampling import Sampling
from tests.context.support import GREEDY, PROMPTS, compression, decoder, dropping, engines, texts
from tests.decoding.longspec_pairs import block_of
from tests.decoding.support import greedy_reference
from tests.ops.test_attention import FAMILIES, build

TARGET, SMALL = engines()
METHODS = {
    "dropping": lambda n: {"dropping": dropping(n)},
    "compression": lambda n: {"compression": compression(n)},
    "both": lambda n: {"compression": compression(n), "dropping": dropping(12 if n == 18 else n)},
    "pyramid": lambda n: {"dropping": KVDropping(Budget(n, "pyramid"), LastWindow(8), Protected(2, 0))},
    "streaming": lambda n: {"dropping": KVDropping(Budget(n), Recency(), Protected(4, 0))},
    "random": lambda n: {"dropping": KVDropping(Budget(n), Random(), Protected(1, 4))},
}
DRAFTERS = {
    "none": lambda: None,
    "the same": lambda: ModelDrafter(SMALL, 3),
    "another": lambda: ModelDrafter(TARGET, 2),
}


@pytest.fixture(scope="module")
def reference():
    return [greedy_reference(TARGET.model, prompt, 14) for prompt in PROMPTS]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_budget_of_everything_is_the_targets_text(method, drafter, reference):
    for budget in (1.0, 60):
        own = decoder(TARGET, SMALL, drafter=DRAFTERS[drafter](), **METHODS[method](budget))
        completions = own.generate(PROMPTS, 14)
        assert texts(completions) == reference
        assert not any(completion.approximate for completion in completions)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_binds_changes_the_text_and_says_so(method, reference):
    """Negative control of the test above."""
    completions = decoder(TARGET, SMALL, **METHODS[method](18)).generate(PROMPTS, 14)
    assert texts(completions) != reference
    assert [completion.approximate for completion in completions] == [True, True, False, True]
    assert completions[2].token_ids == reference[2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, top_p=0.95, repetition_penalty=1.2)])
def test_a_row_of_a_batch_is_its_single_run(method, drafter, sampling):
    def run(prompts, limits, ids):
        own = decoder(TARGET, SMALL, drafter=DRAFTERS[drafter](), sampling=sampling, **METHODS[method](18))
        return texts(own.generate(prompts, limits, ids))

    limits = [14, 3, 9, 12]
    together = run(PROMPTS, limits, [3, 1, 4, 7])
    assert [len(text) for text in together] == limits
    assert together == [
        run([prompt], limit, [key])[0] for prompt, limit, key in zip(PROMPTS, limits, [3, 1, 4, 7], strict=True)
    ]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8)])
@pytest.mark.parametrize("length", [1, 4, 8])
def test_what_is_accepted_of_the_lookahead_is_what_speculative_decoding_accepts(length, sampling, monkeypatch):
    """The first round of Model(length=L) on the dense target, emitted before anything was dropped."""
    rounds: list[list[int]] = []
    own = Decoder._settle

    def settle(self, committed, rows, draft, reply, started):
        own(self, committed, rows, draft, reply, started)
        rounds.append([list(text) for text in committed.tokens])

    monkeypatch.setattr(Decoder, "_settle", settle)
    accepted = 0
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[3]):
        firsts = []
        for made in (
            Decoder(TARGET, ModelDrafter(SMALL, length), sampling),
            decoder(TARGET, SMALL, length, dropping=dropping(16), sampling=sampling),
        ):
            rounds.clear()
            made.generate([prompt], 14)
            firsts.append(rounds[0])
        assert firsts[0] == firsts[1]
        accepted += len(firsts[0][0]) - len(prompt) - 1
    assert accepted > 0


ALGEBRA = [
    "Model(drafter, tree=[3, 2, 2])",
    "Model(drafter, tree=[3, 2], drawn=False)",
    "Model(drafter, length=6, stop=Confidence(0.2))",
    "Copy(gamma=1, length=4)",
    "FirstOf(Copy(gamma=2, length=5), Model(drafter, length=3))",
    "Then((Reviewed(drafter, inner=MaxGram()), 3), (MaxGram(), 4))",
]


@pytest.mark.parametrize("expression", ALGEBRA)
@pytest.mark.parametrize("method", ["dropping", "compression", "both", "pyramid"])
def test_any_drafter_of_the_algebra_writes_what_the_target_writes_over_what_was_kept(expression, method):
    """Greedy text, and sampled text of deterministic drafts, is that without a drafter; a row is its single run."""

    def run(drafter, sampling, prompts=PROMPTS, ids=(3, 1, 4, 7)):
        own = decoder(TARGET, SMALL, 3, drafter=drafter, sampling=sampling, **METHODS[method](18))
        return own.generate(prompts, 20, list(ids))

    members = {"drafter": SMALL}
    drafted = run(built(expression, members), GREEDY)
    assert texts(drafted) == texts(run(None, GREEDY))
    assert sum(source not in ("target", "lookahead") for each in drafted for source in each.sources) > 3
    sampled = texts(run(built(expression, members), Sampling(0.8)))
    if "drawn=False" in expression:
        assert sampled == texts(run(None, Sampling(0.8)))
    for prompt, key, text in zip(PROMPTS, (3, 1, 4, 7), sampled, strict=True):
        assert texts(run(built(expression, members), Sampling(0.8), [prompt], [key])) == [text]


def test_the_first_token_is_the_dense_targets(reference):
    for scorer in (Recency(), Random()):
        dropped = KVDropping(Budget(6), scorer, Protected(1, 0))
        found = texts(ApproximateDecoder(TARGET, dropped, sampling=GREEDY).generate(PROMPTS, 14))
        assert [text[0] for text in found] == [text[0] for text in reference]
        assert found != reference


def test_a_drafter_of_the_same_model_goes_on_from_the_draft_pass(monkeypatch):
    read = []
    own = Engine.read

    def watched(self, cache, rows):
        read.append((self, sum(map(len, rows))))
        own(self, cache, rows)

    monkeypatch.setattr(Engine, "read", watched)
    decoder(TARGET, SMALL, dropping=dropping(16), drafter=ModelDrafter(SMALL, 3)).generate(PROMPTS[:1], 10)
    assert read == [(SMALL, 59)]


def test_a_prompt_that_is_not_cut_down_costs_no_draft_pass(monkeypatch):
    drafted, own = [], Engine.forward

    def watched(self, *args, **kwargs):
        drafted.extend([self] if self is SMALL else [])
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "forward", watched)
    dense = texts(Decoder(TARGET, None, GREEDY).generate(PROMPTS, 4))
    for method in ("dropping", "compression", "both"):
        whole = decoder(TARGET, SMALL, **METHODS[method](60)).generate(PROMPTS, 4)
        short = decoder(TARGET, SMALL, **METHODS[method](12)).generate([PROMPTS[2]], 4)  # shorter than the window
        assert texts(whole) == dense and texts(short) == dense[2:3]
        assert not drafted
    decoder(TARGET, SMALL, **METHODS["dropping"](12)).generate(PROMPTS[:1], 4)
    assert drafted


def test_the_draft_drafts_on_as_it_would_over_the_whole_text():
    """Its own cache is whole: what it proposes behind a lookahead is what a fresh drafter proposes."""
    one = decoder(TARGET, SMALL, dropping=dropping(16), drafter=ModelDrafter(SMALL, 3)).generate(PROMPTS, 14)
    two = decoder(TARGET, SMALL, dropping=dropping(16), drafter=ModelDrafter(Engine(SMALL.model), 3)).generate(
        PROMPTS, 14
    )
    assert texts(one) == texts(two)
    assert [c.counts.accepted for c in one] == [c.counts.accepted for c in two]


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_compressed_prompt_is_read_as_if_it_were_the_prompt(positions):
    """Compact: the target's own text behind the kept tokens. Original: the same with their positions."""
    own = decoder(TARGET, SMALL, 1, compression=compression(20, positions=positions))
    found = texts(own.generate(PROMPTS[:1], 8))[0]
    kept = own.kept[0]
    assert len(kept) == 20 and kept[:2] == [0, 1] and kept[-8:] == list(range(52, 60))
    text, places = [PROMPTS[0][at] for at in kept], kept if positions == "original" else list(range(20))
    for token in found:
        with torch.no_grad():
            logits = TARGET.model(torch.tensor([text]), position_ids=torch.tensor([places])).logits
        assert logits[0, -1].argmax().item() == token
        text, places = [*text, token], [*places, places[-1] + 1]


@pytest.fixture(params=FAMILIES)
def family(request):
    """Engines of a family's target and drafter, prompts, and the target's own greedy texts."""
    model = build(request.param).double()
    prompts = [[token % 64 for token in prompt] for prompt in PROMPTS]
    return Engine(model), Engine(copy.deepcopy(model)), prompts, [greedy_reference(model, p, 6) for p in prompts]


@pytest.mark.parametrize("method", ["dropping", "compression", "both"])
def test_every_family_is_read_right(family, method):
    """Everything kept: the model's own greedy text; a part kept: batch and single run agree."""
    target, drafter, prompts, reference = family
    for budget in (1.0, 60):
        assert texts(decoder(target, drafter, **METHODS[method](budget)).generate(prompts, 6)) == reference
    made = decoder(target, drafter, drafter=ModelDrafter(drafter, 2), **METHODS[method](18))
    together = made.generate(prompts, 6)
    assert texts(together) == [texts(made.generate([prompt], 6))[0] for prompt in prompts]
    assert together[2].token_ids == reference[2]
    made = decoder(target, drafter, 2, drafter=TreeDrafter(drafter, [2, 2]), **METHODS[method](18))
    assert texts(made.generate(prompts, 6)) == texts(
        decoder(target, drafter, 2, **METHODS[method](18)).generate(prompts, 6)
    )
    if method == "dropping":  # the drafter is the target: all that it looked ahead is emitted, and is the target's
        accepted = [completion.sources[:5] for completion in together]
        assert [own.count("lookahead") for own in accepted] == [5, 5, 0, 5]
        assert [completion.token_ids[:6] for completion in together] == [text[:6] for text in reference]


@pytest.mark.parametrize("method", ["dropping", "compression", "both"])
@pytest.mark.parametrize("where", ["score", "target"])
def test_every_family_is_as_it_was_after_an_exception(family, method, where, monkeypatch):
    target, drafter, prompts, reference = family
    before = [engine.config._attn_implementation for engine in (target, drafter)]
    calls = []

    def broken(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:  # one layer is behind it
            raise RuntimeError("broken")
        return own(*args, **kwargs)

    module = {"target": "prefill", "score": "scorers" if method == "dropping" else "compression"}[where]
    name = f"drafttrain.context.{module}.{'prompt_attention' if where == 'target' else 'attention_mass'}"
    own = prompt_attention if where == "target" else attention_mass
    monkeypatch.setattr(name, broken)
    with pytest.raises(RuntimeError, match="broken"):
        decoder(target, drafter, **METHODS[method](18)).generate(prompts, 6)
    monkeypatch.undo()
    assert [engine.config._attn_implementation for engine in (target, drafter)] == before
    assert target.watch is None and drafter.watch is None
    assert texts(Decoder(target, ModelDrafter(drafter, 2), GREEDY).generate(prompts, 6)) == reference


@pytest.mark.parametrize("method", ["dropping", "compression", "both"])
@pytest.mark.parametrize("where", ["draft", "score", "target", "decode"])
def test_models_are_as_they_were_after_an_exception(method, where, monkeypatch, reference):
    def broken(*_, **__):
        raise RuntimeError("broken")

    own = decoder(TARGET, SMALL, **METHODS[method](18))
    if where == "draft":
        monkeypatch.setattr(SMALL.model.model.layers[1].mlp, "forward", broken)
    elif where == "target":
        monkeypatch.setattr(TARGET.model.model.layers[1].mlp, "forward", broken)
    elif where == "score":
        name = "drafttrain.context.scorers" if method == "dropping" else "drafttrain.context.compression"
        monkeypatch.setattr(f"{name}.attention_mass", broken)
    else:
        monkeypatch.setattr("drafttrain.ops.ragged.folded_attention", broken)
    with pytest.raises(RuntimeError, match="broken"):
        own.generate(PROMPTS, 8)
    monkeypatch.undo()
    for engine in (TARGET, SMALL):
        assert engine.watch is None and engine.config._attn_implementation == "sdpa"
    assert texts(Decoder(TARGET, None, GREEDY).generate(PROMPTS, 14)) == reference


def test_one_full_layer_at_most_is_alive(monkeypatch):
    alive = []
    own = Prefill._drop

    def watched(self, row, layer, query, key, value, positions, how):
        own(self, row, layer, query, key, value, positions, how)
        alive.append([arena.keys is not None for arena in self.cache._arenas])
        slots = {arena.keys.shape[0] for arena in self.cache._arenas if arena.keys is not None}
        assert max(slots) < 2 * 40  # two heads of a budget of 16 and room for 13 tokens, not two of 60

    monkeypatch.setattr(Prefill, "_drop", watched)
    decoder(TARGET, SMALL, dropping=dropping(16)).generate(PROMPTS[:1], 7)
    assert alive == [[True, False], [True, True]]


def test_a_chat_reads_every_turn_anew():
    own = Conversation(decoder(TARGET, SMALL, dropping=dropping(18)))
    first = own.reply(PROMPTS[0], 6)
    second = [*PROMPTS[0], *first.token_ids, 4, 5]
    assert (
        own.reply(second, 6).token_ids
        == decoder(TARGET, SMALL, dropping=dropping(18)).generate([second], 6)[0].token_ids
    )


# ---- the lookahead's end ----


def drafted(**ahead: object) -> list[int]:
    """Tokens of the lookahead of each prompt."""
    own = ApproximateDecoder(TARGET, dropping(16), ahead=DraftAhead(SMALL, **ahead), sampling=GREEDY)
    return [completion.counts.drafted for completion in own.generate(PROMPTS, 14)]


def test_a_lookahead_ends_at_low_confidence_or_a_settled_choice():
    full = drafted(length=8)
    assert full == [8, 8, 0, 8]
    for more in ({"min_confidence": 0.9}, {"settled": 1.0}):
        short = drafted(length=8, **more)
        assert all(0 < own <= most for own, most in zip(short, full, strict=True) if most)
        assert short != full
    eager, patient = drafted(length=8, settled=1.0), drafted(length=8, settled=1e-9)
    assert eager == [2, 2, 0, 2]  # the second token is the first that can have changed anything
    assert sum(patient) > sum(eager) and all(a <= b for a, b in zip(eager, patient, strict=True))


def test_a_lookahead_ends_at_an_end_token(reference):
    eos = {reference[0][1]}
    own = decoder(TARGET, TARGET, 8, dropping=dropping(16), eos_ids=eos)
    [completion] = own.generate(PROMPTS[:1], 14)
    assert completion.counts.drafted == 2 == len(completion.token_ids)


@torch.inference_mode()
def test_the_oracle_keeps_what_the_answer_attends_to_and_emits_nothing_of_it(reference):
    prompt, answer = PROMPTS[0], reference[0]
    budget, protect = Budget(16), Protected(2, 0)
    own = OracleDecoder(TARGET, budget, [answer], protect, None, GREEDY)
    [completion] = own.generate([prompt], len(answer))
    dense = DensePass(Reader(TARGET), prompt, [], answer)
    [outcome] = dense.compare([Candidate("oracle", Oracle(), budget, protect)])
    agreeing = next((at for at, (a, b) in enumerate(zip(completion.token_ids, answer, strict=True)) if a != b), 14)
    assert agreeing == outcome.right and set(completion.sources) == {"target"} and completion.approximate
    whole = OracleDecoder(TARGET, Budget(1.0), [answer[:5]], protect, ModelDrafter(SMALL, 3), GREEDY)
    assert texts(whole.generate([prompt], 14)) == [answer]


# ---- bad input ----


def test_impossible_settings_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(TARGET, "forward", None)
    monkeypatch.setattr(SMALL, "forward", None)
    refused = [
        (lambda: ApproximateDecoder(TARGET), "needs KV dropping or prompt compression"),
        (lambda: ApproximateDecoder(TARGET, dropping(16)), "needs a drafter that looks ahead"),
        (lambda: ApproximateDecoder(TARGET, compression=compression(16)), "needs a drafter that looks ahead"),
        (lambda: ApproximateDecoder(TARGET, KVDropping(Budget(16), Oracle())), "needs a drafter that looks ahead"),
        (lambda: decoder(TARGET, SMALL, dropping=dropping(9)).generate(PROMPTS, 4), "60 is less than the 10"),
        (lambda: decoder(TARGET, SMALL, compression=compression(0.1)).generate(PROMPTS, 4), "less than the 10"),
        (lambda: decoder(TARGET, SMALL, 0, dropping=dropping(16)), "a lookahead of 0 tokens"),
        (lambda: DraftAhead(SMALL, min_confidence=1.5), "min_confidence is 1.5"),
        (lambda: PromptCompression(Budget(16), positions="none"), "compact or original, not none"),
        (lambda: PromptCompression(Budget(16, "pyramid")), "give a uniform budget"),
    ]
    for act, sentence in refused:
        with pytest.raises(UserError, match=sentence):
            act()


def test_a_drafter_that_reads_its_targets_keys_is_refused():
    """They are no longer all there."""
    drafter = LongSpec(block_of(TARGET.model, 8), length=3)
    with pytest.raises(UserError, match="reads its target while it drafts"):
        decoder(TARGET, SMALL, dropping=dropping(16), drafter=drafter).generate(PROMPTS[:1], 4)


def test_a_target_with_recurrent_layers_is_refused():
    from drafttrain.models.drafters import without_storage

    with pytest.raises(UserError, match="recurrent state"):
        Engine(without_storage(hf.MambaConfig(num_hidden_layers=1)))


def test_a_drafter_that_cannot_be_watched_is_refused_in_a_sentence():
    """Draft attention is our own attention's: a model that our attention cannot read is refused as any drafter is."""
    model = hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(UserError, match="cannot be read by the bundled decoder"):
        Engine(model).checked()


@pytest.mark.parametrize("scorer", [LookaheadAttention(8), LastWindow(8), Oracle()])
def test_the_split_adds_up_and_scores_are_timed(scorer):
    own = ApproximateDecoder(
        TARGET, KVDropping(Budget(16), scorer, Protected(2, 0)), ahead=DraftAhead(SMALL, 4), sampling=GREEDY
    )
    [completion] = own.generate(PROMPTS[:1], 4)
    split = own.split
    assert min(split.draft_prefill, split.draft_decode, split.scoring, split.target_prefill) > 0
    assert split.total <= completion.counts.prefill_seconds
