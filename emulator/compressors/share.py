"""Lets alike neighbours run on one block's weights: depth and compute stay, bytes fall."""

from itertools import pairwise

from offsite.emulator.calibration.middle import Middle
from offsite.emulator.package.plan import Plan
from offsite.emulator.package.recipe import Step
from offsite.emulator.package.recipe_arguments import fraction, refuse_parallel
from offsite.emulator.structure.ends import PARALLEL
from offsite.errors import UnsupportedModel


def share(plan: Plan, middle: Middle, step: Step) -> Plan:
    """Gives a fraction of the kept blocks a neighbour's weights, beginning with neighbours of most alike results.

    As in Zhang et al. 2023 (CRaSh), section 3, neighbours are clustered by the likeness of their results, and one block
    of each cluster stands for all. Unlike there, the clusters come from public text and not from the task's text.
    """
    part = fraction("share", step.argument)
    if middle.geometry.shape == PARALLEL:
        refuse_parallel(step.name, step.argument)
    if middle.apart:
        raise UnsupportedModel(
            f"share={step.argument!r}: this model's blocks differ in width, so they cannot share weights; use gptq4 "
            "or lowrank"
        )
    blocks = [
        path
        for path in plan.kept
        if path in middle.skippable and (step.places is None or middle.place(path) in step.places)
    ]
    count = min(len(blocks) - 1, max(1, round(part * len(blocks))))
    if count < 1:
        raise UnsupportedModel(
            f"share={step.argument!r}: fewer than two alike blocks are kept; take share from the recipe"
        )
    clusters = [[path] for path in blocks]
    for _ in range(count):
        costs = [_apart(middle, left, right) for left, right in pairwise(clusters)]
        nearest = costs.index(min(costs))
        clusters[nearest : nearest + 2] = [clusters[nearest] + clusters[nearest + 1]]
    return plan.share({path: _owner(cluster) for cluster in clusters for path in cluster if path != _owner(cluster)})


def _apart(middle: Middle, left: list[str], right: list[str]) -> float:
    """Returns how far the hidden states move from the end of the left cluster to the end of the right cluster."""
    return sum(middle.influences[path] for path in right) + 1e-3 * (len(left) + len(right))


def _owner(cluster: list[str]) -> str:
    # The first block of the cluster, not the middle one: segments are made in order, so the owner of the weights must
    # come first.
    return cluster[0]
