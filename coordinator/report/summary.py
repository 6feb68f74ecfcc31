"""The words of a report: `to_markdown` and `to_html` write the same summary."""

from dataclasses import dataclass

from offsite.coordinator.report import metrics, sections
from offsite.coordinator.report.aggregation_section import IN_THE_OPEN, aggregation
from offsite.coordinator.report.data_section import data
from offsite.coordinator.report.emulator_facts import EmulatorFacts
from offsite.coordinator.report.emulator_section import emulator, emulators_of_sites
from offsite.coordinator.report.formatting import number, percent, signed, size
from offsite.coordinator.report.generated_section import generated, generated_line
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.privacy_section import privacy, privacy_line
from offsite.coordinator.report.quality_facts import Quality
from offsite.coordinator.report.quality_section import quality, unknown_here
from offsite.coordinator.report.rounds_section import rounds
from offsite.coordinator.report.section import Section
from offsite.protos.aggregation import NO_SECAGG_WARNING


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
        title="offsite: report of a simulation"
        if report.simulated
        else "offsite: report of a job between organisations",
        answer=_answer(report),
        # The answer begins with the warning on secure aggregation.
        warnings=tuple(warning for warning in report.warnings if warning != NO_SECAGG_WARNING),
        sections=(
            quality(report),
            *([generated(report.quality.generated)] if report.quality.generated is not None else []),
            *([data(report.data)] if report.data else []),
            rounds(report),
            privacy(report),
            aggregation(report),
            emulator(report.emulators),
            *emulators_of_sites(report.emulators),
            sections.adapter(report.adapter),
            sections.cost(report),
            sections.provenance(report),
        ),
    )


def _answer(report: Report) -> tuple[str, ...]:
    better = (_private_line(report.quality),) if report.simulated else _public_lines(report)
    if report.quality.generated is not None:
        better = (*better, generated_line(report.quality.generated))
    lines = [*better, privacy_line(report), _shipped_line(report.emulators)]
    if not report.privacy.private:
        lines.insert(0, lines.pop(len(better)))
    if not report.secagg.enabled:
        lines.insert(0, IN_THE_OPEN)
    if report.simulated:
        lines.append(
            "This was a simulation: one process held the model, all data and all keys, and its noise came from a seed. "
            "The numbers hold for a federation with these settings; nothing was hidden from the person who ran it."
        )
    return tuple(lines)


def _private_line(quality: Quality) -> str:
    before, after = quality.shown.full_zero_shot, quality.shown.plug_in
    verdict = "better" if (quality.gain_nats or 0) > 0 else "not better"
    verdict = "not measurably better or worse" if quality.within_noise else verdict
    further, loss = metrics.against(after, before), metrics.loss_of(after)
    return (
        f"The tuned model is {verdict} on private {loss.kind} that it was not trained on: "
        f"loss {number(after.loss)} against {number(before.loss)} before, a gain of {number(quality.gain_nats)} "
        f"{loss.unit}" + (f" ({further})." if further else ".") + _within_noise(quality)
    )


def _within_noise(quality: Quality) -> str:
    return f" The gain is within noise: {quality.noise_rule}." if quality.within_noise else ""


def _public_lines(report: Report) -> tuple[str, ...]:
    before, after = report.quality.public.full_zero_shot, report.quality.public.plug_in
    further, loss = metrics.against(after, before), metrics.loss_of(after)
    return (
        f"{report.finished_rounds} of {report.rounds_planned} rounds are done, and {len(report.accepted)} were taken "
        "over. "
        f"On the coordinator's public {loss.kind} the full model's loss is {number(after.loss)} with the tuned adapter "
        f"against {number(before.loss)} before, a change of {signed(report.quality.forgetting_nats)} {loss.unit}"
        + (f" ({further})." if further else "."),
        unknown_here(loss.kind),
    )


def _shipped_line(emulators: EmulatorFacts) -> str:
    full, sizes = emulators.composition.full_bytes, [emulator.shipped_bytes for emulator in emulators.all]
    if len(sizes) == 1:
        shipped, shares = f"an emulator of {size(sizes[0])}", percent(sizes[0] / full)
    else:
        shipped = f"{len(sizes)} emulators, of {size(min(sizes))} to {size(max(sizes))},"
        shares = f"{percent(min(sizes) / full)} to {percent(max(sizes) / full)}"
    return f"The sites were given {shipped} instead of the full model's {size(full)} ({shares})."
