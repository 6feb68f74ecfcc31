"""The coordinator's signature of a job manifest, and the context to which a package's key is sealed."""

from offsite.protos.job_manifest import JobManifest
from offsite.trust.identity import Identity, verify
from offsite.trust.wire import Writer

_LABEL, _PACKAGE = "offsite job", "offsite package"


def sign_job(identity: Identity, manifest: bytes) -> bytes:
    """Returns the coordinator's signature of a job manifest, 64 bytes."""
    return identity.sign(_signed(manifest))


def check_job(coordinator: bytes, manifest: bytes, signature: bytes) -> JobManifest:
    """Returns the manifest that the coordinator signed.

    Raises:
      ProtocolViolation: the signature is not the coordinator's over these bytes.
      MalformedMessage: the bytes are not a manifest of this release.
    """
    verify(coordinator, _signed(manifest), signature, sender="coordinator")
    return JobManifest.from_bytes(manifest)


def _signed(manifest: bytes) -> bytes:
    return Writer().text(_LABEL).field(manifest).done()


def package_context(manifest: JobManifest, package: bytes) -> bytes:
    """Returns the context of a package's sealed key: the job, and the SHA-256 of the encrypted package."""
    return Writer().text(_PACKAGE).field(manifest.digest()).field(package).done()
