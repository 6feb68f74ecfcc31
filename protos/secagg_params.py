"""The terms of one secure aggregation, derived alike by the coordinator and by each site from the job manifest."""

import hashlib
import json

import numpy as np

from offsite.errors import lookup
from offsite.protos.codec import KeysRequest
from offsite.protos.job_manifest import JobManifest
from offsite.secagg.params import SecAggParams
from offsite.trust.wire import Writer

_REFRESHED = "offsite refreshed start"


def adapter_digest(vector: np.ndarray, refresh: tuple[tuple[str, bytes], ...] = ()) -> bytes:
    """Returns the SHA-256 of a training's start, 32 bytes.

    The digest is part of the terms that every member signs, so sites that trained on different refreshes have no common
    sum.

    Args:
      vector: the adapter, hashed as little-endian float32, (d,).
      refresh: the emulator's biases that moved, (name, values); empty leaves the digest of the adapter alone.
    """
    adapter = hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).digest()
    if not refresh:
        return adapter
    writer = Writer().text(_REFRESHED).field(adapter)
    for name, values in refresh:
        writer.text(name).field(values)
    return hashlib.sha256(writer.done()).digest()


def secagg_params(manifest: JobManifest, request: KeysRequest) -> SecAggParams:
    """Returns the terms of the aggregation that a request opens.

    All but sequence, nonce, adapter and invited sites comes from the manifest that the site accepted. A coordinator
    that shows different models or rules to different sites therefore gives them different T0 and no sum.

    Raises:
      UnknownName: an invited site is not in the roster.
      ConfigError: fewer sites than n_min are invited, n_min is too small for the manifest's accomplices, or the invited
        sites are not in order.
    """
    roster = dict(manifest.roster)
    return SecAggParams(
        federation=manifest.federation,
        epoch=manifest.epoch,
        round=request.sequence,
        nonce=request.nonce,
        manifest=hashlib.sha256(json.dumps(manifest.roster).encode()).digest(),
        # The common package. `config` covers the whole manifest, and so also which sites get another package.
        emulator=bytes.fromhex(manifest.emulator),
        adapter=request.adapter,
        config=manifest.digest(),
        roster=tuple((site, bytes.fromhex(lookup(roster, site, "site"))) for site in request.invited),
        n_min=manifest.n_min,
        accomplices=manifest.accomplices,
        length=manifest.upload_size(request.round),
        clip=manifest.update_bound,
    )
