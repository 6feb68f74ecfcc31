"""Leaves blocks out: listed blocks, evenly spaced blocks, or the blocks that matter least by one of two measures."""

import heapq

from offsite.emulator.calibration.gradients import SlotGradients
from offsite.emulator.calibration.middle import Middle
from offsite.emulator.package.plan import Plan
from offsite.emulator.package.recipe import Step
from offsite.emulator.package.recipe_arguments import fraction, listed, refuse_parallel
from offsite.emulator.structure.ends import PARALLEL
from offsite.errors import UnsupportedModel


def skip(plan: Plan, middle: Middle, step: Step) -> Plan:
    """Leaves out the blocks at the step's places."""
    places = listed(step)
    _check_shape(middle, step)
    chosen = [path for path in middle.blocks if middle.place(path) in places]
    middle.check_skippable("skip", chosen)
    return plan.skip(chosen)


def skip_uniform(plan: Plan, middle: Middle, step: Step) -> Plan:
    """Leaves out the middle block of each of N equal runs: evenly spaced, and both ends are thinned out alike."""
    candidates, count = _candidates(plan, middle, step)
    return plan.skip(candidates[(2 * i + 1) * len(candidates) // (2 * count)] for i in range(count))


def skip_importance(plan: Plan, middle: Middle, step: Step) -> Plan:
    """Leaves out the blocks of least Block Influence (Men et al. 2024, ShortGPT)."""
    candidates, count = _candidates(plan, middle, step)
    return plan.skip(sorted(candidates, key=lambda path: middle.influences[path])[:count])


def skip_gradient(plan: Plan, middle: Middle, step: Step) -> Plan:
    """Leaves out, one at a time, the block whose absence turns the slots' gradients least.

    The principle is GradOT's (ACL 2025). After each choice only the next block in the queue is measured again, until a
    block keeps its place: damages nearly add up, so few measurements change the order.
    """
    candidates, count = _candidates(plan, middle, step)
    gradients = SlotGradients(middle)
    queue = [(gradients.damage((*plan.skipped, path)), 0, path) for path in candidates]
    heapq.heapify(queue)
    chosen: list[str] = []
    while len(chosen) < count:
        damage, seen, path = heapq.heappop(queue)
        if seen != len(chosen):
            damage = gradients.damage((*plan.skipped, *chosen, path))
            heapq.heappush(queue, (damage, len(chosen), path))
        else:
            chosen.append(path)
    return plan.skip(chosen)


def _candidates(plan: Plan, middle: Middle, step: Step) -> tuple[list[str], int]:
    """Returns the blocks that may still be left out, and the number of blocks that the step's fraction leaves out."""
    _check_shape(middle, step)
    share = fraction(step.name, step.argument)
    kept = [path for path in plan.kept if step.places is None or middle.place(path) in step.places]
    candidates = [path for path in kept if path in middle.skippable]
    count = min(len(candidates), max(1, round(share * len(kept))))
    if not candidates:
        raise UnsupportedModel(
            f"{step.name}={step.argument!r}: no block of the middle is left to skip; take {step.name} from the recipe"
        )
    return candidates, count


def _check_shape(middle: Middle, step: Step) -> None:
    if middle.geometry.shape == PARALLEL:
        refuse_parallel(step.name, step.argument)
