"""What happens on SIGTERM, SIGINT (Ctrl-C), SIGHUP (a closed terminal) and SIGUSR1."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from medgemma_clinical.distributed import sum_over_processes

ENDING = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
KEEPING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()  # as SIGHUP, not on Windows
KNOWN = (*ENDING, *KEEPING)

ECHO_SECONDS = 10.0
"""Of several processes: a second signal within this time is the first one's echo."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run; ``code`` is the exit code of the program."""

    def __init__(self, number: int) -> None:
        """Remember which signal came."""
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class SignalHandler:
    """End the run on SIGTERM, SIGINT and SIGHUP, keep its state on SIGUSR1.

    Within ``deferred`` a signal only sets a flag, which the loop reads after each step, so that
    state and weights agree; elsewhere those of ``ENDING`` raise at once. A second one of them ends
    the process at once.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        self.received = 0
        self._first = 0.0
        self._deferred = False
        self._kills = True

    @contextlib.contextmanager
    def installed(self, *, kills: bool = True) -> Iterator[None]:
        """Handle signals for the length of a block, in a main thread.

        A signal that the parent has set to be ignored, as nohup does, stays ignored.

        Args:
            kills: whether a second signal ends the process; else it raises at once, as a notebook
                needs, which keeps its other variables.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._kills = kills
        before = {n: signal.getsignal(n) for n in KNOWN if signal.getsignal(n) != signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.received, self._first = 0, 0.0

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number not in ENDING:
            self.received = self.received or number
            return
        now = time.monotonic()
        # A launcher passes on what the scheduler has sent to each process already.
        echo = ECHO_SECONDS if "LOCAL_RANK" in os.environ else 0.0
        again = bool(self._first)
        if again and not self._kills:
            raise Stopped(number)
        if again and now - self._first >= echo:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._first = self._first or now
        self.received = number  # where the exception is lost, the next step ends the run
        if not (again or self._deferred):
            raise Stopped(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the signals that end a run wait for the end of a block.

        Raises:
            Stopped: at the end of the block, where one has come to this process.
        """
        outer, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = outer
        if self.received in ENDING and not outer:
            raise Stopped(self.received)

    def pending(self) -> int:
        """Return the signal that has come to any process, 0 for none; each process must call."""
        counts = sum_over_processes(*(float(self.received == number) for number in KNOWN))
        return next((int(n) for n, count in zip(KNOWN, counts, strict=True) if count), 0)

    def obey(self, number: int) -> None:
        """End the run, or go on with it, now that the state is kept.

        Args:
            number: as ``pending`` returned it.

        Raises:
            Stopped: the signal ends the run.
        """
        if number in ENDING:
            raise Stopped(number)
        if number:
            self.received = 0


SIGNALS = SignalHandler()
"""The one of this process."""
