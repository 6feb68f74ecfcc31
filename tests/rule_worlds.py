"""Tiny federations under other server rules, and a slow DP-SGD that shares no line with the product."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from offsite.client.training.emulator_session import EmulatorSession, open_session
from offsite.client.training.local_update import SiteJob, local_update
from offsite.client.training.privacy_plan import SitePlan
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.privacy.randomness import Randomness
from offsite.protos.job_manifest import JobManifest
from offsite.simulation.run_folder import Run
from tests.memory_federation import World

RULES = {
    "rolora": 'rule = "rolora"',
    "nested": 'rule = "nested"\n[[aggregation.ranks]]\nsites = ["elm"]\nrank = 1\n',
    "fedprox": 'rule = "fedprox"\nproximal = 0.8',
    "median": 'rule = "median"',
    "flexlora": 'rule = "flexlora"',
}


def written(fed: Path, name: str, *, method: str = "ffa_lora", steps: int = 1, secagg: bool = True) -> Path:
    """Writes the tiny world's federation file with another rule, beside the original."""
    text = fed.read_text().replace("batch = 8", f"batch = 8\nlocal_steps = {steps}")
    text = text.replace(
        "[training]", f'[privacy]\naccountant = "rdp"\n\n[adapter]\nmethod = "{method}"\nrank = 3\n\n[training]'
    )
    tables = f"[aggregation]\n{RULES[name]}\n[secagg]\nenabled = {str(secagg).lower()}\n"
    text = text.replace("[aggregation]\nlearning_rate = 0.02\n", tables)
    path = fed.parent / f"{name}.toml"
    path.write_text(text)
    return path


def examples_of(run: Run, site: str, manifest: JobManifest, session: EmulatorSession) -> Any:
    """Returns the training records of a site."""
    setting = next(one for one in run.config.sites if one.name == site)
    return run.examples(setting.train, manifest, session)


def trained(world: World, weights: str, recompute: str = "never") -> tuple[EmulatorSession, np.ndarray]:
    """Returns the session of site ash with frozen weights in a form, and the update under one fixed noise."""
    manifest = world.manifest
    session = open_session(
        world.run.store.package_of(""),
        manifest,
        emulator=manifest.emulator_of("ash"),
        limits=VettingThresholds.for_owner(64, 1.0),
        seed=3,
        weights=weights,
        recompute=recompute,
    )
    examples, plan = examples_of(world.run, "ash", manifest, session), world.run.site("ash", manifest, session).plan
    job = SiteJob("ash", manifest, session, examples, plan)
    return session, local_update(job, world.start, randomness=Randomness.for_simulation(1, "weights")).update


def mask_of(session: EmulatorSession, trains: dict[str, slice]) -> np.ndarray:
    """Returns the mask of trainable entries: in each parameter whose name holds a key, the columns of this key."""
    parts = []
    for name, shape in zip(session.layout.names, session.layout.shapes, strict=True):
        part = np.zeros(shape, dtype=bool)
        for key, columns in trains.items():
            if key in name:
                part[:, columns] = True
        parts.append(part.reshape(-1))
    return np.concatenate(parts)


def slow_update(
    session: EmulatorSession,
    start: np.ndarray,
    examples: Any,
    *,
    manifest: JobManifest,
    plan: SitePlan,
    randomness: Any,
    mask: np.ndarray,
    proximal: float = 0.0,
) -> np.ndarray:
    """Returns the update by DP-SGD on the masked entries, record by record on whole gradients, float64 (d,)."""
    names, here = session.layout.names, start.astype(np.float64)
    parameters = dict(session.model.named_parameters())
    terms, places = manifest.privacy, dict(zip(names, np.split(np.arange(start.size), _ends(session)), strict=True))
    for _ in range(manifest.local_steps):
        session.layout.write(session.model, here)
        drawn = np.flatnonzero(randomness.uniform(len(examples)) < plan.sample_rate)
        total = np.zeros(start.size)
        for row in drawn:
            losses = session.task.losses(session.model, examples.select(np.array([row])))
            gradients = torch.autograd.grad(losses.sum(), [parameters[name] for name in names])
            gradient = np.concatenate([one.double().numpy().reshape(-1) for one in gradients]) * mask
            total += gradient * min(1.0, terms.max_grad_norm * (1 - 1e-4) / np.linalg.norm(gradient))
        for name in (name for name in parameters if name in places):  # noise is drawn in the model's order
            entries = places[name][mask[places[name]]]
            if len(entries):
                total[entries] += plan.noise_multiplier * terms.max_grad_norm * randomness.normal(len(entries))
        here = here - manifest.learning_rate * (total / terms.batch + proximal * (here - start) * mask)
    session.layout.write(session.model, start)
    return here - start


def _ends(session: EmulatorSession) -> np.ndarray:
    return np.cumsum([int(np.prod(shape)) for shape in session.layout.shapes])[:-1]
