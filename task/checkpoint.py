"""Loads a model from its directory, with a message of one line for every fault of the directory."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from offsite.errors import DataError
from offsite.task.device_memory import check_fits
from offsite.task.kinds import KINDS
from offsite.task.mapped_weights import mapped_weights
from offsite.task.model_folder import (
    check_folder,
    check_weights,
    document,
    line,
    read_config,
    unused,
    widening,
    without_adapter,
)
from offsite.task.packed_format import KEY
from offsite.task.packed_weights import StoredTensor, dense_tensors, without_zero_biases
from offsite.task.tokenizer import Tokenizer

log = logging.getLogger("offsite.task")
_OPTIONS: dict[str, Any] = {
    "local_files_only": True,
    "trust_remote_code": False,
    "ignore_mismatched_sizes": True,  # refused below, by name
    "output_loading_info": True,
}


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
    config = read_config(folder, kind)
    check_weights(folder)
    packed = dense_tensors(folder)
    try:
        with without_adapter(folder) as plain, _without_report():
            model, report = (
                _widened(packed, config, kind, dtype)
                if packed
                else KINDS[kind].from_pretrained(str(plain), dtype=dtype, use_safetensors=True, **_OPTIONS)
            )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, ImportError, AssertionError) as error:
        raise DataError(f"model={str(folder)!r} cannot be read ({line(error)}); save it again") from error
    _check_report(report, folder)
    if note := unused(folder, without_zero_biases(packed, sorted(report["unexpected_keys"])), model.config):
        log.warning("%s", note)
    _check_finite(model, folder)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def stored_dtype(path: Path | str) -> torch.dtype:
    """Returns the dtype that holds a folder's weights: of its config.json, and float32 where the file names no dtype.

    Packed weights are widened to float16, which bfloat16 does not hold. So float32 holds a packed checkpoint whose
    other weights are in bfloat16.
    """
    try:
        values = document(Path(path))
    except DataError:
        return torch.float32  # the loader's error names the fault of the folder
    name = values.get("dtype") or values.get("torch_dtype")
    known = {"float16": torch.float16} if values.get(KEY) else {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return known.get(str(name), torch.float32)


def check_memory(path: Path | str, device: torch.device, *, mapped: bool = False) -> None:
    """Compares the size of a model's weights with the free memory of a device, before the model is loaded.

    Args:
      path: the model's folder.
      device: device on which the weights will lie.
      mapped: whether plain weights stay in their mapped files; packed ones are widened in memory all the same.

    Raises:
      ConfigError: the weights alone are larger; the message says what they need and what would make them fit.
    """
    wider = widening(Path(path))
    if mapped and wider == 1:
        return
    size = wider * sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    check_fits("the full model", size, device, "free memory, take a larger device or a smaller model")


def load_tokenizer(path: Path | str, *, with_images: bool = False) -> Tokenizer:
    """Returns the tokenizer of a directory; `with_images` as for `task.tokenizer_settings.TokenizerSettings.of`.

    Raises:
      DataError: the directory has no tokenizer.json, or it is damaged.
    """
    folder = Path(path)
    check_folder(folder)
    return Tokenizer.of(folder, with_images=with_images)


def _widened(tensors: Mapping[str, StoredTensor], config: Any, kind: str, dtype: torch.dtype) -> Any:
    """Returns the model of packed weights, with transformers' report; each tensor is widened when its turn comes."""
    del config.quantization_config  # transformers would ask for the packages that compute with the codes
    known = KINDS[kind]._model_mapping[type(config)]
    classes = known if isinstance(known, tuple) else (known,)
    named = [one for one in classes if one.__name__ in (config.architectures or ())]
    return (named or classes)[0].from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype, **_OPTIONS)


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
        mapped_weights((tensor,)).give_back()  # the check reads every page, and a use may be far off
