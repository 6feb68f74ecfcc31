"""The end of a job between organisations: the adapter, and a report of what the coordinator knows."""

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from offsite.adapter.export import export
from offsite.coordinator.aggregation.rules import AGGREGATORS, Aggregator
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.job.evaluate import score
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.store import Progress, Store, write_atomically
from offsite.coordinator.report import metrics
from offsite.coordinator.report.aggregation_section import IN_THE_OPEN, facts_of, left_out, rule_text
from offsite.coordinator.report.sections import refreshes
from offsite.emulator.runtime.plug_in import plug
from offsite.errors import lookup

PACKAGES = ("offsite", "torch", "transformers", "peft", "opacus", "flwr", "cryptography")


def conclude(config: FedConfig, config_sha256: str, store: Store, job: Job, progress: Progress) -> dict[str, Any]:
    """Writes the adapter and the report, and returns the report."""
    plug(job.full, job.layout, progress.plugged)
    after = score(job.task, job.full, job.public.test, batch=job.manifest.physical_batch)
    export(job.full, job.manifest.adapter, store.adapter, base=Path(config.model.path).name, given=job.given)
    rule = lookup(AGGREGATORS, config.aggregation.rule, "rule")
    report = _report(config_sha256, store, job, progress, rule) | {
        "public": {
            "full_zero_shot": dataclasses.asdict(job.zero_shot),
            "emulator_zero_shot": dataclasses.asdict(job.emulator.public),
            "plug_in": dataclasses.asdict(after),
        }
    }
    store.write_json("report.json", report)
    write_atomically(store.folder / "report.md", _text(report, store).encode())
    return report


def _report(config_sha256: str, store: Store, job: Job, progress: Progress, rule: Aggregator) -> dict[str, Any]:
    manifest, lines = job.manifest, store.rounds()
    terms = manifest.privacy
    return {
        "format": 1,
        "mode": "federation",
        "rounds_planned": manifest.rounds,
        "finished_rounds": progress.round,
        "rounds": lines,
        "privacy": {
            "private": terms.private,
            "target_epsilon": terms.epsilon,
            "accountant": terms.accountant,
            "max_grad_norm": terms.max_grad_norm,
            "known_here": "what each site spent stands in its own ledger; the coordinator is not told",
        },
        "aggregation": facts_of(rule),
        "secagg": {
            "enabled": not manifest.aggregation.individuals,
            "suite": 1,
            "threshold": lines[-1]["threshold"] if lines else 0,
            "dropped": [one | {"round": line["round"]} for line in lines for one in line["dropped"]],
        },
        "emulator": {
            **job.emulator.report(),
            "variants": [one.report() for one in job.emulators[1:]],
        },
        "adapter": {"method": manifest.adapter.method, "rank": manifest.adapter.rank, "parameters": job.layout.size},
        "provenance": {
            "config_sha256": config_sha256,
            "job_sha256": manifest.digest().hex(),
            "versions": {name: version(name) for name in PACKAGES},
        },
    }


def _text(report: dict[str, Any], store: Store) -> str:
    public, lines = report["public"], report["rounds"]
    before, after = public["full_zero_shot"]["loss"], public["plug_in"]["loss"]
    loss, further = metrics.loss_of(public["plug_in"]), ""
    if loss.kind != "text":
        further = f" ({metrics.against(public['plug_in'], public['full_zero_shot'])})"
    taken = sum(line["accepted"] for line in lines)
    table = [
        f"| {line['round']} | {', '.join(line['members'])} | {line['public_loss'] or float('nan'):.4f} | "
        f"{'yes' if line['accepted'] else 'no'} | {line['seconds']:.1f} |"
        for line in lines
    ]
    return "\n".join(
        [
            "# Federation",
            "",
            *([] if report["secagg"]["enabled"] else [IN_THE_OPEN, ""]),
            f"{report['finished_rounds']} of {report['rounds_planned']} rounds are done, {taken} were taken over. On "
            f"the coordinator's public {loss.kind} the model went from {before:.4f} to {after:.4f} {loss.unit}"
            f"{further}; how good it is on the sites' own {loss.kind}, only they can measure.",
            "",
            f"Each site planned for epsilon {report['privacy']['target_epsilon']} at most, by its own ledger.",
            "",
            "| round | members | public loss | taken over | seconds |",
            "|---|---|---|---|---|",
            *table,
            "",
            rule_text(report["aggregation"]),
            "",
            *left_out(report["secagg"]["dropped"]),
            *_emulators(report["emulator"]),
            *(line for sentence in refreshes(lines) for line in (sentence, "")),
            f"adapter: {store.adapter}",
            "",
        ]
    )


def _emulators(default: Mapping[str, Any]) -> list[str]:
    """Returns the table of who got which emulator; nothing where all got the same."""
    if not default["variants"]:
        return []
    rows = [
        f"| {', '.join(one['sites'])} | {', '.join(one['recipe']) or 'none'} | {one['embedding']} | "
        f"{one['package_bytes']} | {one['gradient_cosine']:.3f} | {one['public_loss']:.4f} | {one['sha256'][:16]} |"
        for one in (default, *default["variants"])
    ]
    head = "| sites | compression | word tables | package bytes | gradient cosine | public loss | SHA-256 |"
    return ["Not all sites got the same emulator; each was told who got which.", "", head, "|---" * 7 + "|", *rows, ""]
