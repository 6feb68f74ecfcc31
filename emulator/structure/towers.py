"""Towers: lists of alike blocks in a model, found by structure and never by a list of model classes."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from offsite.errors import UnsupportedModel

Signature = tuple[tuple[str, tuple[int, ...]], ...]
U_SHAPE = ("down_blocks", "mid_block", "up_blocks")  # parts of a U-net, in the order in which they run
APART = "transformer_blocks"  # in each part, lists of this name hold the blocks that keep the width
SCATTERED = f"*.{APART}"


@dataclass(frozen=True)
class Tower:
    """A list of alike blocks, named by module path.

    Attributes:
      path: module path of the list, for example "model.layers"; `SCATTERED` if the blocks stand apart.
      blocks: module paths of the tower's blocks in order, for example "model.layers.0".
    """

    path: str
    blocks: tuple[str, ...]

    @property
    def apart(self) -> bool:
        """True for a U-shaped model, where other modules stand between the blocks, and blocks may differ in width."""
        return self.path == SCATTERED


def signature(block: nn.Module) -> Signature:
    """Returns names and shapes of a block's parameters, relative to the block; alike blocks have equal signatures."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def usual_signature(blocks: list[nn.Module]) -> Signature | None:
    """Returns the signature shared by more than half of the blocks; None without such a majority.

    A majority is enough, because a first block may own one tensor more than the others: T5 keeps its table of relative
    positions there.
    """
    commonest, count = Counter(signature(block) for block in blocks).most_common(1)[0]
    return commonest if 2 * count > len(blocks) else None


def blocks_at(model: nn.Module, path: str) -> tuple[str, ...]:
    """Returns the module paths of a tower's blocks in order, whatever modules stand in their places now.

    Args:
      model: a model under its own module names.
      path: path of the tower.
    """
    lists = [path] if path != SCATTERED else _lists_apart(model)
    return tuple(f"{place}.{name}" for place in lists for name, _ in model.get_submodule(place).named_children())


def find_towers(model: nn.Module) -> list[Tower]:
    """Returns every tower of a model, outermost lists only, in the order of the model's modules.

    A tower is a `ModuleList` or `Sequential` of at least two composite blocks of one class, most of them with the same
    parameter names and shapes. Lists inside a block (experts of a mixture, for example) belong to their block.

    A U-shaped model (Ronneberger et al. 2015, arXiv 1505.04597, figure 1) changes size and channels on its way, and its
    halves are joined, so no list can lose a member. The one tower of such a model are its transformer blocks.
    """
    if all(hasattr(model, name) for name in U_SHAPE):
        blocks = blocks_at(model, SCATTERED)
        return [Tower(SCATTERED, blocks)] if len(blocks) > 1 else []
    towers: list[Tower] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{tower.path}.") for tower in towers)
        if not inside and isinstance(module, nn.ModuleList | nn.Sequential) and _alike(list(module.children())):
            towers.append(Tower(path, tuple(f"{path}.{name}" for name, _ in module.named_children())))
    return towers


def main_tower(model: nn.Module) -> Tower:
    """Returns the tower with most parameters; of equal towers the last, which is next to the head.

    Raises:
      UnsupportedModel: the model has no tower.
    """
    towers = find_towers(model)
    if not towers:
        raise UnsupportedModel(
            f"model={type(model).__name__}: no list of at least two alike blocks was found, so there is no middle to "
            "replace; use a model built of repeated blocks"
        )
    return max(reversed(towers), key=lambda tower: sum(_size(model.get_submodule(path)) for path in tower.blocks))


def token_embeddings(model: nn.Module) -> list[nn.Module]:
    """Returns the embeddings by which tokens enter a model, as far as the model names them.

    A model that only joins others (CLIP) has no embedding of its own, and transformers raises if asked for one. Then
    the embeddings of the joined models are returned.
    """
    getter = getattr(model, "get_input_embeddings", None)
    if getter is None:
        return []
    try:
        return [getter()]
    except (AttributeError, NotImplementedError):
        return [
            table for part in model.children() for table in token_embeddings(part) if isinstance(table, nn.Embedding)
        ]


def _alike(blocks: list[nn.Module]) -> bool:
    if len(blocks) < 2 or len({type(block) for block in blocks}) > 1:
        return False
    # A leaf (in a list of Linear or Embedding layers) has no residual path around it, so it cannot be left out.
    composite = all(next(block.children(), None) is not None for block in blocks)
    return composite and bool(usual_signature(blocks))


def _lists_apart(model: nn.Module) -> list[str]:
    lists: list[str] = []
    for part in U_SHAPE:
        for path, module in model.get_submodule(part).named_modules(prefix=part):
            if isinstance(module, nn.ModuleList) and path.endswith(f".{APART}"):
                lists.append(path)
    return lists


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
