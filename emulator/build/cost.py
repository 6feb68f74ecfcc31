"""The cost of an emulator before it is built: bytes to ship, multiply-adds, and memory to train on."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite.emulator.build.package_writer import embedding_storage, macs
from offsite.emulator.calibration.draft import DraftSegment
from offsite.emulator.calibration.middle import Middle
from offsite.emulator.package.storage import DTYPES, SPARSE, parse, verbatim
from offsite.errors import ConfigError

FLOAT32 = 4


@dataclass(frozen=True)
class Cost:
    """The cost of an emulator, or of a part of an emulator.

    Attributes:
      bytes: size of the weights as shipped.
      macs: multiply-adds for each position in the middle's dense layers.
      parameters: size of the weights in bytes as a site loads them, in float32.
    """

    bytes: int = 0
    macs: int = 0
    parameters: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Returns the cost of both parts together."""
        return Cost(self.bytes + other.bytes, self.macs + other.macs, self.parameters + other.parameters)

    def __sub__(self, other: "Cost") -> "Cost":
        """Returns the cost without the other part."""
        return Cost(self.bytes - other.bytes, self.macs - other.macs, self.parameters - other.parameters)


@dataclass(frozen=True)
class SizeLimits:
    """The largest allowed cost of an emulator; None is no limit.

    Attributes:
      bytes: largest size of all shipped tensors.
      memory: largest size in bytes of the emulator's weights in float32, which a site holds while it trains.
      flops: largest multiply-adds of the middle over the full model's, in (0, 1].
      leak: largest leak, relearning included, see `evaluation.rehearse.Rehearsal`.
    """

    bytes: int | None = None
    memory: int | None = None
    flops: float | None = None
    leak: float | None = None

    def __post_init__(self) -> None:
        """Refuses limits that no emulator meets."""
        for name in ("bytes", "memory", "flops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"max_{name}={value}: it must be above 0; leave it out for no limit")
        if self.flops is not None and self.flops > 1:
            raise ConfigError(f"max_flops={self.flops}: it is a share of the full model's middle, at most 1; write 0.5")

    def excess(self, cost: Cost, full_macs: int) -> dict[str, float]:
        """Returns by how much each limit is exceeded, in the limit's unit; {} if all limits are kept."""
        over = {
            "bytes": cost.bytes - self.bytes if self.bytes is not None else 0,
            "parameters": cost.parameters - self.memory if self.memory is not None else 0,
            "macs": cost.macs - self.flops * full_macs if self.flops is not None else 0,
        }
        return {name: float(value) for name, value in over.items() if value > 0}


def segment_cost(draft: DraftSegment) -> Cost:
    """Returns the cost of one segment; unchanged tensors are stored in the narrowest dtype that holds them."""
    total = Cost()
    for path, block in draft.blocks.items():
        own = path != draft.segment.head or draft.segment.owner is None
        total += Cost(0, macs(block), 0)
        for name, tensor in block.state_dict(prefix=f"{path}.").items():
            total += Cost(_bytes(draft, name, tensor) if own else 0, 0, FLOAT32 * tensor.numel() if own else 0)
    return total


def outside_cost(middle: Middle, embedding: str) -> Cost:
    """Returns the cost of all of an emulator but the middle.

    Args:
      middle: the full model's middle.
      embedding: storage of the input embedding and the head, as in `write_package`.
    """
    model = middle.source.model
    chosen = embedding_storage(model, embedding)
    tower = tuple(f"{path}." for path in middle.tower)
    total = _parameters_cost({n: p for n, p in model.named_parameters() if not n.startswith(tower)}, chosen)
    for path in middle.geometry.ends(model):
        with middle.source.open(path) as block:
            total += _parameters_cost(dict(block.named_parameters(prefix=path)), chosen)
    return total


def _parameters_cost(parameters: dict[str, nn.Parameter], chosen: dict[str, str]) -> Cost:
    total = Cost()
    for name, parameter in parameters.items():
        scheme = parse(chosen[name]) if name in chosen else None
        size = scheme.stored_bytes(tuple(parameter.shape)) if scheme else _verbatim_bytes(parameter)
        total += Cost(size, 0, FLOAT32 * parameter.numel())
    return total


def full_macs(middle: Middle) -> int:
    """Returns the multiply-adds for each position in the dense layers of the full model's middle."""
    return sum(macs(middle.source.model.get_submodule(path)) for path in middle.blocks)


def _bytes(draft: DraftSegment, name: str, tensor: Tensor) -> int:
    how = draft.storage.get(name)
    if how == SPARSE:
        return int(2 * (tensor != 0).sum()) + (tensor.numel() + 7) // 8
    scheme = parse(how) if how else None
    if scheme:
        return scheme.stored_bytes(tuple(tensor.shape))
    return 2 * tensor.numel() if name in draft.changed else _verbatim_bytes(tensor)


def _verbatim_bytes(tensor: Tensor) -> int:
    return tensor.numel() * DTYPES[verbatim(tensor)].itemsize


def dtype_of(model: nn.Module) -> torch.dtype:
    """Returns the dtype of a model's weights."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
