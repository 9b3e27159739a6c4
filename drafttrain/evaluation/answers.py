"""Does a model answer the reference tasks? Teacher-forced, so one forward an example.

Greedy decoding writes the reference answer exactly if and only if, reading that answer, the model's most likely token
is right at every position: no decoding is needed to know the share of exact answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from drafttrain.evaluation.tasks import HELD_OUT, Example, generate


@dataclass
class Answers:
    """Counts over answers: tokens, right tokens, answers, exact answers."""

    tokens: int = 0
    right_tokens: int = 0
    answers: int = 0
    exact: int = 0

    def add(self, right: torch.Tensor) -> None:
        """Count one answer from the bool [T] of its right tokens (end token included)."""
        self.tokens += right.numel()
        self.right_tokens += int(right.sum())
        self.answers += 1
        self.exact += int(right.all())

    @property
    def exact_share(self) -> float:
        """Exact answers / answers."""
        return self.exact / max(1, self.answers)

    @property
    def token_share(self) -> float:
        """Right tokens / tokens."""
        return self.right_tokens / max(1, self.tokens)


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[range]]:
    """Token ids of a whole conversation, and the range of each answer (its end token included)."""
    ids, ranges = [tokenizer.bos_token_id], []
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    for turn in example.turns:
        ids += [user, *tokenizer(turn.user, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id, assistant]
        start = len(ids)
        ids += [*tokenizer(turn.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ranges.append(range(start, len(ids)))
    return ids, ranges


def held_out_examples(
    kind: str, length: int, answers: int, tokenizer: PreTrainedTokenizerBase, questions: int = 4
) -> Iterator[Example]:
    """Held-out examples of a kind until `answers` answers are covered."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    seed = HELD_OUT
    while answers > 0:
        example = generate(kind, seed, length, count, questions)
        seed += 1
        answers -= len(example.turns)
        yield example


@torch.no_grad()
def answer_examples(model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Iterator[Example]) -> Answers:
    """Teacher-forced answers of a causal language model in its own dtype, one example a forward."""
    total = Answers()
    for example in examples:
        ids, ranges = render(example, tokenizer)
        states = model.get_decoder()(input_ids=torch.tensor([ids], device=model.device), use_cache=False)[0]
        for span in ranges:
            at = torch.arange(span.start, span.stop, device=model.device)
            logits = model.lm_head(states[0, at - 1])
            total.add(logits.argmax(-1).cpu() == torch.tensor(ids)[span.start : span.stop])
    return total


@torch.no_grad()
def code_loss(model: nn.Module, ids: torch.Tensor, length: int, rows: int) -> float:
    """Mean next-token loss in nats over the first `rows` stretches of `length` tokens of the held-out code."""
    total = 0.0
    for row in range(rows):
        block = ids[row * length : (row + 1) * length].long().unsqueeze(0).to(model.device)
        logits = model(input_ids=block, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, block[0, 1:]).item()
    return total / rows
