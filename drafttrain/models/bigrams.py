"""A bigram table: the most frequent successor of every token, learned from text in the target's tokens."""

# V vocabulary

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from drafttrain.errors import UserError

UNSEEN = -1


@dataclass(frozen=True)
class BigramTable:
    """Successors by token.

    Attributes:
        successors: [V] token ids; `UNSEEN` where the token never had one.
        tokenizer: hash of the tokenizer (`models.fingerprint.tokenizer_hash`).
        pairs: pairs of tokens that were counted.
    """

    successors: list[int]
    tokenizer: str
    pairs: int

    def save(self, path: Path) -> None:
        """Write it as safetensors, whole or not at all."""
        temporary = path.with_suffix(f".{os.getpid()}-{time.time_ns()}.tmp")
        tensors = {"successors": torch.tensor(self.successors, dtype=torch.int32)}
        try:
            save_file(tensors, temporary, {"tokenizer": self.tokenizer, "pairs": str(self.pairs)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, tokenizer: str) -> BigramTable:
        """Read a table.

        Args:
            path: what `save` wrote.
            tokenizer: hash of the target's.

        Raises:
            UserError: it is damaged, or of another tokenizer.
        """
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                table = cls(file.get_tensor("successors").tolist(), facts["tokenizer"], int(facts["pairs"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path} is no bigram table ({error}); make it again with data_prep/bigrams.py.") from None
        if table.tokenizer != tokenizer:
            raise UserError(
                f"the bigram table in {path} was learned in tokens of the tokenizer {table.tokenizer[:8]}, but the "
                f"target's is {tokenizer[:8]}; learn one for this target with data_prep/bigrams.py."
            )
        return table


def learn(texts: Iterable[Sequence[int]], vocabulary: int, tokenizer: str) -> BigramTable:
    """Count pairs of neighbours and keep the most frequent successor of each token, of equals the lowest id.

    Args:
        texts: sequences of token ids below ``vocabulary``; pairs do not reach from one into the next.
        vocabulary: V.
        tokenizer: its hash.
    """
    parts = [np.asarray(text, dtype=np.int64) for text in texts if len(text) > 1]
    keys = np.concatenate([text[:-1] * vocabulary + text[1:] for text in parts] or [np.zeros(0, np.int64)])
    found, counts = np.unique(keys, return_counts=True)
    order = np.lexsort((found, -counts, found // vocabulary))  # by first token, the most frequent pair first
    firsts, places = np.unique(found[order] // vocabulary, return_index=True)
    successors = np.full(vocabulary, UNSEEN, dtype=np.int64)
    successors[firsts] = found[order][places] % vocabulary
    return BigramTable(successors.tolist(), tokenizer, len(keys))
