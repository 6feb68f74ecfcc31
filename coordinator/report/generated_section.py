"""The section of a report on texts that the full model generates, and their sentence in its answer."""

from offsite.coordinator.job.score import GeneratedScores
from offsite.coordinator.report import metrics
from offsite.coordinator.report.formatting import count, number, signed
from offsite.coordinator.report.quality_facts import NOISE_ERRORS
from offsite.coordinator.report.section import Section
from offsite.task.nothing_to_learn import PUBLIC
from offsite.task.text_measures import Comparison

HEAD = ("measure", "before training", "tuned adapter", "difference", "standard error")


def generated(scores: GeneratedScores) -> Section:
    """Returns the section on generated texts."""
    rows = tuple(_row(name, values) for name, values in scores.measures.items())
    words = (
        f"For {_records(scores)} the full model generated a text before training and with the tuned adapter. Each "
        "token is the likeliest one (greedy decoding), up to the end that the model sets, and at most "
        f"{count(scores.new_tokens)} tokens. {_unfinished(scores)}{_left_out(scores)}",
        " ".join(metrics.meanings(scores.measures)),
        "The standard error is of the difference over these records, by the jackknife. A difference of less than "
        f"{NOISE_ERRORS} standard errors may be luck.",
    )
    return Section("Texts that the model generates", words if rows else words[:1], HEAD if rows else (), rows, "", True)


def generated_line(scores: GeneratedScores) -> str:
    """Returns the sentence on generated texts for a report's answer."""
    if not scores.measures:
        return f"No text was generated, since no record was left. {_left_out(scores).strip()}"
    values = "; ".join(
        f"{metrics.title(name)} {number(own.after, metrics.digits(name))} against "
        f"{number(own.before, metrics.digits(name))} before{_noise(own)}"
        for name, own in scores.measures.items()
    )
    return f"In the texts that the full model generated for {_records(scores)}: {values}."


def _records(scores: GeneratedScores) -> str:
    kind = "public" if scores.part == PUBLIC else "held-out private"
    return f"{count(scores.records)} {kind} record{'' if scores.records == 1 else 's'}"


def _row(name: str, values: Comparison) -> tuple[str, ...]:
    digits = metrics.digits(name)
    return (
        metrics.title(name),
        number(values.before, digits),
        number(values.after, digits),
        signed(values.after - values.before),
        number(values.error),
    )


def _noise(values: Comparison) -> str:
    small = values.error is not None and abs(values.after - values.before) < NOISE_ERRORS * values.error
    return " (within noise)" if small else ""


def _unfinished(scores: GeneratedScores) -> str:
    return (
        f"{count(scores.unfinished_before)} texts before training and {count(scores.unfinished_after)} with the tuned "
        "adapter were cut at this number, and are compared as they are."
    )


def _left_out(scores: GeneratedScores) -> str:
    if not scores.left_out:
        return ""
    return (
        f" {count(scores.left_out)} more records were left out, since they hold no right text, or a prompt without "
        "room in data.length tokens."
    )
