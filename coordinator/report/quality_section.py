"""The section of a report on the quality of the four models."""

from offsite.coordinator.job.score import Score
from offsite.coordinator.report import metrics
from offsite.coordinator.report.formatting import count, number, signed
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.quality_facts import Quality
from offsite.coordinator.report.section import Section

FOUR = {
    "full_zero_shot": "full model, before training",
    "emulator_zero_shot": "emulator, before training",
    "emulator_tuned": "emulator, tuned adapter",
    "plug_in": "full model, tuned adapter (plug-in)",
}
"""The words for the four models that are compared, in the order of every table and plot."""


def quality(report: Report) -> Section:
    """Returns the section on the quality of the four models, on public records, and on private records where known."""
    scores = report.quality
    kinds = (
        {"public": scores.public} if scores.private is None else {"private": scores.private, "public": scores.public}
    )
    shown = metrics.names(scores.shown.plug_in)
    columns = (four.all().values() for four in kinds.values())
    rows = tuple(
        (words, *(cell for score in row for cell in _scored(score, shown)))
        for words, *row in zip(FOUR.values(), *columns, strict=True)
    )
    heads = tuple(f"{kind} {title}" for kind in kinds for title in ("loss", *map(metrics.title, shown)))
    return Section("How good the model is", _meaning(scores), ("model", *heads), rows, "fidelity", numbers=True)


def unknown_here(kind: str) -> str:
    """Returns the sentences on the quality that the coordinator cannot know, and on who can measure it."""
    return (
        f"The coordinator cannot know how good the model is on the sites' own {kind}, since only the sites hold their "
        f"own {kind}. Only a site's owner can measure the quality there, by trying the tuned model on {kind} held out "
        "from training."
    )


def _scored(score: Score, shown: tuple[str, ...]) -> tuple[str, ...]:
    return (number(score.loss), *(metrics.value(score, name) for name in shown))


def _meaning(scores: Quality) -> tuple[str, ...]:
    loss, change = metrics.loss_of(scores.shown.plug_in), signed(scores.forgetting_nats)
    words = (
        *(loss.meaning, *metrics.meanings(metrics.names(scores.shown.plug_in))),
        "An adapter is the small set of trained numbers. An emulator is a smaller stand-in for the full model; the "
        "sites train the adapter on the emulator.",
    )
    public = count(scores.public.plug_in.targets)
    if scores.private is None:
        return (" ".join(words), _public_only(loss, public, change))
    held = count(scores.private.plug_in.targets)
    if loss.kind == "text":
        return (
            " ".join(words),
            f"Private text is text of the sites that was held out from training ({held} tokens). Public text is of "
            f"another kind ({public} tokens) and shows what was forgotten: the loss on public text changed by {change} "
            f"{loss.unit}.",
        )
    return (
        " ".join(words),
        f"Private records are records of the sites that were held out from training ({held} targets). Public records "
        f"are the coordinator's own ({public} targets) and show what was forgotten: the loss on public records "
        f"changed by {change} {loss.unit}.",
    )


def _public_only(loss: metrics.Loss, targets: str, change: str) -> str:
    begins, own, held = (
        (f"Public text is the coordinator's own ({targets} tokens).", "text has", "that text")
        if loss.kind == "text"
        else (f"Public records are the coordinator's own ({targets} targets).", "records have", "these records")
    )
    return (
        f"{begins} The full model's loss on public {loss.kind} changed by {change} {loss.unit}. The sites' own {own} "
        f"no column here, since the coordinator does not hold {held}."
    )
