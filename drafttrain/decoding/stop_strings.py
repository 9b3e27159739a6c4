"""Stop strings: an answer ends with the token that completes one of them, wherever in a block that token lies."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from drafttrain.errors import UserError


class StopStrings:
    """Looks for strings in the text of an answer; the prompt does not count.

    Args:
        tokenizer: the target's.
        strings: any of them ends an answer.

    Raises:
        UserError: an empty string, which every answer contains.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        if not all(strings):
            raise UserError("a stop string is empty; every text contains the empty string.")
        self._tokenizer = tokenizer
        self._strings = list(strings)
        # A token of a text is at least a byte of it, so the start of a string lies no further back than this.
        self._reach = max((len(text.encode()) for text in strings), default=0)

    def end(self, before: Sequence[int], tokens: Sequence[int]) -> int | None:
        """How many of the new tokens it takes to complete a stop string, None if they complete none.

        Args:
            before: tokens of the answer so far, which contain none.
            tokens: that follow.
        """
        tail = list(before[max(0, len(before) - self._reach) :])
        if not self._found([*tail, *tokens]):
            return None
        return next(count for count in range(1, len(tokens) + 1) if self._found([*tail, *tokens[:count]]))

    def _found(self, tokens: list[int]) -> bool:
        text = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return any(string in text for string in self._strings)
