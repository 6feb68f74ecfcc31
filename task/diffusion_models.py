"""The supported denoisers of diffusers, which is an optional extra, and the reading of a model directory."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from offsite.errors import DataError, UnsupportedModel

CLASS = "_class_name"  # diffusers' key for the class; its other keys with an underscore are bookkeeping
# The classes that a configuration may name; diffusers has many more.
UNET = "UNet2DConditionModel"
NAMES = ("DiTTransformer2DModel", "PixArtTransformer2DModel", UNET)


def model_class(name: str) -> Any:
    """Returns a class of diffusers that is in `NAMES`.

    Raises:
      UnsupportedModel: diffusers is not installed, or the class is not in the table.
    """
    if name not in NAMES:
        raise UnsupportedModel(f"model={name} must be {' or '.join(NAMES)} of diffusers; choose another model")
    try:
        return getattr(importlib.import_module("diffusers"), name)  # late, as diffusers is optional and takes seconds
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UnsupportedModel(
            f"model={name}: diffusers cannot be imported ({error}); pip install 'offsite[diffusion]'"
        ) from error


def load_diffusion(path: Path | str, *, dtype: torch.dtype, names: tuple[str, ...]) -> Any:
    """Returns the denoiser of a directory, frozen and in eval mode.

    Reads safetensors only, runs no code from the directory, and never asks the network.

    Args:
      path: the folder "transformer" or "unet" of a pipeline.
      dtype: of every parameter, whatever the files hold.
      names: classes that the model may have, a part of `NAMES`.

    Raises:
      DataError: the directory, config or weights are missing, damaged, or hold NaN or Inf.
      UnsupportedModel: the model has another class, or diffusers is not installed.
    """
    folder = Path(path)
    name = _known_class(folder, names)
    if not any(folder.glob("*.safetensors")):
        raise DataError(
            f"model={str(folder)!r} has no *.safetensors; convert the model's weights and copy them into it"
        )
    kind = model_class(name)
    try:
        model, report = kind.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise DataError(f"model={str(folder)!r} cannot be read ({reason}); save it again") from error
    if missing := sorted(report["missing_keys"]):  # diffusers fills a missing tensor with random values and goes on
        raise DataError(f"model={str(folder)!r} lacks tensor={missing[0]!r}; save all weights again with diffusers")
    for tensor_name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(
                f"model={str(folder)!r} tensor={tensor_name!r} holds NaN or Inf; repair it or take a wider dtype"
            )
    return model.requires_grad_(False).eval()


def _known_class(folder: Path, names: tuple[str, ...]) -> str:
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"model={str(folder)!r} has no config.json; give a pipeline's folder 'transformer' or 'unet'")
    try:
        class_name = json.loads(path.read_text(encoding="utf-8")).get(CLASS)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"model={str(folder)!r} has a damaged config.json; save the model again") from error
    if class_name not in names:
        raise UnsupportedModel(f"model={class_name!r} must be {' or '.join(names)}; choose another model or task")
    return str(class_name)
