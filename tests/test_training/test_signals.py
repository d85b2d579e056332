"""Signals: at once, after the step, or never."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from medgemma_clinical.training.signals import ENDING, SignalHandler, Stopped


def send(number):
    os.kill(os.getpid(), number)


def handlers():
    return [signal.getsignal(number) for number in ENDING]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_signal_ends_the_run_at_once_or_after_the_outer_deferred_block(deferred, number):
    before, handler, done = handlers(), SignalHandler(), []

    def work():
        with handler.deferred() if deferred else nullcontext():
            with handler.deferred() if deferred else nullcontext():
                send(number)
            done.append(handler.received)

    with pytest.raises(KeyboardInterrupt) as stop, handler.installed():
        work()
    assert stop.value.code == 128 + number
    assert done == [number] * deferred
    assert handlers() == before
    assert handler.received == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored_and_another_error_is_not_lost(number):
    """As a shell's ``&``, or nohup, has asked."""

    def work():
        with handler.installed(), handler.deferred():
            send(number)
            assert handler.received == 0
            send(signal.SIGTERM)
            raise ZeroDivisionError

    before, handler = signal.signal(number, signal.SIG_IGN), SignalHandler()
    try:
        with pytest.raises(ZeroDivisionError):
            work()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_another_thread_installs_nothing():
    before = handlers()
    with ThreadPoolExecutor() as pool:
        pool.submit(SignalHandler().installed().__enter__).result()
    assert handlers() == before


@pytest.mark.parametrize(("rank", "kills", "code"), [("", True, -15), ("0", True, 143), ("", 0, 7)])
def test_a_second_signal_kills_but_under_a_launcher_or_in_a_notebook(rank, kills, code):
    child = os.fork()
    if child == 0:
        os.environ |= {"LOCAL_RANK": rank} if rank else {}
        ended, handler = 0, SignalHandler()
        try:
            with handler.installed(kills=kills), handler.deferred():
                send(signal.SIGTERM)
                try:
                    send(signal.SIGTERM)
                except Stopped:  # at once: a notebook's variables live on
                    ended = 7
        except Stopped as stop:
            ended = ended or stop.code
        finally:
            os._exit(ended)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
