"""The table of the fields that each task reads from a record; importing the table loads no model library."""

from collections.abc import Mapping

LATENTS, LABEL, PROMPT, IMAGES = "latents", "label", "prompt_embeds", "image_embeds"
IMAGE = "image"
LABELS = (LABEL, "labels")  # fields that hold labels, one or a list
# A further field of `extractive_qa`, of a record with several right answers: all of them with their places, in order.
ANSWERS = "answers"

# Task -> fields of its records with their types, the main field first; `object` is a name, a number or an array.
FIELDS: Mapping[str, Mapping[str, type]] = {
    "causal_lm": {"text": str},
    "prompt_completion": {"prompt": str, "completion": str},
    "chat": {"messages": list},
    "sequence_classification": {"text": str, "label": object},
    "token_classification": {"words": list, "labels": list},
    "extractive_qa": {"question": str, "context": str, "answer": str, "answer_start": int},
    "seq2seq": {"source": str, "target": str},
    "image_classification": {"image": object, "label": object},
    "clip_classification": {"image": object, "label": object},
    "image_text": {"image": object, "question": str, "answer": str},
    "class_to_image": {LATENTS: object, LABEL: object},
    "text_to_image": {LATENTS: object, PROMPT: object},
    "image_prompt_to_image": {LATENTS: object, PROMPT: object, IMAGES: object},
}

_NAMES = "its model chooses among labels; leave the key out"
_NOISE = "its model predicts noise; leave the key out"
# Tasks whose models generate no text that a record could hold the right text for -> the reason, and the next step.
WITHOUT_TEXT: Mapping[str, str] = {
    "causal_lm": "its records have no prompt; leave the key out, or take the task prompt_completion",
    "sequence_classification": _NAMES,
    "token_classification": _NAMES,
    "extractive_qa": "its model marks a place in the context, and the report has exact match and F1; leave it out",
    "image_classification": _NAMES,
    "clip_classification": _NAMES,
    "class_to_image": _NOISE,
    "text_to_image": _NOISE,
    "image_prompt_to_image": _NOISE,
}
