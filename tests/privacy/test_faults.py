"""Faults of the machine end a training or make its batches smaller; faults of a record stay unheard."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offsite.errors import TrainingFault
from offsite.privacy import zero_order
from offsite.privacy.engines import ENGINES
from offsite.privacy.faults import is_memory
from offsite.privacy.mechanism import DpTraining, train
from offsite.privacy.probe import choose_engine
from offsite.privacy.zero_order import Directions
from tests.privacy.test_mechanism import Rows, data, losses, network, run, silent, terms

SHORT = [
    torch.OutOfMemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1 MiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB, other allocations: 2 GB, max allowed: 3 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]
BROKEN = [
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    NotImplementedError("Could not run 'aten::foo' with arguments from the 'fake' backend"),
    TypeError("a bug"),
]
WHOLE = {"sample_rate": 1.0, "physical_batch": 8}


class Short(nn.Module):
    """Has memory for some examples at a time, going forward or backward."""

    def __init__(self, module: nn.Module, most: int, error: Exception, *, backward: bool) -> None:
        super().__init__()
        self.module, self.most, self.error, self.backward = module, most, error, backward
        self.tries: list[int] = []

    def forward(self, values: Tensor) -> Tensor:
        # A loop over one example at a time may still see a whole batch of one.
        self.tries.append(len(values))
        if self.backward and len(values) > self.most:
            values = values + 0 * torch.ones_like(values, requires_grad=True)
            values.register_hook(self.fail)
        elif len(values) > self.most:
            raise self.error
        return self.module(values)

    def fail(self, gradient: Tensor) -> Tensor:
        raise self.error


def short_of_memory(place: int, most: int, error: Exception, *, backward: bool = False) -> nn.Sequential:
    """Returns the network with one module that has memory for few examples."""
    model = network()
    wrapped = Short(model[place], most, error, backward=backward)
    layers = [nn.Sequential(wrapped) if at == place else layer for at, layer in enumerate(model)]
    return nn.Sequential(*layers)


def failing(error: Exception) -> Callable[[nn.Module, Rows], Tensor]:
    def fail(model: nn.Module, rows: Rows) -> Tensor:
        raise error

    return fail


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_errors_that_mean_too_little_memory(error: Exception) -> None:
    assert is_memory(error)


@pytest.mark.parametrize("error", [*BROKEN, ValueError("allocate"), KeyError("out of memory")], ids=str)
def test_errors_that_do_not(error: Exception) -> None:
    assert not is_memory(error)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("engine", ENGINES)
def test_batches_get_smaller_until_they_fit(engine: str, place: int, backward: bool) -> None:
    """The sum equals the sum of a training with such small batches from the start."""
    model = short_of_memory(place, 2, SHORT[1], backward=backward)
    outcome = train(DpTraining(model, losses, data(12), terms(engine=engine, **WHOLE), silent(), data(1)))
    moved = torch.cat([p.detach().flatten() for p in model[2].parameters()])
    expected, small = run(data(12), terms(engine=engine, sample_rate=1.0, physical_batch=2), silent())
    before = torch.cat([p.detach().flatten() for p in network()[2].parameters()])
    assert torch.equal(moved - before, expected)
    assert (outcome.dropped, outcome.batch_sizes, outcome.clipped_fraction) == (0, (12,), small.clipped_fraction)
    assert outcome.losses == small.losses


@pytest.mark.parametrize("error", SHORT, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_too_little_memory_for_one_example_ends_the_training(engine: str, error: Exception) -> None:
    model = short_of_memory(1, 0, error)
    with pytest.raises(MemoryError):
        train(DpTraining(model, losses, data(12), terms(engine=engine, **WHOLE), silent(), data(1)))


@pytest.mark.parametrize("invented", [None, data(1)], ids=["without", "with"])
def test_memory_that_runs_out_between_single_records_counts_none_twice(
    invented: Rows | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that fail together only are added one by one; from there nothing may be added a second time."""
    calls = []

    def touchy(model: nn.Module, rows: Rows) -> Tensor:
        if len(rows) > 1:
            raise ValueError
        calls.append(1)
        if len(calls) > 8 + 3:  # eight trials of one record each, and then the third record that counts
            raise torch.OutOfMemoryError
        return losses(model, rows)

    with pytest.raises(MemoryError):
        train(DpTraining(network(), touchy, data(8), terms(**WHOLE), silent(), invented))


@pytest.mark.parametrize("error", BROKEN, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_machine_on_which_everything_fails_ends_the_training(engine: str, error: Exception) -> None:
    """Without the trial on invented records, the step would be noise alone and the training done."""
    training = (network(), failing(error), data(12), terms(engine=engine, **WHOLE), silent())
    with pytest.raises(TrainingFault, match="no record is at fault") as caught:
        train(DpTraining(*training, data(1)))
    assert str(error)[:40] in str(caught.value)
    assert train(DpTraining(*training)).dropped == 12


@pytest.mark.parametrize("bad", [0, 11, range(12)], ids=["the first", "the last", "all"])
def test_records_that_fail_are_left_out_unheard(bad: Any) -> None:
    """However many records fail: their number is no reason to stop, since the number tells of them."""
    rows = data(12).values
    rows[list(bad) if isinstance(bad, range) else bad] = 99.0

    def touchy(model: nn.Module, given: Rows) -> Tensor:
        if (given.values == 99.0).any():
            raise ValueError("99")
        return losses(model, given)

    outcome = train(DpTraining(network(), touchy, Rows(rows), terms(**WHOLE), silent(), data(1)))
    assert outcome.dropped == (12 if isinstance(bad, range) else 1)


@pytest.mark.parametrize("error", [*SHORT, *BROKEN], ids=str)
def test_forward_passes_alone_keep_the_rules(error: Exception) -> None:
    training = DpTraining(network(), failing(error), data(12), terms(**WHOLE), silent(), data(1))
    with pytest.raises(MemoryError if error in SHORT else TrainingFault):
        zero_order.train(training, Directions(bytes(32), 2, 1e-3))


@pytest.mark.parametrize("error", [SHORT[1], MemoryError()], ids=str)
def test_the_probe_calls_no_engine_wrong_because_memory_is_short(error: Exception) -> None:
    """Wherever memory runs out: a refusal of the engine would send the site to a slower one, for no reason."""

    tried, stop = list[int](), [0]

    def count(model: nn.Module, rows: Rows) -> Tensor:
        tried.append(len(rows))
        if len(tried) == stop[0]:
            raise error
        return losses(model, rows)

    assert choose_engine(network(), count, data(4)) == "bookkeeping"
    for stop[0] in range(1, len(tried) + 1):
        tried.clear()
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            choose_engine(network(), count, data(4))
        assert is_memory(caught.value)
