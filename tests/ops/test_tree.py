"""Trees as arrays of parents: ancestry and depth."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.ops.tree import ABSENT, ROOT, TreeBlock, ancestry, below


@st.composite
def trees(draw, most: int = 14) -> list[int]:
    """Parents of up to ``most`` nodes, each an earlier node, the root, or absent."""
    parents: list[int] = []
    for place in range(draw(st.integers(1, most))):
        candidates = [ROOT, ABSENT, *[node for node in range(place) if parents[node] != ABSENT]]
        parents.append(draw(st.sampled_from(candidates)))
    return parents


def climb(parents: list[int], node: int) -> list[int]:
    """A node and all above it."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path


@given(trees())
def test_ancestry_is_what_climbing_finds(parents):
    seen = ancestry(torch.tensor([parents]))[0]
    for node in range(len(parents)):
        assert seen[node].nonzero().flatten().tolist() == sorted(climb(parents, node))


def test_a_long_chain_is_seen_from_end_to_end():
    for length in range(1, 40):
        seen = ancestry(torch.arange(-1, length - 1).unsqueeze(0))[0]
        assert torch.equal(seen, torch.ones(length, length, dtype=torch.bool).tril())


@given(trees())
def test_the_root_is_seen_by_all_nodes_and_depth_counts_from_it(parents):
    block = TreeBlock.below_root(torch.tensor([parents]))
    present = torch.tensor([parent != ABSENT for parent in parents])
    assert torch.equal(block.seen_BQT[0, 1:, 0], present)
    depths = [len(climb(parents, node)) if parents[node] != ABSENT else 0 for node in range(len(parents))]
    assert block.depth_BT[0].tolist() == [0, *depths]
    assert (block.size, block.before) == (len(parents) + 1, 0)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_a_tree_grown_level_by_level_is_the_tree_of_its_parents(widths, data):
    parents: list[int] = []
    block, first = None, 0
    for level, width in enumerate(widths):
        above = [ABSENT, *range(widths[level - 1])] if level else [ROOT, ABSENT]
        chosen = [data.draw(st.sampled_from(above)) for _ in range(width)]
        parents += [parent if parent < 0 else first - widths[level - 1] + parent for parent in chosen]
        first += width
        block = below(block, torch.tensor([chosen]))
    seen = ancestry(torch.tensor([parents]))[0]
    assert torch.equal(block.seen_BQT[0], seen[-widths[-1] :])
    assert torch.equal(block.depth_BT[0], seen.sum(1) - 1)
