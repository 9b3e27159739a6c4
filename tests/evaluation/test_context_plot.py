"""The plot of longer prompts: a method has one colour in all panels, also where another is missing."""

from __future__ import annotations

import types

from drafttrain.evaluation.context_plot import contexts
from drafttrain.evaluation.schema import ContextBucket


def test_a_method_has_one_colour_and_lengths_are_ticks():
    buckets = [
        ContextBucket(method, "greedy", context, 2, 10, 2.0, 9.0, 0.1, kept)
        for method, kept in (("Autoregressive()", None), ("a", 5), ("b", 5))
        for context in (1024, 3000, 8192)
    ]
    figure = contexts(types.SimpleNamespace(contexts=buckets))
    colours = [{line.get_label(): line.get_color() for line in axis.get_lines()} for axis in figure.axes]
    assert set(colours[2]) == {"a", "b"}  # no drafter, no memory
    assert all(panel[name] == colours[0][name] for panel in colours for name in panel)
    figure.canvas.draw()
    for axis in figure.axes:
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1k", "3000", "8k"]
    assert contexts(types.SimpleNamespace(contexts=[])) is None
