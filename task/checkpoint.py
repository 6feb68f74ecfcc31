"""Loads a model from its directory, with a message of one line for every fault of the directory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from offsite.errors import DataError
from offsite.task.kinds import KINDS
from offsite.task.model_folder import check_folder, check_weights, line, read_config, unused, without_adapter
from offsite.task.tokenizer import Tokenizer

log = logging.getLogger("offsite.task")


def load(path: Path | str, *, dtype: torch.dtype, kind: str) -> Any:
    """Returns the model of a directory, frozen and in eval mode.

    Reads safetensors only, runs no code from the directory, attaches no adapter that lies there, and never asks the
    network. Stored tensors for which the model has no place are named in the log.

    Args:
      path: a Hugging Face model directory.
      dtype: of every parameter, whatever the files hold.
      kind: key of `task.kinds.KINDS`.

    Raises:
      DataError: the directory, config or weights are missing, damaged, or hold NaN or Inf.
      UnsupportedModel: transformers knows no such model of this kind.
    """
    folder = Path(path)
    read_config(folder, kind)
    check_weights(folder)
    try:
        with without_adapter(folder) as plain, _without_report():
            model, report = KINDS[kind].from_pretrained(
                str(plain),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, ImportError, AssertionError) as error:
        raise DataError(f"model={str(folder)!r} cannot be read ({line(error)}); save it again") from error
    _check_report(report, folder)
    if note := unused(folder, sorted(report["unexpected_keys"]), model.config):
        log.warning("%s", note)
    _check_finite(model, folder)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def load_tokenizer(path: Path | str, *, with_images: bool = False) -> Tokenizer:
    """Returns the tokenizer of a directory; `with_images` as for `task.tokenizer_settings.TokenizerSettings.of`.

    Raises:
      DataError: the directory has no tokenizer.json, or it is damaged.
    """
    folder = Path(path)
    check_folder(folder)
    return Tokenizer.of(folder, with_images=with_images)


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps transformers' own table of keys off the terminal; `_check_report` says the same in one line."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_report(report: dict[str, Any], folder: Path) -> None:
    """Refuses tensors that transformers would fill with random values, and goes on."""
    if missing := sorted(report["missing_keys"]):
        raise DataError(f"model={str(folder)!r} lacks tensor={missing[0]!r}; save all weights again with transformers")
    if different := sorted((name, tuple(stored), tuple(wanted)) for name, stored, wanted in report["mismatched_keys"]):
        name, stored, wanted = different[0]
        raise DataError(
            f"model={str(folder)!r} tensor={name!r} has the shape {stored}, and config.json wants {wanted}; copy the "
            "config.json that belongs to these weights"
        )


def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(
                f"model={str(folder)!r} tensor={name!r} holds NaN or Inf as {tensor.dtype}; repair the tensor or take "
                "a wider dtype"
            )
