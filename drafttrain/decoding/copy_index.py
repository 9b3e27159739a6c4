"""Where a text could be copied from: an index of its gamma-grams, and a guess kept after every token.

Both are functions of the text alone, one dictionary look-up and a few comparisons a token: the guess after each token
says from where a copier would continue there, and whether such guesses have been right of late, whoever wrote the
tokens. So what is copied depends neither on how the text came about nor on drafts that were rejected, and a text can be
shortened again (an uncommitted prefix, an edited history).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

SOURCES = ("earliest", "latest", "longest")

_CANDIDATES = 8
"""Occurrences that the longest match is chosen from, the latest ones."""

_MOST_MISSES = 6
"""More misses than this count no more."""

_REACH = 64
"""Tokens that matches are compared over."""


class Guess(NamedTuple):
    """What a copier would do after some token.

    Attributes:
        source: position that it would copy from; 0 where nothing matches.
        confirmed: whether the token before was guessed right.
        misses: copies in a row that would have been wrong at their first token.
        resume: length of text before which it waits.
    """

    source: int = 0
    confirmed: bool = False
    misses: int = 0
    resume: int = 0


class CopyIndex:
    """The gamma-grams of one text and the guesses behind its tokens.

    Grams are looked up as tuples of token ids, so equality is checked by the dictionary.

    Args:
        gamma: tokens that must match.
        source: which occurrence to copy from: the "earliest" (the published rule), the "latest", or of the latest few
            the one with the "longest" match to the left, of equals the latest.
        follow: stay with a source that was right; when it is wrong at one token, try what follows that one there.
        backoff: after misses, this many more tokens must match for each of them in a row.
        cooldown: tokens to wait after a miss, twice as many after each further one in a row; a guess that would have
            been right ends the wait.
    """

    def __init__(self, gamma: int, source: str, follow: bool, backoff: int, cooldown: int) -> None:
        self.gamma = gamma
        self.source = source
        self.follow = follow
        self.backoff = backoff
        self.cooldown = cooldown
        self.text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # by gram, where its first or its latest occurrence ends
        self._matches: list[int] = []  # of the gram that ends with each token, the end of an earlier one; 0 if none
        self._guesses: list[Guess] = []

    @property
    def guess(self) -> Guess:
        """What a copier would do after the last token."""
        return self._guesses[-1] if self._guesses else _NONE

    @property
    def place(self) -> int | None:
        """The position to copy from behind the last token; None where nothing is to be copied."""
        guess = self.guess
        return guess.source if guess.source and self._tried(guess, len(self.text)) else None

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        text, matches, guesses = self.text, self._matches, self._guesses
        for token in tokens:
            guess = self.guess
            text.append(token)
            match = self._enter()
            matches.append(match)
            guesses.append(self._next(guess, token, match))

    def shorten(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        text, gamma, ends = self.text, self.gamma, self._ends
        for end in range(len(text), max(length, gamma - 1), -1):
            gram, match = tuple(text[end - gamma : end]), self._matches[end - 1]
            if not match:
                del ends[gram]
            elif self.source != "earliest":
                ends[gram] = match
        del text[length:], self._matches[length:], self._guesses[length:]

    def matched(self, source: int, most: int, end: int | None = None) -> int:
        """How many tokens before ``source`` are those before ``end`` (of the text), ``most`` at most."""
        text, end = self.text, len(self.text) if end is None else end
        most = min(most, source)
        count = 0
        while count < most and text[source - 1 - count] == text[end - 1 - count]:
            count += 1
        return count

    def _enter(self) -> int:
        """Index the gram at the end; the end of an earlier occurrence of it, 0 if there is none."""
        text, gamma = self.text, self.gamma
        end = len(text)
        if end < gamma:
            return 0
        gram = tuple(text[end - gamma :])
        if self.source == "earliest":
            match = self._ends.setdefault(gram, end)
            return match if match < end else 0
        match = self._ends.get(gram, 0)
        self._ends[gram] = end
        return match

    def _next(self, guess: Guess, token: int, match: int) -> Guess:
        """The guess behind a token, from the one before it and an earlier end of its gram."""
        source, confirmed, misses, resume = guess
        right = bool(source) and self.text[source] == token
        if right:
            if misses:
                misses = 0 if self._tried(guess, len(self.text) - 1) else misses
                resume = 0
            if self.follow:
                return Guess(source + 1, True, misses)
        elif source and not confirmed and self._tried(guess, len(self.text) - 1):
            misses = min(misses + 1, _MOST_MISSES)
            if self.cooldown:
                resume = len(self.text) + (self.cooldown << (misses - 1))
        if match:
            found = self._longest(match) if self.source == "longest" else match
            return Guess(found, right and found == source + 1, misses, resume)
        if self.follow and confirmed:
            return Guess(source + 1, False, misses, resume)
        return Guess(0, False, misses, resume) if misses else _NONE

    def _tried(self, guess: Guess, end: int) -> bool:
        """Whether a copier would follow the guess behind ``end`` tokens."""
        if not guess.misses:
            return True
        if end < guess.resume:
            return False
        needed = self.gamma + guess.misses * self.backoff
        return not self.backoff or self.matched(guess.source, needed, end) >= needed

    def _longest(self, match: int) -> int:
        """Of the latest occurrences of the gram at the end, the one that most tokens before it match, too."""
        best, most = match, 0
        for _ in range(_CANDIDATES):
            if not match:
                break
            count = self.matched(match, _REACH)
            if count > most:
                best, most = match, count
            match = self._matches[match - 1]
        return best


_NONE = Guess()
