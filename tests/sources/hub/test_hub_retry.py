"""Trying again: what, how often and how long."""

from __future__ import annotations

import pytest

from twinkle.errors import SourceError
from twinkle.sources.hub import faults as hub_faults
from twinkle.sources.hub.faults import Retry
from twinkle.sources.hub.kernels_package import kernels_package


class Response:
    def __init__(self, status, headers=None):
        self.status_code = status
        self.headers = headers or {}


class HubError(Exception):
    def __init__(self, status, headers=None):
        super().__init__(f"status {status}")
        self.response = Response(status, headers)


class TransportError(Exception):
    pass


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited, without waiting them."""
    found = []
    monkeypatch.setattr(hub_faults.time, "sleep", found.append)
    return found


def failing(error, times):
    calls = []

    def operation():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return operation


@pytest.mark.parametrize(
    "error",
    [
        HubError(408),
        HubError(429),
        HubError(500),
        HubError(503),
        TransportError("reset"),
        TimeoutError("read"),
    ],
    ids=repr,
)
def test_what_may_go_better_is_tried_again(waits, error):
    class Timeout(TimeoutError):
        pass

    error = Timeout("read") if isinstance(error, TimeoutError) else error
    assert Retry()(failing(error, 3)) == 4


@pytest.mark.parametrize(
    "error", [HubError(401), HubError(403), HubError(404), ValueError("no"), OSError(28, "full")], ids=repr
)
def test_what_will_not_go_better_is_not_tried_again(waits, error):
    with pytest.raises(type(error)):
        Retry()(failing(error, 1))
    assert waits == []


def test_attempts_are_bounded(waits):
    with pytest.raises(HubError):
        Retry(attempts=3)(failing(HubError(500), 9))
    assert len(waits) == 2


def test_waits_grow_are_spread_and_are_capped():
    retry = Retry(base=1.0, cap=4.0)
    samples = [[retry.wait(attempt) for attempt in (1, 2, 3, 9)] for _ in range(50)]
    for low, high, column in zip((0.5, 1, 2, 2), (1, 2, 4, 4), zip(*samples, strict=True), strict=True):
        assert all(low <= wait <= high for wait in column)
        assert len(set(column)) > 1


def test_retry_after_is_heeded(waits):
    Retry(cap=8.0)(failing(HubError(429, {"Retry-After": "5"}), 1))
    assert waits == [5.0]


def test_retry_after_is_capped(waits):
    Retry(cap=8.0)(failing(HubError(429, {"Retry-After": "3600"}), 1))
    assert waits == [8.0]


def test_patience_ends_it(waits):
    with pytest.raises(HubError):
        Retry(patience=0.1, base=1.0)(failing(HubError(500), 9))
    assert waits == []


@pytest.mark.parametrize(
    ("action", "value"), [("status", 429), ("status", 500), ("status", 503), ("drop", 0)]
)
@pytest.mark.parametrize("stage", ["/refs", "/tree/", "organizations"])
def test_fault_that_passes_is_not_seen(hub, source, stage, action, value):
    hub.fault(stage, action, value, times=2)
    assert source(version=1).load().label == "v1"
    asked_by_type = len(kernels_package().repo_types) if stage == "/refs" else 1
    assert hub.count(stage) == 2 + asked_by_type


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_are_not_repeated(hub, source, status):
    hub.fault("/refs", "status", status)
    with pytest.raises(SourceError):
        source(version=1).load()
    types = len(kernels_package().repo_types) if status != 403 else 1
    assert hub.count("/refs") == types


def test_silence_ends(hub, source, monkeypatch):
    from twinkle.sources.hub import client as hub_client

    hub.fault(".", "drop", times=4)
    with pytest.raises(SourceError):
        source(version=1, trust_remote_code=True).load()
    monkeypatch.setattr(hub_client, "SILENCE", 0.0)
    hub.faults.clear()
    assert source(version=1).load().label == "v1"
