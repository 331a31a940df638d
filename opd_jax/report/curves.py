"""The figures of a report: runs over each other as curves, and heat maps of turn by update.

matplotlib is an extra of its own (`report`), so it is imported when a figure is drawn.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from opd_jax.losses import Verdict
from opd_jax.report.runs import Group, mean

# Okabe and Ito's colours: told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")  # after so many groups colours come again
_STEPS = (1, 2, 5, 10)  # between ticks
INK, GRID, FAINT = "#333333", "#E3E3E3", "#8A8A8A"

VERDICTS = tuple(verdict.name.lower() for verdict in Verdict)
NAMES = {"det_fail": "failed"}
# The parts of an update, in their order, and the colour of each.
PARTS = {"rollout": "#56B4E9", "judge": "#E69F00", "update": "#009E73"}


class Panel(NamedTuple):
    """One metric over updates; a share is shown in percent."""

    key: str
    title: str
    unit: str = ""
    share: bool = False


LEARNING = (
    Panel("loss", "Loss", "nats / token"),
    Panel("divergence", "Divergence from the teacher", "nats / token"),
    Panel("grad_norm", "Gradient norm before the clip"),
    Panel("raw_weight", "Weight mass, mean of i · c · e"),
    Panel("z", "Normalizer z"),
    Panel("active_tokens", "Tokens with a weight", share=True),
    Panel("student_entropy", "Student's entropy", "nats"),
    Panel("teacher_entropy", "Teacher's entropy", "nats"),
    Panel("confidence", "Teacher's confidence"),
)
JUDGE = (
    *(Panel(f"verdict/{v}", f"Turns: {NAMES.get(v, v)}", share=True) for v in VERDICTS),
    Panel("judge/precision", "Judge's precision", share=True),
    Panel("judge/recall", "Judge's recall", share=True),
)


def figures(groups: Sequence[Group]) -> dict[str, tuple[Any, str]]:
    """Name to (matplotlib figure, caption); a figure that has nothing to show is left out.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "figures need matplotlib, which is not installed: pip install 'opd-jax[report]'"
        ) from None
    matplotlib.use("Agg")
    lines = "Bands: lowest to highest seed."
    if (width := smoothing(groups)) > 1:
        lines = f"Lines: running mean over {width} updates; faint: each of a single seed. {lines}"
    drawn: dict[str, tuple[Callable[[Sequence[Group]], Any], str]] = {
        "success": (
            _success,
            "Success on training batches and at each evaluation, with 95 % intervals; dashed: "
            f"others on the same tasks. {lines}",
        ),
        "learning": (lambda g: _curves(g, LEARNING), f"What is learnt. {lines}"),
        "judge": (lambda g: _curves(g, JUDGE), f"Shares of turns by verdict. {lines}"),
        "seconds": (
            _seconds,
            "Seconds of an update by part, mean over seeds; compiling is counted apart.",
        ),
        "turns": (
            _turns,
            "By turn (down) and update (right), mean over seeds: divergence, and the share of "
            "turns with each verdict. Grey: no episode got this far.",
        ),
    }
    with matplotlib.rc_context(_STYLE):
        made = {name: (draw(groups), caption) for name, (draw, caption) in drawn.items()}
    return {name: (figure, caption) for name, (figure, caption) in made.items() if figure}


_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
}


def smoothing(groups: Sequence[Group]) -> int:
    """Updates of the running mean: a twentieth of the longest run, and odd."""
    return max(len(group.updates) for group in groups) // 20 // 2 * 2 + 1


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The running mean of [rows, U] over `width` updates around each, of those that there are."""
    padded = np.pad(values, [(0, 0), (width // 2, width // 2)], constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)
    return np.where(np.isnan(values), np.nan, mean(np.moveaxis(windows, -1, 0)))


def _style(place: int) -> dict[str, Any]:
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": dash}


def _grid(count: int, columns: int, *, height: float = 2.3) -> tuple[Any, list[Any]]:
    """A figure of `count` panels in rows of `columns`."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    # A legend needs room beside one or two panels too.
    figure = Figure(figsize=(3.5 * max(columns, 2), height * rows + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count]


def _legend(figure: Any, groups: Sequence[Group]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=2, **_style(n)) for n in range(len(groups))]
    labels = [
        f"{group.label} ({len(group.runs)} seeds)" if len(group.runs) > 1 else group.label
        for group in groups
    ]
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(groups), 4))


def _draw(axis: Any, groups: Sequence[Group], panel: Panel) -> None:
    """Draws one metric of all groups."""
    width = smoothing(groups)
    for place, group in enumerate(groups):
        raw, style = group.curve(panel.key), _style(place)
        if np.isnan(raw).all():
            continue
        means = smooth(raw, width)
        if len(raw) > 1:
            low, high = np.fmin.reduce(means), np.fmax.reduce(means)
            axis.fill_between(group.updates, low, high, color=style["color"], alpha=0.2, lw=0)
        elif width > 1:
            axis.plot(group.updates, raw[0], color=style["color"], alpha=0.25, linewidth=0.7)
        marker = "o" if len(group.updates) == 1 else ""
        axis.plot(group.updates, mean(means), linewidth=1.8, marker=marker, **style)
    _frame(axis, panel)


def _frame(axis: Any, panel: Panel) -> None:
    """Titles and labels an axis, and sets its range."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_title(panel.title)
    axis.set_xlabel("update")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
    axis.set_ylabel("% of turns" if panel.key.startswith("verdict/") else panel.unit)
    if panel.share:
        axis.yaxis.set_major_formatter(PercentFormatter(1, symbol="", decimals=0))
        axis.set_ylim(-0.03, 1.03)
        axis.set_ylabel(axis.get_ylabel() or "%")
    elif 0 < axis.get_ylim()[0] < 0.5 * axis.get_ylim()[1]:
        axis.set_ylim(bottom=0)


def _curves(groups: Sequence[Group], panels: Sequence[Panel]) -> Any:
    """Small multiples: a panel a metric that any group has."""
    shown = [p for p in panels if any(not np.isnan(g.curve(p.key)).all() for g in groups)]
    if not shown:
        return None
    figure, axes = _grid(len(shown), 3)
    for axis, panel in zip(axes, shown, strict=True):
        _draw(axis, groups, panel)
    _legend(figure, groups)
    return figure


def _success(groups: Sequence[Group]) -> Any:
    """Success on the training batches, and on each evaluated split with intervals."""
    evaluations = [group.evaluations() for group in groups]
    splits = dict.fromkeys(split for found in evaluations for split in found)
    figure, axes = _grid(1 + len(splits), 3, height=3.2)
    _draw(axes[0], groups, Panel("batch/success", "Training batches", share=True))
    axes[0].set_ylabel("success, %")
    longest = max(len(group.updates) for group in groups)
    for axis, split in zip(axes[1:], splits, strict=True):
        _frame(axis, Panel("", split, share=True))
        axis.set_ylabel("success, %")
        axis.set_xlim(-0.06 * longest, 1.06 * longest)
        for place, found in enumerate(evaluations):
            if points := found.get(split):
                # Apart, so that intervals of one update do not hide each other.
                shift = (place - (len(groups) - 1) / 2) * 0.018 * longest
                updates, success, low, high = np.array(points, np.float64).T
                axis.errorbar(
                    updates + shift,
                    success,
                    yerr=np.maximum([success - low, high - success], 0),
                    fmt="o",
                    markersize=4,
                    capsize=2.5,
                    linewidth=1.5,
                    elinewidth=1.2,
                    **_style(place),
                )
        _references(axis, groups, split)
    _legend(figure, groups)
    return figure


def _references(axis: Any, groups: Sequence[Group], split: str) -> None:
    """Dashed lines for the others that were evaluated, such as the teacher, on the most tasks."""
    for place, who in enumerate(("expert", "teacher", "random")):
        results = [run.results.get(who, {}).get(split) for group in groups for run in group.runs]
        most = max((figures["n"] for figures in results if figures), default=0)
        rates = {figures["success"] for figures in results if figures and figures["n"] == most}
        if len(rates) == 1:  # runs with several teachers have no one line
            (rate,) = rates
            axis.axhline(rate, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axis.annotate(
                who,
                (0.25 + 0.25 * place, rate),  # beside each other: two may have one rate
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(0, -2 if rate > 0.5 else 2),
                ha="center",
                va="top" if rate > 0.5 else "bottom",
                color="#666666",
                fontsize=8,
            )


def _seconds(groups: Sequence[Group]) -> Any:
    """Stacked seconds of each part of an update, a panel a group."""
    curves = [
        {p: c for p in PARTS if not np.isnan(c := mean(g.curve(f"seconds/{p}"))).all()}
        for g in groups
    ]
    if not any(curves):
        return None
    figure, axes = _grid(len(groups), 3)
    tops = [np.nanmax(sum(map(np.nan_to_num, parts.values()), np.zeros(1))) for parts in curves]
    width = smoothing(groups)
    for axis, group, parts in zip(axes, groups, curves, strict=True):
        _frame(axis, Panel("", group.label, "seconds / update"))
        values = [np.nan_to_num(smooth(curve[None], width)[0]) for curve in parts.values()]
        colours = [PARTS[part] for part in parts]
        axis.stackplot(group.updates, values, colors=colours, edgecolor="white", linewidth=0.5)
        compiling = np.nansum(group.curve("seconds/compile"), axis=1).mean()
        axis.annotate(
            f"and {compiling:.0f} s of compiling in all",
            (0.98, 0.97),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=8,
            color="#666666",
        )
        axis.set_ylim(0, 1.25 * max(tops))
        axis.set_xlim(1, max(len(group.updates), 2))
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=part) for part, colour in PARTS.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(PARTS))
    return figure


def _turns(groups: Sequence[Group]) -> Any:
    """Heat maps of turn by update: a row a group, divergence and each verdict side by side."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def has(group: Group, key: str) -> bool:
        return any(f"by_turn/{key}" in line for run in group.runs for line in run.lines)

    keys = [key for key in ("divergence", *VERDICTS) if any(has(g, key) for g in groups)]
    if not keys:
        return None
    figure = Figure(figsize=(1.2 + 2.1 * max(len(keys), 2), 0.9 + 1.75 * len(groups)))
    axes = figure.subplots(len(groups), len(keys), squeeze=False, sharey="row")
    peaks = [g.by_turn("divergence") for g in groups if has(g, "divergence")]
    peak = max((np.nanquantile(values, 0.99) for values in peaks), default=1.0)
    for column, key in enumerate(keys):
        image: Any = None
        for row, group in enumerate(groups):
            axis = axes[row, column]
            axis.grid(False)
            if row == 0:
                axis.set_title(NAMES.get(key, key), fontweight="normal")
            if not has(group, key):
                axis.set_axis_off()
                axis.text(0.5, 0.5, "no judge", transform=axis.transAxes, ha="center", color=FAINT)
                continue
            values = group.by_turn(key)
            axis.set_facecolor("#DDDDDD")
            image = axis.imshow(
                values,
                aspect="auto",
                interpolation="nearest",
                cmap="viridis" if key == "divergence" else "cividis",
                vmin=0,
                vmax=peak if key == "divergence" else 1,
                extent=(0.5, values.shape[1] + 0.5, values.shape[0] + 0.5, 0.5),
            )
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=_STEPS))
            axis.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
            if column == 0:
                axis.set_ylabel(f"{group.label}\nturn")
            if row == len(groups) - 1:
                axis.set_xlabel("update")
        if key == "divergence" or column == len(keys) - 1:
            beside = axes[:, :1] if key == "divergence" else axes[:, len(keys) - len(VERDICTS) :]
            assert image is not None  # there is an update
            bar = figure.colorbar(
                image,
                ax=beside.ravel().tolist(),
                location="bottom",
                shrink=1 if key == "divergence" else 0.5,
                aspect=12 if key == "divergence" else 30,
            )
            bar.outline.set_visible(False)
            bar.set_label("nats / token" if key == "divergence" else "% of turns")
            if key != "divergence":
                bar.formatter = FuncFormatter(lambda share, _: f"{100 * share:.0f}")
    return figure
