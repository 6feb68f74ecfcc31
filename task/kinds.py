"""The kinds of models that are loaded: a name from a file is looked up here, and nothing is imported by it."""

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

# In this order a model's kind is looked for.
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
    found = KINDS[kind]._model_mapping._model_mapping
    return {name: (one,) if isinstance(one, str) else tuple(one) for name, one in found.items()}
