"""The words in which an offered job is shown to the owner of a site."""

import shlex

from offsite.client.home.package_room import PackageRoom
from offsite.errors import PolicyRefusal
from offsite.protos.aggregation import NO_SECAGG_WARNING, AggregationTerms
from offsite.protos.job_manifest import JobManifest
from offsite.trust.collusion import weaker_sentence

SPLITS = {
    "truncate": "one record for each text, cut after so many tokens",
    "blocks": "each text cut into several records, so that the job's tokenizer decides how many there are",
}


def job_lines(
    manifest: JobManifest,
    *,
    site: str,
    folder: str,
    approved: bool,
    records: int | None,
    delta: float,
    room: PackageRoom | None,
    cost: str,
) -> list[str]:
    """Returns what a job asks of a site, one fact in each line.

    Args:
      manifest: manifest of the job.
      site: name of the site; the manifest maps this name to an emulator.
      folder: path of the site's folder, as the owner typed the path.
      approved: whether the site's owner approved the job.
      records: declared number of the site's records, or of its blocks; None where there is none yet.
      delta: delta of the job at this site.
      room: disk that the job's package takes; None where no offer has named its size.
      cost: sentence about time and memory at this site; empty where they were not measured yet.
    """
    digest, own, rule = manifest.digest().hex(), manifest.emulator_of(site), manifest.aggregation
    lines = [
        f"job        {digest}  ({'approved' if approved else 'not approved'})",
        f"model      {manifest.model} ({manifest.base[:16]}…), task {manifest.task}, "
        f"emulator {own[:16]}…, tokenizer {manifest.tokenizer[:16]}…",
        f"refresh    {_refresh(manifest.refresh)}",
        *_training(manifest, records, delta),
        *_disk(room),
        f"cost       {cost or 'measured on invented records once the emulator has been fetched and vetted'}",
        f"{'round' if rule.individuals else 'sum':<10} of at least {manifest.n_min} of {len(manifest.roster)} "
        f"sites: {', '.join(name for name, _ in manifest.roster)}",
        *_of_rule(rule, manifest.adapter.rank),
        f"leaves     one {'signed, plain' if rule.individuals else 'masked'} update a round"
        + "".join(f", and the metric {name}, which no site sends" for name in manifest.metrics),
    ]
    if not rule.individuals:
        lines.append(
            f"helpers    up to {manifest.accomplices} of these sites may help the coordinator, which then sees no "
            "single update of the others"
        )
    lines.append(f"next       {shlex.join(['offsite', 'client', 'approve', folder, digest])}")
    if rule.individuals:
        lines.insert(1, f"WARNING    {NO_SECAGG_WARNING}")
    if weaker := weaker_sentence(manifest.accomplices, len(manifest.roster)):
        lines.insert(1, f"WARNING    {weaker}")
    if others := {emulator: sites for emulator, sites in manifest.shipped().items() if emulator != own}:
        lines.insert(2, f"others     {_others(others)}")
    return lines


def _training(manifest: JobManifest, records: int | None, delta: float) -> list[str]:
    """Says what a job trains, on which records, and at what cost in privacy."""
    privacy, adapter, declared = manifest.privacy, manifest.adapter, records or "not declared yet"
    split = SPLITS.get(manifest.split, "cut in a way that this release does not know")
    return [
        f"adapter    {adapter.method} rank {adapter.rank}, {manifest.layout.size} parameters in all"
        + "".join(f", {name} {value}" for name, value in adapter.options),
        f"training   {manifest.rounds} rounds (+{manifest.spare_rounds} spare) of {manifest.local_steps} steps, "
        f"{manifest.length} tokens a record, expected batch {privacy.batch}",
        f"records    {declared}: {split} ({manifest.split})",
        f"privacy    epsilon {privacy.epsilon} at delta {delta:.3g} for the whole job, "
        f"clip {privacy.max_grad_norm:.4g}, accountant {privacy.accountant}",
    ]


def _disk(room: PackageRoom | None) -> list[str]:
    """Says what disk a job takes, and what to do where there is too little."""
    if room is None:
        return []
    try:
        room.check()
    except PolicyRefusal as refusal:
        return [f"disk       {room.line()}", f"WARNING    {refusal}"]
    return [f"disk       {room.line()}"]


def _others(others: dict[str, tuple[str, ...]]) -> str:
    """Says in one sentence which sites get another emulator than this site."""
    named = ", ".join(f"{' and '.join(sites)} {digest[:16]}…" for digest, sites in others.items())
    return f"other sites train on other emulators than this site: {named}"


def _of_rule(rule: AggregationTerms, rank: int) -> list[str]:
    """Says what the coordinator's rule asks of the sites beyond training and sending."""
    lines = []
    if rule.proximal:
        lines.append(f"pull       each step is pulled back to where the round began (FedProx), mu {rule.proximal:g}")
    if rule.directions:
        lines.append(
            f"forward    no gradients: a step looks along {rule.directions} directions, and one number leaves for each"
        )
    if rule.alternate:
        lines.append("turns      B is trained in odd rounds and A in even rounds; only the trained part leaves")
    if rule.ranks:
        named = ", ".join(f"{site} {own}" for site, own in rule.ranks)
        lines.append(f"ranks      these sites train fewer than {rank} columns: {named}")
    return lines


def _refresh(every: int) -> str:
    """Says whether the emulator may change after the site vetted it and its owner approved the job."""
    if not every:
        return "never: the emulator stays as it was fetched"
    return (
        f"after every {every} rounds the biases at the ends of the emulator's middle blocks may move, and nothing else "
        "of the emulator; the site vets moved biases before it trains on them"
    )
