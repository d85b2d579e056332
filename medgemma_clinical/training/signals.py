"""What happens on SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal)."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))


SECONDS_BETWEEN = 1.0
"""Between two looks of a worker whether its parent lives."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run; ``code`` is the exit code of the program."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def begin_process(program: str) -> None:
    """Load the script, a module's name, in a process that ends with its parent."""
    # A terminal sends Ctrl-C to all processes: the one that waits ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    importlib.import_module(program)


def _end_with(parent: int) -> None:
    """End this process once its parent is gone, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN)
    os._exit(1)


class SignalHandler:
    """End the run on a signal of ``ENDING``; within ``deferred`` only set ``received``."""

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False
        self._kills = True

    @contextlib.contextmanager
    def installed(self, *, kills: bool = True) -> Iterator[None]:
        """Handle signals in a block of a main thread; if ``kills``, a second ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._kills = kills  # not in a notebook, which keeps its other variables
        # A signal that the parent has set to be ignored, as nohup does, stays ignored.
        handlers = {n: signal.getsignal(n) for n in ENDING if signal.getsignal(n) != signal.SIG_IGN}
        for number in handlers:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.received = 0

    def _handle(self, number: int, _: FrameType | None) -> None:
        repeated, self.received = bool(self.received), number
        # A launcher sends again what the scheduler has sent: there a second one does not kill.
        if repeated and self._kills and "LOCAL_RANK" not in os.environ:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not (repeated or self._deferred) or (repeated and not self._kills):
            raise Stopped(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer signals to the end of a block, so that state and weights agree."""
        outer, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = outer
        if self.received and not outer:
            raise Stopped(self.received)


SIGNALS = SignalHandler()
"""The one of this process."""
