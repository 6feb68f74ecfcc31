"""The terms of one secure aggregation, built alike by the coordinator and by each site from the job manifest."""

import hashlib
import json

import numpy as np

from errors import lookup
from protos.codec import KeysRequest
from protos.manifest import JobManifest
from secagg.terms import Terms


def adapter_digest(vector: np.ndarray) -> bytes:
    """Returns the SHA-256 of an adapter vector as little-endian float32, 32 bytes."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).digest()


def terms_of(manifest: JobManifest, request: KeysRequest) -> Terms:
    """Returns the terms T0 of the aggregation that a request opens.

    Everything but sequence, nonce, adapter and invited sites comes from the manifest that the site accepted, so a
    coordinator that shows different models or rules to different sites gives them different T0 and no sum.

    Raises:
      UnknownName: an invited site is not in the roster.
      ConfigError: fewer invited than n_min, or not in order.
    """
    roster = dict(manifest.roster)
    return Terms(
        federation=manifest.federation,
        epoch=manifest.epoch,
        round=request.sequence,
        nonce=request.nonce,
        manifest=hashlib.sha256(json.dumps(manifest.roster).encode()).digest(),
        # That of all sites that get no other; who gets which other one is in `config`, which covers the whole manifest.
        emulator=bytes.fromhex(manifest.emulator),
        adapter=request.adapter,
        config=manifest.digest(),
        roster=tuple((site, bytes.fromhex(lookup(roster, site, "site"))) for site in request.invited),
        n_min=manifest.n_min,
        length=manifest.layout.size,
        clip=manifest.update_bound,
    )
