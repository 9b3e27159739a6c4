"""Near-duplicate removal: word shingles, banded MinHash to find candidates, exact Jaccard to decide.

Duplicates between a training and a held-out split would make every held-out figure too good, so they go before the
split is made. MinHash only proposes pairs; a pair counts as a duplicate by its exact Jaccard similarity, so that a
threshold means what it says. Broder 1997 (resemblance of documents); banding as in Leskovec et al., Mining of
Massive Datasets, chapter 3.
"""

import re
import zlib
from collections import defaultdict

import numpy as np

SHINGLE = 5
"""Words of one shingle. Shorter ones would find topics alike, longer ones would forgive no edit."""

_HASHES = 128
_MISSED = 1e-3  # chance that a pair exactly at the threshold is not even looked at
_MIX = np.uint64(0x9E3779B97F4A7C15)
# ideographs and kana have no spaces between words, so each stands alone
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")


def shingles(text: str, size: int = SHINGLE) -> np.ndarray:
    """Hashes of all runs of `size` words of a text, each once, sorted.

    Case and white space do not count; punctuation marks are words of their own. A text of fewer words is one shingle.

    Returns:
        [n] uint64, n >= 1 unless the text has no words at all.
    """
    words = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())], dtype=np.uint64)
    if len(words) == 0:
        return words
    size = min(size, len(words))
    runs = np.zeros(len(words) - size + 1, dtype=np.uint64)
    for at in range(size):
        runs = _scramble(runs * _MIX + words[at : at + len(runs)] + np.uint64(1))
    return np.unique(runs)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a intersect b| / |a union b| of two sorted shingle sets; 1.0 for two empty ones."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - common
    return common / union if union else 1.0


class Seen:
    """Texts met so far, and whether another one repeats any of them.

    A text is compared with the kept ones only, so of a chain of ever smaller changes those stay that differ enough
    from all that stayed before them.

    Args:
        threshold: Jaccard similarity of word shingles from which two texts are alike; 1.0 means equal shingle sets.

    Raises:
        ValueError: the threshold is not in (0, 1].
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"near-duplicate threshold must be in (0, 1], got {threshold}")
        self._threshold = threshold
        self._rows = _rows_per_band(threshold)
        self._buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        self._kept: dict[int, np.ndarray] = {}
        self._number = 0

    def add(self, text: str) -> int | None:
        """The number (0, 1, ... in order of `add`) of the kept text that this one repeats; None if it is kept."""
        mine = shingles(text)
        keys = _band_keys(mine, self._rows)
        candidates = sorted({other for key in keys for other in self._buckets[key]})
        twin = next((other for other in candidates if jaccard(mine, self._kept[other]) >= self._threshold), None)
        if twin is None:
            self._kept[self._number] = mine
            for key in keys:
                self._buckets[key].append(self._number)
        self._number += 1
        return twin


def _rows_per_band(threshold: float) -> int:
    """Most MinHash rows a band may have, so that pairs at the threshold are still all but surely looked at."""
    fitting = [rows for rows in range(1, 17) if (1 - threshold**rows) ** (_HASHES // rows) <= _MISSED]
    return max(fitting, default=1)


def _band_keys(shingle_set: np.ndarray, rows: int) -> list[tuple[int, bytes]]:
    """Bucket keys of a set: alike sets share at least one key with high probability."""
    if len(shingle_set) == 0:
        return [(0, b"")]
    lowest = np.full(_HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingle_set), 4096):  # bounds the temporary array for book-length prompts
        block = shingle_set[start : start + 4096, None] ^ _SALTS[None, :]
        lowest = np.minimum(lowest, _scramble(block).min(axis=0))
    return [(band, lowest[band * rows : (band + 1) * rows].tobytes()) for band in range(_HASHES // rows)]


def _scramble(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every input bit changes about half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_SALTS = _scramble(np.arange(1, _HASHES + 1, dtype=np.uint64) * _MIX)
