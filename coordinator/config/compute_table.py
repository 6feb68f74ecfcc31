"""The table [compute] of the federation file: where the coordinator, or a simulation, computes."""

from dataclasses import dataclass

from offsite.task.device import AUTO, check_device


@dataclass(frozen=True)
class ComputeConfig:
    """The table [compute]: the device of the coordinator, or of a simulation; each site names its own in `site.toml`.

    Attributes:
      device: device of the models: `auto` takes the accelerator that PyTorch finds, or the CPU where there is none;
        else `cpu`, `cuda`, `cuda:N` or `xpu`. May change while a job runs.
    """

    device: str = AUTO

    def check(self) -> None:
        """Checks the names; whether this machine has the device is known where a model is loaded.

        Raises:
          ConfigError: the device has no such name.
        """
        check_device(self.device, key="compute.device")
