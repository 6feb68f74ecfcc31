"""The emulator with its adapter, opened from a verified package, ready to train on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach, places
from offsite.client.training.workers import Workers
from offsite.emulator.package import package_reader
from offsite.emulator.package.manifest import Manifest
from offsite.emulator.package.package_folder import tokenizer_sha256
from offsite.emulator.runtime.quantized_linear import bytes_of
from offsite.emulator.runtime.recomputation import frozen_blocks, kept_bytes, recompute_blocks
from offsite.emulator.runtime.refresh import plain_of
from offsite.emulator.runtime.refresh_state import Frame, Refresh, Refreshable
from offsite.emulator.runtime.stored_model import holding, in_format
from offsite.emulator.runtime.weight_forms import AUTO, NEVER, RECOMPUTATIONS, WIDENED
from offsite.emulator.vetting.limits import Vetting, VettingThresholds
from offsite.emulator.vetting.vet import Slots, read_auxiliary, vet, vet_adapter, vet_auxiliary, vet_refresh
from offsite.errors import ConfigError, DigestMismatch, OffsiteError, RangeError, UnsupportedModel, lookup
from offsite.protos.job_manifest import JobManifest
from offsite.task.device import CPU
from offsite.task.model_fit import WITH_LENGTH, check_positions, check_token_ids, most_positions
from offsite.task.number_format import FLOAT32, choose_dtype
from offsite.task.records import without_empty
from offsite.task.spec import Batch, Record, Task
from offsite.task.splits import SPLITS
from offsite.task.tasks import TASKS

log = logging.getLogger("offsite.client")


@dataclass
class EmulatorSession:
    """One loaded emulator; sites of one machine may share it, since each writes its adapter before it trains.

    Attributes:
      model: emulator with the adapter attached; only the adapter requires gradients.
      task: task of the job, with per-example losses.
      layout: order of the adapter's parameters.
      processor: processor of the package, which turns records into examples, as a tokenizer does.
      vetting: measurements of the emulator and of the adapter, made before any training.
      limits: thresholds of the vetting.
      frame: frame of the package.
      biases: biases of the emulator that may move between rounds.
      start: adapter as attached, float32 (d,).
      seed: seed of the examples on which the model is tried; a secret of the site, except in a simulation.
      engine: name of the per-example gradient engine that passed the probe; empty before the probe.
      workers: further processes with this emulator, which take shares of each step's records; None where this process
        trains alone.
      refreshed: moved biases that are in the emulator now; () for the shipped ones.
    """

    model: Any
    task: Task
    layout: Layout
    processor: Any
    vetting: tuple[Vetting, ...]
    limits: VettingThresholds
    frame: Frame
    biases: Refreshable
    start: np.ndarray
    seed: int
    engine: str = ""
    workers: Workers | None = None
    refreshed: Refresh = field(default=(), init=False)
    _vetted: Refresh = field(default=(), init=False)

    def put(self, adapter: np.ndarray) -> None:
        """Writes an adapter, float32 (d,), into the emulator.

        Raises:
          RangeError: the adapter has another length, a value that is not finite, or a value that drowns all others.
        """
        peak = float(np.abs(adapter).max(initial=0.0))
        if peak > self.limits.adapter_peak:
            raise RangeError(
                f"adapter peak={peak:.4g}: training starts from at most {self.limits.adapter_peak:g}, because a larger "
                "value drowns all others; ask the coordinator what happened to its adapter"
            )
        self.layout.write(self.model, adapter)

    def refresh(self, refresh: Refresh) -> None:
        """Writes moved biases into the emulator, the shipped biases for (), and vets the emulator with new biases.

        After an error the shipped biases stand.

        Raises:
          MalformedMessage, RangeError: the biases are not exactly those that may move, or not finite.
          UnsupportedModel: the vetting found a known trap.
        """
        self.biases.put(())
        self.refreshed = ()
        if not refresh:
            return
        try:
            moved = self.biases.read(refresh)
            self.biases.put(refresh)
            if refresh != self._vetted:
                self.put(self.start)
                vet_refresh(plain_of(self.model), self.frame, moved, self.limits, seed=self.seed)
                self._vetted = refresh
            self.refreshed = refresh
        except OffsiteError:
            self.biases.put(())
            raise

    def close(self) -> None:
        """Ends the workers; a second time changes nothing."""
        if self.workers is not None:
            self.workers.close()


def open_session(
    folder: Path,
    manifest: JobManifest,
    *,
    emulator: str,
    limits: VettingThresholds,
    seed: int,
    weights: str = WIDENED,
    recompute: str = NEVER,
    device: torch.device | str = CPU,
    vetted: bool = False,
    dtype: str = FLOAT32,
) -> EmulatorSession:
    """Loads the emulator package that the manifest names for a site, and vets it and its adapter.

    Args:
      folder: folder of the package.
      manifest: manifest of the job.
      emulator: SHA-256 of the package, hexadecimal, see `JobManifest.emulator_of`.
      limits: thresholds of the vetting.
      seed: seed of the examples that the vetting draws; a secret of the site, except in a simulation.
      weights: form in which frozen weights lie in memory, see `SiteSettings.weights`.
      recompute: whether activations of frozen blocks are computed again, see `SiteSettings.recompute`.
      device: device on which the emulator is vetted and trained.
      vetted: whether another process of this site has vetted this package for this job, so that it is only loaded; the
        bytes are compared with the digest all the same.
      dtype: number format in which it is trained, see `task.number_format.choose_dtype`; the vetting is in float32.

    Raises:
      UnsupportedModel: the vetting found a known trap.
      MalformedMessage, RangeError: the given tensors are not those that the adapter takes, or too many.
      DigestMismatch: the package is not the named one, or the manifest's recipe gives another adapter on it.
    """
    task = lookup(TASKS, manifest.task, "task")
    lookup(SPLITS, manifest.split, "split")
    lookup(RECOMPUTATIONS, recompute, "recompute")
    hold = holding(weights, manifest.adapter)
    model = package_reader.load(folder, dtype=torch.float32, expected_digest=emulator, device=device, hold=hold)
    facts = package_reader.read_manifest(folder, expected_digest=emulator)
    _check_tokenizer(facts, manifest)
    frame = Frame.of(folder, facts)
    biases = Refreshable.of(model, facts, frame)
    vettings, slots = list[Vetting](), Slots.of(model, facts)
    if not vetted:
        vettings.append(vet(folder, model, facts, limits, seed=seed))
    given = read_auxiliary(folder, model, facts)
    processor = task.load_processor(folder)
    _check_fit(task, processor, model, manifest.length)
    model = in_format(model, choose_dtype(dtype, torch.device(device), facts.full_bytes // 2))
    where = places(model, manifest.adapter)
    model = attach(model, manifest.adapter, given)
    if not vetted:
        vettings.append(vet_adapter(model, manifest.adapter, slots, limits, where))
    if given and not vetted:
        vettings.append(vet_auxiliary(plain_of(model), frame, limits, seed=seed))
    layout = Layout.of(model)
    _check_layout(layout, manifest)
    session = EmulatorSession(
        model,
        task,
        layout,
        processor,
        tuple(vettings),
        limits,
        frame,
        biases,
        layout.read(model),
        seed,
    )
    _keep_less(session, manifest, recompute)
    return session


def _check_tokenizer(facts: Manifest, manifest: JobManifest) -> None:
    if (tokenizer := tokenizer_sha256(facts.files)) != manifest.tokenizer:
        raise DigestMismatch(
            f"tokenizer={tokenizer[:16]}: the job manifest names {manifest.tokenizer[:16]}; ask the coordinator which "
            "of the two holds"
        )


def _check_layout(layout: Layout, manifest: JobManifest) -> None:
    if layout.digest() != manifest.layout.digest():
        raise DigestMismatch(
            f"layout={layout.digest().hex()[:16]}: the job manifest names {manifest.layout.digest().hex()[:16]}, and "
            "its recipe gives another adapter on this emulator; install the same release on both sides"
        )


def _keep_less(session: EmulatorSession, manifest: JobManifest, recompute: str) -> None:
    """Lets frozen blocks compute their activations again, where the setting says so; tried on invented records."""
    plain, frame = plain_of(session.model), session.frame
    blocks = frozen_blocks(plain, tuple(path for path in frame.tower if path not in frame.gone))
    if recompute == NEVER or manifest.aggregation.directions:  # which take no gradient
        return
    if recompute == AUTO:
        batch = session.task.dummy_batch(session.model, manifest.length, seed=session.seed)
        kept = kept_bytes(blocks, lambda: session.task.losses(session.model, batch))
        kept = kept * manifest.physical_batch // len(batch)
        held = bytes_of(plain)
        log.info("activations=%d MB of a physical batch beside weights=%d MB", kept >> 20, held >> 20)
        if kept <= held:
            return
    log.info("recompute: %d blocks compute their activations again", len(blocks))
    recompute_blocks(blocks)


def encode_records(session: EmulatorSession, manifest: JobManifest, records: Sequence[Record]) -> Batch:
    """Returns records as the examples of a job; a record is empty where the model knows nothing of its encoding."""
    examples = session.task.encode(
        session.processor,
        records,
        length=manifest.length,
        split=manifest.split,
        model_config=session.model.config,
    )
    return without_empty(examples, records, manifest.split).within(session.model)


def _check_fit(task: Task, processor: Any, model: Any, length: int) -> None:
    """Checks that a model knows every token and position; by failing on some records, it would tell which they are.

    Raises:
      UnsupportedModel: the processor has a token that the model does not know, or examples have too many tokens.
    """
    # A processor that makes no tokens has no largest id.
    check_token_ids(getattr(model, "config", None), getattr(processor, "largest_id", None), task.kind)
    if task.kind in WITH_LENGTH:
        try:
            check_positions(most_positions(model), length)
        except ConfigError as error:
            raise UnsupportedModel(f"emulator: {error}; its coordinator should have seen that") from error
