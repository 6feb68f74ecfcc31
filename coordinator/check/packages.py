"""The check of packages that were built before: their files, their geometry, and whether they are of the model."""

from pathlib import Path

from offsite.coordinator.config.federation_file import FedConfig
from offsite.errors import ConfigError, DataError, UnsupportedModel
from offsite.task.findings import Findings


def check_packages(config: FedConfig, out: Path | None, findings: Findings) -> None:
    """Checks each package that the table [emulator] names; most files name none, and nothing is loaded for them.

    Args:
      config: the federation file.
      out: run folder, which may not exist yet; None where it is not known.
      findings: findings so far; faults of the model's own files are findings of other checks.
    """
    for folder in config.emulator.packages:
        where = f"emulator.package={folder!r}"
        findings.on_step(f"check the package {folder}")
        before = len(findings.errors)
        with findings.gathering(where):
            _check_place(Path(folder), out)
        if len(findings.errors) == before:
            _check_package(config, Path(folder), where, findings)


def _check_place(folder: Path, out: Path | None) -> None:
    """Refuses a package inside the run folder, which a new run clears."""
    if out is not None and folder.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"lies in the run folder {str(out)!r}, which a new run clears; move the package elsewhere")


def _check_package(config: FedConfig, folder: Path, where: str, findings: Findings) -> None:
    """Compares a package with its manifest, with the geometry of the file, and with the weights of the model."""
    from offsite.emulator.build.built_before import BuiltPackage
    from offsite.emulator.calibration.source import ShardSource
    from offsite.task.checkpoint import stored_dtype

    emulator, model = config.emulator, Path(config.model.path)
    with findings.gathering(where):
        package = BuiltPackage.open(folder)
        with findings.gathering(where):
            package.check_files()
        for fault in package.misfits(emulator.first, emulator.last, emulator.shape, model):
            findings.add(f"{where} {fault}")
        try:
            source = ShardSource(model, stored_dtype(model))
        except DataError:
            return  # a finding about the model's own files
        except UnsupportedModel as error:
            findings.warn(f"{where}: is compared with the model's weights once the model is loaded ({error})")
            return
        for fault in package.differences(source):
            findings.add(f"{where} {fault}")
