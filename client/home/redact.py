"""What is said of a fault in the site's program: where, to its owner; to the coordinator, only that there was one."""

import traceback
from pathlib import Path

NO_MEMORY = "not enough memory for this job; raise max_memory_gb in policy.toml, or ask for a smaller physical_batch"


def local_message(error: BaseException) -> str:
    """Returns what the site's own log is told of a fault that is not an `OffsiteError`: never its message.

    That could quote a record.
    """
    if _is_memory(error):
        return NO_MEMORY
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
    return f"a fault in the site's program at {place}; see its log"


def peer_message(error: BaseException) -> str:
    """Returns what the coordinator is told of such a fault: not where, since a record may decide where."""
    return NO_MEMORY if _is_memory(error) else "a fault in the site's program; its owner sees where in the site's log"


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error)
