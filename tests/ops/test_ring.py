from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.ops.ring import Ring

CPU = torch.device("cpu")
WINDOW, MARGIN = 5, 3


def new_ring(rows: int) -> Ring:
    return Ring(rows, WINDOW, MARGIN, heads=2, size=3, dtype=torch.float32, device=CPU)


def write(ring: Ring, tokens: list[list[int]], counts: list[int] | None = None) -> None:
    states = torch.tensor(tokens, dtype=torch.float32)[:, None, :, None].expand(-1, 2, -1, 3)
    ring.put(states, -states, ring.next_positions(states.shape[2]), counts)
    ring.advance(states.shape[2], counts)


def seen(ring: Ring) -> list[list[int]]:
    """What the last token of every row sees, in the order of positions."""
    query_B1 = torch.tensor(ring.lengths).unsqueeze(1) - 1
    found = []
    for row, mask_R in enumerate(ring.visible(query_B1)[:, 0]):
        order = ring.positions_BR[row][mask_R].argsort()
        found.append([int(token) for token in ring.keys[row, 0, mask_R, 0][order]])
    return found


def test_a_query_sees_its_window_and_nothing_older():
    ring = new_ring(1)
    for token in range(20):
        write(ring, [[token]])
        assert seen(ring) == [list(range(max(0, token - WINDOW + 1), token + 1))]


def test_memory_does_not_grow_with_the_text():
    ring = new_ring(2)
    before, keys = ring.memory_bytes(), ring.keys
    for token in range(100):
        write(ring, [[token], [token]])
    assert ring.memory_bytes() == before
    assert ring.keys is keys


def test_padding_leaves_no_trace():
    ring = new_ring(2)
    write(ring, [list(range(8)), list(range(8))])
    write(ring, [[8, 9, 10, 11, 12, 13], [8, 99, 99, 99, 99, 99]], [6, 1])
    assert seen(ring) == [[9, 10, 11, 12, 13], [4, 5, 6, 7, 8]]


def test_what_was_skipped_is_not_seen():
    ring = new_ring(1)
    write(ring, [[0, 1, 2]])
    ring.skip([97])
    write(ring, [[100, 101]])
    assert seen(ring) == [[100, 101]]
    ring.rollback([101])
    assert ring.lengths == [96], "a part of the window before 101 was never read"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_after_anything_the_window_is_that_of_the_text(data):
    """Texts grow by ragged or even writes, lose tokens and lose rows; a row that went further back is read again."""
    ring = new_ring(3)
    texts: list[list[int]] = [[], [], []]
    fresh = iter(range(10**6))
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["write", "ragged", "back", "keep"])):
            case "write":
                width = data.draw(st.integers(1, MARGIN))
                more = [[next(fresh) for _ in range(width)] for _ in texts]
                write(ring, more)
                texts = [text + tokens for text, tokens in zip(texts, more, strict=True)]
            case "ragged":
                counts = [data.draw(st.integers(0, WINDOW + MARGIN)) for _ in texts]
                width = max(counts)
                if not width:
                    continue
                more = [[next(fresh) for _ in range(width)] for _ in texts]
                write(ring, more, counts)
                texts = [text + tokens[:count] for text, tokens, count in zip(texts, more, counts, strict=True)]
            case "back":
                texts = [text[: data.draw(st.integers(0, len(text)))] for text in texts]
                ring.rollback([len(text) for text in texts])
            case "keep" if len(texts) > 1:
                texts, _ = texts[:-1], ring.keep(range(len(texts) - 1))
        unread = [text[length:] for text, length in zip(texts, ring.lengths, strict=True)]
        if any(unread):
            width = max(map(len, unread))
            assert width <= WINDOW
            write(ring, [row + [-1] * (width - len(row)) for row in unread], [len(row) for row in unread])
        assert ring.lengths == [len(text) for text in texts]
        assert [row for row, text in zip(seen(ring), texts, strict=True) if text] == [
            text[-WINDOW:] for text in texts if text
        ]


@pytest.mark.parametrize("margin", [0, 1])
def test_without_a_margin_a_rejected_token_is_missed(margin):
    """The negative control: one token taken back needs a margin of one."""
    ring = Ring(1, WINDOW, margin, 2, 3, torch.float32, CPU)
    write(ring, [[0, 1, 2, 3, 4]])
    write(ring, [[5]])
    ring.rollback([5])
    assert ring.lengths == [5 if margin else 0]
