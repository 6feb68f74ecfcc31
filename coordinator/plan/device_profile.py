"""The speed of one device, as `offsite plan --measure` found it, in one small JSON file."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from offsite.errors import DataError
from offsite.trust.files import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class DeviceProfile:
    """Rates of one device and of its machine; all are per second, unless they say otherwise.

    Attributes:
      device: name of the device, for example "cpu" or "cuda:0".
      memory: memory of the device in bytes.
      threads: number of threads with which torch computes.
      imports: resident bytes of a process that has imported everything and holds no model.
      flops: floating operations of float32 matrix products; a multiply-add is two.
      traffic: bytes that operations on single numbers read and write.
      reading: bytes of a file read and hashed.
      rounding: weights rounded to codes of 4 bits.
      fitting: weights rounded by their inputs (GPTQ) to codes of 4 bits.
      masking: ring elements masked for one peer.
      noise: normal numbers drawn.
    """

    device: str
    memory: int
    threads: int
    imports: int
    flops: float
    traffic: float
    reading: float
    rounding: float
    fitting: float
    masking: float
    noise: float

    def write(self, path: Path) -> None:
        """Writes the profile."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode() + b"\n")


def read_profile(path: Path) -> DeviceProfile:
    """Returns the profile of a file.

    Raises:
      DataError: the file is missing, or is no profile.
    """
    advice = "measure one with: offsite plan --measure"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"profile={str(path)!r}: cannot be read ({error}); {advice}") from error
    names = {field.name: field.type for field in fields(DeviceProfile)}
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT or content.keys() != names.keys():
        raise DataError(f"profile={str(path)!r}: not a profile of this release; {advice}")
    for name, value in content.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not (isinstance(value, str) if names[name] is str else number):
            raise DataError(f"profile={str(path)!r}: {name}={value!r} must be above 0; {advice}")
    return DeviceProfile(**content)
