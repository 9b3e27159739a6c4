"""The decode loop: draft, verify, accept, for a batch of any size, with or without a drafter.

The target's cache always holds a row's text but its last token. A round reads that token and the draft behind it in one
forward, accepts the longest valid prefix and adds one token of the target's own. Everything up to there stays on the
device; then one small tensor is read, and the host ends rows, cuts at end tokens and moves lengths.

Draws are keyed by position, so a position that was drafted in vain is drafted again with the same draw. That is exact
as long as nothing that decides about later tokens looks at the values of discarded ones, and nothing here does.
"""

# B batch, K drafted tokens, V vocabulary

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from drafttrain.decoding.counts import Completion
from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, Setting
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.exclusions import Exclusions
from drafttrain.decoding.rows import Reply, Round, Row
from drafttrain.decoding.stop_strings import StopStrings
from drafttrain.decoding.synthetic import SyntheticAcceptance
from drafttrain.decoding.target_view import TargetView
from drafttrain.decoding.verify import Verdict, accepted_greedily, verify_greedy, verify_sampled
from drafttrain.decoding.verify_tree import matching_path, verify_tree
from drafttrain.errors import UserError
from drafttrain.ops.cache import DenseCache
from drafttrain.ops.random import Draws, sample
from drafttrain.ops.sampling import Sampling, seen_along, seen_tokens
from drafttrain.ops.tree import ABSENT, TreeBlock, depth_of


class Decoder:
    """Decodes with a target and, optionally, a drafter. The emitted distribution is always the target's.

    The one exception is ``synthetic``, and its completions say so.

    Args:
        target: the model whose text is wanted.
        drafter: proposes tokens; None decodes autoregressively.
        sampling: applied to target and drafter alike.
        eos_ids: tokens that end a sequence.
        seed: of all draws; a draw depends on (seed, purpose, sample id, position) alone, hence not on the batch.
        stop_strings: texts that end a sequence.
        synthetic: decides what is accepted in place of verification, to measure speed; the text then means nothing.

    Raises:
        UserError: synthetic acceptance without a drafter.

    Example:
        >>> decoder = Decoder(Engine(target), ModelDrafter(Engine(small), length=5), Sampling(0.0), eos_ids={2})
        >>> [completion] = decoder.generate([[1, 17, 4]], max_new_tokens=64)
    """

    def __init__(
        self,
        target: Engine,
        drafter: Drafter | None = None,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] = (),
        seed: int = 0,
        stop_strings: StopStrings | None = None,
        synthetic: SyntheticAcceptance | None = None,
    ) -> None:
        if synthetic is not None and drafter is None:
            raise UserError("synthetic acceptance needs a drafter: without one there is nothing to accept")
        self.target = target
        self.drafter = drafter
        self.sampling = sampling or Sampling()
        self.eos_ids = frozenset(eos_ids)
        self.seed = seed
        self.stop_strings = stop_strings
        self.synthetic = synthetic
        self._cache: DenseCache | None = None
        self._view = TargetView(target)
        self._empty: Draft | None = None
        self._committed: Committed | None = None  # the text of the last call, for the next turn of a chat

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sample_ids: Sequence[int] | None = None,
        resume: bool = False,
        exclusions: Sequence[Exclusions] | None = None,
    ) -> list[Completion]:
        """Continue every prompt.

        Args:
            prompts: token ids of each row, at least one a row.
            max_new_tokens: for all rows or each.
            sample_ids: key the draws; by default 0, 1, ...
            resume: for a single row: read only what does not repeat the text of the previous call (chat turns).
            exclusions: what must not be copied from each prompt. They restrict drafting only.

        Returns:
            one completion a prompt, in order.

        Raises:
            UserError: an empty prompt, a limit below 1, more tokens than a model has positions, a drafter of another
                dtype or device, or an excluded span outside its prompt.
        """
        prompts = [list(prompt) for prompt in prompts]
        if not prompts:
            return []
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        ids = list(range(len(prompts))) if sample_ids is None else list(sample_ids)
        self._check(prompts, limits, ids)
        for index, (prompt, excluded) in enumerate(zip(prompts, exclusions or (), strict=exclusions is not None)):
            excluded.check(index, len(prompt))
        committed = Committed(prompts, ids, exclusions=list(exclusions) if exclusions else None)
        if self.sampling.penalised:
            committed.seen_BV = seen_tokens(prompts, self.target.vocabulary, self.target.device)
        rows = [Row(index, limit) for index, limit in enumerate(limits)]
        draws = Draws(self.seed, ids, committed.lengths, self.target.device)
        self._start(committed, rows, resume)
        finished: list[Row] = []
        while rows:
            started = time.perf_counter()
            draft, reply = self._round(committed, rows, draws)
            self._settle(committed, rows, draft, reply, started)
            done = [row for row in rows if row.finish_reason]
            if done:
                finished += done
                rows = self._leave(committed, rows, draws)
        finished.sort(key=lambda row: row.index)
        return [self._completion(row) for row in finished]

    def _completion(self, row: Row) -> Completion:
        return row.completion(self.synthetic is not None)

    # ---- start ----

    def _check(self, prompts: list[list[int]], limits: list[int], ids: list[int]) -> None:
        if len(limits) != len(prompts) or len(ids) != len(prompts):
            raise ValueError("max_new_tokens and sample_ids must have one entry a prompt")
        most = self.target.max_positions
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if not prompt:
                raise UserError(f"prompt {index} is empty; a prompt needs at least one token (a start token will do)")
            if limit < 1:
                raise UserError(f"max_new_tokens is {limit} for prompt {index}; it must be at least 1")
            if most is not None and len(prompt) + limit > most:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens, which with {limit} new ones exceeds the {most} "
                    "positions of the target; shorten the prompt or lower max_new_tokens"
                )

    def _start(self, committed: Committed, rows: list[Row], resume: bool) -> None:
        """Read the prompts, each but its last token."""
        started = time.perf_counter()
        setting = self._setting(committed, rows)
        if self.drafter:  # first, for it may refuse
            self.drafter.start(committed, setting, resume)
        kept = committed.shared_with(self._committed) if resume else None
        if kept is None:
            width = 1 + (self.drafter.max_length if self.drafter else 0)
            self._cache = self._view.cache = None  # its storage can serve again
            self._cache = self._view.cache = self.target.new_cache(len(rows), setting.capacity + width)
        else:
            self._cache.rollback([min(pair) for pair in zip(self._cache.lengths, kept, strict=True)])
        self._committed = committed  # from here on what the cache holds begins this text, even if a read fails
        unread = zip(committed.tokens, self._cache.lengths, strict=True)
        self.target.read(self._cache, [tokens[length:-1] for tokens, length in unread])
        self._started(rows, started)

    def _setting(self, committed: Committed, rows: list[Row]) -> Setting:
        """What a drafter is told of this run."""
        return Setting(
            self.sampling,
            self.eos_ids,
            self.target.vocabulary,
            max(len(prompt) + row.limit for prompt, row in zip(committed.tokens, rows, strict=True)),
            self.target.dtype,
            self.target.device,
            self._view,
        )

    def _started(self, rows: list[Row], started: float) -> None:
        """The prompts are read."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        seconds = (time.perf_counter() - started) / len(rows)
        for row in rows:
            row.prefill_seconds = seconds

    # ---- a round ----

    def _round(self, committed: Committed, rows: list[Row], draws: Draws) -> tuple[Draft, list[Reply]]:
        """Draft and verify."""
        draft, logits = self._drafted(committed, rows, draws)
        if self.synthetic is None and self._compares(draft):
            return draft, self._compare(draft, self._choice(logits, committed, draft, draws))
        verdict = self._verify(logits, committed, draft, draws)
        if self.synthetic is not None and draft.width:
            verdict = self.synthetic.exchange(verdict, draft, draws.at("synthetic", committed.lengths, draft.width))
        return draft, self._outcome(draft, verdict)

    def _drafted(self, committed: Committed, rows: list[Row], draws: Draws) -> tuple[Draft, Tensor]:
        """A draft, and the target's logits behind the text and behind each drafted token: [B, K + 1, V]."""
        budget = [row.limit - len(row.tokens) - 1 for row in rows]
        draft = None
        if self.drafter and max(budget) > 0:
            draft = self.drafter.propose(committed, None, budget, draws, self._view).to(self.target.device)
        last_B1 = committed.last(self.target.device)
        if draft is None:
            draft = self._no_draft(len(rows))
        block = last_B1 if draft.width == 0 else torch.cat([last_B1, draft.tokens_BK], 1)
        if draft.parents_BK is None:
            return draft, self.target.forward(self._cache, block).logits
        tree = TreeBlock.below_root(draft.parents_BK)
        return draft, self.target.forward(self._cache, block, tree=tree).logits

    def _compares(self, draft: Draft) -> bool:
        """Whether tokens are accepted that equal the target's choice: greedy, or a tree of deterministic tokens."""
        return self.sampling.greedy or (draft.parents_BK is not None and draft.probs_BKV is None)

    def _choice(self, logits: Tensor, committed: Committed, draft: Draft, draws: Draws) -> Tensor:
        """The target's token behind every token of the block, int64 [B, K + 1]: its argmax, or a draw."""
        seen = self._seen(committed, draft)
        if self.sampling.greedy:
            return self.sampling.choose(logits, seen)
        u_next = draws.at("target", committed.lengths, draft.width + 1)
        depth = TreeBlock.below_root(draft.parents_BK).depth_BT  # draws belong to positions
        return sample(self.sampling.probabilities(logits, seen), u_next.gather(1, depth))

    def _compare(self, draft: Draft, choice: Tensor) -> list[Reply]:
        """Tokens are compared where they are read, which takes the device no operations."""
        if draft.width == 0:
            return [Reply(0, 0, [], token) for token in self._read(draft, choice)]
        if draft.parents_BK is not None:
            return self._compare_trees(draft, choice)
        members, width = len(draft.forwards), draft.width
        reply = []
        for drafted, *rest in self._read(draft, draft.tokens_BK, choice):
            tokens, chosen = rest[members : members + drafted], rest[members + width :]
            reply.append(Reply(accepted_greedily(tokens, chosen), drafted, rest[:members], chosen))
        return reply

    def _compare_trees(self, draft: Draft, choice: Tensor) -> list[Reply]:
        members, width = len(draft.forwards), draft.width
        reply = []
        for _, *rest in self._read(draft, draft.tokens_BK, draft.parents_BK, choice):
            forwards, tokens = rest[:members], rest[members : members + width]
            parents, chosen = rest[members + width : members + 2 * width], rest[members + 2 * width :]
            path = matching_path(parents, tokens, chosen)
            emitted = [chosen[0], *(chosen[node + 1] for node in path)]
            drafted = sum(parent != ABSENT for parent in parents)
            reply.append(Reply(len(path), drafted, forwards, emitted, path, depth_of(parents)))
        return reply

    def _outcome(self, draft: Draft, verdict: Verdict) -> list[Reply]:
        """What was verified on the device."""
        if draft.width == 0:
            return [Reply(0, 0, [], token) for token in self._read(draft, verdict.emitted)]
        members, width = len(draft.forwards), draft.width
        if draft.parents_BK is None:
            read = self._read(draft, verdict.accepted_B.unsqueeze(1), verdict.emitted)
            return [Reply(rest[members], drafted, rest[:members], rest[members + 1 :]) for drafted, *rest in read]
        reply = []
        found = verdict.accepted_B.unsqueeze(1), draft.parents_BK, verdict.path_BK, verdict.emitted
        for _, *rest in self._read(draft, *found):
            forwards, accepted, rest = rest[:members], rest[members], rest[members + 1 :]
            parents, path, emitted = rest[:width], rest[width : width + accepted], rest[2 * width :]
            drafted = sum(parent != ABSENT for parent in parents)
            reply.append(Reply(accepted, drafted, forwards, emitted, path, depth_of(parents)))
        return reply

    def _read(self, draft: Draft, *found: Tensor) -> list[list[int]]:
        """The one read from the device of a round: in each row tokens drafted, forwards by member, and ``found``.

        Without a draft it is what was found alone.
        """
        if draft.width == 0:
            return found[0].tolist()
        if draft.length_B is None and all(isinstance(count, int) for count in draft.forwards.values()):
            known = [draft.width, *draft.forwards.values()]
            return [[*known, *row] for row in torch.cat(found, 1).tolist()]
        counts = [draft.width if draft.length_B is None else draft.length_B, *draft.forwards.values()]
        columns = [
            torch.full_like(found[0][:, :1], count) if isinstance(count, int) else count.unsqueeze(1)
            for count in counts
        ]
        return torch.cat([*columns, *found], 1).tolist()

    def _no_draft(self, rows: int) -> Draft:
        if self._empty is None or len(self._empty.tokens_BK) != rows:
            self._empty = Draft.empty(rows, self.target.device)
        return self._empty

    def _seen(self, committed: Committed, draft: Draft) -> Tensor | None:
        """For a penalty: the tokens before each of the block's."""
        if committed.seen_BV is None:
            return None
        return seen_along(committed.seen_BV, draft.tokens_BK, draft.parents_BK)

    def _verify(self, logits: Tensor, committed: Committed, draft: Draft, draws: Draws) -> Verdict:
        seen = self._seen(committed, draft)
        if self.sampling.greedy:
            return verify_greedy(self.sampling.choose(logits, seen), draft)
        starts, width = committed.lengths, draft.width
        u_next = draws.at("target", starts, width + 1)
        u_accept_BK = draws.at("accept", starts, width)
        verify = verify_sampled if draft.parents_BK is None else verify_tree
        return verify(self.sampling.probabilities(logits, seen), draft, u_accept_BK, u_next)

    def _settle(self, committed: Committed, rows: list[Row], draft: Draft, reply: list[Reply], started: float) -> None:
        """Emit the round's tokens, end rows, and roll the caches back to what is committed."""
        read = [length - draft.width - 1 for length in self._cache.lengths]  # before the round's forward
        emitted: list[list[int]] = []
        agreed: list[int] = []
        for row, own in zip(rows, reply, strict=True):
            tokens, row.finish_reason = self._cut(row, own.tokens[: own.accepted + 1])
            emitted.append(tokens)
            agreed.append(min(own.accepted, len(tokens)))
            row.tokens += tokens
        committed.grow(emitted)
        # The last emitted token is not read yet, in either model.
        if draft.parents_BK is None:
            self._cache.rollback([length + len(tokens) for length, tokens in zip(read, emitted, strict=True)])
            paths = None
        else:
            paths = [own.path[:count] for own, count in zip(reply, agreed, strict=True)]
            kept = [
                [0, *(node + 1 for node in path[: len(tokens) - 1])]
                for path, tokens in zip(paths, emitted, strict=True)
            ]
            self._cache.keep_path(read, kept)
        if self.drafter:
            self.drafter.commit(agreed) if paths is None else self.drafter.commit(agreed, paths)
        if committed.seen_BV is not None:
            for place, tokens in enumerate(emitted):
                committed.seen_BV[place, tokens] = True
        members = tuple(draft.forwards)
        seconds = (time.perf_counter() - started) / len(rows)
        for place, (row, own) in enumerate(zip(rows, reply, strict=True)):
            row.rounds.append(Round(own, len(emitted[place]), seconds, members, *draft.written_by(place)))

    def _cut(self, row: Row, tokens: list[int]) -> tuple[list[int], str | None]:
        """A round's tokens up to and including the first that ends the row, and why it ends there."""
        reason = "length" if len(row.tokens) + len(tokens) >= row.limit else None
        end = next((place for place, token in enumerate(tokens) if token in self.eos_ids), None)
        if end is not None:
            tokens, reason = tokens[: end + 1], "eos"
        if self.stop_strings is not None:
            count = self.stop_strings.end(row.tokens, tokens)
            if count is not None:
                tokens, reason = tokens[:count], "stop"
        return tokens, reason

    def _leave(self, committed: Committed, rows: list[Row], draws: Draws) -> list[Row]:
        """Drop finished rows: the last rows move into their places."""
        kept = surviving_order([row.finish_reason is None for row in rows])
        if not kept:
            return []
        self._cache.keep(kept)
        if self.drafter:
            self.drafter.keep(kept)
        draws.keep(kept)
        committed.keep(kept)
        return [rows[row] for row in kept]


def surviving_order(alive: Sequence[bool]) -> list[int]:
    """The rows that stay, such that each keeps its place or moves forward into a free one, and few move.

    Example:
        >>> surviving_order([True, False, True, True])
        [0, 3, 2]
    """
    total = sum(alive)
    movers = [row for row in range(len(alive) - 1, total - 1, -1) if alive[row]]
    return [place if alive[place] else movers.pop(0) for place in range(total)]


class Conversation:
    """A chat whose next turn reads only what is new, in the target and in the drafter.

    The decoder may be used for other things in between: what the caches hold is compared with the prompt.

    Args:
        decoder: decodes the turns.
        sample_id: keys the draws of this conversation.
    """

    def __init__(self, decoder: Decoder, sample_id: int = 0) -> None:
        self.decoder = decoder
        self.sample_id = sample_id

    def reply(self, prompt: Sequence[int], max_new_tokens: int, exclusions: Exclusions | None = None) -> Completion:
        """Answer a turn.

        Args:
            prompt: the whole conversation up to this turn, as the chat template renders it.
            max_new_tokens: of the answer.
            exclusions: what must not be copied from the conversation so far.
        """
        closed = None if exclusions is None else [exclusions]
        [completion] = self.decoder.generate([prompt], max_new_tokens, [self.sample_id], True, closed)
        return completion
