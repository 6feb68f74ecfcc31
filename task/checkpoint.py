"""Reading a model directory, with every way it can be wrong as one line."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from offsite.errors import DataError, UnsupportedModel
from offsite.task.kinds import KINDS, WORDS, class_names
from offsite.task.tokenizer import Tokenizer

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load(path: Path | str, *, dtype: torch.dtype, kind: str) -> Any:
    """Returns the model of a directory, frozen and in eval mode.

    Reads safetensors only, runs no code from the directory, and never asks the network.

    Args:
      path: a Hugging Face model directory.
      dtype: of every parameter, whatever the files hold.
      kind: a key of `task.kinds.KINDS`.

    Raises:
      DataError: the directory, config or weights are missing, damaged, or hold NaN or Inf.
      UnsupportedModel: the model is not one of this kind that transformers knows.
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
        raise DataError(f"model={str(folder)!r} has no config.json; give the directory save_pretrained wrote")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"model={str(folder)!r} has a damaged config.json; save the model again") from error
    known = class_names(kind)
    name = values.get("model_type") if isinstance(values, dict) else None
    if name not in known:
        raise UnsupportedModel(
            f"model_type={name!r} is no {WORDS[kind]} of transformers, and code in the model's directory is never "
            "run; choose another model"
        )
    if values.get("quantization_config"):
        raise UnsupportedModel(
            f"quantization_config in model={str(folder)!r}, adapters need plain weights; save a dequantised copy"
        )
    names = values.get("architectures") or known[name]
    if not set(names) & {one for several in known.values() for one in several}:
        raise UnsupportedModel(f"architectures={names} is no {WORDS[kind]}; choose another model")


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if pickles := sorted(found.name for pattern in PICKLES for found in folder.glob(pattern)):
        raise DataError(
            f"model={str(folder)!r} has weights only as {pickles[0]}, a pickle; convert them to safetensors first"
        )
    raise DataError(f"model={str(folder)!r} has no *.safetensors; copy the model's weights there")


def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(
                f"model={str(folder)!r} tensor={name!r} holds NaN or Inf as {tensor.dtype}; repair it or widen dtype"
            )


def _line(error: BaseException) -> str:
    """Returns the first line of a library's message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
