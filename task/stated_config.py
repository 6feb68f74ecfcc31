"""What config.json itself states of a model, for checks that load no model library.

transformers fills what a file leaves out with its own defaults; here, such a value is not known.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from offsite.errors import UnsupportedModel

# Keys for one thing in the configurations of different families.
POSITIONS = ("max_position_embeddings", "n_positions")
BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def stated(document: Mapping[str, Any], *keys: str) -> int | None:
    """Returns the smallest whole number that a configuration, or its text part, states under some keys; else None.

    Args:
      document: content of config.json.
      keys: names of the value.
    """
    part = document.get("text_config")
    for place in (part if isinstance(part, Mapping) else document, document):
        if numbers := [place[key] for key in keys if type(place.get(key)) is int]:
            return int(min(numbers))
    return None


def stated_labels(document: Mapping[str, Any]) -> Any | None:
    """Returns the part of a configuration that names the labels, or None where the names are transformers' defaults.

    Args:
      document: content of config.json.
    """
    table = document.get("id2label")
    if not isinstance(table, Mapping) or not all(str(key).isdecimal() for key in table):
        return None
    return SimpleNamespace(id2label=table, label2id=document.get("label2id"), problem_type=document.get("problem_type"))


def check_rows(largest: int, rows: int) -> None:
    """Checks that a model has a row for each token id of its tokenizer.

    Args:
      largest: largest token id of the tokenizer.
      rows: number of the model's token ids.

    Raises:
      UnsupportedModel: an id has no row.
    """
    if largest >= rows:
        raise UnsupportedModel(
            f"token id={largest}: the model has rows for the token ids 0 to {rows - 1} only (vocab_size={rows}); give "
            "the model's own tokenizer, remove added tokens that the model never learnt from tokenizer.json, or resize "
            "the model (resize_token_embeddings) and save it"
        )
