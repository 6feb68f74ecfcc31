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
