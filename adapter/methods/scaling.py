"""(IA)3: one learned scale for each feature a dense layer reads or writes."""

from peft import IA3Config
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEED_FORWARD
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as DEFAULTS
from torch import nn

from offsite.adapter.inject import inject, task_type, train_only
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import choose, default_targets, in_slots, is_linear, matches


def attach_ia3(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Scales the output of attention targets and the input of feed-forward targets, from one at the start.

    Which targets are feed-forward is peft's table for the model's type; in a model it does not know, none is.
    Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """
    found = choose(in_slots(model, spec.slots, is_linear), spec, default_targets(model, DEFAULTS))
    feed_forward = default_targets(model, FEED_FORWARD)
    config = IA3Config(
        target_modules=sorted(found),
        feedforward_modules=sorted(name for name in found if matches(name, feed_forward)),
        fan_in_fan_out=any(not isinstance(module, nn.Linear) for module in found.values()),
        task_type=task_type(model),
    )
    wrapped = inject(model, config)
    train_only(wrapped, lambda name: ".ia3_l." in name)
    return wrapped
