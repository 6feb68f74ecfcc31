"""A program for tests of the fork server: `python -m tests.faults.look HOW` prints its state, or ends in some way."""

import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGCHLD", "SIGPIPE")


def found() -> dict[str, Any]:
    """Returns the state of this process."""
    has_torch = "torch" in sys.modules
    import numpy as np
    import torch

    drawn = {
        "system": os.urandom(8).hex(),
        "random": random.random(),
        "numpy": float(np.random.random()),
        "torch": float(torch.rand(1)),
    }
    return {
        "pid": os.getpid(),
        "torch": has_torch,
        "random": drawn,
        "arguments": sys.argv[1:],
        "name": __name__,
        "folder": str(Path.cwd()),
        "environment": dict(os.environ),
        "signals": {name: str(signal.getsignal(getattr(signal, name))).split(" at ")[0] for name in SIGNALS},
        "descriptors": sorted(int(one.name) for one in list(Path("/proc/self/fd").iterdir()) if one.exists()),
        "handlers": [str(handler) for handler in logging.getLogger().handlers],
        "umask": os.umask(0o022),
    }


def main(how: str) -> None:
    """Prints the state, or ends as its argument says."""
    if how == "print":
        sys.stdout.write(json.dumps(found()))
    elif how == "exit":
        sys.exit(7)
    elif how == "refuse":
        sys.exit("refused")
    elif how == "raise":
        raise ValueError("on purpose")
    elif how == "sleep":
        sys.stdout.write("asleep\n")
        sys.stdout.flush()
        time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
