"""Rehearses the whole exchange on public text before any site trains, and measures both gain and leak.

The adapter is trained on the emulator with one half of the public text, plugged into the full model, and scored on the
other half. For comparison the same adapter is trained inside the full model, and an attacker tunes every weight of the
emulator. The words are the literature's: transfer G and leak L, both relative to the slots' gain in the full model.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.evaluation.fidelity import visiting
from offsite.emulator.runtime.plug_in import plug
from offsite.errors import RangeError

RELEARN_RATE = 3e-4


@dataclass(frozen=True)
class Lesson:
    """The training of an adapter in a rehearsal: plain, without clip and noise.

    Attributes:
      spec: spec of the adapter.
      steps: number of Adam steps, >= 1.
      batch: examples of one step, >= 1.
      learning_rate: learning rate of Adam, > 0.
      seed: seed of the order of examples, >= 0.
      auxiliary: tensors that the adapter needs and does not train, by name.
    """

    spec: AdapterSpec
    steps: int = 30
    batch: int = 4
    learning_rate: float = 1e-3
    seed: int = 0
    auxiliary: AuxiliaryTensors = field(default_factory=dict)


@dataclass(frozen=True)
class Rehearsal:
    """Losses on examples that nothing was trained on, nats per target, and their two ratios.

    Attributes:
      zero_shot: loss of the full model.
      emulator_zero_shot: loss of the emulator.
      slot_tuned: loss of the full model with the adapter trained inside it.
      emulator_tuned: loss of the emulator with the adapter trained on it.
      plug_in: loss of the full model with the adapter trained on the emulator.
      relearned: loss of the emulator with the adapter after an attacker tuned all weights, by number of tokens.
    """

    zero_shot: float
    emulator_zero_shot: float
    slot_tuned: float
    emulator_tuned: float
    plug_in: float
    relearned: dict[int, float] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """The slots' gain in the full model, nats per target."""
        return self.zero_shot - self.slot_tuned

    @property
    def transfer(self) -> float:
        """G: share of that gain that came through the emulator; 1 is the whole gain, below 0 is harm."""
        return (self.zero_shot - self.plug_in) / self.gain

    @property
    def leak(self) -> float:
        """L: share of the gain on the emulator alone; 0 if the tuned emulator is as good as the untuned full model."""
        return (self.zero_shot - self.emulator_tuned) / self.gain

    def relearned_leak(self, tokens: int) -> float:
        """Returns L after an attacker relearned on a number of tokens."""
        return (self.zero_shot - self.relearned[tokens]) / self.gain

    @property
    def worst_leak(self) -> float:
        """The largest of all leaks measured."""
        return max(self.leak, *(self.relearned_leak(tokens) for tokens in self.relearned), -float("inf"))

    def to_dict(self) -> dict[str, object]:
        """Returns the JSON form, ratios included."""
        ratios = {"gain": self.gain, "transfer": self.transfer, "leak": self.leak, "worst_leak": self.worst_leak}
        return {
            **asdict(self),
            **ratios,
            "relearned_leak": {tokens: self.relearned_leak(tokens) for tokens in self.relearned},
        }


@dataclass(frozen=True)
class Text:
    """Examples by purpose; no example serves two purposes.

    Attributes:
      train: examples for the training of adapters.
      test: examples for all scores.
      attack: examples on which an attacker relearns.
      length: largest number of tokens in an example, >= 1; an attacker's tokens are counted by it.
    """

    train: PublicExamples
    test: PublicExamples
    attack: PublicExamples
    length: int


@dataclass(frozen=True)
class Reference:
    """The losses that do not depend on the emulator, measured once for a model and a text.

    Attributes:
      zero_shot: loss of the full model, nats per target.
      slot_tuned: loss of the full model with the adapter trained inside it, nats per target.
    """

    zero_shot: float
    slot_tuned: float


def reference(full: nn.Module, lesson: Lesson, text: Text) -> Reference:
    """Returns the full model's losses without and with the adapter trained inside it; leaves the model unchanged."""
    zero_shot = text.test.loss(full)
    with visiting(full, lesson.spec, lesson.auxiliary) as model:
        train(model, lesson, text.train)
        return Reference(zero_shot, text.test.loss(model))


def rehearse(
    full: nn.Module,
    emulator: nn.Module,
    lesson: Lesson,
    text: Text,
    known: Reference,
    *,
    relearn: tuple[int, ...] = (),
    correct: Callable[[Tensor], Tensor] = lambda vector: vector,
) -> Rehearsal:
    """Returns the losses of a rehearsal with an emulator; leaves both models unchanged.

    Args:
      full: the full model, float32.
      emulator: the loaded package, float32.
      lesson: training of the adapter.
      text: examples by purpose.
      known: result of `reference` for the same model, lesson and text.
      relearn: numbers of tokens on which an attacker tunes all weights, each time from the emulator as shipped.
      correct: function that the coordinator applies to a tuned adapter, a vector, before plug-in.

    Raises:
      RangeError: the slots gain nothing in the full model, so that no ratio can be formed.
    """
    if not known.zero_shot > known.slot_tuned:
        raise RangeError(
            f"gain={known.zero_shot - known.slot_tuned:.4f}: the adapter gains nothing inside the full model on this "
            "text; give more public text, more steps or another learning rate"
        )
    zero_shot = text.test.loss(emulator)
    with visiting(emulator, lesson.spec, lesson.auxiliary) as model:
        layout = Layout.of(model)
        train(model, lesson, text.train)
        tuned, vector = text.test.loss(model), layout.read(model)
    with visiting(full, lesson.spec, lesson.auxiliary) as model:
        plug(model, layout, correct(torch.from_numpy(vector)).numpy())
        plug_in = text.test.loss(model)
    relearned = {tokens: relearned_loss(emulator, lesson, text, tokens) for tokens in relearn}
    return Rehearsal(known.zero_shot, zero_shot, known.slot_tuned, tuned, plug_in, relearned)


def train(model: nn.Module, lesson: Lesson, examples: PublicExamples) -> None:
    """Trains the parameters that require a gradient, in place, with Adam."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _fit(model, trained, lesson, examples, lesson.steps, lesson.learning_rate)


def relearned_loss(emulator: nn.Module, lesson: Lesson, text: Text, tokens: int) -> float:
    """Returns the loss of a copy of an emulator, nats per target, after an attack: all weights, then the adapter.

    Args:
      emulator: the emulator as shipped; left unchanged.
      lesson: training of the adapter.
      text: examples; the weights are tuned on `attack`, the adapter on `train`.
      tokens: number of tokens on which the weights are tuned.
    """
    stolen = copy.deepcopy(emulator)
    parameters = [parameter.requires_grad_(True) for parameter in stolen.parameters()]
    steps = max(1, round(tokens / (lesson.batch * text.length)))
    _fit(stolen, parameters, lesson, text.attack, steps, RELEARN_RATE)
    stolen.requires_grad_(False)
    adapted = attach(stolen, lesson.spec, lesson.auxiliary)
    train(adapted, lesson, text.train)
    return text.test.loss(adapted)


def _fit(
    model: nn.Module, trained: list[nn.Parameter], lesson: Lesson, public: PublicExamples, steps: int, rate: float
) -> None:
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(lesson.seed)
    with _evaluating(model), torch.enable_grad():
        for rows in _orders(len(public.examples), lesson.batch, steps, generator):
            optimizer.zero_grad(set_to_none=True)
            public.task.losses(model, public.examples.select(rows)).mean().backward()
            optimizer.step()


def _orders(count: int, batch: int, steps: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yields the examples' numbers for each step: every example comes once, in random order, before any comes again."""
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < batch:
            waiting += torch.randperm(count, generator=generator).tolist()
        rows, waiting = waiting[:batch], waiting[batch:]
        yield rows


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Turns dropout off within the context, so that the same seed gives the same adapter."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
