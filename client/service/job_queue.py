"""Where jobs are prepared: one at a time, since a machine has room for one model."""

import threading

from offsite.client.service.job_loading import JobLoader


class LatestJobRunner:
    """Runs the newest preparation; an older one is given up, and one that waits behind it is never begun."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: JobLoader | None = None
        self._waiting: JobLoader | None = None
        self._works = False

    def take(self, preparation: JobLoader) -> None:
        """Begins with a preparation as soon as the one before has let go."""
        with self._lock:
            self._give_up()
            self._waiting = preparation
            if not self._works:
                self._works = True
                threading.Thread(target=self._work, name="preparation", daemon=True).start()

    def clear(self) -> None:
        """Gives everything up."""
        with self._lock:
            self._give_up()

    def _give_up(self) -> None:
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
