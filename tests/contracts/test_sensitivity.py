"""No record moves a clipped sum by more than the bound: at the ends of the ranges, and where a record tries to.

A record is replaced by an empty one, and the sums of both batches are compared. Two kinds of records try: gradients of
1e35, whose factors float32 cannot hold, and positions that cancel, whose terms are ten million times their sum.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.privacy.batches import trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.norms import CLIP_MARGIN
from offsite.privacy.ranges import HIGHEST, LOWEST
from offsite.privacy.tolerances import Tolerances
from tests.contracts.test_engines import CASES, adapted, fitting

LENGTH = 3  # few positions beside the layers' widths, so that gradients are held as their factors
SIZES = (1, 3, 8, 64)
PAIRS = fitting(ENGINES, CASES)
METHODS = ("lora on llama", "biases", "scales", "blocks of llama")


class Records:
    """Texts, each with a weight: 1 for a record like others, 0 for an empty one."""

    def __init__(self, ids: Tensor, weights: Tensor, cancelling: Tensor) -> None:
        self.ids, self.weights, self.cancelling = ids, weights, cancelling

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Any) -> "Records":
        rows = torch.as_tensor(indices, dtype=torch.long)
        return Records(self.ids[rows], self.weights[rows], self.cancelling[rows])


def losses(model: nn.Module, batch: Records) -> Tensor:
    """Returns the weighted losses; a cancelling record also adds and subtracts its loss, many times over."""

    def plain() -> Tensor:
        logits = model(input_ids=batch.ids).logits[:, :-1]
        return nn.functional.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none").mean(1)

    own = plain() * batch.weights
    return own + batch.cancelling * plain() - batch.cancelling * plain() if batch.cancelling.any() else own


def records(size: int, kind: str, bound: float, present: bool) -> Records:
    """Returns records of which the first tries to move the others, or is empty."""
    ids = torch.randint(1, 97, (size, LENGTH), generator=torch.Generator().manual_seed(size))
    weights, cancelling = torch.full((size,), max(1.0, bound)), torch.zeros(size)
    if kind == "huge":
        weights[0] = 1e35
    else:
        cancelling[0] = 1e7 * max(1.0, bound)
    if not present:
        weights[0] = cancelling[0] = 0.0
    return Records(ids, weights, cancelling)


def clipped_sum(model: nn.Module, batch: Records, engine: Any, bound: float) -> Tensor:
    for parameter in trainable(model).values():
        parameter.__dict__.pop("summed_grad", None)
    rows = engine.add(losses, batch, lambda norms, _: (bound * (1 - CLIP_MARGIN) / norms).clamp(max=1.0))
    assert len(rows.kept) == int(torch.isfinite(batch.weights).sum())
    return torch.cat([parameter.summed_grad.flatten() for parameter in trainable(model).values()])


@pytest.mark.parametrize("kind", ["huge", "cancels"])
@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_a_record_moves_the_sum_by_at_most_the_bound(engine: str, case: str, kind: str) -> None:
    model = adapted(case)
    with ENGINES[engine](model) as opened:
        for size in SIZES[:3] if engine == "loop" else SIZES:  # the loop takes every record alone
            for bound in (LOWEST, HIGHEST):
                whole = clipped_sum(model, records(size, kind, bound, present=True), opened, bound)
                rest = clipped_sum(model, records(size, kind, bound, present=False), opened, bound)
                moved = float((whole - rest).norm())
                assert moved <= bound * (1 + 1e-6), (size, bound)
                if kind == "huge":
                    assert moved >= bound * (1 - 2 * CLIP_MARGIN), (size, bound)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_factor_that_32_bits_cannot_hold_bounds_all_the_same(engine: str) -> None:
    """The manifest's range forbids such a bound; an engine does not rest on that."""
    model, bound = adapted("lora on llama"), 7e-44
    with ENGINES[engine](model) as opened:
        whole = clipped_sum(model, records(3, "huge", bound, present=True), opened, bound)
        rest = clipped_sum(model, records(3, "huge", bound, present=False), opened, bound)
    assert float((whole - rest).norm()) / bound == pytest.approx(1 - CLIP_MARGIN, rel=1e-5)


@pytest.mark.parametrize(("engine", "case"), [pair for pair in PAIRS if pair[1] in METHODS])
def test_a_record_without_a_finite_loss_leaves_the_others_every_bit(engine: str, case: str) -> None:
    """It is left out, and the batch keeps its shape, by which products are rounded."""
    model = adapted(case)
    empty, broken = records(5, "huge", 1.0, present=False), records(5, "huge", 1.0, present=False)
    broken.weights[0] = float("nan")
    with ENGINES[engine](model) as opened:
        sums = [clipped_sum(model, batch, opened, 1.0) for batch in (empty, broken)]
    assert torch.equal(*sums)


NARROW = [(engine, case) for engine, case in PAIRS if case == "lora on llama" or (engine, case) == ("slot", "scales")]


@pytest.mark.parametrize("kind", ["huge", "cancels"])
@pytest.mark.parametrize(("engine", "case"), NARROW)
def test_a_record_moves_the_sum_by_at_most_the_bound_in_bfloat16(engine: str, case: str, kind: str) -> None:
    """The model is in bfloat16; a gradient's norm, its factor and the sum are in float32 and float64."""
    model = adapted(case, torch.bfloat16)
    with ENGINES[engine](model) as opened:
        for size, bound in ((1, LOWEST), (3, HIGHEST)):
            whole = clipped_sum(model, records(size, kind, bound, present=True), opened, bound)
            rest = clipped_sum(model, records(size, kind, bound, present=False), opened, bound)
            moved = float((whole - rest).norm())
            assert moved <= bound * (1 + 1e-6), (size, bound)
            if kind == "huge":
                assert moved >= bound * (1 - 2 * CLIP_MARGIN), (size, bound)


@pytest.mark.parametrize(("engine", "case"), NARROW)
def test_a_record_left_out_of_a_bfloat16_batch_leaves_the_others_within_their_rounding(engine: str, case: str) -> None:
    """The batch gets shorter, so the others may be rounded otherwise: by no more than the probe allows."""
    model, bound = adapted(case, torch.bfloat16), 1e-3  # clips every record
    batch = records(5, "huge", 1.0, present=True)
    with ENGINES[engine](model) as opened:
        whole = clipped_sum(model, batch, opened, bound)
        rest = clipped_sum(model, batch.select([1, 2, 3, 4]), opened, bound)
    assert float((whole - rest).norm()) <= bound * (1 + 4 * Tolerances.of(model).size)
    assert float((whole - rest).norm()) >= bound * (1 - 2 * CLIP_MARGIN - 4 * Tolerances.of(model).size)
