"""The table [compute] of the federation file: where the coordinator, or a simulation, computes, and in which format."""

from dataclasses import dataclass

from offsite.task.device import AUTO, check_device
from offsite.task.number_format import check_dtype
from offsite.task.offload_setting import check_offload


@dataclass(frozen=True)
class ComputeConfig:
    """The table [compute]: device and number format of the coordinator, or of a simulation; see `site.toml` for a site.

    Attributes:
      device: device of the models: `auto` takes the accelerator that PyTorch finds, or the CPU where there is none;
        else `cpu`, `cuda`, `cuda:N` or `xpu`. May change while a job runs.
      dtype: number format of frozen weights and activations: `auto` takes bfloat16 where that is faster, else float32;
        or `float32`, `bfloat16` or `float16`. May change while a job runs.
      offload: whether the full model's blocks lie in the machine's memory, or in its files, while an accelerator
        computes: `auto` where they would not fit beside the computation, `always` or `never`. On the CPU they always
        stay in the mapped files. May change while a job runs.
    """

    device: str = AUTO
    dtype: str = AUTO
    offload: str = AUTO

    def check(self) -> None:
        """Checks the names; whether this machine has the device is known where a model is loaded.

        Raises:
          ConfigError: no device, number format or setting has such a name.
        """
        check_device(self.device, key="compute.device")
        check_dtype(self.dtype, key="compute.dtype")
        check_offload(self.offload, key="compute.offload")
