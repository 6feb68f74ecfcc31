"""The three plots of a run report, as SVG to stand inside an HTML page; the same report gives the same bytes."""

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from offsite.coordinator.report import metrics
from offsite.coordinator.report.formatting import number, short, signed
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.privacy_facts import PrivacyFacts
from offsite.coordinator.report.quality_facts import FourScores, Quality
from offsite.coordinator.report.quality_section import FOUR
from offsite.coordinator.report.svg import COLOURS, INK, MARKERS, STYLE, WIDTH, Line, draw_lines, to_svg

MAX_NAMED = 8  # lines with a name of their own; nobody could distinguish more lines
BETTER, WORSE, NEUTRAL = COLOURS[0], COLOURS[1], COLOURS[2]
PRIVATE, PUBLIC = "Held-out private text", "Public text (what was forgotten)"
PUBLIC_ALONE = "Public text"


def plots(report: Report) -> dict[str, tuple[str, str]]:
    """Returns the plots that a report has numbers for: key to (SVG, description in words)."""
    with mpl.rc_context(STYLE):
        drawn = {"fidelity": (_fidelity(report.quality), _fidelity_words(report.quality))}
        if report.rounds:
            drawn |= {"rounds": (_rounds(report), _rounds_words(report))}
        if report.privacy.private and _spent(report.privacy):
            drawn |= {"epsilon": (_epsilon(report.privacy), _epsilon_words(report.privacy))}
    return drawn


def _panels(quality: Quality) -> dict[str, FourScores]:
    """Returns the scores that are known, by the title of their panel."""
    kind = metrics.loss_of(quality.shown.plug_in).kind
    if quality.private is None:
        return {PUBLIC_ALONE.replace("text", kind): quality.public}
    return {PRIVATE.replace("text", kind): quality.private, PUBLIC.replace("text", kind): quality.public}


def _fidelity(quality: Quality) -> str:
    """Draws bars of the change from the full model before training; bars from zero keep small gains visible."""
    panels = _panels(quality)
    both = len(panels) > 1
    figure = Figure(figsize=(WIDTH, 4.2 if both else 2.4))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(
        left=0.37, right=0.80, top=0.93 if both else 0.88, bottom=0.17 if both else 0.29, hspace=0.35
    )
    unit = metrics.loss_of(quality.shown.plug_in).unit
    for place, (title, scores) in zip(axes, panels.items(), strict=True):
        _bars(place, scores)
        place.set_title(title)
    axes[-1].set_xlabel(f"change of loss from the full model before training,\n{unit} (left is better)")
    axes[0].text(1.04, 1.06, "loss", transform=axes[0].transAxes)
    axes[0].text(1.24, 1.06, "change", transform=axes[0].transAxes)
    return to_svg(figure, "fidelity")


def _bars(axes: Axes, scores: FourScores) -> None:
    base = scores.full_zero_shot.loss
    for row, score in enumerate(scores.all().values()):
        loss = score.loss
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
    sites = sorted({site for record in report.rounds for site in record.site_losses or {}})
    figure = Figure(figsize=(WIDTH, 4.8 if sites else 2.7))
    places = figure.subplots(2 if sites else 1, 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(
        left=0.09, right=0.74, top=0.93 if sites else 0.86, bottom=0.11 if sites else 0.2, hspace=0.28
    )
    _public(places[0], report)
    if sites:
        numbers = [record.round for record in report.rounds]
        losses = {site: [(record.site_losses or {}).get(site) for record in report.rounds] for site in sites}
        unit = metrics.loss_of(report.quality.shown.plug_in).unit
        places[1].set_title(f"Each site's training loss on the emulator, own batch, {unit}")
        draw_lines(places[1], _lines(numbers, losses))
    _number_rounds(places[-1], report.rounds_planned)
    return to_svg(figure, "rounds")


def _public(axes: Axes, report: Report) -> None:
    start = report.quality.public.full_zero_shot.loss
    taken = [(0, start), *((record.round, record.public_loss) for record in report.accepted)]
    refused = [(record.round, record.public_loss) for record in report.refused]
    lines = [
        Line("adapter in use", *_columns(taken), COLOURS[0], "o"),
        Line("before training", *_columns([(0, start), (report.rounds_planned, start)]), INK, "", "--"),
    ]
    if refused:
        lines.append(Line("round not taken over", *_columns(refused), COLOURS[1], "X", ""))
    loss = metrics.loss_of(report.quality.public.full_zero_shot)
    axes.set_title(f"Full model's loss on public {loss.kind}, {loss.unit}")
    draw_lines(axes, lines)


def _spent(privacy: PrivacyFacts) -> dict[str, list[float]]:
    """Returns the epsilons by round of the sites whose spending is known."""
    return {site.site: list(site.epsilon_by_round) for site in privacy.sites if site.epsilon_by_round is not None}


def _epsilon(privacy: PrivacyFacts) -> str:
    figure = Figure(figsize=(WIDTH, 2.9))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.74, top=0.9, bottom=0.17)
    spent, target = _spent(privacy), _target(privacy)
    longest = max(map(len, spent.values()))
    numbers = list(range(1, longest + 1))
    lines = _lines(numbers, spent)
    if target is not None:
        lines.append(Line(f"target {target:g}", [0, max(longest, 1)], [target, target], INK, "", "--"))
    axes.set_title(f"Epsilon spent up to and including each round, at delta {short(privacy.largest_delta)}")
    draw_lines(axes, lines, bottom=0.0)
    _number_rounds(axes, longest)
    return to_svg(figure, "epsilon")


def _lines(numbers: Sequence[int], values: Mapping[str, Sequence[float | None]]) -> list[Line]:
    """Returns a named line for each site, or unnamed lines for more sites than a reader can distinguish."""
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


def _columns(points: Sequence[tuple[int, float | None]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], _floats([y for _, y in points])


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float(value) if value is not None and _finite(value) else math.nan for value in values]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _target(privacy: PrivacyFacts) -> float | None:
    """Returns the target epsilon, or None where the target is not a finite number."""
    return privacy.target_epsilon if _finite(privacy.target_epsilon) else None


def _fidelity_words(quality: Quality) -> str:
    parts = []
    for title, scores in _panels(quality).items():
        four = zip(FOUR.values(), scores.all().values(), strict=True)
        losses = ", ".join(f"{words} {number(score.loss)}" for words, score in four)
        base = number(scores.full_zero_shot.loss)
        parts.append(f"{title}: loss of {losses}; bars show the change from {base}.")
    return " ".join(parts)


def _rounds_words(report: Report) -> str:
    before, newest = report.quality.public.full_zero_shot, report.rounds[-1]
    refused = [str(record.round) for record in report.refused]
    first, last = number(before.loss, 4), number(newest.public_loss, 4)
    rest = f" Rounds not taken over: {', '.join(refused)}." if refused else " Every round was taken over."
    kind = metrics.loss_of(before).kind
    return f"Loss on public {kind} from {first} before training to {last} in round {newest.round}.{rest}"


def _epsilon_words(privacy: PrivacyFacts) -> str:
    ends = ", ".join(f"{site} {number(spent[-1], 2)}" for site, spent in _spent(privacy).items() if spent)
    target, delta = number(_target(privacy), 2), short(privacy.largest_delta)
    return f"Epsilon spent in the end, at delta {delta}: {ends}; target {target}."
