"""Storage of one tensor in a package: as it is, as codes, or without its zeros; the manifest names which."""

from functools import partial

import torch
from torch import Tensor

from offsite.emulator.package.quantization_scheme import BITS, Scheme
from offsite.emulator.package.quantize import Quantised, quantize
from offsite.emulator.package.stored_weight import Codes, Pieces, StoredWeight, Verbatim
from offsite.errors import MalformedMessage, RangeError, UnsupportedModel

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
MODEL_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
SPARSE = "sparse"
ZEROS = ("places", "values")


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


def parse(storage: str) -> Scheme | None:
    """Returns the scheme of a quantised storage such as "int4:64"; None for any other storage.

    Raises:
      MalformedMessage: the text is not the name of a storage.
    """
    if storage in DTYPES or storage == SPARSE:
        return None
    name, _, argument = storage.partition(":")
    scheme = Scheme.of(name, argument)
    if scheme is None:
        known = ", ".join((*DTYPES, SPARSE, *(f"int{bits}:GROUP" for bits in BITS)))
        raise MalformedMessage(f"storage={storage!r} is not known; known: {known}")
    return scheme


def is_verbatim(storage: str) -> bool:
    """Returns whether a storage keeps every bit of a tensor of its dtype."""
    parse(storage)
    return storage in DTYPES


def names(name: str, storage: str) -> tuple[str, ...]:
    """Returns the names under which a tensor's pieces lie in the safetensors file."""
    scheme = parse(storage)
    if scheme is None and storage != SPARSE:
        return (name,)
    return tuple(f"{name}#{piece}" for piece in (scheme.pieces if scheme else ZEROS))


def encode(name: str, tensor: Tensor, storage: str, chosen: Quantised | None = None) -> dict[str, Tensor]:
    """Returns the pieces of a tensor under their stored names, on the CPU and contiguous.

    Args:
      name: the tensor's name.
      tensor: a tensor of any shape; for a quantised storage, of at least two dimensions.
      storage: name of the storage, for example "bf16", "int4:64" or "sparse".
      chosen: codes that a compressor chose for the tensor; None rounds to nearest.

    Raises:
      UnsupportedModel: a value does not fit the storage.
    """
    scheme = parse(storage)
    if scheme is None:
        tensor = tensor.detach().cpu()
        pieces = _without_zeros(name, tensor) if storage == SPARSE else (tensor.to(DTYPES[storage]).contiguous(),)
        return dict(zip(names(name, storage), pieces, strict=True))
    try:
        quantised = chosen or quantize(tensor.cpu(), scheme)
    except RangeError as error:
        raise UnsupportedModel(f"tensor={name}: {error}") from error
    return dict(zip(names(name, storage), quantised.pieces, strict=True))


def decode(name: str, storage: str, pieces: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Returns the tensor of a shape from its pieces; the inverse of `encode` for verbatim storage.

    Raises:
      RangeError: a piece does not have the shape or dtype of the storage, or a value is not finite.
    """
    if storage not in DTYPES:
        return held(name, storage, pieces, shape, torch.float32).widened(torch.float32)
    tensor = pieces[name]
    if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[storage]:
        raise RangeError(f"tensor={name}: stored {tuple(tensor.shape)}, the model has {shape}; build again")
    _check_finite(name, tensor)
    return tensor


def held(
    name: str, storage: str, pieces: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> StoredWeight:
    """Returns the tensor of a shape in its stored form; what `decode` returns is made of it at each use.

    Args:
      name: the tensor's name.
      storage: name of a storage that is narrower than float32.
      pieces: the tensor's pieces, by their stored names.
      shape: shape of the tensor in the model.
      dtype: floating dtype in which the tensor runs.

    Raises:
      RangeError: as for `decode`; no weight is widened to find out.
    """
    scheme = parse(storage)
    ordered = [pieces[piece] for piece in names(name, storage)]
    if storage in DTYPES:
        return Verbatim(shape, dtype, decode(name, storage, pieces, shape))
    if scheme is None:
        _check_finite(name, _with_zeros(ordered[0], ordered[1], name=name, shape=shape))
        return Pieces(shape, dtype, ordered[0], ordered[1], partial(_with_zeros, name=name, shape=shape))
    # Every group has a weight, and codes are small, so all weights are finite exactly if the grid is.
    grid = Quantised(*ordered).grid(shape, scheme)
    for side in (grid.scales, grid.minima):
        _check_finite(name, side)
    return Codes(shape, dtype, scheme, *ordered)


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise RangeError(f"tensor={name}: a value is not finite; refuse this package and ask for another")


def _without_zeros(name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (a bit map of the entries that are not zero, uint8, eight in a byte; their values, fp16)."""
    flat = tensor.reshape(-1)
    places = flat != 0
    values = flat[places].to(torch.float16)
    if not torch.isfinite(values).all():
        raise UnsupportedModel(f"tensor={name}: a value does not fit fp16; take prune from the recipe")
    padded = torch.cat([places, places.new_zeros(-places.numel() % 8)]).reshape(-1, 8).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.int64).to(torch.uint8), values


def _with_zeros(bits: Tensor, values: Tensor, *, name: str, shape: tuple[int, ...]) -> Tensor:
    count = 1
    for length in shape:
        count *= length
    fits = bits.dtype == torch.uint8 and values.dtype == torch.float16 and bits.shape == ((count + 7) // 8,)
    if not fits or values.dim() != 1:
        raise RangeError(f"tensor={name}: the stored places and values do not belong to {shape}; build again")
    places = (
        (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1).reshape(-1)[:count].bool()
    )
    if int(places.sum()) != len(values):
        raise RangeError(f"tensor={name}: {len(values)} values for {int(places.sum())} places; build again")
    flat = torch.zeros(count, device=values.device)
    flat[places] = values.float()
    return flat.reshape(shape)
