"""(IA)3: one learned scale for each feature that a dense layer reads or writes."""

from peft import IA3Config
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEED_FORWARD
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as DEFAULTS
from torch import nn

from offsite.adapter.inject import inject, task_type, train_only
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import choose, default_targets, in_slots, is_linear, matches


def attach_ia3(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Scales the output of attention targets and the input of feed-forward targets; every scale is one at the start.

    peft's table for the model's type says which targets are feed-forward; in a model that the table lacks, no target is
    feed-forward. Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """
    targets = choose(in_slots(model, spec.slots, is_linear), spec, default_targets(model, DEFAULTS))
    feed_forward = default_targets(model, FEED_FORWARD)
    config = IA3Config(
        target_modules=sorted(targets),
        feedforward_modules=sorted(name for name in targets if matches(name, feed_forward)),
        fan_in_fan_out=any(not isinstance(module, nn.Linear) for module in targets.values()),
        task_type=task_type(model),
    )
    wrapped = inject(model, config)
    train_only(wrapped, lambda name: ".ia3_l." in name)
    return wrapped
