"""The longest ending of a text that occurs in it before, kept up in constant time a token: a suffix automaton.

States are classes of substrings that end at the same places (Blumer et al. 1985). The longest ending that occurs
elsewhere is the suffix link of the state of the whole text, and each state knows where it ends first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Suffixes:
    """A text and its automaton.

    Attributes:
        text: the tokens read.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._first = [0]  # where the state's substrings end first
        self._last = 0

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        following, links, lengths, firsts = self._next, self._link, self._length, self._first
        last = self._last
        for token in tokens:
            self.text.append(token)
            state = len(following)
            following.append({})
            lengths.append(lengths[last] + 1)
            firsts.append(len(self.text))
            links.append(0)
            while last >= 0 and token not in following[last]:
                following[last][token] = state
                last = links[last]
            if last >= 0:
                links[state] = self._split(last, following[last][token], token)
            last = state
        self._last = last

    def shorten(self, length: int) -> None:
        """Forget all tokens but the first ``length``; an automaton cannot, so it reads them again."""
        text = self.text[:length]
        self.__init__()
        self.extend(text)

    def _split(self, last: int, found: int, token: int) -> int:
        """The state whose longest substring is that of ``last`` and a token: ``found``, or a part of it."""
        following, links, lengths = self._next, self._link, self._length
        if lengths[found] == lengths[last] + 1:
            return found
        part = len(following)
        following.append(dict(following[found]))
        lengths.append(lengths[last] + 1)
        self._first.append(self._first[found])
        links.append(links[found])
        links[found] = part
        while last >= 0 and following[last].get(token) == found:
            following[last][token] = part
            last = links[last]
        return part

    def match(self, more: Sequence[int] = ()) -> tuple[int, int]:
        """The longest ending of text ++ more that occurs before in text ++ more, at its earliest occurrence.

        Returns:
            where that occurrence ends and how long it is; (0, 0) if the last token is new.
        """
        if not more:
            state = self._link[self._last] if self.text else 0
            return self._first[state] if state > 0 else 0, self._length[max(state, 0)]
        state, length = self._last, len(self.text)
        for token in more:
            while state > 0 and token not in self._next[state]:
                state = self._link[state]
                length = self._length[state]
            if token in self._next[state]:
                state, length = self._next[state][token], length + 1
        best = (self._first[state], length) if length else (0, 0)
        return self._within(more, *best)

    def _within(self, more: Sequence[int], end: int, length: int) -> tuple[int, int]:
        """The same, with occurrences that end inside of ``more``."""
        whole = self.text + list(more) if len(self.text) < 4 * len(more) else _Joined(self.text, more)
        total = len(self.text) + len(more)
        for place in range(len(self.text) + 1, total):
            count = 0
            while count < place and whole[place - 1 - count] == whole[total - 1 - count]:
                count += 1
            if count > length:
                end, length = place, count
        return end, length


class _Joined:
    """Two sequences read as one, without copying them."""

    def __init__(self, first: Sequence[int], second: Sequence[int]) -> None:
        self.first, self.second = first, second

    def __getitem__(self, place: int) -> int:
        behind = place - len(self.first)
        return self.first[place] if behind < 0 else self.second[behind]
