"""Between an adapter's vector and a site's upload in a round: the whole vector, a part, or its way along directions."""

import hashlib
import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from offsite.adapter.layout import Layout
from offsite.errors import PrivacyRefusal, RangeError
from offsite.privacy.zero_order import Directions, displacement
from offsite.protos.aggregation import UP
from offsite.protos.job_manifest import JobManifest


def directions_of(manifest: JobManifest, number: int) -> Directions:
    """Returns the directions of a round of DP-ZO; they follow from the job and the round, and from no message.

    Args:
      manifest: the job.
      number: number of the round, from 1.
    """
    seed = hashlib.sha256(b"offsite directions 1" + manifest.digest() + number.to_bytes(8, "big")).digest()
    return Directions(seed, manifest.aggregation.directions, manifest.aggregation.spacing)


def select_uploaded(manifest: JobManifest, number: int, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the entries of an adapter's vector that a round uploads.

    Args:
      manifest: the job.
      number: number of the round, from 1.
      vector: float32 (d,), in the adapter's layout.

    Returns:
      float32 (upload_size,).
    """
    return vector[_mask(manifest.layout, manifest.upload_layout(number))]


def scatter_uploaded(manifest: JobManifest, number: int, uploads: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns uploaded vectors in the adapter's layout; entries that the round did not upload are zero.

    Uploads of DP-ZO are replayed along the round's directions.

    Args:
      manifest: the job.
      number: number of the round, from 1.
      uploads: float64 (..., upload_size).

    Returns:
      float64 (..., d).

    Raises:
      RangeError: the uploads have another length.
    """
    size = manifest.upload_size(number)
    if uploads.shape[-1] != size:
        raise RangeError(f"upload size={uploads.shape[-1]}: round {number} has {size}; use the job's own manifest")
    if manifest.aggregation.directions:
        along, rows = directions_of(manifest, number), uploads.reshape(-1, size)
        moved = np.stack([displacement(row, along, manifest.layout.size) for row in rows])
        return moved.reshape(*uploads.shape[:-1], manifest.layout.size)
    whole = np.zeros((*uploads.shape[:-1], manifest.layout.size), dtype=np.float64)
    whole[..., _mask(manifest.layout, manifest.upload_layout(number))] = uploads
    return whole


def trained_mask(manifest: JobManifest, number: int, site: str) -> NDArray[np.bool_]:
    """Returns which entries of a round's upload a site trains, bool (upload_size,); it leaves all others at zero."""
    layout, rank = manifest.upload_layout(number), manifest.rank_of(site)
    parts = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        part = np.ones(shape, dtype=np.bool_)
        if UP in name:
            part[..., rank:] = False
        parts.append(part.reshape(-1))
    return np.concatenate(parts)


def mean_of(
    manifest: JobManifest, number: int, total: NDArray[np.float64], members: Collection[str]
) -> NDArray[np.float64]:
    """Returns the mean of a sum; each entry is divided by the number of members that train it, and is zero without any.

    Args:
      manifest: the job.
      number: number of the round, from 1.
      total: sum of the members' uploads, float64 (upload_size,).
      members: names of the sites in the sum.
    """
    if not manifest.aggregation.ranks:
        return total / len(members)
    count = sum(trained_mask(manifest, number, site).astype(np.float64) for site in members)
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def check_coverage(manifest: JobManifest, sites: Collection[str]) -> None:
    """Checks that at least n_min of some sites, or none, train each entry of their sum.

    Where ranks differ, few sites train the last columns, and those entries of the sum are theirs alone.

    Raises:
      PrivacyRefusal: an entry would be the sum of fewer than n_min sites.
    """
    if not manifest.aggregation.ranks or manifest.aggregation.individuals:
        return
    ranks = [manifest.rank_of(site) for site in sites]
    for rank in sorted(set(ranks)):
        covering = sum(other >= rank for other in ranks)
        if covering < manifest.n_min:
            raise PrivacyRefusal(
                f"rank={rank}: only {covering} of {len(ranks)} sites train so many columns, and a sum is opened "
                f"for n_min={manifest.n_min} or more; wait for more of those sites, or give them smaller ranks"
            )


def _mask(layout: Layout, part: Layout) -> NDArray[np.bool_]:
    kept = set(part.names)
    sizes = [math.prod(shape) for shape in layout.shapes]
    return np.repeat([name in kept for name in layout.names], sizes)
