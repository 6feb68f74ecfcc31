"""The number format of frozen weights and activations: named by its owner, or bfloat16 where that is faster."""

from typing import TYPE_CHECKING

from offsite.errors import ConfigError
from offsite.task.device import AUTO, CPU

if TYPE_CHECKING:  # the name of a format is checked by commands that need no model
    import torch
    from torch import nn

FLOAT32, BFLOAT16, FLOAT16 = "float32", "bfloat16", "float16"
DTYPES = (AUTO, FLOAT32, BFLOAT16, FLOAT16)
# Measured on one core with avx512_bf16, the time of a private LoRA step in bfloat16 over float32's: 1.14 at 0.3 million
# parameters, 0.98 at 1.3, 0.75 at 4, 0.64 at 9, 0.59 at 23 and 0.52 at 69. Where little time is saved, digits are worth
# more.
LARGE = 10_000_000
CPU_FLAGS = ("avx512_bf16", "amx_bf16")  # instructions that multiply bfloat16 numbers and add in float32


def check_dtype(name: str, key: str = "dtype") -> None:
    """Checks the name of a number format.

    Raises:
      ConfigError: there is no such format.
    """
    if name not in DTYPES:
        raise ConfigError(f"{key}={name!r}: must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}", key=key)


def check_dtype_on(name: str, device: "torch.device") -> None:
    """Checks that a device computes in a number format.

    Raises:
      ConfigError: there is no such format, or it is float16 on a CPU.
    """
    check_dtype(name)
    if name == FLOAT16 and device.type == CPU:
        raise ConfigError(
            f"dtype={name!r} on the CPU takes four to ten times as long as float32, and ends at 65504; set dtype = "
            f"{BFLOAT16!r} or {FLOAT32!r}"
        )


def choose_dtype(name: str, device: "torch.device", parameters: int) -> "torch.dtype":
    """Returns the number format of a name; the same for every model of this size on this machine.

    Args:
      name: `auto` for bfloat16 where the device multiplies such numbers faster and the model is large enough to gain
        from that, and for float32 elsewhere; else the name of a format.
      device: device that computes.
      parameters: number of the full model's parameters, also where an emulator of it trains.

    Raises:
      ConfigError: as for `check_dtype_on`.
    """
    import torch

    check_dtype_on(name, device)
    if name == AUTO:
        return torch.bfloat16 if parameters >= LARGE and has_fast_bfloat16(device) else torch.float32
    return {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}[name]


def name_of(dtype: "torch.dtype") -> str:
    """Returns the name of a number format, for example `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def has_fast_bfloat16(device: "torch.device") -> bool:
    """Whether a device has instructions for bfloat16; read from its flags, so that the answer never changes."""
    import torch

    if device.type == CPU:
        flags: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch do not tell
        return any(flags.get(flag) for flag in CPU_FLAGS)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "xpu"  # every GPU of Intel's that PyTorch supports has such instructions


def dtype_of(model: "nn.Module") -> "torch.dtype":
    """Returns the number format of a model: of its first frozen weight, since adapters stay in float32."""
    import torch

    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    frozen = (weight.dtype for weight in weights if not weight.requires_grad)
    return next(frozen, weights[0].dtype if weights else torch.float32)


def in_dtype(model: "nn.Module", dtype: "torch.dtype") -> "nn.Module":
    """Returns a model without an adapter in another number format, in place.

    Its weights change, and what else is stored with them. Tables that a model computes for itself, for example of
    rotary positions, stay as they are where the format is narrower, as when a model is loaded in that format.
    """
    import torch

    if dtype == torch.float32:
        return model.float()
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model
