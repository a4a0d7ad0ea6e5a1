"""Locks by name, and what a forked child finds of those that its parent held."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from twinkle.runtime import runtime
from twinkle.sources.locks import NamedLocks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


def in_child(question):
    """How a forked child ends: with 5 when the question came back, killed when it takes ten seconds.

    The parent keeps the time: the handlers of a fork run before a child could set an alarm.
    """
    child = os.fork()
    if child == 0:
        try:
            question()
            os._exit(5)
        finally:
            os._exit(1)
    for _ in range(1000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_name_has_one_lock(clean_registry):
    locks = runtime.of(NamedLocks)
    assert locks.of("a") is locks.of("a")
    assert locks.of("a") is not locks.of("b")


def test_a_child_can_take_a_lock_that_a_thread_of_its_parent_held(clean_registry):
    released = threading.Event()
    holding = threading.Event()

    def hold():
        with runtime.of(NamedLocks).of("a"):
            holding.set()
            released.wait(30)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert holding.wait(10)
    try:
        assert in_child(lambda: runtime.of(NamedLocks).of("a").acquire()) == 5
    finally:
        released.set()
        thread.join()


def test_a_child_can_make_a_state_while_a_thread_of_its_parent_was_making_one(clean_registry):
    released = threading.Event()
    holding = threading.Event()

    class Slow:
        def __init__(self):
            holding.set()
            released.wait(30)

    class Other:
        pass

    thread = threading.Thread(target=runtime.of, args=(Slow,), daemon=True)
    thread.start()
    assert holding.wait(10)
    try:
        assert in_child(lambda: runtime.of(Other)) == 5
    finally:
        released.set()
        thread.join()
