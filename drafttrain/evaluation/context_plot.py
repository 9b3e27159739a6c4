"""The report's plot of longer prompts."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from drafttrain.evaluation.schema import ContextBucket, Report

_PANELS = {
    "tau": "tau: tokens per round",
    "tokens_per_second": "tokens a second, decoding",
    "drafter_kv_bytes": "drafter's keys and values, bytes",
}


def contexts(report: Report) -> Figure | None:
    """A row a decoding setting: tau, decoding speed and the drafter's memory against the length of the prompt."""
    samplings = list(dict.fromkeys(bucket.sampling for bucket in report.contexts))
    if not samplings:
        return None
    figure, axes = pyplot.subplots(len(samplings), 3, figsize=(12, 0.6 + 3.2 * len(samplings)), squeeze=False)
    for row, sampling in zip(axes, samplings, strict=True):
        for axis, (name, label) in zip(row, _PANELS.items(), strict=True):
            _panel(axis, [bucket for bucket in report.contexts if bucket.sampling == sampling], name)
            axis.set_ylabel(label)
        row[0].set_title(sampling, loc="left")
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _panel(axis: Axes, buckets: list[ContextBucket], name: str) -> None:
    for method in dict.fromkeys(bucket.method for bucket in buckets):
        own = [each for each in buckets if each.method == method and getattr(each, name) is not None]
        if own:
            axis.plot([each.context for each in own], [getattr(each, name) for each in own], "o-", label=method)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("tokens of the prompt, at most")
    axis.set_ylim(bottom=0)
