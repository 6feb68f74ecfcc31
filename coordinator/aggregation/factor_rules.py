"""Rules that use LoRA's factors: their products are averaged, or kept apart from those of earlier adapters."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from offsite.adapter.export import WEIGHTS
from offsite.adapter.inject import ADAPTER
from offsite.adapter.layout import Layout
from offsite.coordinator.aggregation.state import RuleSettings, ServerState
from offsite.errors import ConfigError, DataError
from offsite.protos.aggregation import DOWN, UP

Vector = NDArray[np.float64]


def flexlora(state: ServerState, updates: Vector, settings: RuleSettings) -> ServerState:
    """Averages the sites' products B A and goes on from their best approximation of the adapter's rank.

    Bai et al. 2024 (arXiv 2402.11505): the singular value decomposition U S V^T of the mean product gives
    B = U S and A = V^T, the first `rank` columns of each. Everything beyond that rank is lost: with n sites the mean
    has up to n times the rank. A zero update leaves every product as it is, and writes its factors in this form.
    Tensors that are not factors are averaged.

    Args:
      state: state before the round.
      updates: updates of both factors, float64 (n, d).
      settings: rule settings with the layout.
    """
    adapters = state.adapter.astype(np.float64) + updates
    after = adapters.mean(axis=0)
    spans = _spans(settings)
    for down, up in _pairs(settings):
        rank = spans[down][1][0]
        downs = [adapter[spans[down][0]].reshape(spans[down][1]) for adapter in adapters]
        ups = [adapter[spans[up][0]].reshape(spans[up][1]) for adapter in adapters]
        new_up, new_down = nearest_product(np.hstack(ups) / len(adapters), np.vstack(downs), rank)
        after[spans[up][0]], after[spans[down][0]] = new_up.reshape(-1), new_down.reshape(-1)
    return state.at(after)


def nearest_product(up: Vector, down: Vector, rank: int) -> tuple[Vector, Vector]:
    """Returns the factors U S and V^T of the best approximation of `up @ down` of a rank, without making the product.

    Args:
      up: left factor, (out, k).
      down: right factor, (k, in).
      rank: rank of the approximation, >= 1.

    Returns:
      (out, rank), and (rank, in) with orthonormal rows; rows beyond the factors' sizes are zero.
    """
    left, left_small = np.linalg.qr(up)
    right, right_small = np.linalg.qr(down.T)
    inner_left, values, inner_right = np.linalg.svd(left_small @ right_small.T)
    kept, rows = values[:rank], inner_right[:rank]
    new_up, new_down = np.zeros((len(up), rank)), np.zeros((rank, down.shape[1]))  # the rank may be above the product's
    new_up[:, : len(kept)] = left @ (inner_left[:, : len(kept)] * kept)
    new_down[: len(rows)] = rows @ right.T
    return new_up, new_down


def olora(state: ServerState, update: Vector, settings: RuleSettings) -> ServerState:
    """Adds the mean update, then moves each A out of the row spaces of earlier adapters' A_i.

    Wang et al. 2023 (arXiv 2310.14152): the penalty is lambda times the sum over i of the squared entries of A A_i^T.
    This rule takes its proximal step, the A' that minimises |A' - A|^2 / 2 plus the penalty, which is stable for every
    lambda: A' = A (I + 2 lambda sum_i A_i^T A_i)^-1. The step sees adapters only, so it costs no privacy.

    Args:
      state: state before the round.
      update: mean update, float64 (d,).
      settings: rule settings with penalty (lambda), layout and earlier adapters.
    """
    after = state.adapter.astype(np.float64) + update
    for name, (span, shape) in _spans(settings).items():
        taken = [factors[name].astype(np.float64) for factors in settings.earlier if name in factors]
        if taken:
            rows = np.vstack(taken)
            down = after[span].reshape(shape)
            # Woodbury's identity: a system of the rows' size instead of the inputs'
            inner = np.eye(len(rows)) / (2 * settings.penalty) + rows @ rows.T
            after[span] = (down - (down @ rows.T) @ np.linalg.solve(inner, rows)).reshape(-1)
    return state.at(after)


def read_earlier(folder: str, layout: Layout | None = None) -> Mapping[str, NDArray[np.float32]]:
    """Reads the factors A of an adapter folder as `adapter.export` writes them, by their names in a layout.

    Args:
      folder: folder of the earlier adapter.
      layout: layout of the adapter that is trained now; None reads every factor A.

    Raises:
      DataError: the folder is missing, or its file is damaged.
      ConfigError: no factor A in the folder belongs to this adapter, or a factor has other inputs.
    """
    try:
        tensors = load_file(Path(folder) / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"aggregation.earlier={folder!r}: no readable {WEIGHTS}; give the folder of an adapter"
        ) from error
    ending = f"{DOWN}weight"
    factors = {
        name.removesuffix(ending) + f"{DOWN}{ADAPTER}.weight": values
        for name, values in tensors.items()
        if name.endswith(ending)
    }
    shapes = dict(zip(layout.names, layout.shapes, strict=True)) if layout else {}
    kept = {name: values for name, values in factors.items() if layout is None or name in shapes}
    if not kept:
        raise ConfigError(
            f"aggregation.earlier={folder!r}: has no factor A of a layer that is trained now; leave the folder out"
        )
    for name in kept.keys() & shapes.keys():
        if kept[name].shape[1:] != shapes[name][1:] or not np.isfinite(kept[name]).all():
            raise ConfigError(f"aggregation.earlier={folder!r}: {name} does not fit this model; leave the folder out")
    return kept


def _spans(settings: RuleSettings) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """Returns slice and shape of each tensor, by name."""
    layout = _layout(settings)
    ends = np.cumsum([int(np.prod(shape)) for shape in layout.shapes])
    places = zip(layout.names, layout.shapes, ends, strict=True)
    return {name: (slice(int(end - np.prod(shape)), int(end)), shape) for name, shape, end in places}


def _pairs(settings: RuleSettings) -> list[tuple[str, str]]:
    """Returns the names of the two factors of each layer."""
    return [(name, name.replace(DOWN, UP)) for name in _layout(settings).names if DOWN in name]


def _layout(settings: RuleSettings) -> Layout:
    if settings.layout is None:
        raise ConfigError("layout=None: this rule uses the adapter's factors; pass the adapter's layout")
    return settings.layout
