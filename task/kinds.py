"""The kinds of models that can be loaded; a name from a file is looked up here and never imported."""

from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

# The order in which a model's kind is searched.
KINDS: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "image_classification": AutoModelForImageClassification,
    "image_text": AutoModelForImageTextToText,
    "encoder": AutoModel,
}
WORDS = {
    "causal_lm": "causal language model",
    "seq2seq": "sequence to sequence model",
    "masked_lm": "masked language model",
    "sequence_classification": "model with a head for sequence classification",
    "token_classification": "model with a head for token classification",
    "question_answering": "model with a head for question answering",
    "image_classification": "model with a head for image classification",
    "image_text": "model of images and text",
    "encoder": "encoder",
}


def class_names(kind: str) -> dict[str, tuple[str, ...]]:
    """Returns the names of the classes of a kind by model type, as transformers has them."""
    classes = KINDS[kind]._model_mapping._model_mapping
    return {name: (value,) if isinstance(value, str) else tuple(value) for name, value in classes.items()}
