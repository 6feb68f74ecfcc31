"""What a run report says of a task's measures: their names, digits and meanings."""

from dataclasses import dataclass

from offsite.coordinator.job.score import Score
from offsite.coordinator.report.formatting import number


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
      digits: behind the point.
      meaning: a sentence; empty where the name says it.
    """

    digits: int = 3
    meaning: str = ""


MEASURES = {
    "perplexity": Measure(
        1, "Perplexity is the same as a factor: a perplexity of 20 is like guessing among 20 equal choices."
    ),
    "accuracy": Measure(meaning="Accuracy is the share of answers that are right."),
    "balanced_accuracy": Measure(
        meaning="Balanced accuracy is the mean over the classes of the share of each that is found, however rare it is."
    ),
    "macro_f1": Measure(
        meaning="Macro F1 is the mean over the classes of the F1 of each, the harmonic mean of how much of it is found "
        "and how much of what is called so is right."
    ),
    "f1": Measure(
        meaning="F1 is the harmonic mean of how much of what there is to find is found, and of how much of what is "
        "found is right."
    ),
    "explained": Measure(
        meaning="Explained is the share of the noise's variance that the model predicts; 0 is as good as no model."
    ),
    "exact_match": Measure(meaning="Exact match is the share of answers that are right from first to last token."),
}


@dataclass(frozen=True)
class Loss:
    """What a task's loss is.

    Attributes:
      unit: behind a number.
      meaning: a sentence.
      kind: what is learned from: text, or records of any other kind.
    """

    unit: str
    meaning: str
    kind: str = "records"


# By the measure that tells what the loss is; a loss without one is that of right answers.
LOSSES = {
    "perplexity": Loss(
        "nats per token",
        "Loss is how surprised a model is by the next token (a word or part of one), in nats per token; lower is "
        "better.",
        "text",
    ),
    "explained": Loss(
        "of mean squared error",
        "Loss is the mean squared error of the noise that a model predicts; lower is better.",
    ),
}
ANSWERS = Loss(
    "nats per target",
    "Loss is how surprised a model is by the right answer, in nats per target (what it is asked to tell); lower is "
    "better.",
)


def loss_of(score: Score) -> Loss:
    """Returns what the loss of a score is."""
    return next((LOSSES[name] for name in score.metrics if name in LOSSES), ANSWERS)


def against(after: Score, before: Score) -> str:
    """Returns each measure of one score against that of another, as in a sentence; empty where there is none."""
    return "; ".join(f"{title(name)} {value(after, name)} against {value(before, name)}" for name in names(after))


def title(name: str) -> str:
    """Returns the words for a measure."""
    return name.replace("_", " ")


def names(score: Score) -> tuple[str, ...]:
    """Returns the names of a score's measures in the order in which they are shown."""
    return tuple(score.metrics)


def value(score: Score, name: str) -> str:
    """Returns a measure as people read it."""
    return number(score.metrics.get(name), MEASURES.get(name, Measure()).digits)


def meanings(score: Score) -> tuple[str, ...]:
    """Returns a sentence on each measure that needs one."""
    return tuple(MEASURES[name].meaning for name in names(score) if name in MEASURES)
