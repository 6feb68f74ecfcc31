"""The emulator with its adapter, opened from a verified package, ready to train on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach, places
from offsite.client.home.installation import WEIGHTS
from offsite.emulator.package import package_reader
from offsite.emulator.package.files import tokenizer_sha256
from offsite.emulator.runtime.bitsandbytes_layers import ROUNDINGS, round_layers
from offsite.emulator.runtime.quantized_linear import replace_linears
from offsite.emulator.runtime.refresh import plain_of
from offsite.emulator.runtime.refresh_state import Frame, Refresh, Refreshable
from offsite.emulator.vetting.limits import Vetting, VettingThresholds
from offsite.emulator.vetting.vet import Slots, read_given, vet, vet_adapter, vet_given, vet_refresh
from offsite.errors import DigestMismatch, OffsiteError, RangeError, UnsupportedModel, lookup
from offsite.protos.job_manifest import JobManifest
from offsite.task.encode import SPLITS
from offsite.task.examples import vocabulary_of
from offsite.task.spec import Batch, Record, Task
from offsite.task.tasks import TASKS


@dataclass
class EmulatorSession:
    """One loaded emulator; sites of one machine may share it, since each writes its adapter before it trains.

    Attributes:
      model: the emulator with the adapter attached; only the adapter requires gradients.
      task: gives per-example losses.
      layout: order of the adapter's parameters.
      processor: of the package: what makes examples of records, as a tokenizer.
      vetting: what was measured of the emulator and of the adapter before anything was trained on them.
      limits: of the vetting.
      frame: of the package.
      biases: of the emulator, as far as they may move between rounds.
      start: adapter as it was attached, float32 (d,).
      seed: of what is drawn to try the model on; at a real site its own secret.
      engine: per-example gradient engine that passed the probe; empty until a site has probed.
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
    _vetted: Refresh = field(default=(), init=False)

    def put(self, adapter: np.ndarray) -> None:
        """Writes an adapter, float32 (d,), into the emulator.

        Raises:
          RangeError: wrong length, a value that is not finite, or one so large that it drowns all others.
        """
        peak = float(np.abs(adapter).max(initial=0.0))
        if peak > self.limits.adapter_peak:
            raise RangeError(
                f"adapter peak={peak:.4g}: at most {self.limits.adapter_peak:g} is trained from, or one value drowns "
                "all others; ask the coordinator what happened to its adapter"
            )
        self.layout.write(self.model, adapter)

    def refresh(self, refresh: Refresh) -> None:
        """Puts biases that moved in place, the shipped ones for (), and vets the emulator where they are new to it.

        Raises:
          MalformedMessage, RangeError: they are not exactly those that may move, or not finite.
          UnsupportedModel: the vetting found a known trap. In any case the shipped ones stand afterwards.
        """
        self.biases.put(())
        if not refresh:
            return
        try:
            moved = self.biases.read(refresh)
            self.biases.put(refresh)
            if refresh != self._vetted:
                self.put(self.start)
                vet_refresh(plain_of(self.model), self.frame, moved, self.limits, seed=self.seed)
                self._vetted = refresh
        except OffsiteError:
            self.biases.put(())
            raise


def open_session(
    folder: Path,
    manifest: JobManifest,
    *,
    emulator: str,
    limits: VettingThresholds,
    seed: int,
    weights: str = "widened",
) -> EmulatorSession:
    """Loads the emulator package that the manifest names for a site, and vets it and its adapter.

    Args:
      folder: the package.
      manifest: the job.
      emulator: SHA-256 of the package, hexadecimal: `JobManifest.emulator_of` the site.
      limits: of the vetting.
      seed: of what the vetting draws; at a real site its own secret.
      weights: in which form frozen ones lie in memory, see `SiteSettings.weights`.

    Raises:
      UnsupportedModel: the vetting found a known trap.
      MalformedMessage, RangeError: the given tensors are not those that the adapter takes, or too many.
      DigestMismatch: the package, or the adapter that the manifest's recipe gives on it, is another one.
    """
    task = lookup(TASKS, manifest.task, "task")
    lookup(SPLITS, manifest.split, "split")
    lookup(WEIGHTS, weights, "weights")
    model = package_reader.load(folder, dtype=torch.float32, expected_digest=emulator)
    facts = package_reader.read_manifest(folder, expected_digest=emulator)
    if (found := tokenizer_sha256(facts.files)) != manifest.tokenizer:
        raise DigestMismatch(
            f"tokenizer={found[:16]}: the job manifest names {manifest.tokenizer[:16]}; ask the coordinator which holds"
        )
    frame = Frame.of(folder, facts)
    biases = Refreshable.of(model, facts, frame)
    rounded = round_layers(model, facts, weights) if weights in ROUNDINGS else {}
    vetted, slots = vet(folder, model, facts, limits, seed=seed), Slots.of(model, facts)
    given = read_given(folder, model, facts)
    processor = task.load_processor(folder)
    _check_ids(processor, model)
    if weights != "widened":
        replace_linears(model, folder, facts, rounded)
    where = places(model, manifest.adapter)
    model = attach(model, manifest.adapter, given)
    vettings = [vetted, vet_adapter(model, manifest.adapter, slots, limits, where)]
    if given:
        vettings.append(vet_given(plain_of(model), frame, limits, seed=seed))
    layout = Layout.of(model)
    if layout.digest() != manifest.layout.digest():
        raise DigestMismatch(
            f"layout={layout.digest().hex()[:16]}: the job manifest names {manifest.layout.digest().hex()[:16]}, and "
            "its recipe gives another adapter on this emulator; install the same release on both sides"
        )
    return EmulatorSession(
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


def encoded(session: EmulatorSession, manifest: JobManifest, records: Sequence[Record]) -> Batch:
    """Returns records as the examples of a job; one of which its processor makes nothing the model knows is empty."""
    examples = session.task.encode(
        session.processor,
        records,
        length=manifest.length,
        split=manifest.split,
        model_config=session.model.config,
    )
    return examples.within(session.model)


def _check_ids(processor: Any, model: Any) -> None:
    """Checks that a model knows every token, or it would fail on some records and tell by it which they are.

    Raises:
      UnsupportedModel: it does not.
    """
    largest = getattr(processor, "largest_id", None)  # what makes no tokens has none
    if largest is not None and largest >= (vocabulary := vocabulary_of(model)):
        raise UnsupportedModel(
            f"token id={largest}: the emulator knows {vocabulary} tokens; its tokenizer belongs to another model"
        )
