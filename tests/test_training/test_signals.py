"""Signals: at once, after the step, or never."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from medgemma_clinical.training.signals import ENDING, SignalHandler, Stopped


def untouched():
    return all(signal.getsignal(number) == signal.SIG_DFL for number in ENDING)


@pytest.fixture(autouse=True)
def plain_signals():
    """Whatever the caller of the tests ignores."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_signal_ends_the_run_at_once_or_after_the_outer_deferred_block(deferred, number):
    handler, done = SignalHandler(), []

    def work():
        with handler.deferred() if deferred else nullcontext():
            with handler.deferred() if deferred else nullcontext():
                signal.raise_signal(number)
            done.append(handler.received)

    with pytest.raises(KeyboardInterrupt) as stop, handler.installed():
        work()
    assert stop.value.code == 128 + number
    assert done == [number] * deferred
    assert untouched()
    assert handler.received == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored_and_another_error_is_not_lost(number):
    handler = SignalHandler()

    def work():
        with handler.installed(), handler.deferred():
            signal.raise_signal(number)
            assert handler.received == 0
            signal.raise_signal(signal.SIGTERM)
            raise ZeroDivisionError

    signal.signal(number, signal.SIG_IGN)
    with pytest.raises(ZeroDivisionError):
        work()
    assert signal.getsignal(number) == signal.SIG_IGN


def test_another_thread_installs_nothing():
    with ThreadPoolExecutor() as pool:
        pool.submit(SignalHandler().installed().__enter__).result()
    assert untouched()


@pytest.mark.parametrize(("rank", "kills", "code"), [("", True, -15), ("0", True, 143), ("", 0, 7)])
def test_a_second_signal_kills_but_under_a_launcher_or_in_a_notebook(rank, kills, code):
    child = os.fork()
    if child == 0:
        os.environ |= {"LOCAL_RANK": rank} if rank else {}
        ended, handler = 0, SignalHandler()
        try:
            with handler.installed(kills=kills), handler.deferred():
                signal.raise_signal(signal.SIGTERM)
                try:
                    signal.raise_signal(signal.SIGTERM)
                except Stopped:  # at once: a notebook's variables live on
                    ended = 7
        except Stopped as stop:
            ended = ended or stop.code
        finally:
            os._exit(ended)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
