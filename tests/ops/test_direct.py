"""Launchers of several versions of triton, looked through: the C function gets what they would give it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from twinkle.ops.direct import Launched, Slot, direct, has_slots, hooked


class Launcher:
    """As triton's, with a function in the place of the C one that keeps what it is given."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self) -> None:
        self.given: list[tuple] = []
        self.launch = lambda *arguments: self.given.append(arguments)


class Of33(Launcher):
    def __call__(self, x, y, z, stream, function, *arguments):
        self.launch(x, y, z, stream, function, False, None, *arguments)


class Of36(Launcher):
    def __call__(self, x, y, z, stream, function, *arguments):
        def scratch(size):
            return object() if size else None

        own = scratch(self.global_scratch_size), scratch(self.profile_scratch_size)
        self.launch(x, y, z, stream, function, False, True, *own, *arguments)


class Of39(Launcher):
    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        hooks = (metadata, launch_metadata, enter, leave)
        self.launch(x, y, z, stream, function, False, True, *hooks, None, None, ["*", 0], b"p", arguments)


class Scratch(Of36):
    global_scratch_size = 64


class Beneath(Launcher):
    """Launches by another function in C, which takes numbers alone."""

    def __call__(self, x, y, z, stream, *arguments):
        self.given.append((x, y, z, stream + 0, *arguments))


class Looking(Launcher):
    """Looks at an argument before it launches."""

    def __call__(self, x, y, z, stream, function, *arguments):
        self.launch(x, y, z, stream + 0, function, *arguments)


class Twice(Launcher):
    def __call__(self, *arguments):
        self.launch(*arguments)
        self.launch(*arguments)


def filled(arguments: tuple) -> tuple:
    """The arguments with a stream and addresses in the slots."""
    return tuple(
        (7 if a.at is None else 1000 + a.at) if isinstance(a, Slot) else filled(a) if has_slots(a) else a
        for a in arguments
    )


@pytest.mark.parametrize("kind", [Of33, Of36, Of39, Scratch, Beneath, Looking, Twice])
def test_what_is_launched_is_what_the_launcher_launches(kind):
    run = kind()
    compiled = SimpleNamespace(run=run, function=55, packed_metadata=(4, 1, 0))
    tensors = (torch.empty(1), torch.empty(1))
    one = Launched(None, compiled, (2, 3, 1), tensors, (16, 0.5), (128, "none"), {})
    function, arguments = direct(one)
    assert run.given == []  # nothing was launched to find out
    function(*filled(arguments))
    found = list(run.given)
    run.given.clear()
    run(2, 3, 1, 7, 55, (4, 1, 0), None, None, None, 1000, 1001, 16, 0.5, 128, "none")
    assert [repr(one) for one in found] == [repr(one) for one in run.given] or kind is Scratch
    assert (function is run) == (kind in (Scratch, Beneath, Looking, Twice))


class Chain:
    def __init__(self) -> None:
        self.calls: list = []


@pytest.mark.parametrize("form", ["none", "chain"])
def test_hooks_of_a_profiler_are_seen(monkeypatch, form):
    pytest.importorskip("triton")
    runtime = SimpleNamespace(
        launch_enter_hook=None if form == "none" else Chain(),
        launch_exit_hook=None if form == "none" else Chain(),
    )
    import triton

    monkeypatch.setattr(triton, "knobs", SimpleNamespace(runtime=runtime), raising=False)
    monkeypatch.setitem(sys.modules, "triton.knobs", triton.knobs)
    scope: dict = {}

    def constant(value):
        scope[f"c{len(scope)}"] = value
        return f"c{len(scope) - 1}"

    conditions = hooked(constant)
    assert conditions
    assert not any(eval(one, scope) for one in conditions)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        idle = getattr(runtime, name)
        if form == "chain":
            idle.calls.append(print)
            assert any(eval(one, scope) for one in conditions)
            assert hooked(constant) is None
            idle.calls.clear()
        setattr(runtime, name, print)
        assert any(eval(one, scope) for one in conditions)
        assert hooked(constant) is None
        setattr(runtime, name, idle)
    assert not any(eval(one, scope) for one in conditions)
