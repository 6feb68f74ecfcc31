"""The three plots of a run report, as SVG to stand inside an HTML page; the same report gives the same bytes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from offsite.coordinator.report import metrics
from offsite.coordinator.report.formatting import number, signed
from offsite.coordinator.report.sections import FOUR
from offsite.coordinator.report.svg import COLOURS, INK, MARKERS, STYLE, WIDTH, Line, draw_lines, to_svg

MAX_NAMED = 8  # lines with a name of their own; more would not be told apart
BETTER, WORSE, NEUTRAL = COLOURS[0], COLOURS[1], COLOURS[2]
PANELS = {"private": "Held-out private text", "public": "Public text (what was forgotten)"}
Report = Mapping[str, Any]


def plots(report: Report) -> dict[str, tuple[str, str]]:
    """Returns the plots that a report has numbers for: key to (SVG, what it shows in words)."""
    with mpl.rc_context(STYLE):
        drawn = {"fidelity": (_fidelity(report["quality"]), _fidelity_words(report["quality"]))}
        if report["rounds"]:
            drawn["rounds"] = (_rounds(report), _rounds_words(report))
        if report["privacy"]["private"] and report["privacy"]["sites"]:
            drawn["epsilon"] = (_epsilon(report["privacy"]), _epsilon_words(report["privacy"]))
    return drawn


def target_epsilon(privacy: Mapping[str, Any]) -> float | None:
    """Returns the epsilon that was asked for; where the report does not have it, the largest that a site planned."""
    values = [privacy.get("target_epsilon"), *(site["epsilon"] for site in privacy["sites"])]
    known = [float(value) for value in values if _finite(value)]
    return (known[0] if _finite(values[0]) else max(known)) if known else None


def _fidelity(quality: Mapping[str, Any]) -> str:
    """Bars of the difference from the full model before training: they start at zero, and small gains stay visible."""
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.37, right=0.80, top=0.93, bottom=0.17, hspace=0.35)
    unit = metrics.loss_of(quality["private"]["plug_in"]).unit
    for place, (kind, title) in zip(axes, PANELS.items(), strict=True):
        _bars(place, quality[kind])
        place.set_title(_panel(title, quality))
    axes[1].set_xlabel(f"change of loss from the full model before training,\n{unit} (left is better)")
    axes[0].text(1.04, 1.06, "loss", transform=axes[0].transAxes)
    axes[0].text(1.24, 1.06, "change", transform=axes[0].transAxes)
    return to_svg(figure, "fidelity")


def _bars(axes: Axes, scores: Mapping[str, Mapping[str, Any]]) -> None:
    base = scores["full_zero_shot"]["loss"]
    for row, name in enumerate(FOUR):
        loss = scores[name]["loss"]
        change = loss - base if _finite(loss) and _finite(base) else None
        if change is not None:
            axes.barh(row, change, height=0.6, color=BETTER if change < 0 else WORSE)
        at = axes.get_yaxis_transform()
        axes.text(1.04, row, number(loss), transform=at, va="center")
        axes.text(1.24, row, "reference" if row == 0 else signed(change), transform=at, va="center")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(FOUR)), list(FOUR.values()))
    axes.set_ylim(len(FOUR) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.08)


def _rounds(report: Report) -> str:
    sites = sorted({site for line in report["rounds"] for site in line.get("site_losses") or {}})
    figure = Figure(figsize=(WIDTH, 4.8 if sites else 2.5))
    places = figure.subplots(2 if sites else 1, 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.09, right=0.74, top=0.93, bottom=0.11 if sites else 0.2, hspace=0.28)
    _public(places[0], report)
    if sites:
        numbers = [line["round"] for line in report["rounds"]]
        losses = {s: [(line.get("site_losses") or {}).get(s) for line in report["rounds"]] for s in sites}
        unit = metrics.loss_of(report["quality"]["private"]["plug_in"]).unit
        places[1].set_title(f"Each site's training loss on the emulator, own batch, {unit}")
        draw_lines(places[1], _lines(numbers, losses))
    _number_rounds(places[-1], report["rounds_planned"])
    return to_svg(figure, "rounds")


def _public(axes: Axes, report: Report) -> None:
    rounds = report["rounds"]
    start = report["quality"]["public"]["full_zero_shot"]["loss"]
    taken = [(0, start), *((line["round"], line["public_loss"]) for line in rounds if line["accepted"])]
    refused = [(line["round"], line["public_loss"]) for line in rounds if not line["accepted"]]
    lines = [
        Line("adapter in use", *_columns(taken), COLOURS[0], "o"),
        Line("before training", *_columns([(0, start), (report["rounds_planned"], start)]), INK, "", "--"),
    ]
    if refused:
        lines.append(Line("round not taken over", *_columns(refused), COLOURS[1], "X", ""))
    loss = metrics.loss_of(report["quality"]["public"]["full_zero_shot"])
    axes.set_title(f"Full model's loss on public {loss.kind}, {loss.unit}")
    draw_lines(axes, lines)


def _epsilon(privacy: Mapping[str, Any]) -> str:
    figure = Figure(figsize=(WIDTH, 2.9))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.74, top=0.9, bottom=0.17)
    longest = max(len(site["epsilon_by_round"]) for site in privacy["sites"])
    numbers = list(range(1, longest + 1))
    spent = {site["site"]: list(site["epsilon_by_round"]) for site in privacy["sites"]}
    target = target_epsilon(privacy)
    lines = _lines(numbers, spent)
    if target is not None:
        lines.append(Line(f"target {target:g}", [0, max(longest, 1)], [target, target], INK, "", "--"))
    axes.set_title("Epsilon spent up to and including each round")
    draw_lines(axes, lines, bottom=0.0)
    _number_rounds(axes, longest)
    return to_svg(figure, "epsilon")


def _lines(numbers: Sequence[int], values: Mapping[str, Sequence[Any]]) -> list[Line]:
    """Returns one named line for each site, or thin unnamed ones when there are too many to tell apart."""
    if len(values) > MAX_NAMED:
        names = [f"{len(values)} sites", *[""] * (len(values) - 1)]
        return [
            Line(name, list(numbers), _floats(v), COLOURS[0], "")
            for name, v in zip(names, values.values(), strict=True)
        ]
    return [
        Line(name, list(numbers), _floats(v), COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, (name, v) in enumerate(values.items())
    ]


def _number_rounds(axes: Axes, last: int) -> None:
    axes.set_xlim(-0.1, max(last, 1) + 0.1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlabel("round")


def _columns(points: Sequence[tuple[int, Any]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], _floats([y for _, y in points])


def _floats(values: Sequence[Any]) -> list[float]:
    return [float(value) if _finite(value) else math.nan for value in values]


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _panel(title: str, quality: Mapping[str, Any]) -> str:
    return title.replace("text", metrics.loss_of(quality["private"]["plug_in"]).kind)


def _fidelity_words(quality: Mapping[str, Any]) -> str:
    parts = []
    for kind, title in PANELS.items():
        base, panel = quality[kind]["full_zero_shot"]["loss"], _panel(title, quality)
        scores = (f"{words} {number(quality[kind][name]['loss'])}" for name, words in FOUR.items())
        parts.append(f"{panel}: loss of {', '.join(scores)}; bars show the change from {number(base)}.")
    return " ".join(parts)


def _rounds_words(report: Report) -> str:
    rounds = report["rounds"]
    refused = [str(line["round"]) for line in rounds if not line["accepted"]]
    first, last = number(report["quality"]["public"]["full_zero_shot"]["loss"], 4), number(rounds[-1]["public_loss"], 4)
    rest = f" Rounds not taken over: {', '.join(refused)}." if refused else " Every round was taken over."
    kind = metrics.loss_of(report["quality"]["public"]["full_zero_shot"]).kind
    return f"Loss on public {kind} from {first} before training to {last} in round {rounds[-1]['round']}.{rest}"


def _epsilon_words(privacy: Mapping[str, Any]) -> str:
    ends = ", ".join(
        f"{site['site']} {number(site['epsilon_by_round'][-1], 2)}"
        for site in privacy["sites"]
        if site["epsilon_by_round"]
    )
    return f"Epsilon spent in the end: {ends}; target {number(target_epsilon(privacy), 2)}."
