"""One forward and one backward pass for a whole batch: norms and clipped sums from module inputs and gradients."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from offsite.errors import PrivacyRefusal
from offsite.privacy.batches import Batch, Losses, trainable
from offsite.privacy.captured import Captured
from offsite.privacy.gradient_rules import Recomputed, Rule, rule_of
from offsite.privacy.per_example import Rows, Weigh, checked_losses, finite_losses
from offsite.privacy.tap import Call, Taps


class BookkeepingEngine:
    """Book-keeping (Bu et al. 2023, arXiv 2210.00038), without Gram matrices; see `privacy.captured`.

    Args:
      model: model with an adapter.
      recompute: whether a module without a closed-form rule is computed once more per example, by itself (the "slot"
        engine); False refuses such a module.

    Raises:
      PrivacyRefusal: a trainable parameter belongs to a module that has no rule.
    """

    def __init__(self, model: nn.Module, *, recompute: bool) -> None:
        self._model, self._name = model, "slot" if recompute else "bookkeeping"
        self._parameters = list(trainable(model).values())
        self._captured: Captured | None = None
        self._refusal: PrivacyRefusal | None = None
        units = list(_units(model, recompute=recompute))
        self._taps = Taps([(module, partial(self._receive, module, path, rule)) for path, module, rule in units])

    def close(self) -> None:
        """Removes taps and sums."""
        self._taps.close()
        for parameter in self._parameters:
            parameter.grad = None
            parameter.__dict__.pop("summed_grad", None)

    def add(self, losses_fn: Losses, batch: Batch, weigh: Weigh) -> Rows:
        """See `privacy.per_example.Engine`."""
        finite = finite_losses(lambda part: checked_losses(losses_fn, self._model, part), batch)
        if finite is None:
            return Rows()
        losses, kept = finite
        captured = self._backward(losses, len(batch))
        rows, norms = captured.add(self._parameters, weigh, kept)
        values = losses.detach().double().tolist()
        return Rows(tuple(rows), tuple(values[row] for row in rows), tuple(norms.tolist()))

    def _backward(self, losses: Tensor, size: int) -> Captured:
        self._captured, self._refusal = Captured(size), None
        try:
            if losses.requires_grad:
                losses.sum().backward()
            if any(parameter.grad is not None for parameter in self._parameters):
                raise PrivacyRefusal(
                    f"engine={self._name!r}: a trainable parameter is used outside its module, so its gradient cannot "
                    "be split by example; use engine='loop'"
                )
            return self._captured
        except Exception:
            if self._refusal is not None:  # whatever autograd wrapped around the refusal
                raise self._refusal from None
            raise
        finally:
            self._captured = None
            for parameter in self._parameters:
                parameter.grad = None

    def _receive(self, module: nn.Module, path: str, rule: Rule, call: Call, gradients: list[Tensor]) -> None:
        captured = self._captured
        if captured is None:
            return  # a backward pass that is not ours
        self._taps.active = False
        try:
            with torch.no_grad():
                rule(module, path, call, gradients, captured)
        except PrivacyRefusal as refusal:
            self._refusal = refusal
            raise
        finally:
            self._taps.active = True


def _units(model: nn.Module, *, recompute: bool) -> Iterator[tuple[str, nn.Module, Rule]]:
    """Yields the modules to tap: the smallest that together own every trainable parameter and are called as a whole.

    A layer of peft is called as a whole, since modules inside it may be used in ways of their own, as DoRA uses its
    factors.
    """
    modules, recomputed = dict(model.named_modules()), Recomputed()
    chosen: dict[str, Rule] = {}
    for path, module in modules.items():
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        rule = rule_of(module)
        if rule is not None and not (recompute and _layer(path, modules) != path):
            chosen[path] = rule
        elif recompute:
            chosen[_layer(path, modules)] = recomputed
        else:
            raise PrivacyRefusal(
                f"engine='bookkeeping': module={path!r} is a {type(module).__name__}, which has no rule; "
                "use engine='slot'"
            )
    outer = [path for path, rule in chosen.items() if rule is recomputed]
    for path, rule in chosen.items():
        if not any(path != other and path.startswith(f"{other}.") for other in outer):
            yield path, modules[path], rule


def _layer(path: str, modules: dict[str, nn.Module]) -> str:
    """Returns the path of the smallest called module around a parameter's owner: peft's layer, if the owner is in one.

    Containers of parameters or modules are never called themselves.
    """
    for around in _outwards(path):
        if hasattr(modules[around], "adapter_layer_names"):  # what peft's layers have in common
            return around
    for around in _outwards(path):
        if not isinstance(modules[around], (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)):
            return around
    return path


def _outwards(path: str) -> Iterator[str]:
    parts: Sequence[str] = path.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])
