"""Which worker takes which file of tests: the longest first; two federations at once only when nothing else is left.

A federation is six to nine processes; beside one that waits for its processes, another worker has a core for itself.
"""

from typing import Any

from xdist.scheduler import LoadScopeScheduling

PROCESSES = ("tests/faults/", "tests/deploy/test_six_commands.py")
# Measured seconds of the longest files on two cores; the others count by their tests.
SECONDS: dict[str, float] = {
    "tests/faults/test_coordinator_killed.py": 500,
    "tests/faults/test_sites_lost.py": 450,
    "tests/contracts/test_tasks_learn.py": 350,
    "tests/deploy/test_six_commands.py": 330,
    "tests/faults/test_hostile_coordinator.py": 320,
    "tests/docs/test_commands.py": 280,
    "tests/faults/test_identities.py": 280,
    "tests/faults/test_disk_full.py": 230,
    "tests/cli/test_simulate.py": 220,
    "tests/faults/test_individuals.py": 200,
    "tests/faults/test_hostile_site.py": 180,
    "tests/faults/test_variants.py": 170,
    "tests/faults/test_quiet.py": 140,
    "tests/contracts/test_per_example_gradients.py": 130,
    "tests/contracts/test_sensitivity.py": 100,
    "tests/coordinator/test_attempt.py": 100,
    "tests/coordinator/test_link.py": 95,
    "tests/privacy/test_ledger.py": 90,
    "tests/contracts/test_compressors.py": 90,
    "tests/test_package.py": 85,
    "tests/contracts/test_engines.py": 80,
    "tests/emulator/test_vet.py": 80,
    "tests/cli/test_check.py": 75,
    "tests/coordinator/test_refresh.py": 75,
    "tests/task/test_tokenizer_table.py": 70,
    "tests/coordinator/test_zero_order_rounds.py": 70,
}
SECONDS_A_TEST = 0.2


def spread(names: list[str], limit: int) -> set[str]:
    """Returns at most `limit` cases of each test, the first case among them and the others at equal distances."""
    tests: dict[str, list[str]] = {}
    for name in names:
        tests.setdefault(name.partition("[")[0], []).append(name)
    return {cases[i * len(cases) // limit] for cases in tests.values() for i in range(limit)}


class Files(LoadScopeScheduling):
    """Keeps a file's tests, and with them its federation, on one worker."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0]

    def _assign_work_unit(self, node: Any) -> None:
        taken = any(
            scope.startswith(PROCESSES) and not all(done.values())
            for other, work in self.assigned_work.items()
            if other is not node
            for scope, done in work.items()
        )
        scope = min(self.workqueue, key=lambda one: (one.startswith(PROCESSES) is taken, -self._seconds(one)))
        self.workqueue.move_to_end(scope, last=False)
        super()._assign_work_unit(node)

    def _seconds(self, scope: str) -> float:
        return SECONDS.get(scope, SECONDS_A_TEST * len(self.workqueue[scope]))
