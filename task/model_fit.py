"""Whether a model's configuration, its tokenizer and the length of examples fit each other; needs no weight."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offsite.errors import ConfigError, UnsupportedModel
from offsite.task.kinds import KINDS
from offsite.task.model_folder import beside, check_weights, document, read_config
from offsite.task.packed_format import packed_format
from offsite.task.packed_weights import dense_tensors
from offsite.task.spec import Task
from offsite.task.stated_config import check_rows

USUAL = 128
BEFORE_TARGET = 2  # tokens that a decoder may begin with: its start token, and a language code
# Kinds whose examples are padded with the token that the configuration names.
PADDED = ("sequence_classification", "token_classification", "question_answering", "seq2seq")
# Kinds whose examples have a length in tokens; images and the class prompts of CLIP have none.
WITH_LENGTH = (*("causal_lm", "masked_lm", "image_text"), *PADDED)
# Models with a bound that is no table: their attention has a term for each distance, up to this key of config.json.
_BOUNDS = {"mpt": "max_seq_len"}
_EXTENDING = (
    "linear",
    "dynamic",
    "yarn",
)  # rotary positions that reach `factor` times as far as the model was made for


def check_fit(task: Task, folder: Path | str, length: int, processor: Any) -> list[str]:
    """Checks a model's folder against its tokenizer and a length, before a weight is loaded.

    Args:
      task: task of the model.
      folder: the model's folder.
      length: tokens of each example.
      processor: processor of the folder, from the task.

    Returns:
      Warnings, a sentence each: files that are not used, and a length beyond the positions that the model was made for.

    Raises:
      DataError: the folder has no readable configuration or weights.
      UnsupportedModel: transformers has no such model of this kind, or the model lacks rows for some token ids.
      ConfigError: the length is more than the model's positions.
    """
    if task.kind not in KINDS:  # a denoiser has neither tokens nor positions
        return []
    path = Path(folder)
    config = read_config(path, task.kind)
    check_weights(path)
    check_token_ids(config, getattr(processor, "largest_id", None), task.kind)
    notes = beside(path)
    if (packed := packed_format(path, document(path))) is not None:
        dense_tensors(path)  # each packed layer has its pieces
        notes.append(f"model={str(path)!r}: {packed.sentence}")
    if task.kind not in WITH_LENGTH:
        return notes
    most = most_positions(_empty(config, task.kind))
    check_positions(most, length)
    return notes + [note for note in [position_warning(config, length)] if note and most is None]


def check_generation(task: Task, folder: Path | str, length: int, new_tokens: int) -> list[str]:
    """Checks that a model generates text, and has positions for a prompt and the text behind it.

    Args:
      task: task of the model, whose models generate text.
      folder: the model's folder.
      length: largest number of tokens of a prompt.
      new_tokens: largest number of tokens of a generated text.

    Returns:
      A warning about more tokens than the model was made for, or nothing.

    Raises:
      ConfigError: there are more tokens than positions.
      UnsupportedModel: the model has no method that generates text.
    """
    config = read_config(Path(folder), task.kind)
    kinds = KINDS[task.kind]._model_mapping[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    if not (hasattr(kind, "generate") and kind.can_generate()):
        raise UnsupportedModel(
            f"evaluation.measures: a {kind.__name__} generates no text in transformers; leave the key out"
        )
    most, encoded = most_positions(_empty(config, task.kind)), task.kind == "seq2seq"
    needed = max(length, new_tokens + BEFORE_TARGET) if encoded else length + new_tokens
    if most is not None and needed > most:
        behind = f"and {BEFORE_TARGET} tokens before the text" if encoded else f"behind prompts of data.length={length}"
        raise ConfigError(
            f"evaluation.new_tokens={new_tokens} {behind}: must be at most {most} together, the number of the model's "
            "positions; lower evaluation.new_tokens",
            key="evaluation.new_tokens",
        )
    note = position_warning(config, needed)
    return [note] if note else []


def check_token_ids(model_config: Any, largest: int | None, kind: str = "causal_lm") -> None:
    """Checks that a model has a row for each token id of its tokenizer, and for the special ids of its configuration.

    Args:
      model_config: configuration of the model.
      largest: largest token id of the tokenizer; None for a processor that makes no tokens.
      kind: key of `task.kinds.KINDS`.

    Raises:
      UnsupportedModel: an id has no row, or the configuration lacks an id that examples of this kind need.
    """
    if largest is None:
        return
    text = model_config.get_text_config()
    rows = int(text.vocab_size)
    check_rows(largest, rows)
    needed = {"pad_token_id": kind in PADDED, "decoder_start_token_id": kind == "seq2seq"}
    for key, used in needed.items():
        number = getattr(text, key, None)
        if (used and (number is None or number < 0)) or (number is not None and number >= rows):
            raise UnsupportedModel(
                f"{key}={number}: must be a token id of the model, from 0 to {rows - 1}; correct the number in the "
                "model's config.json"
            )


def check_positions(most: int | None, length: int) -> None:
    """Checks a length against the number of a model's positions.

    Args:
      most: number of positions, from `most_positions`.
      length: tokens of each example.

    Raises:
      ConfigError: there are more tokens than positions.
    """
    if most is not None and length > most:
        raise ConfigError(
            f"length={length}: must be at most {most}, the number of the model's positions; {min(USUAL, most)} is usual"
        )


def position_warning(model_config: Any, length: int) -> str:
    """Returns a sentence about a length beyond the positions that a model was made for, or "".

    The sentence is about models without a table of positions, which compute positions of any number.
    """
    text = model_config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if type(most) is not int or length <= (most := _reach(text, most)):
        return ""
    return (
        f"length={length}: the model was made for at most {most} positions (max_position_embeddings); it computes "
        f"further positions, but never learnt them; a length of at most {most} is safe"
    )


def most_positions(model: nn.Module) -> int | None:
    """Returns the largest number of tokens that a model has positions for, or None where it computes any number.

    The tables of positions are found by structure: embeddings, and constant tables, that are named for positions. A
    model with a padding token in its table (RoBERTa) or with an offset (OPT, BART) has fewer positions than rows. A
    part that knows no vocabulary, as a vision tower, has tables for other things.

    Args:
      model: model of any kind, also an empty one.
    """
    config: Any = model.config
    foreign = tuple(f"{path}." for path, module in model.named_modules() if path and _without_words(module))
    numbers = [
        number
        for path, module in model.named_modules()
        if not f"{path}.".startswith(foreign) and (number := _positions_in(path, module)) is not None
    ]
    text = config.get_text_config()
    bound = getattr(text, _BOUNDS.get(text.model_type, ""), None)
    if type(bound) is int:
        numbers.append(bound)
    stated = getattr(text, "max_position_embeddings", None)
    if numbers and type(stated) is int:  # some tables have rows to spare
        numbers.append(stated)
    return min(numbers, default=None)


def _empty(model_config: Any, kind: str) -> nn.Module:
    """Returns the part of a model that reads tokens, without weights."""
    with torch.device("meta"):
        if kind == "image_text":
            text: nn.Module = KINDS["encoder"].from_config(model_config.get_text_config())
            return text
        model: nn.Module = KINDS[kind].from_config(model_config)
        return model


def _positions_in(path: str, module: nn.Module) -> int | None:
    """Returns the number of positions in a module's own table, None for a module without one."""
    if isinstance(module, nn.Embedding) and _for_positions(path.rpartition(".")[2]):
        padding = -1 if module.padding_idx is None else module.padding_idx
        offset = getattr(module, "offset", padding + 1)
        return module.num_embeddings - int(offset)
    tables = [
        len(table)
        for name, table in module.named_buffers(recurse=False)
        if isinstance(table, Tensor) and table.ndim == 2 and len(table) > 1 and _for_positions(name)
    ]
    return min(tables, default=None)


def _for_positions(name: str) -> bool:
    """Whether a table of positions has this name; tables of distances, or of places in a page, have other names."""
    return name == "wpe" or ("pos" in name and not name.startswith(("rel", "x_", "y_", "h_", "w_", "box_")))


def _without_words(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return (
        config is not None
        and hasattr(config, "get_text_config")
        and not hasattr(config.get_text_config(), "vocab_size")
    )


def _reach(text_config: Any, most: int) -> int:
    """Returns the number of positions that a model was made for, with the extension of its rotary positions."""
    settings = getattr(text_config, "rope_parameters", None)
    if not isinstance(settings, dict):
        return most
    for entry in (settings, *settings.values()):
        if isinstance(entry, dict) and entry.get("rope_type") in _EXTENDING:
            original = entry.get("original_max_position_embeddings") or most
            most = max(most, int(original * (entry.get("factor") or 1)))
    return most
