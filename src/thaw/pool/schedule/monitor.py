"""The monitor: ends branches whose time is up, and workers that hang or fell silent.

A worker hangs when a batch in it made no step for `stall_s` (nor got its point ready), or when its process answers
nothing for `heartbeat_s`. It is then killed, and what ran there begins again elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from thaw.core.errors import EngineDied
from thaw.pool.schedule.scheduler import Scheduler
from thaw.pool.workers.fleet import Fleet

LOOK_S = 1.0


class Monitor:
    """One thread. `tick` is called about once a second, for whoever writes statistics."""

    def __init__(
        self, scheduler: Scheduler, fleet: Fleet, *, stall_s: float, heartbeat_s: float, tick: Callable[[], None]
    ) -> None:
        self._scheduler, self._fleet = scheduler, fleet
        self._stall_s, self._heartbeat_s, self._tick = stall_s, heartbeat_s, tick
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="thaw-pool-monitor", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """A branch with a limit came: look when that is up."""
        self._wake.set()

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._pause())
            self._wake.clear()
            self._end_late()
            self._end_hung()
            self._tick()

    def _pause(self) -> float:
        now = time.perf_counter()
        deadlines = [job.deadline - now for job in self._scheduler.jobs_under_way() if not job.stop]
        return max(0.005, min([LOOK_S, *deadlines]))

    def _end_late(self) -> None:
        now = time.perf_counter()
        late = [job for job in self._scheduler.jobs_under_way() if job.deadline <= now and not job.stop]
        if late:
            self._scheduler.stop(late, "timeout")

    def _end_hung(self) -> None:
        now = time.perf_counter()
        with self._fleet.changed:
            running = list(self._scheduler.running)
        for chunk in running:
            if now - chunk.progress > self._stall_s and chunk.worker is not None and chunk.life is not None:
                why = EngineDied(f"{chunk.worker.name} made no step for {self._stall_s:.0f} s and was ended")
                self._fleet.failed(chunk.worker, chunk.life, why)
        for worker, life in self._fleet.ready():
            if not life.host.check(self._heartbeat_s):
                why = EngineDied(f"{worker.name} answered nothing for {self._heartbeat_s:.0f} s and was ended")
                self._fleet.failed(worker, life, why)
