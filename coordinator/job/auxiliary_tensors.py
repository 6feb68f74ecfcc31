"""The tensors that the coordinator adds to an adapter's spec: masks from public data, and adapters of earlier jobs."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from offsite.adapter.auxiliary import NO_AUXILIARY, AuxiliaryTensors, check_auxiliary
from offsite.adapter.earlier import earlier_bottlenecks, read_bottleneck
from offsite.adapter.methods import METHODS, frozen_count, needs_public_data, required_tensors
from offsite.adapter.methods.masked import by_fisher
from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.job.public_records import PublicRecords
from offsite.emulator.evaluation.fisher import fisher_places
from offsite.emulator.structure.ends import PARALLEL
from offsite.errors import ConfigError, DataError, MalformedMessage, RangeError
from offsite.task.spec import Task

T = TypeVar("T")


def check_frozen(config: FedConfig) -> None:
    """Checks the kind and the number of the adapters in `adapter.frozen` before any slow step.

    Raises:
      ConfigError: the method takes no such adapters, or another number of adapters.
      DataError, RangeError: an adapter cannot be read.
    """
    folders, spec = config.adapter.frozen, config.adapter.spec(slots=(), seed=config.seed)
    needed = frozen_count(spec)
    if folders and not needed:
        users = " or ".join(
            name
            for name, method in METHODS.items()
            if method.auxiliary and method.auxiliary.frozen_count(AdapterSpec(name))
        )
        raise ConfigError(
            f"adapter.frozen={folders[0]!r}: method {spec.method!r} takes no frozen adapter; "
            f"remove the key, or take {users}"
        )
    if len(folders) != needed:
        raise ConfigError(
            f"adapter.frozen={len(folders)} folders: method {spec.method!r} takes {needed}; name that many adapter "
            "folders of earlier jobs with method 'bottleneck', or set the method's own option"
        )
    for folder in folders:
        _named(partial(read_bottleneck, folder))


def check_mask(config: FedConfig) -> None:
    """Refuses a mask by magnitude in a parallel emulator.

    Each party computes such a mask from its own weights, and the weights of a site with a parallel emulator are
    compressed.

    Raises:
      ConfigError: the mask is by magnitude, and the emulator is parallel.
    """
    spec = config.adapter.spec(slots=(), seed=config.seed)
    if spec.method == "masked" and not by_fisher(spec) and config.emulator.shape == PARALLEL:
        raise ConfigError(
            "adapter.options by='magnitude': the slots of a parallel emulator are compressed, so its sites would train "
            "other entries than the full model's largest; take by = 'fisher', a mask that is shipped to the sites"
        )


def collected(
    config: FedConfig,
    full: Any,
    spec: AdapterSpec,
    task: Task,
    public: PublicRecords,
    on_step: Callable[[str], None],
) -> AuxiliaryTensors:
    """Returns the auxiliary tensors of a job; most methods have no such tensors.

    Args:
      config: the federation file.
      full: plain model, in the dtype of its stored weights; its weights are left as they were.
      spec: specification of the adapter, with its slots.
      task: task of the job.
      public: public examples; a mask is computed from the examples that compressors are fitted to.
      on_step: function that takes a text about what is being done.

    Raises:
      ConfigError: an earlier adapter does not fit the model or the slots.
      DataError, RangeError: an earlier adapter cannot be read, or a mask cannot be computed.
    """
    if needs_public_data(spec):
        on_step("compute the Fisher mask on public data")
        return fisher_places(full, spec, task, public.calibration)
    if not (folders := config.adapter.frozen):
        return NO_AUXILIARY
    given = _named(partial(earlier_bottlenecks, folders, spec.slots))
    try:
        check_auxiliary(required_tensors(full, spec), given, hint="an adapter of another model")
    except MalformedMessage as error:
        raise ConfigError(f"adapter.frozen={', '.join(folders)}: {error}; take adapters of this model") from error
    return given


def _named(read: Callable[[], T]) -> T:
    """Calls `read`, and puts the key of the federation file before an error."""
    try:
        return read()
    except (ConfigError, DataError, RangeError) as error:
        raise type(error)(f"adapter.{error}") from error
