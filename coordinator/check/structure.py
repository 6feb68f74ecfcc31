"""The check of blocks, adapter and recipe against the structure of a model without weights."""

from typing import Any

import torch

from offsite.adapter.layout import Layout
from offsite.adapter.method_names import NEEDING
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.aggregation.factor_rules import read_earlier
from offsite.coordinator.config.federation_file import FedConfig
from offsite.emulator.package.recipe import Step
from offsite.emulator.package.recipe_arguments import check_places
from offsite.emulator.structure.geometry import Geometry
from offsite.task.findings import Findings
from offsite.task.kinds import KINDS

# Methods whose start is computed from values of weights or of given tensors, which an empty model lacks.
WITH_VALUES = (*NEEDING, "shira", "unilora")


def check_structure(config: FedConfig, kind: str, model_config: Any, findings: Findings) -> None:
    """Checks that a model has the blocks, the layers and the places that the federation file names.

    Args:
      config: the federation file.
      kind: key of `task.kinds.KINDS`.
      model_config: configuration of the model.
      findings: findings so far.
    """
    emulator, slots, model = config.emulator, tuple[str, ...](), None
    with findings.gathering():
        with torch.device("meta"):
            model = KINDS[kind].from_config(model_config)
        geometry = Geometry.of(model, emulator.first, emulator.last, emulator.shape)
        known = range(emulator.first, emulator.first + len(geometry.middle(model)))
        slots = geometry.slots(model)
        recipes = {emulator.compress, *(variant.compress or () for variant in emulator.variants)}
        for step in (Step.parse(text) for recipe in sorted(recipes) for text in recipe):
            with findings.gathering():
                check_places(step, known)
    if slots and config.adapter.method not in WITH_VALUES:
        with findings.gathering():
            _check_adapter(config, model, config.adapter.spec(slots=slots, seed=config.seed))


def _check_adapter(config: FedConfig, model: Any, spec: AdapterSpec) -> None:
    """Attaches the adapter to the empty model.

    Raises:
      UnsupportedModel, ConfigError: the slots lack what the method tunes, or a number does not fit the layers.
      DataError: an earlier adapter is of another model.
    """
    layout = Layout.of(attach(model.requires_grad_(False).eval(), spec))
    for folder in config.aggregation.earlier:
        read_earlier(folder, layout)
