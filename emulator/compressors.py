"""What happens to the middle: the one table of compressors, and the plan a recipe of them makes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial

from torch import nn

from emulator.geometry import Geometry
from emulator.quantize import stored_bytes
from emulator.skip import Calibration, Observation, observe
from emulator.towers import signature, usual_signature
from errors import ConfigError, UnsupportedModel, lookup

DEFAULT_GROUP = 64
VERBATIM = "verbatim"


@dataclass(frozen=True)
class Plan:
    """What a package will hold of the middle.

    Attributes:
      actions: "keep" or "skip" for each block of the middle, by module path.
      storage: "int8:GROUP" or "int4:GROUP" by parameter name; a tensor that is not named here is stored verbatim.
    """

    actions: Mapping[str, str]
    storage: Mapping[str, str]

    @property
    def kept(self) -> tuple[str, ...]:
        """Module paths of the blocks that stay."""
        return tuple(path for path, action in self.actions.items() if action == "keep")

    @property
    def skipped(self) -> tuple[str, ...]:
        """Module paths of the blocks that are left out."""
        return tuple(path for path, action in self.actions.items() if action == "skip")


class Middle:
    """The blocks between the slots of one model, and what was observed of them on public examples."""

    def __init__(self, model: nn.Module, geometry: Geometry, calibration: Calibration | None) -> None:
        self.model = model
        self.blocks = geometry.middle(model)
        tower = [model.get_submodule(path) for path in (*geometry.slots(model), *self.blocks)]
        usual = usual_signature(tower)
        # A block with a tensor of its own (T5's relative positions) serves the others: it is never left out.
        self.skippable = tuple(path for path in self.blocks if signature(model.get_submodule(path)) == usual)
        self._calibration = calibration

    @cached_property
    def observations(self) -> dict[str, Observation]:
        """What each skippable block did on public examples; the calibration runs once, when first asked."""
        return observe(self.model, self.skippable, self._calibration)

    def matrices(self, block: str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a block's parameters of two and more dimensions, by full name."""
        parameters = self.model.get_submodule(block).named_parameters(prefix=block)
        return {name: tuple(parameter.shape) for name, parameter in parameters if parameter.dim() >= 2}


Compressor = Callable[[Plan, Middle, str], Plan]


def make_plan(middle: Middle, recipe: tuple[str, ...]) -> Plan:
    """Returns the plan of a recipe, its compressors applied in order; the empty recipe keeps all verbatim.

    Args:
      middle: of the model to compress.
      recipe: compressors with their argument, for example ("skip_importance:0.25", "int4:64").

    Raises:
      UnknownName: a compressor is not in `COMPRESSORS`.
      ConfigError: an argument is out of range.
    """
    plan = Plan(dict.fromkeys(middle.blocks, "keep"), {})
    for step in recipe:
        name, _, argument = step.partition(":")
        plan = lookup(COMPRESSORS, name, "compressor")(plan, middle, argument)
    return plan


def embedding_storage(model: nn.Module, setting: str) -> dict[str, str]:
    """Returns the storage of the input embedding and the head, by parameter name; none where they stay verbatim.

    Args:
      model: a model with `get_input_embeddings` and `get_output_embeddings`, where it has such tables.
      setting: "verbatim", or "int8" or "int4" with an optional group, for example "int8:64".

    Raises:
      ConfigError: the setting is none of these.
    """
    if setting == VERBATIM:
        return {}
    name, _, argument = setting.partition(":")
    if name not in ("int8", "int4"):
        raise ConfigError(f"embedding={setting!r} is not verbatim, int8 or int4; use embedding='int8'")
    group = _group(name, argument)
    tables = embedding_names(model)
    shapes = {path: tuple(model.get_parameter(path).shape) for path in tables}
    return {path: f"{name}:{group}" for path, shape in shapes.items() if _worth(shape, int(name[3:]), group)}


def embedding_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the weights of the input embedding and the head; tied ones under one name."""
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    tables = [getattr(getter(), "weight", None) for getter in getters if getter is not None]
    wanted = {id(table) for table in tables if isinstance(table, nn.Parameter) and table.dim() >= 2}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in wanted)


def _skip_uniform(plan: Plan, middle: Middle, argument: str) -> Plan:
    candidates, count = _candidates("skip_uniform", plan, middle, argument)
    # The middle of each of `count` equal stretches: evenly spaced, and never one end twice as thin as the other.
    return _skip(plan, {candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count)})


def _skip_importance(plan: Plan, middle: Middle, argument: str) -> Plan:
    candidates, count = _candidates("skip_importance", plan, middle, argument)
    ranked = sorted(candidates, key=lambda path: middle.observations[path].influence)
    return _skip(plan, set(ranked[:count]))


def _quantise(name: str, bits: int, plan: Plan, middle: Middle, argument: str) -> Plan:
    group = _group(name, argument)
    shapes = {path: shape for block in plan.kept for path, shape in middle.matrices(block).items()}
    chosen = {path: f"{name}:{group}" for path, shape in shapes.items() if _worth(shape, bits, group)}
    return replace(plan, storage={**plan.storage, **chosen})


def _skip(plan: Plan, chosen: set[str]) -> Plan:
    actions = {path: "skip" if path in chosen else action for path, action in plan.actions.items()}
    dropped = tuple(f"{path}." for path in chosen)
    return Plan(actions, {name: how for name, how in plan.storage.items() if not name.startswith(dropped)})


def _candidates(name: str, plan: Plan, middle: Middle, argument: str) -> tuple[list[str], int]:
    """Returns the blocks that may still be left out, and how many of them a fraction of the kept middle is."""
    try:
        fraction = Fraction(argument)
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(-1)
    if not 0 < fraction <= 1:
        raise ConfigError(f"{name}={argument!r}: the fraction skipped must lie in (0, 1]; write {name}:0.25")
    candidates = [path for path in plan.kept if path in middle.skippable]
    count = min(len(candidates), max(1, round(fraction * len(plan.kept))))
    if not candidates:
        raise UnsupportedModel(f"{name}={argument!r}: no block of the middle is left to skip; take it from the recipe")
    return candidates, count


def _group(name: str, argument: str) -> int:
    if not argument:
        return DEFAULT_GROUP
    if not (argument.isascii() and argument.isdecimal() and 2 <= int(argument) <= 4096):
        raise ConfigError(f"{name}={argument!r}: the group must be a whole number in 2..4096; write {name}:64")
    return int(argument)


def _worth(shape: tuple[int, ...], bits: int, group: int) -> bool:
    """Returns whether codes, scales and minima are smaller than the 16-bit tensor; they are not for very short rows."""
    size = 1
    for length in shape:
        size *= length
    return stored_bytes(shape, bits, group) < 2 * size


COMPRESSORS: dict[str, Compressor] = {
    "skip_uniform": _skip_uniform,
    "skip_importance": _skip_importance,
    "int8": partial(_quantise, "int8", 8),
    "int4": partial(_quantise, "int4", 4),
}
