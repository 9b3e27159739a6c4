"""Max-Gram (Chen et al. 2023, section 4.3): copy behind the longest match, else follow a bigram table. No model.

The bottom of a drafting cascade: its cost is close to none, and a reviewer sorts out what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from drafttrain.decoding.copying import exclusions_of, proposable
from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, Setting
from drafttrain.decoding.exclusions import Excluded
from drafttrain.decoding.suffixes import Suffixes
from drafttrain.errors import UserError
from drafttrain.models.bigrams import UNSEEN, BigramTable
from drafttrain.ops.random import Draws

BIGRAMS = "bigrams"
"""Label of tokens that the table proposed."""


class MaxGram(Drafter):
    """Copies what followed the earliest of the longest matches of the text's end.

    Where the match stands so near to the end that fewer tokens follow, it is looked for once more behind them; what is
    missing still the bigram table adds, if there is one, as long as it knows a successor.

    Args:
        bigrams: the table; None proposes nothing where nothing matches.
        length: tokens to propose.
        least: tokens that must match; with fewer it abstains from copying.
        name: label of its copied tokens.
    """

    def __init__(
        self, bigrams: BigramTable | None = None, length: int = 10, least: int = 1, name: str = "max-gram"
    ) -> None:
        if length < 1 or least < 1:
            raise UserError(f"MaxGram's length and least must be at least 1, not {length} and {least}")
        self.name = name
        self.max_length = length
        self.least = least
        self.successors = bigrams.successors if bigrams is not None else []
        self._rows: list[Suffixes] = []
        self._excluded: list[Excluded] = []
        self._setting: Setting | None = None
        self._committed: Committed | None = None

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """Read the prompts; of a chat only what is new, unless what was said has changed."""
        kept = committed.shared_with(self._committed) if resume else None
        self._setting, self._committed = setting, committed
        if kept is None or len(self._rows) != 1 or kept[0] < len(self._rows[0].text):
            self._rows = [Suffixes() for _ in committed.tokens]
        self._excluded = [Excluded(each) for each in exclusions_of(committed)]
        self._read(committed)

    def propose(
        self,
        committed: Committed,
        prefix: Draft | None,
        budget: Sequence[int],
        random: Draws,
        target_view: object | None = None,
    ) -> Draft:
        """Deterministic tokens behind committed ++ prefix."""
        self._read(committed)
        behind = prefix.rows() if prefix is not None and prefix.width else [[]] * len(self._rows)
        found = [
            self._found(row, excluded, more, most)
            for row, excluded, more, most in zip(self._rows, self._excluded, behind, budget, strict=True)
        ]
        origins = [[origin for _, origin in row] for row in found]
        draft = Draft.of([[token for token, _ in row] for row in found], self.name, origins)
        if self.successors:
            draft.source = [[BIGRAMS if origin is None else self.name for origin in row] for row in origins]
        return draft

    def keep(self, rows: Sequence[int]) -> None:
        """Release all other rows."""
        self._rows = [self._rows[row] for row in rows]
        self._excluded = [self._excluded[row] for row in rows]

    def _read(self, committed: Committed) -> None:
        for suffixes, excluded, tokens in zip(self._rows, self._excluded, committed.tokens, strict=True):
            suffixes.extend(tokens[len(suffixes.text) :])
            if excluded.any:
                excluded.read(tokens)

    def _found(
        self, suffixes: Suffixes, excluded: Excluded, more: list[int], most: int
    ) -> list[tuple[int, int | None]]:
        """Tokens and where they were copied from."""
        length = min(self.max_length, most)
        if length < 1:
            return []
        found: list[tuple[int, int | None]] = []
        for _ in range(2):
            behind = more + [token for token, _ in found]
            source, matched = suffixes.match(behind)
            if matched < self.least:
                break
            text = suffixes.text
            copied = text[source : source + length - len(found)]
            if source + len(copied) >= len(text):
                copied = [*copied, *behind[max(0, source - len(text)) :]][: length - len(found)]
            found += [(token, source + place) for place, token in enumerate(copied)]
            if len(found) >= length:
                break
        last = found[-1][0] if found else more[-1] if more else suffixes.text[-1]
        while len(found) < length and last < len(self.successors) and self.successors[last] != UNSEEN:
            last = self.successors[last]
            found.append((last, None))
        tokens = proposable([token for token, _ in found], self._setting.eos_ids, self._setting.vocabulary)
        if excluded.any:
            places = [-1 if origin is None else origin for _, origin in found[: len(tokens)]]
            tokens = tokens[: excluded.allowed([*suffixes.text, *more], tokens, places)]
        return found[: len(tokens)]
