"""Messages about a fault in the site's program: the owner learns the place, the coordinator that there was one."""

import traceback
from pathlib import Path

NO_MEMORY = "not enough memory for this job; raise max_memory_gb in policy.toml, or ask for a smaller physical_batch"


def local_message(error: BaseException) -> str:
    """Returns the line of the site's own log about an error that is not an `OffsiteError`.

    The line never holds the error's message, which could quote a record.
    """
    if _is_memory(error):
        return NO_MEMORY
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
    return f"a fault in the site's program at {place}; see its log"


def peer_message(error: BaseException) -> str:
    """Returns the line for the coordinator about such an error, without the place, since a record may decide it."""
    return NO_MEMORY if _is_memory(error) else "a fault in the site's program; the site's log tells its owner where"


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error)
