"""Reads a model directory, with a message of one line for every fault of the directory."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from offsite.errors import DataError, UnsupportedModel
from offsite.task.kinds import KINDS, WORDS, class_names
from offsite.task.tokenizer import Tokenizer
from offsite.task.weight_files import check_files

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load(path: Path | str, *, dtype: torch.dtype, kind: str) -> Any:
    """Returns the model of a directory, frozen and in eval mode.

    Reads safetensors only, runs no code from the directory, and never asks the network.

    Args:
      path: a Hugging Face model directory.
      dtype: of every parameter, whatever the files hold.
      kind: key of `task.kinds.KINDS`.

    Raises:
      DataError: the directory, config or weights are missing, damaged, or hold NaN or Inf.
      UnsupportedModel: transformers knows no such model of this kind.
    """
    folder = Path(path)
    _check_config(folder, kind)
    _check_weights(folder)
    try:
        model, report = KINDS[kind].from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, ImportError) as error:
        raise DataError(f"model={str(folder)!r} cannot be read ({_line(error)}); save it again") from error
    # transformers fills a missing tensor with random values and goes on
    if missing := sorted(report["missing_keys"]):
        raise DataError(f"model={str(folder)!r} lacks tensor={missing[0]!r}; save all weights again with transformers")
    _check_finite(model, folder)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def check(path: Path | str, *, kind: str) -> None:
    """Checks a model directory without reading a weight: its configuration, its kind, and the frames of its files.

    Raises:
      DataError: the directory, config or weights are missing or damaged.
      UnsupportedModel: transformers knows no such model of this kind.
    """
    folder = Path(path)
    _check_config(folder, kind)
    _check_weights(folder)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Returns the tokenizer of a directory.

    Raises:
      DataError: the directory has no tokenizer.json, or it is damaged.
    """
    folder = Path(path)
    _check_folder(folder)
    return Tokenizer.of(folder)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"model={str(folder)!r} is not a directory; give the path of a Hugging Face model directory")


def _check_config(folder: Path, kind: str) -> None:
    _check_folder(folder)
    if not (folder / "config.json").is_file():
        raise DataError(f"model={str(folder)!r} has no config.json; give the directory that save_pretrained wrote")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"model={str(folder)!r} has a damaged config.json; save the model again") from error
    known = class_names(kind)
    name = values.get("model_type") if isinstance(values, dict) else None
    if name not in known:
        raise UnsupportedModel(
            f"model_type={name!r} must be a {WORDS[kind]} of transformers, and code in the model's directory is "
            "never run; choose another model"
        )
    if values.get("quantization_config"):
        raise UnsupportedModel(
            f"model={str(folder)!r} has a quantization_config, must have plain weights; save a dequantised copy"
        )
    names = values.get("architectures") or known[name]
    if not set(names) & {class_name for class_names_of_type in known.values() for class_name in class_names_of_type}:
        raise UnsupportedModel(f"architectures={names} must be a {WORDS[kind]}; choose another model")


def _check_weights(folder: Path) -> None:
    if files := sorted(folder.glob("*.safetensors")):
        check_files(files)
        return
    if pickles := sorted(file.name for pattern in PICKLES for file in folder.glob(pattern)):
        raise DataError(
            f"model={str(folder)!r} has its weights only in a pickle, {pickles[0]}; convert the weights to safetensors"
        )
    raise DataError(f"model={str(folder)!r} has no *.safetensors; copy the model's weights into it")


def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(
                f"model={str(folder)!r} tensor={name!r} holds NaN or Inf as {tensor.dtype}; repair the tensor or take "
                "a wider dtype"
            )


def _line(error: BaseException) -> str:
    """Returns the first line of a library's message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
