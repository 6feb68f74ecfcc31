"""A long federation on a tiny model with random kills: no process may grow, and every ledger must equal its replay.

`python -m bench.soak --rounds 100 --out runs/soak` prints JSON. Sites and coordinator are real processes over TLS.
"""

import argparse
import json
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from offsite.privacy.accountants import ACCOUNTANTS
from offsite.privacy.events import Event
from tests.conftest import make_world
from tests.faults.conftest import POLICY, Federation

SITES = ("ash", "birch", "cedar", "elm")
STEADY = "ash"  # never killed, so that growth shows
SAMPLE_SECONDS = 5.0


@dataclass
class Series:
    """Samples of one process.

    Attributes:
      pid: number of the process.
      samples: round, resident bytes, file descriptors and threads of each sample.
    """

    pid: int
    samples: list[tuple[int, int, int, int]] = field(default_factory=list)

    def take(self, number: int) -> None:
        """Adds a sample, if the process is alive."""
        try:
            process = psutil.Process(self.pid)
            sample = (number, process.memory_info().rss, process.num_fds(), process.num_threads())
        except psutil.Error:
            return
        self.samples.append(sample)

    def growth(self) -> dict[str, float] | None:
        """Returns the means of the second and the last quarter of the samples; the first quarter is the start.

        Returns:
          The means by name; None with fewer than 12 samples.
        """
        quarter = len(self.samples) // 4
        if quarter < 3:
            return None
        early, late = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        mean = [[sum(sample[i] for sample in part) / len(part) for i in (1, 2, 3)] for part in (early, late)]
        return {
            "samples": len(self.samples),
            "rss_early_mb": mean[0][0] / 1e6,
            "rss_late_mb": mean[1][0] / 1e6,
            "fds_early": mean[0][1],
            "fds_late": mean[1][1],
            "threads_early": mean[0][2],
            "threads_late": mean[1][2],
        }


def soak(folder: Path, rounds: int, *, kill_every: float, seed: int) -> dict[str, Any]:
    """Runs the federation to its end under kills, and returns the measurements.

    Args:
      folder: empty folder for the federation.
      rounds: number of rounds.
      kill_every: mean seconds between kills.
      seed: seed of times and victims.
    """
    draw = random.Random(seed)
    federation = Federation(folder, make_world(folder / "world"), sites=SITES)
    for site in SITES:
        federation.set_policy(site, **(POLICY | {"epsilon_cap": "100000.0"}))
        (federation.site(site) / "site.toml").write_text(
            (federation.site(site) / "site.toml").read_text().replace("\nsimulation_seed = 1", "")
        )
    job = federation.job(
        "soak", rounds=rounds, training=f"spare_rounds = {rounds}", coordinator="attempts = 20\nsites = 4"
    )
    federation.start_sites()
    began, kills = time.monotonic(), []
    series = {STEADY: Series(federation.processes[STEADY].pid)}
    coordinators = [Series(federation.start_coordinator(job).pid)]
    next_kill = time.monotonic() + 2 * kill_every
    try:
        while federation.processes["coordinator"].poll() is None:
            time.sleep(SAMPLE_SECONDS)
            done = int(federation.status().get("round") or 0)
            series[STEADY].take(done)
            coordinators[-1].take(done)
            if time.monotonic() > next_kill:
                next_kill = time.monotonic() + kill_every * draw.uniform(0.5, 1.5)
                # the coordinator is left alone in the second half, so that its growth shows too
                victim = draw.choice(SITES[1:] if done > rounds / 2 else (*SITES[1:], "coordinator"))
                kills.append((done, victim))
                federation.kill(victim, signal.SIGKILL)
                if victim == "coordinator":
                    coordinators.append(Series(federation.start_coordinator(job).pid))
                else:
                    federation.start_site(victim)
        code = federation.processes["coordinator"].returncode
    finally:
        federation.stop()
    lines = [json.loads(line) for line in (federation.run(job) / "rounds.jsonl").read_text().splitlines()]
    return {
        "exit_code": code,
        "seconds": round(time.monotonic() - began, 1),
        "rounds": len(lines),
        "members_mean": sum(len(line["members"]) for line in lines) / max(len(lines), 1),
        "kills": {name: sum(victim == name for _, victim in kills) for name in (*SITES, "coordinator")},
        "site_never_killed": series[STEADY].growth(),
        "coordinator_last": coordinators[-1].growth(),
        "ledgers": {site: replay(federation, site) for site in SITES},
    }


def replay(federation: Federation, site: str) -> dict[str, Any]:
    """Computes a site's spent epsilon again from the debits, and compares ledger and audit log."""
    ledger = [entry["fields"] for entry in federation.ledger(site)]
    left = federation.audit(site, "egress")
    events = [Event(debit["noise_multiplier"], debit["sample_rate"], debit["steps"]) for debit in ledger]
    total = ACCOUNTANTS["pld"](events, 0.01) if events else 0.0
    recorded = ledger[-1]["epsilon_total"] if ledger else 0.0
    return {
        "debits": len(ledger),
        "egress_reports": len(left),
        "epsilon_recorded": recorded,
        "epsilon_replayed": total,
        "equal": abs(recorded - total) < 1e-9 and len(ledger) - len(left) in (0, 1),
    }


def main() -> None:
    """Runs the soak and prints the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--kill-every", type=float, default=40.0, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder to keep; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch) / "soak"
        folder.mkdir(parents=True, exist_ok=True)
        measured = soak(folder, options.rounds, kill_every=options.kill_every, seed=options.seed)
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
