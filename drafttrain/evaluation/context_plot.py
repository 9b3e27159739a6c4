"""The report's plot of longer prompts."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    methods = list(dict.fromkeys(bucket.method for bucket in buckets))
    for number, method in enumerate(methods):
        own = [each for each in buckets if each.method == method and getattr(each, name) is not None]
        values = [getattr(each, name) for each in own]
        if own:  # one look in all panels; larger marks below, so that all of equal lines are seen
            look = {"color": f"C{number}", "markersize": 5 + 2 * (len(methods) - number - 1)}
            axis.plot([each.context for each in own], values, "o-", label=method, **look)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({bucket.context for bucket in buckets}))
    axis.minorticks_off()
    axis.xaxis.set_major_formatter(_tokens)
    axis.set_xlabel("tokens of the prompt, at most")
    axis.set_ylim(bottom=0)


def _tokens(context: float, _place: int | None = None) -> str:
    """A length as people say it.

    Example:
        >>> [_tokens(context) for context in (400, 1024, 8192, 3000)]
        ['400', '1k', '8k', '3000']
    """
    whole = round(context)
    return f"{whole // 1024}k" if whole % 1024 == 0 else str(whole)
