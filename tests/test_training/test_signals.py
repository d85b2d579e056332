"""Signals: at once, after the step, or never; each in a forked process of its own where it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from medgemma_clinical.training import signals
from medgemma_clinical.training.signals import KNOWN, SignalHandler, Stopped


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def handler() -> Iterator[SignalHandler]:
    handler = SignalHandler()
    with handler.installed():
        yield handler


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_an_end_comes_at_once(handler: SignalHandler, number: int, code: int) -> None:
    with pytest.raises(Stopped) as stop:
        send(number)
    assert stop.value.code == code
    assert isinstance(stop.value, KeyboardInterrupt)


def stopped_by(work: Callable[[], None]) -> Stopped | None:
    """Run a function; return the ``Stopped`` that it raises."""
    try:
        work()
    except Stopped as stop:
        return stop
    return None


def test_a_deferred_end_is_pending_and_comes_after_the_block(handler: SignalHandler) -> None:
    seen = []

    def work() -> None:
        with handler.deferred():
            with handler.deferred():  # an inner block raises nothing either
                send(signal.SIGTERM)
            seen.append(handler.pending())
        pytest.fail("the block has an end that raises")

    stop = stopped_by(work)
    assert seen == [signal.SIGTERM]
    assert stop is not None
    assert stop.code == 143


def test_a_deferred_end_is_obeyed_between_two_steps(handler: SignalHandler) -> None:
    def work() -> None:
        with handler.deferred():
            send(signal.SIGINT)
            handler.obey(handler.pending())
            pytest.fail("obey raises")

    assert str(stopped_by(work)) == "SIGINT"


def test_an_error_within_a_deferred_block_is_not_lost(handler: SignalHandler) -> None:
    def work() -> None:
        with handler.deferred():
            send(signal.SIGTERM)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()


def test_sigusr1_is_pending_until_it_is_obeyed_and_ends_nothing(handler: SignalHandler) -> None:
    send(signal.SIGUSR1)
    assert handler.pending() == signal.SIGUSR1
    with handler.deferred():
        handler.obey(handler.pending())
    assert handler.pending() == 0


def test_an_end_counts_more_than_sigusr1(handler: SignalHandler) -> None:
    def work() -> None:
        with handler.deferred():
            send(signal.SIGTERM)
            send(signal.SIGUSR1)
            seen.append(handler.pending())

    seen: list[int] = []
    assert stopped_by(work)
    assert seen == [signal.SIGTERM]


def test_a_signal_to_another_process_is_pending_here(
    handler: SignalHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def summed(*counts: float) -> list[float]:
        return [
            count + (number == signal.SIGTERM) for count, number in zip(counts, KNOWN, strict=True)
        ]

    monkeypatch.setattr(signals, "sum_over_processes", summed)
    assert handler.pending() == signal.SIGTERM
    with pytest.raises(Stopped):
        handler.obey(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number: int) -> None:
    """As a shell's ``&``, or nohup, has asked."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        handler = SignalHandler()
        with handler.installed():
            send(number)
            assert handler.pending() == 0
            with pytest.raises(Stopped):
                send(signal.SIGTERM)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_the_handlers_before_are_back_afterwards() -> None:
    before = [signal.getsignal(number) for number in KNOWN]
    handler = SignalHandler()
    with pytest.raises(Stopped), handler.installed():
        send(signal.SIGTERM)
    assert [signal.getsignal(number) for number in KNOWN] == before
    assert handler.received == 0


def test_another_thread_installs_nothing() -> None:
    seen = []

    def work() -> None:
        with SignalHandler().installed():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def exit_code_of(work: Callable[[], int]) -> int:
    """Run a function in a forked process; return its exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("ranked", "later", "code"), [(False, 0.0, -15), (True, 0.0, 143), (True, 11.0, -15)]
)
def test_a_second_end_comes_without_further_ado_unless_a_launcher_echoes_it(
    ranked: bool, later: float, code: int
) -> None:
    def work() -> int:
        if ranked:
            os.environ["LOCAL_RANK"] = "0"
        handler = SignalHandler()
        with handler.installed():
            try:
                with handler.deferred():
                    send(signal.SIGTERM)
                    handler._first -= later
                    send(signal.SIGTERM)
            except Stopped as stop:
                return stop.code
        return 0

    assert exit_code_of(work) == code


def test_a_second_signal_raises_where_the_process_must_live_on() -> None:
    handler = SignalHandler()
    with handler.installed(kills=False):
        with contextlib.suppress(Stopped), handler.deferred():
            send(signal.SIGINT)
            with pytest.raises(Stopped):
                send(signal.SIGINT)
        assert handler.received == signal.SIGINT
