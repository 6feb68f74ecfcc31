"""The view of an offered job before its approval, as an owner reads it at a terminal."""

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offsite.cli import client, client_run, coordinator
from offsite.client.home.installation import SiteHome
from offsite.client.home.jobs import Jobs
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.protos.aggregation import AggregationTerms
from offsite.protos.signed_job import sign_job
from tests.protos.test_manifest import JOB

PERMITTED = {
    **{"models": '["any"]', "methods": '["any"]', "splits": '["any"]', "max_rank": "64"},
    **{"epsilon_cap": "100.0", "allow_individual_updates": "true"},
}
Show = Callable[[AggregationTerms], tuple[list[str], list[str]]]


def run(app: object, *arguments: object) -> list[str]:
    result = CliRunner().invoke(app, [str(one) for one in arguments])  # type: ignore[arg-type]
    if result.exception is not None:
        raise result.exception
    return result.output.splitlines()


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Show:
    """Returns the output of `inspect` and `approve` for a job under some terms."""
    folder = tmp_path_factory.mktemp("owners")
    (folder / "text.csv").write_text("text\n" + "some words\n" * 120)
    home, names = folder / "home", ("east", "north", "west")
    run(coordinator.app, "init", home, "--name", "demo")
    for name in names:
        run(client.app, "init", folder / name, "--name", name, "--data", folder / "text.csv")
    said = run(coordinator.app, "approve", home, *(folder / name / "site.request" for name in names), "--yes")
    fingerprint = next(line.split(": ")[1] for line in said if line.startswith("fingerprint for every site"))
    run(client.app, "sign", folder / "east", home / "welcomes" / "east.welcome", "--fingerprint", fingerprint)
    policy = folder / "east" / "policy.toml"
    for key, value in PERMITTED.items():
        policy.write_text(re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", policy.read_text()))
    jobs, identity = Jobs(SiteHome.open(folder / "east").state / "jobs"), CoordinatorHome.open(home).identity

    def shown(terms: AggregationTerms) -> tuple[list[str], list[str]]:
        job = dataclasses.replace(JOB, aggregation=terms, adapter=dataclasses.replace(JOB.adapter, **METHODS[terms]))
        digest = job.digest().hex()
        jobs.keep(job.to_bytes(), sign_job(identity, job.to_bytes()), digest)
        return run(client_run.app, "inspect", folder / "east", digest), run(
            client_run.app, "approve", folder / "east", digest
        )

    return shown


OPEN = AggregationTerms(individuals=True)
NESTED = AggregationTerms(ranks=(("north", 2),))
TURNS = AggregationTerms(alternate=True, proximal=0.5)
METHODS = {OPEN: {}, NESTED: {}, TURNS: {"method": "lora"}, AggregationTerms(): {}}


def test_a_job_without_secure_aggregation_says_so_first(show: Show) -> None:
    inspected, approved = show(OPEN)
    assert inspected[1].startswith("WARNING    secure aggregation is OFF: the coordinator sees each site's own update")
    assert any(line.startswith("leaves     one signed, plain update a round") for line in inspected)
    assert approved[0].startswith("WARNING secure aggregation is OFF")
    assert approved[-1].startswith("approved ")
    assert re.match(
        r"set aside in the ledger: epsilon \d+\.\d+ at delta 1e-06 by pld, for 120 declared records", approved[-2]
    )
    assert any(re.match(r"privacy    epsilon \S+ at delta 1e-06 for the whole job", line) for line in inspected)
    assert any(line.startswith("records    120: ") for line in inspected)


def test_the_command_that_inspect_prints_approves_what_it_showed(
    show: Show, tmp_path_factory: pytest.TempPathFactory
) -> None:
    inspected, _ = show(AggregationTerms())
    digest = inspected[0].split()[1]
    assert len(digest) == 64
    (command,) = [line.split(maxsplit=1)[1] for line in inspected if line.startswith("next")]
    *words, place, approved = shlex.split(command)
    assert (words, approved) == (["offsite", "client", "approve"], digest)
    assert (Path(place) / "site.toml").is_file()
    assert (
        "helpers    up to 1 of these sites may help the coordinator, which then sees no single update of the others"
        in inspected
    )


def test_other_jobs_say_what_the_sites_do_and_no_warning(show: Show) -> None:
    for terms, words in (
        (AggregationTerms(), ""),
        (NESTED, "ranks      these sites train fewer than 8 columns: north 2"),
    ):
        inspected, approved = show(terms)
        assert not any("WARNING" in line for line in (*inspected, *approved))
        assert not words or words in inspected
        assert any(line.startswith("leaves     one masked update a round") for line in inspected)
    inspected, _ = show(TURNS)
    assert "turns      B is trained in odd rounds and A in even rounds; only the trained part leaves" in inspected
    assert "pull       each step is pulled back to where the round began (FedProx), mu 0.5" in inspected
