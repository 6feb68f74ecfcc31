"""What a run report says, once: `report` writes it as Markdown and as HTML."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offsite.coordinator.report import metrics, sections
from offsite.coordinator.report.aggregation_section import IN_THE_OPEN, aggregation
from offsite.coordinator.report.formatting import number, percent, short, size
from offsite.coordinator.report.privacy_statement import WITHOUT_PRIVACY, largest_epsilon
from offsite.coordinator.report.sections import Report, Section


@dataclass(frozen=True)
class Summary:
    """A whole report: the answer first, then warnings, then the sections."""

    title: str
    answer: tuple[str, ...]
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]


def summarise(report: Report) -> Summary:
    """Returns the words and tables of a report."""
    return Summary(
        title="offsite: report of a simulation" if report["mode"] == "simulation" else "offsite: report of a job",
        answer=_answer(report),
        warnings=tuple(str(one) for one in report["warnings"]),
        sections=(
            sections.quality(report),
            sections.rounds(report),
            sections.privacy(report),
            aggregation(report),
            sections.emulator(report["emulator"]),
            *sections.emulators(report["emulator"]),
            sections.adapter(report["adapter"]),
            sections.cost(report["cost"]),
            sections.provenance(report),
        ),
    )


def _answer(report: Report) -> tuple[str, ...]:
    quality, privacy, emulator = report["quality"]["private"], report["privacy"], report["emulator"]
    before, after = quality["full_zero_shot"], quality["plug_in"]
    gain = report["quality"]["gain_nats"]
    verdict = "better" if (gain or 0) > 0 else "not better"
    further, loss = metrics.against(after, before), metrics.loss_of(after)
    lines = [
        f"The tuned model is {verdict} on private {loss.kind} that it was not trained on: "
        f"loss {number(after['loss'])} against {number(before['loss'])} before, a gain of {number(gain)} "
        f"{loss.unit}" + (f" ({further})." if further else "."),
        _privacy_line(privacy, report["finished_rounds"]),
        _shipped_line(emulator),
    ]
    if not privacy["private"]:
        lines.insert(0, lines.pop(1))
    if not report["secagg"]["enabled"]:
        lines.insert(0, IN_THE_OPEN)
    if report["mode"] == "simulation":
        lines.append(
            "This was a simulation: one process held the model, all data and all keys, and its noise came from a seed. "
            "The numbers hold for a federation with these settings; nothing was hidden from the person who ran it."
        )
    return tuple(lines)


def _shipped_line(emulator: Mapping[str, Any]) -> str:
    full, sizes = emulator["full_bytes"], [one["shipped_bytes"] for one in (emulator, *emulator.get("variants", ()))]
    if len(sizes) == 1:
        what, shares = f"an emulator of {size(sizes[0])}", percent(sizes[0] / full)
    else:
        what = f"{len(sizes)} emulators, of {size(min(sizes))} to {size(max(sizes))},"
        shares = f"{percent(min(sizes) / full)} to {percent(max(sizes) / full)}"
    return f"The sites were given {what} instead of the full model's {size(full)} ({shares})."


def _privacy_line(privacy: Mapping[str, Any], rounds: int) -> str:
    if not privacy["private"]:
        return f"This run was {WITHOUT_PRIVACY}."
    deltas = [site["delta"] for site in privacy["sites"]]
    return (
        f"Every record is protected by differential privacy with epsilon {number(largest_epsilon(privacy), 2)} at most "
        f"(delta {short(max(deltas, default=None))} or less) over all {rounds} rounds. Epsilon bounds how much the "
        "result can depend on any one record; smaller is more private."
    )
