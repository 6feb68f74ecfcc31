"""The first step of a simulation: the check of everything, and only then the run folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from offsite.coordinator.check.federation import EVERYTHING, Scope
from offsite.coordinator.config.federation_file import FedConfig, read_with_faults
from offsite.errors import CheckFailed
from offsite.simulation.check import check_simulation
from offsite.simulation.run_folder import Origin, Run, check_free, with_options
from offsite.task.findings import Findings
from offsite.trust.files import sha256_file


def begin(
    file: Path,
    out: Path,
    origin: Origin,
    on_warning: Callable[[str], None],
    on_step: Callable[[str], None] = lambda text: None,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> Run:
    """Checks everything that a run reads, and makes its run folder.

    Args:
      file: federation file.
      out: run folder; the folder of a run without a whole round is taken over.
      origin: options of the command; its path of the file is set here.
      on_warning: function that takes each warning of the check.
      on_step: function that takes what is being checked.
      device: device in place of the file's; None for the file's.
      dtype: number format in place of the file's; None for the file's.

    Raises:
      CheckFailed: something is wrong; nothing was written.
      OffsiteError: the federation file cannot be read, or the folder is in use.
    """
    origin, findings = dataclasses.replace(origin, file=str(file.resolve())), Findings(on_step=on_step)
    config, faults = read_with_faults(file)
    for fault in faults:
        findings.add(str(fault))
    if config is None:
        raise CheckFailed("\n".join(findings.errors))
    config = configured(config, origin).on(device, dtype)
    check_free(out)
    _check(config, out, findings, on_warning, Scope(tuple(fault.key for fault in faults)))
    return Run.create(config, sha256_file(file), out, origin)


def resume(
    folder: Path,
    on_warning: Callable[[str], None],
    on_step: Callable[[str], None] = lambda text: None,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> Run:
    """Opens the run of a folder; a run without a whole round begins anew where its federation file was changed.

    Whatever stopped a run before its first whole round may stand in the federation file, and would stop the run again
    for ever if the folder's copy of the file counted.

    Raises:
      CheckFailed: something is wrong with a run without a whole round.
      OffsiteError: the folder holds no run, or its run cannot be opened.
    """
    run = Run.open(folder)
    run = dataclasses.replace(run, config=run.config.on(device, dtype))
    if run.whole_rounds:
        return run
    file = Path(run.origin.file)
    if run.origin.file and file.is_file() and sha256_file(file) != run.config_sha256:
        return begin(file, folder, run.origin, on_warning, on_step, device=device, dtype=dtype)
    prepared = run.store.job() is not None
    _check(run.config, folder, Findings(on_step=on_step), on_warning, prepared=prepared)
    return run


def configured(config: FedConfig, origin: Origin) -> FedConfig:
    """Returns a configuration with the options of a command; the ranges are checked again.

    Raises:
      ConfigError: an option does not fit the file.
    """
    config = with_options(config, seed=origin.seed, rounds=origin.rounds, sites=origin.sites)
    if origin.private:
        return config
    return dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, private=False))


def _check(
    config: FedConfig,
    out: Path,
    findings: Findings,
    on_warning: Callable[[str], None],
    scope: Scope = EVERYTHING,
    *,
    prepared: bool = False,
) -> None:
    check_simulation(config, out, findings, scope, prepared=prepared)
    for warning in findings.warnings:
        on_warning(warning)
    findings.check()
