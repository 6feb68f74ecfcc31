"""The part of the adapter that a site trains in a round: all, one factor in turn, or the first columns of each B."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from offsite.adapter.rank_columns import first_columns
from offsite.protos.job_manifest import JobManifest


@contextmanager
def only_trainable(model: nn.Module, manifest: JobManifest, *, site: str, number: int) -> Iterator[None]:
    """Lets exactly the parameters require gradients that a site trains in a round, and so are clipped and noised.

    Afterwards the model has its own parameters back, with the trained values.

    Args:
      model: emulator with the job's adapter attached.
      manifest: manifest of the job.
      site: name of the site.
      number: number of the round, from 1.

    Raises:
      UnsupportedModel: the adapter has no columns to leave out.
    """
    with ExitStack() as stack:
        if (rank := manifest.rank_of(site)) < manifest.adapter.rank:
            stack.enter_context(first_columns(model, rank))
        resting = set(manifest.layout.names) - set(manifest.upload_layout(number).names)
        stack.enter_context(_frozen([p for name, p in model.named_parameters() if name in resting]))
        yield


@contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
