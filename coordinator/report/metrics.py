"""The measures of a task in a run report: their names, digits and meanings."""

from collections.abc import Iterable
from dataclasses import dataclass

from offsite.coordinator.job.score import Score
from offsite.coordinator.report.formatting import number


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
      digits: number of digits after the point.
      meaning: sentence on the measure; empty where the name says it all.
      title: words for the measure; empty where its name has the words.
    """

    digits: int = 3
    meaning: str = ""
    title: str = ""


MEASURES = {
    "perplexity": Measure(
        1,
        "Perplexity is the loss as a factor: a perplexity of 20 is like guessing among 20 equal choices. It is taken "
        "on the right texts, token by token, and no text is generated for it.",
    ),
    "accuracy": Measure(meaning="Accuracy is the share of answers that are right."),
    "balanced_accuracy": Measure(
        meaning="Balanced accuracy is the mean over the classes of the share of each class that is found; a rare class "
        "counts as much as a frequent class."
    ),
    "macro_f1": Measure(
        meaning="Macro F1 is the mean of the F1 of each class. F1 is the harmonic mean of recall (the share of the "
        "class that is found) and precision (the share of the answers with this class that are right)."
    ),
    "f1": Measure(
        meaning="F1 is the share of words that the given and the right answer have in common, as SQuAD counts: the "
        "harmonic mean of recall (the share of the right words that are given) and precision (the share of the given "
        "words that are right), without case, punctuation and articles."
    ),
    "entity_f1": Measure(
        meaning="Entity F1 is the F1 of whole entities, as seqeval counts: an entity is right where type, first word "
        'and last word are right. Words of the outside label ("O", or the only label without B- or I-) are no entities.'
    ),
    "explained": Measure(
        meaning="Explained is the share of the noise's variance that the model predicts; 0 is as good as no model."
    ),
    "rouge1": Measure(
        meaning="ROUGE is the F1 of what a generated text and the right text share: words (ROUGE-1), pairs of "
        "adjoining words (ROUGE-2), or the longest series of words in the same order (ROUGE-L). The mean over the "
        "records is shown, from 0 to 1. A word is a series of letters and digits of any script, without case and "
        "without stemming; in scripts without spaces each letter is a word. For English the values are those of the "
        "package rouge-score, which drops all letters of other scripts.",
        title="ROUGE-1",
    ),
    "rouge2": Measure(title="ROUGE-2"),
    "rougeL": Measure(title="ROUGE-L"),
    "chrf": Measure(
        1,
        "chrF is the F-score of the series of 1 to 6 characters that the generated and the right texts share, over "
        "all records together, from 0 to 100, as the package sacrebleu counts (chrF2).",
        title="chrF",
    ),
    "exact_match": Measure(
        meaning="Exact match is the share of answers that are right as a whole; for answers in a text and generated "
        "texts as SQuAD compares, without case, punctuation and articles."
    ),
}


@dataclass(frozen=True)
class Loss:
    """The words for a task's loss.

    Attributes:
      unit: unit of the loss, as it stands after a number.
      meaning: sentence on the loss.
      kind: word for the records of the task: text, or records of any other kind.
    """

    unit: str
    meaning: str
    kind: str = "records"


# The key is the measure that identifies the loss; a score without such a measure has the loss of right answers.
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
    "Loss is how surprised a model is by the right answer, in nats per target (an answer that the model is asked "
    "for); lower is better.",
)


def loss_of(score: Score) -> Loss:
    """Returns the words for the loss of a score."""
    return next((LOSSES[name] for name in score.metrics if name in LOSSES), ANSWERS)


def against(after: Score, before: Score) -> str:
    """Returns each measure of a score against the same measure of another score, in words; empty without measures."""
    return "; ".join(f"{title(name)} {value(after, name)} against {value(before, name)}" for name in names(after))


def title(name: str) -> str:
    """Returns the words for a measure."""
    return MEASURES.get(name, Measure()).title or name.replace("_", " ")


def names(score: Score) -> tuple[str, ...]:
    """Returns the names of a score's measures in the order in which they are shown."""
    return tuple(score.metrics)


def value(score: Score, name: str) -> str:
    """Returns a measure as people read it."""
    return number(score.metrics.get(name), digits(name))


def digits(name: str) -> int:
    """Returns the number of digits after the point of a measure's values."""
    return MEASURES.get(name, Measure()).digits


def meanings(shown: Iterable[str]) -> tuple[str, ...]:
    """Returns a sentence on each measure whose name does not say it all."""
    return tuple(MEASURES[name].meaning for name in shown if name in MEASURES and MEASURES[name].meaning)
