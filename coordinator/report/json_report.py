"""The JSON form of a report, as in `report.json`, and the way back."""

import json
from pathlib import Path

from offsite.coordinator.job.json_form import decode, encode
from offsite.coordinator.report.emulator_facts import EmulatorFacts
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.privacy_facts import PrivacyFacts
from offsite.coordinator.report.quality_facts import Quality
from offsite.errors import DataError

FORMAT = 1
FILE = "report.json"


def report_to_json(report: Report) -> dict[str, object]:
    """Returns a report as the plain values of `report.json`."""
    content = {
        "format": FORMAT,
        "mode": report.mode,
        "engine": report.engine,
        "rounds_planned": report.rounds_planned,
        "finished_rounds": report.finished_rounds,
        "quality": _quality(report.quality),
        "emulator": _emulator(report.emulators),
        "adapter": encode(report.adapter),
        "privacy": _privacy(report.privacy),
        "aggregation": encode(report.aggregation),
        "secagg": encode(report.secagg),
        "rounds": encode(report.rounds),
        "cost": encode(report.cost),
        "warnings": encode(report.warnings),
        "provenance": encode(report.provenance),
        "data": encode(report.data),
    }
    # Reports between organisations have had this key from the first release on.
    return content if report.simulated else content | {"public": encode(report.quality.public)}


def read_report(folder: Path) -> Report:
    """Reads the report of a run folder.

    Args:
      folder: run folder of `offsite simulate` or `offsite coordinator run`.

    Raises:
      DataError: the folder holds no report, or a report of a release that wrote less.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"report={str(path)!r}: cannot be read; give the folder of a finished run") from error
    if not isinstance(content, dict):
        raise DataError(f"report={str(path)!r}: must be a JSON object; give the folder of a finished run")
    emulator = content.get("emulator")
    variants = emulator.get("variants") if isinstance(emulator, dict) else None
    emulators = {"default": emulator, "composition": emulator, "variants": variants}
    return decode(Report, content | {"emulators": emulators}, FILE)


def _quality(quality: Quality) -> dict[str, object]:
    private = None if quality.private is None else encode(quality.private)
    numbers = {
        "gain_nats": quality.gain_nats,
        "gain_error": quality.gain_error,
        "within_noise": quality.within_noise,
        "forgetting_nats": quality.forgetting_nats,
    }
    texts = {} if quality.generated is None else {"generated": encode(quality.generated)}
    return {"private": private, "public": encode(quality.public), **(private or {}), **numbers, **texts}


def _emulator(emulators: EmulatorFacts) -> dict[str, object]:
    default = encode(emulators.default) | encode(emulators.composition)
    return {**default, "variants": encode(emulators.variants)}


def _privacy(privacy: PrivacyFacts) -> dict[str, object]:
    content: dict[str, object] = encode(privacy)
    return content if privacy.not_known_here is None else content | {"known_here": " ".join(privacy.not_known_here)}
