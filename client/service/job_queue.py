"""Where jobs are loaded: one at a time, since a machine has room for one model."""

import threading

from offsite.client.service.job_loading import JobLoader


class LatestJobRunner:
    """Runs the newest job's loader; an older loader is stopped, and a loader that still waits is never begun."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: JobLoader | None = None
        self._waiting: JobLoader | None = None
        self._works = False

    def take(self, loader: JobLoader) -> None:
        """Begins with a loader as soon as the loader before it has let go."""
        with self._lock:
            self._stop_all()
            self._waiting = loader
            if not self._works:
                self._works = True
                threading.Thread(target=self._work, name="job loader", daemon=True).start()

    def clear(self) -> None:
        """Stops all loaders."""
        with self._lock:
            self._stop_all()

    def _stop_all(self) -> None:
        if self._running is not None:
            self._running.stop()
        self._waiting = None

    def _work(self) -> None:
        while True:
            with self._lock:
                running = self._running = self._waiting
                self._waiting = None
                if running is None:
                    self._works = False
                    return
            running.run()
