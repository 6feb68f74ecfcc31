"""The section of a report on the rounds."""

from collections.abc import Sequence

from offsite.coordinator.job.round_record import RoundRecord
from offsite.coordinator.report.formatting import number, short, size
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.section import Section

HEAD = ("round", "taken over", "public loss", "update length", "sites", "seconds", "to sites", "from sites")


def rounds(report: Report) -> Section:
    """Returns the section on the rounds, with the reason of each round that was not taken over."""
    rows = tuple(
        (
            f"{record.round}",
            "yes" if record.accepted else "no",
            number(record.public_loss, 4),
            short(record.update_norm),
            f"{len(record.members)}",
            number(record.seconds, 1),
            size(record.bytes_down),
            size(record.bytes_up),
        )
        for record in report.rounds
    )
    return Section(
        "Rounds",
        (
            f"{report.finished_rounds} of {report.rounds_planned} rounds were run. After each round, the new adapter "
            "is tried in the full model on public records; it is taken over only if the loss there is no worse than "
            "the best loss so far, within a tolerance. Update length is the length of the sites' mean update.",
            *(f"Round {record.round}: {record.reason}." for record in report.refused),
            *_corrected(report),
            *refreshes(report.rounds),
        ),
        HEAD,
        rows,
        "rounds" if rows else "",
        numbers=True,
    )


def _corrected(report: Report) -> tuple[str, ...]:
    corrected = [str(record.round) for record in report.accepted if record.correction]
    if not corrected:
        return ()
    return (
        f"In round {', '.join(corrected)}, the adapter had learnt to repair the emulator. This repair was taken out, "
        "wholly or by half, before the adapter was plugged in, since the full model was better without it on public "
        "records.",
    )


def refreshes(records: Sequence[RoundRecord]) -> tuple[str, ...]:
    """Returns a sentence on the emulator's refreshes between rounds; empty for a job without refreshes."""
    tried = [record for record in records if record.refreshed is not None]
    kept = [record for record in tried if record.refreshed]
    if not tried:
        return ()
    if not kept:
        return (
            f"The emulator was refreshed {len(tried)} times on trial; no refresh lowered its loss, and the emulator "
            "stayed as it was.",
        )
    losses = [record.emulator_loss for record in kept if record.emulator_loss is not None]
    before, after = (number(_mean([pair[i] for pair in losses]), 4) for i in (0, 1))
    most = max(records, key=lambda record: record.refresh_bytes or 0)
    share = None if most.refresh_share is None else 100 * most.refresh_share
    return (
        f"The emulator was refreshed after round {', '.join(str(record.round) for record in kept)}: biases of its "
        f"middle moved, and its loss with the adapter on public records went from {before} to {after} on average. "
        f"With each later round a site got {size(most.refresh_bytes)} of biases, {short(share)} % of the package.",
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
