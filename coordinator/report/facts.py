"""The parts of a report that a simulation and a job between organisations have in common."""

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from offsite.adapter.export import in_peft_format
from offsite.adapter.methods import METHODS
from offsite.coordinator.aggregation.rules import AGGREGATORS
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.job.emulators import Emulator
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.round_record import RoundRecord
from offsite.coordinator.report.data_facts import DataFacts
from offsite.coordinator.report.emulator_facts import Composition, EmulatorFacts, ShippedEmulator
from offsite.coordinator.report.model import AdapterFacts, DroppedInRound, Provenance, RuleFacts, SecaggFacts
from offsite.coordinator.report.quality_facts import Quality
from offsite.errors import lookup
from offsite.protos.aggregation import NO_SECAGG_WARNING
from offsite.protos.job_manifest import JobManifest
from offsite.task.model_folder import document
from offsite.task.packed_format import packed_format
from offsite.trust.collusion import weaker_sentence

PACKAGES = ("offsite", "torch", "transformers", "peft", "opacus", "dp-accounting", "flwr", "cryptography", "numpy")


def emulator_facts(job: Job, gate: float) -> EmulatorFacts:
    """Returns the facts of a job's emulators; `gate` is the smallest allowed gradient cosine."""
    facts = job.emulator.facts
    composition = Composition(
        full_bytes=facts.full_bytes,
        slot_bytes=facts.slot_bytes,
        embedding_bytes=facts.embedding_bytes,
        middle_bytes=facts.middle_bytes,
        middle_ratio=facts.middle_ratio,
        verbatim_share=facts.verbatim,
        gate=gate,
    )
    return EmulatorFacts(_shipped(job.emulator), composition, tuple(map(_shipped, job.emulators[1:])))


def adapter_facts(job: Job) -> AdapterFacts:
    """Returns the facts of the adapter."""
    spec = job.manifest.adapter
    method = METHODS[spec.method]
    return AdapterFacts(
        method=spec.method,
        rank=spec.rank,
        alpha=spec.alpha,
        targets=tuple(spec.targets),
        slots=tuple(spec.slots),
        parameters=job.layout.size,
        exact_mean=method.exact_mean,
        why=method.why,
        options=dict(spec.options),
        peft=in_peft_format(spec),
        directory="adapter",
    )


def rule_facts(config: FedConfig) -> RuleFacts:
    """Returns the server rule of a federation file.

    Raises:
      UnknownName: the rule does not exist.
    """
    rule = lookup(AGGREGATORS, config.aggregation.rule, "rule")
    return RuleFacts(rule.name, rule.needs, rule.linear, rule.why)


def secagg_facts(manifest: JobManifest, records: tuple[RoundRecord, ...]) -> SecaggFacts:
    """Returns the facts of the addition of updates in all whole rounds."""
    last = records[-1] if records else None
    dropped = (
        DroppedInRound(drop.site, drop.stage, drop.reason, record.round)
        for record in records
        for drop in record.dropped
    )
    return SecaggFacts(
        enabled=manifest.aggregation.secure_aggregation,
        suite=1,
        members=last.members if last else (),
        threshold=last.threshold if last else 0,
        accomplices=manifest.accomplices,
        sites=len(manifest.roster),
        dropped=tuple(dropped),
        upload_bytes=max((record.upload_bytes for record in records), default=0),
        payload_bytes=max((record.payload_bytes for record in records), default=0),
        rounds=len(records),
    )


def unit_of(manifest: JobManifest) -> str:
    """Returns the unit of the privacy promise: one record, with the meaning of a record."""
    record = f"a block of {manifest.length} tokens" if manifest.split == "blocks" else "one row"
    return f"one record: {record} of one site's data"


def warnings_of(
    config: FedConfig, job: Job, records: tuple[RoundRecord, ...], quality: Quality, data: tuple[DataFacts, ...]
) -> tuple[str, ...]:
    """Returns the sentences that a reader of the report must not miss."""
    warnings = []
    method = METHODS[job.manifest.adapter.method]
    if not job.manifest.aggregation.secure_aggregation:
        warnings.append(NO_SECAGG_WARNING)
    if weaker := weaker_sentence(job.manifest.accomplices, len(job.manifest.roster)):
        warnings.append(weaker)
    model = Path(config.model.path)
    if (packed := packed_format(model, document(model))) is not None:
        warnings.append(packed.sentence)
    if not job.manifest.privacy.private:
        warnings.append("privacy is off: gradients were neither clipped nor noised, epsilon is unbounded")
    warnings += [line for own in data for line in own.warnings]
    if not method.exact_mean:
        warnings.append(f"method {method.name}: the mean of the uploads is not the mean of their effects; {method.why}")
    if refused := [record.round for record in records if not record.accepted]:
        warnings.append(f"rounds {refused} were not taken over: public loss rose by more than the tolerance")
    if quality.within_noise:
        warnings.append(f"the gain on held-out private records is within noise: {quality.noise_rule}")
    elif quality.gain_nats is not None and quality.gain_nats <= 0:
        warnings.append("the plug-in is not better than the untrained full model on held-out private text")
    if (dropped := sum(len(record.dropped) for record in records)) > 0:
        warnings.append(f"{dropped} times a site dropped out of a round; see secagg.dropped")
    return tuple(warnings)


def provenance_of(config: FedConfig, config_sha256: str, job: Job, started: str) -> Provenance:
    """Returns seed, hashes and versions; `started` is the wall clock at the start, ISO 8601."""
    return Provenance(
        seed=config.seed,
        config_sha256=config_sha256,
        model_sha256=_weights_sha256(job.hashes),
        job_sha256=job.manifest.digest().hex(),
        versions={name: version(name) for name in PACKAGES},
        started=started,
        platform=platform.platform(),
    )


def _shipped(emulator: Emulator) -> ShippedEmulator:
    return ShippedEmulator(
        sites=emulator.sites,
        sha256=emulator.facts.digest(),
        shipped_bytes=emulator.facts.shipped_bytes,
        package_bytes=emulator.facts.package_bytes,
        recipe=tuple(emulator.facts.recipe),
        embedding=emulator.facts.embedding,
        gradient_cosine=emulator.cosine,
        public_loss=emulator.public.loss,
    )


def _weights_sha256(hashes: Mapping[str, str]) -> str:
    """Returns one hash over the hashes of a model's weight files, by name."""
    state = hashlib.sha256()
    for name in sorted(name for name in hashes if name.endswith(".safetensors")):
        state.update(f"{name}:{hashes[name]}\n".encode())
    return state.hexdigest()
