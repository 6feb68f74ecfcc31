"""How one tensor lies in the package: as it is, or as codes; each way has a name that stands in the manifest."""

import torch
from torch import Tensor

from emulator.quantize import Quantised, dequantize, quantize
from errors import MalformedMessage, RangeError, UnsupportedModel

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
BITS = {"int8": 8, "int4": 4}
PIECES = ("codes", "scales", "minima")


def verbatim(tensor: Tensor) -> str:
    """Returns the name of the narrowest dtype that holds a tensor bit for bit.

    A bf16 checkpoint that was loaded as fp32 is stored as bf16: widening it again gives the same fp32 bits.

    Raises:
      UnsupportedModel: the tensor's dtype is not in `DTYPES`.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    if tensor.dtype not in names:
        raise UnsupportedModel(f"dtype={tensor.dtype} cannot be stored; load the model in {', '.join(DTYPES)}")
    if tensor.dtype == torch.float32:
        for narrow in ("bf16", "fp16"):
            if torch.equal(tensor.to(DTYPES[narrow]).to(torch.float32), tensor):
                return narrow
    return names[tensor.dtype]


def parse(storage: str) -> tuple[int, int] | None:
    """Returns (bits, group) of a quantised storage such as "int4:64", or None for a verbatim one such as "bf16".

    Raises:
      MalformedMessage: it is neither.
    """
    if storage in DTYPES:
        return None
    name, _, group = storage.partition(":")
    if name not in BITS or not group.isascii() or not group.isdecimal() or not 2 <= int(group) < 2**20:
        raise MalformedMessage(f"storage={storage!r} is not known; known: {', '.join(DTYPES)}, int8:GROUP, int4:GROUP")
    return BITS[name], int(group)


def names(name: str, storage: str) -> tuple[str, ...]:
    """Returns the names under which a tensor's pieces lie in the safetensors file."""
    return (name,) if parse(storage) is None else tuple(f"{name}#{piece}" for piece in PIECES)


def encode(name: str, tensor: Tensor, storage: str) -> dict[str, Tensor]:
    """Returns the pieces of a tensor under their stored names, on the CPU and contiguous."""
    quantisation = parse(storage)
    if quantisation is None:
        return {name: tensor.detach().to("cpu", DTYPES[storage]).contiguous()}
    try:
        quantised = quantize(tensor.cpu(), *quantisation)
    except RangeError as error:
        raise UnsupportedModel(f"tensor={name}: {error}") from error
    return dict(zip(names(name, storage), (quantised.codes, quantised.scales, quantised.minima), strict=True))


def decode(name: str, storage: str, pieces: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Returns the tensor of a shape from its pieces; the inverse of `encode` for verbatim storage.

    Raises:
      RangeError: a piece has another shape or dtype, or a value is not finite.
    """
    quantisation = parse(storage)
    if quantisation is None:
        tensor = pieces[name]
        if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[storage]:
            raise RangeError(f"tensor={name}: stored {tuple(tensor.shape)}, the model has {shape}; build again")
    else:
        tensor = dequantize(Quantised(*(pieces[piece] for piece in names(name, storage))), shape, *quantisation)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise RangeError(f"tensor={name}: a value is not finite; refuse this package and ask for another")
    return tensor
