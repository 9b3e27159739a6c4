"""The report's plots: PNG files of fixed names, drawn from a `Report` alone.

Colours are Okabe and Ito's, which colour-blind readers tell apart; every kind of method also has its own marker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from drafttrain.evaluation.context_plot import contexts
from drafttrain.evaluation.load import Load
from drafttrain.evaluation.methods import head_of, kind_of, parameter_of
from drafttrain.evaluation.schema import MethodResult, Report, SweepPoint
from drafttrain.evaluation.sources_plot import gamma, sources, turns

COLORS = {
    "autoregressive": "#767676",
    "fixed": "#0072B2",
    "head": "#D55E00",
    "confidence": "#009E73",
    "entropy": "#CC79A7",
    "oracle": "#000000",
    "known": "#8C6D31",
    "other": "#56B4E9",
}
MARKERS = {
    "autoregressive": "|",
    "fixed": "o",
    "head": "D",
    "confidence": "s",
    "entropy": "^",
    "oracle": "*",
    "known": "P",
    "other": "v",
}
NAMES = {
    "fixed": "fixed length",
    "head": "acceptance head",
    "confidence": "confidence",
    "entropy": "entropy bound",
    "oracle": "oracle (perfect stopping)",
    "known": "bound of all heads",
    "other": "other",
    "autoregressive": "no drafter",
}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 144,
}


def draw_all(report: Report, folder: Path) -> dict[str, str]:
    """Draw every plot that the report has data for into `folder`.

    Returns:
        File by name of plot, the folder's own name in front.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, draw in PLOTS.items():
        with pyplot.rc_context(STYLE):
            figure = draw(report)
            path = folder / f"{name}.png"
            path.unlink(missing_ok=True)
            if figure is None:
                continue
            figure.savefig(path)
            pyplot.close(figure)
        drawn[name] = f"{folder.name}/{path.name}"
    return drawn


def samplings(report: Report) -> list[str]:
    """Names of the decoding settings that have measured methods, in the report's order."""
    return list(dict.fromkeys(row.sampling for row in report.methods))


def _panels(report: Report, width: float, height: float) -> tuple[Figure, list[tuple[str, Axes]]]:
    """A figure with one panel for each decoding setting, two in a row."""
    names = samplings(report)
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for unused in axes.flat[len(names) :]:
        unused.set_visible(False)
    panels = list(zip(names, axes.flat, strict=False))
    if len(names) > 1:
        for name, axis in panels:
            axis.set_title(name, fontsize=10)
    return figure, panels


# ---------------------------------------------------------------------------------------------------------------------
# Speed-up of all methods


def speedup(report: Report) -> Figure | None:
    """Measured speed-up with its interval, beside what the counts and what replay predict."""
    rows = [row for row in report.methods if row.overall.speedup is not None and row.kind != "autoregressive"]
    if not rows:
        return None
    names = samplings(report)
    counts = [max(1, len([row for row in rows if row.sampling == name])) for name in names]
    figure, axes = pyplot.subplots(
        len(names),
        1,
        figsize=(8, 1.1 + 0.42 * sum(counts) + 0.4 * len(names)),
        squeeze=False,
        sharex=True,
        height_ratios=counts,
    )
    for name, axis in zip(names, axes[:, 0], strict=True):
        _speedup_panel(axis, [row for row in rows if row.sampling == name])
        axis.set_title(name, fontsize=10, loc="left")
    figure.supxlabel("speed-up over decoding without a drafter, with its 95 % interval over prompts", fontsize=10)
    _speedup_legend(figure, rows)
    return figure


def _speedup_panel(axis: Axes, rows: Sequence[MethodResult]) -> None:
    ordered = sorted(rows, key=lambda row: row.overall.speedup.value)
    for y, row in enumerate(ordered):
        interval, color = row.overall.speedup, COLORS[row.kind]
        axis.plot([interval.low, interval.high], [y, y], color=color, lw=3, alpha=0.45, solid_capstyle="round")
        axis.plot(interval.value, y, MARKERS[row.kind], color=color, ms=8)
        if row.predicted_speedup is not None:
            axis.plot(row.predicted_speedup, y, "|", color="#333333", ms=13, mew=1.8)
        if row.replayed_speedup is not None:
            axis.plot(row.replayed_speedup, y, "x", color="#333333", ms=7, mew=1.4)
    axis.axvline(1, color=COLORS["autoregressive"], lw=1.2, ls="--")
    axis.set_yticks(range(len(ordered)), [row.method for row in ordered], fontsize=9)
    axis.set_ylim(-0.7, len(ordered) - 0.3)
    axis.grid(axis="y", visible=False)


def _speedup_legend(figure: Figure, rows: Sequence[MethodResult]) -> None:
    kinds = [kind for kind in COLORS if any(row.kind == kind for row in rows)]
    handles = [pyplot.Line2D([], [], color=COLORS[kind], marker=MARKERS[kind], lw=0, ms=7) for kind in kinds]
    labels = [f"{NAMES[kind]}, measured" for kind in kinds]
    if any(row.predicted_speedup is not None for row in rows):
        handles.append(pyplot.Line2D([], [], color="#333333", marker="|", lw=0, ms=12, mew=1.8))
        labels.append("predicted: own counts x costs")
    if any(row.replayed_speedup is not None for row in rows):
        handles.append(pyplot.Line2D([], [], color="#333333", marker="x", lw=0, ms=7))
        labels.append("predicted by replay, before running")
    figure.legend(handles, labels, loc="outside upper center", ncols=2 if len(labels) < 5 else 3, fontsize=8.5)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens per second against K


def length(report: Report) -> Figure | None:
    """Tokens per second of every fixed length, with adaptive rules and the oracle as lines."""
    if not any(point.kind == "fixed" for point in report.sweep):
        return None
    figure, panels = _panels(report, 5.6, 4.4)
    for name, axis in panels:
        _length_panel(axis, report, name)
    for _, axis in panels[::2]:
        axis.set_ylabel("tokens per second")
    handles, labels = _unique_legend([axis for _, axis in panels])
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, 1 + len(panels)), fontsize=8.5)
    return figure


def _length_panel(axis: Axes, report: Report, sampling: str) -> None:
    base = report.baseline(sampling).overall.tokens_per_second or 1.0
    fixed = sorted(
        (p for p in report.sweep if p.sampling == sampling and p.kind == "fixed"), key=lambda point: point.parameter
    )
    color = COLORS["fixed"]
    axis.plot(
        [p.parameter for p in fixed],
        [base * p.predicted_speedup for p in fixed],
        "-",
        color=color,
        lw=1.6,
        label="fixed length, by replay",
    )
    for row in report.of(sampling, "fixed"):
        interval, k = row.overall.speedup, parameter_of(row.method)
        if interval is None:
            continue
        bars = [[base * (interval.value - interval.low)], [base * (interval.high - interval.value)]]
        axis.errorbar(
            [k],
            [base * interval.value],
            yerr=bars,
            fmt="o",
            color=color,
            ms=7,
            capsize=3,
            label="fixed length, measured",
        )
    for kind in ("head", "confidence", "entropy", "other"):
        _measured_line(axis, report.of(sampling, kind), kind, base)
    for point in report.sweep:
        if point.sampling == sampling and point.kind in ("oracle", "known"):
            style = {"color": COLORS[point.kind], "ls": "--", "lw": 1.5, "label": f"{NAMES[point.kind]}, by replay"}
            axis.axhline(base * point.predicted_speedup, **style)
    axis.axhline(base, color=COLORS["autoregressive"], ls=":", lw=1.6, label="no drafter, measured")
    axis.set_xlabel("drafted tokens per round, K")
    axis.set_xticks([int(p.parameter) for p in fixed])
    axis.set_ylim(bottom=0)


def _measured_line(axis: Axes, rows: Sequence[MethodResult], kind: str, base: float) -> None:
    """The best measured row of a kind that has no K: a line, and its interval as a band."""
    rows = [row for row in rows if row.overall.speedup is not None]
    if not rows:
        return
    interval = max((row.overall.speedup for row in rows), key=lambda i: i.value)
    axis.axhspan(base * interval.low, base * interval.high, color=COLORS[kind], alpha=0.10, lw=0)
    style = {"head": "-", "confidence": "-.", "entropy": (0, (3, 1, 1, 1, 1, 1)), "other": (0, (7, 2))}[kind]
    axis.axhline(base * interval.value, color=COLORS[kind], ls=style, lw=1.8, label=f"{NAMES[kind]}, measured")


def _unique_legend(axes: Sequence[Axes]) -> tuple[list, list[str]]:
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


# ---------------------------------------------------------------------------------------------------------------------
# Larger batches


def load(report: Report) -> Figure | None:
    """Throughput against batch size, and beside it the speed-up over the baseline at the same size."""
    if not report.load:
        return None
    rows = len(report.load)
    figure, axes = pyplot.subplots(rows, 2, figsize=(9.6, 0.9 + 3.2 * rows), squeeze=False)
    for (left, right), each in zip(axes, report.load, strict=True):
        _load_panels(left, right, each)
    for axis in axes[-1]:
        axis.set_xlabel("batch size: requests started together")
    handles, labels = _unique_legend([axis for pair in axes for axis in pair])
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8.5)
    return figure


def _load_panels(left: Axes, right: Axes, each: Load) -> None:
    sizes = [batch.batch_size for batch in each.batches]
    methods = [point.method for point in each.batches[0].points]
    for number, method in enumerate(methods):
        kind = kind_of(method)
        look = {"color": COLORS[kind], "marker": "o" if kind == "autoregressive" else MARKERS[kind], "ms": 6}
        rates = [batch.points[number].tokens_per_second for batch in each.batches]
        left.plot(sizes, rates, lw=1.6, label=NAMES[kind], **look)
        speedups = list(each.speedups(method).values())
        if not speedups:
            continue
        beside = [size * 1.03 ** (2 * number - len(methods)) for size in sizes]  # so that no bar hides another
        values = [speedup.value for speedup in speedups]
        bars = [[s.value - s.low for s in speedups], [s.high - s.value for s in speedups]]
        right.errorbar(beside, values, yerr=bars, lw=1.6, capsize=3, **look)
    right.axhline(1, color=COLORS["autoregressive"], lw=1.2, ls="--")
    crossings = [found for found in each.break_even if found.crossing is not None]
    for found in crossings:
        right.axvline(found.crossing, ymax=0.06, color=COLORS[kind_of(found.method)], lw=2.4)
    if crossings:
        right.plot([], [], "|", color="#333333", ms=10, mew=2.4, label="no gain from here on")
    left.set_title(f"{each.sampling}: tokens per second", fontsize=10, loc="left")
    right.set_title(f"{each.sampling}: speed-up at the same batch size", fontsize=10, loc="left")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.margins(x=0.08)
    left.set_ylim(bottom=0)


# ---------------------------------------------------------------------------------------------------------------------
# Verification rate against discard rate


def pareto(report: Report) -> Figure | None:
    """Every swept setting: fewer target forwards (down) against fewer wasted drafts (left)."""
    if not report.sweep:
        return None
    figure, panels = _panels(report, 5.6, 4.6)
    for name, axis in panels:
        points = [point for point in report.sweep if point.sampling == name]
        for family in dict.fromkeys(_family(point) for point in points):
            _pareto_family(axis, [point for point in points if _family(point) == family], family)
        axis.set_xlabel("discard rate: discarded drafted tokens per token")
        axis.margins(0.06)
    for _, axis in panels[::2]:
        axis.set_ylabel("verification rate: target forwards per token")
    handles, labels = _unique_legend([axis for _, axis in panels])
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, 1 + len(panels)), fontsize=8.5)
    return figure


def _family(point: SweepPoint) -> tuple[str, str]:
    """Kind, and what else tells its curves apart: the form of confidence, the name of a head not the run's own."""
    if "per_token=True" in point.method:
        return point.kind, "per token"
    name = head_of(point.method) if point.kind == "head" else None
    return point.kind, name if name and name != "head" else ""


def _pareto_family(axis: Axes, points: Sequence[SweepPoint], family: tuple[str, str]) -> None:
    kind, form = family
    is_other_head = kind == "head" and form != ""
    color = COLORS["other"] if is_other_head else COLORS[kind]
    marker = MARKERS["other"] if form else MARKERS[kind]
    points = sorted(points, key=lambda point: point.parameter or 0.0)
    axis.plot(
        [point.discard_rate for point in points],
        [point.verification_rate for point in points],
        marker=marker,
        ms=9 if kind in ("oracle", "known") else 5,
        lw=1.2,
        ls=":" if form else "-",
        color=color,
        alpha=0.85,
        label=f"{NAMES[kind]} {form}".strip(),
    )
    if kind not in ("oracle", "known"):
        best = max(points, key=lambda point: point.predicted_speedup)
        axis.plot(best.discard_rate, best.verification_rate, "o", ms=14, mfc="none", mec=color, mew=1.6)
        axis.plot([], [], "o", ms=11, mfc="none", mec="#555555", label="fastest of its kind")
    if kind == "fixed":
        for point in points:
            if point.parameter in (1, 2, 3, 4, 6, 8, 12):
                axis.annotate(
                    f"K={int(point.parameter)}",
                    (point.discard_rate, point.verification_rate),
                    fontsize=8,
                    xytext=(7, 5),
                    textcoords="offset points",
                    color=color,
                )


# ---------------------------------------------------------------------------------------------------------------------
# Time, reliability, training


def breakdown(report: Report) -> Figure | None:
    """Milliseconds per emitted token, split into drafting, the target's forwards, and the loop."""
    rows = [row for row in report.methods if row.breakdown is not None]
    if not rows:
        return None
    names = samplings(report)
    counts = [max(1, len([row for row in rows if row.sampling == name])) for name in names]
    figure, axes = pyplot.subplots(
        len(names),
        1,
        figsize=(8, 1.1 + 0.4 * sum(counts) + 0.4 * len(names)),
        squeeze=False,
        sharex=True,
        height_ratios=counts,
    )
    parts = {"draft": ("#56B4E9", "drafting"), "verify": ("#0072B2", "target forwards"), "loop": ("#E69F00", "loop")}
    for name, axis in zip(names, axes[:, 0], strict=True):
        here = [row for row in rows if row.sampling == name]
        here.sort(key=lambda row: -sum(getattr(row.breakdown, part) for part in parts))
        left = [0.0] * len(here)
        for part, (color, label) in parts.items():
            widths = [1e3 * getattr(row.breakdown, part) for row in here]
            axis.barh(range(len(here)), widths, left=left, color=color, height=0.62, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, total in enumerate(left):
            axis.annotate(
                f"{total:.2f}", (total, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axis.set_yticks(range(len(here)), [row.method for row in here], fontsize=9)
        axis.grid(axis="y", visible=False)
        axis.set_title(name, fontsize=10, loc="left")
        axis.margins(x=0.08)
    axes[-1, 0].set_xlabel("milliseconds per emitted token (instrumented run)")
    handles, labels = _unique_legend([axes[0, 0]])
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8.5)
    return figure


_UNITS = {"tokens": "response tokens trained on", "fraction": "share of the training data", "step": "optimizer steps"}

_PREDICTORS = {
    "head": ("head", "o-", "acceptance head, calibrated"),
    "head_raw": ("other", "v:", "acceptance head as trained"),
    "raw_q": ("confidence", "s--", "the drafter's own probability"),
}


def reliability(report: Report) -> Figure | None:
    """Share of drafted tokens accepted, against the acceptance that was predicted; held-out responses."""
    predictors = (report.head or {}).get("predictors", {})
    shown = [name for name in _PREDICTORS if predictors.get(name, {}).get("reliability")]
    if not shown:
        return None
    figure, axis = pyplot.subplots(figsize=(6, 5))
    axis.plot([0, 1], [0, 1], color=COLORS["autoregressive"], lw=1, ls=":")
    if "head_raw" in shown and predictors.get("head", {}).get("ece") == predictors["head_raw"]["ece"]:
        shown.remove("head_raw")  # trained without a loss weight: nothing was there to undo
    for name in shown:
        scores = predictors[name]
        color, style, label = _PREDICTORS[name]
        _reliability_curve(axis, scores["reliability"], COLORS[color], style)
        label = f"{label}: ECE {scores['ece']:.3f}, AUROC {scores['auroc']:.3f}"
        axis.plot([], [], style, color=COLORS[color], ms=6, label=label)
    axis.set_xlabel("predicted probability of acceptance (area: share of tokens)")
    axis.set_ylabel("share accepted")
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(-0.02, 1.02)
    axis.set_aspect("equal")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=1, fontsize=8.5)
    return figure


def _reliability_curve(axis: Axes, bins: Sequence[dict[str, float]], color: str, style: str) -> None:
    """One predictor: the area of a marker is the share of tokens in its bin, so that sparse bins look sparse."""
    x, y = [each["predicted"] for each in bins], [each["accepted"] for each in bins]
    total = sum(each["count"] for each in bins)
    axis.plot(x, y, style[1:], color=color, lw=1.2, alpha=0.8)
    axis.scatter(x, y, [12 + 500 * each["count"] / total for each in bins], color=color, marker=style[0], alpha=0.75)


def tau_history(report: Report) -> Figure | None:
    """Real tokens per round on held-out prompts while the drafter was trained."""
    points = [point for point in report.tau_history if point.get("tau") is not None]
    if len(points) < 2:
        return None
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    unit = next(unit for unit in _UNITS if all(point.get(unit) is not None for point in points))
    axis.plot([point[unit] for point in points], [point["tau"] for point in points], "o-", color=COLORS["fixed"])
    axis.set_xlabel(_UNITS[unit])
    axis.xaxis.set_major_formatter(PercentFormatter(1) if unit == "fraction" else EngFormatter(sep=""))
    axis.set_ylabel("tau: tokens per round, greedy, held out")
    return figure


PLOTS: dict[str, Callable[[Report], Figure | None]] = {
    "speedup": speedup,
    "length": length,
    "load": load,
    "pareto": pareto,
    "reliability": reliability,
    "breakdown": breakdown,
    "sources": sources,
    "turns": turns,
    "gamma": gamma,
    "contexts": contexts,
    "tau_history": tau_history,
}
