"""What flows through the rooms: registrations on the way in, bindings on the way to the report.

Standard library only, and no dataclasses (they import ``inspect``): this module is imported at
interpreter start.
"""

from __future__ import annotations

from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from twinkle.modes import Mode

    class Source(Protocol):
        """Where an implementation comes from.

        ``load`` is called at first use, from any thread, any number of times; it returns the same
        object each time and imports it once.
        """

        kind: str  # "code" | "local" | "installed" | "hub" | "embedded"

        def describe(self) -> str:
            """One line for the report: what it is and where it comes from."""
            ...

        def load(self) -> object:
            """The layer class or the callable.

            Raises:
                SourceError: It cannot be loaded; the message says what, where and what to do.
            """
            ...


__all__ = ["STATES", "Binding", "FunctionKernel", "LayerKernel", "LayerTarget", "Source"]

STATES = ("pending", "active", "skipped", "failed", "quarantined", "displaced", "reverted")


class LayerKernel:
    """One implementation registered under a kernel name.

    Attributes:
        name: The kernel name that targets are bound to.
        source: Where the layer class is loaded from.
        device: The device it is for, or ``None`` for any.
        mode: The mode it is for, or ``None`` for any.
        attributes: Class attributes the kernel reads and its target lacks.
        verify: ``auto``, ``off``, ``first-use``, ``always``, or ``None`` for the global setting.
        origin: Where it was registered: ``file:line (key)`` or the calling line.
    """

    __slots__ = ("attributes", "device", "mode", "name", "origin", "source", "verify")

    def __init__(
        self,
        name: str,
        source: Source,
        *,
        device: str | None = None,
        mode: Mode | None = None,
        attributes: Mapping[str, object] | None = None,
        verify: str | None = None,
        origin: str = "",
    ) -> None:
        self.name = name
        self.source = source
        self.device = device
        self.mode = mode
        self.attributes = dict(attributes or {})
        self.verify = verify
        self.origin = origin


class LayerTarget:
    """A layer class, or a pattern of them, bound to a kernel name.

    Attributes:
        target: A class in hand, ``"module:Class"``, or a pattern of that form.
        kernel_name: The name whose kernels replace it.
        origin: Where it was registered.
    """

    __slots__ = ("kernel_name", "origin", "target")

    def __init__(self, target: type | str, kernel_name: str, *, origin: str = "") -> None:
        self.target = target
        self.kernel_name = kernel_name
        self.origin = origin


class FunctionKernel:
    """One implementation registered for a function of a module.

    Attributes:
        name: The function's name in its module; dotted for a method (``Class.method``).
        target_module: The module that defines it; ``match:op`` for whatever function is that op.
        source: Where the implementation is loaded from.
        device, mode, verify, origin: As for :class:`LayerKernel`.
    """

    __slots__ = ("device", "mode", "name", "origin", "source", "target_module", "verify")

    def __init__(
        self,
        name: str,
        target_module: str,
        source: Source,
        *,
        device: str | None = None,
        mode: Mode | None = None,
        verify: str | None = None,
        origin: str = "",
    ) -> None:
        self.name = name
        self.target_module = target_module
        self.source = source
        self.device = device
        self.mode = mode
        self.verify = verify
        self.origin = origin

    @property
    def target(self) -> str:
        """``module:name``, as the report and the configuration write it; ``match:op`` alone."""
        return self.target_module if self.op else f"{self.target_module}:{self.name}"

    @property
    def op(self) -> str | None:
        """The op whose functions it is for, where it was bound by structure."""
        return self.target_module[6:] if self.target_module.startswith("match:") else None


class Binding:
    """A kernel with a target, a device and a mode, and what became of it.

    Attributes:
        kind: ``layer`` or ``function``.
        target: ``module:Class`` or ``module:function``.
        kernel: The kernel name (for a function, the function's name).
        source: The source in words, as it describes itself now.
        device, mode: As registered, in words; ``any`` when not given.
        state: One of :data:`STATES`.
        reason: Why the state is not ``active``; notes when it is.
        instances: Modules (or importing modules, for a function) it is in place on now.
        proof: ``unproven``, ``proven`` or ``rejected``, with figures in words.
        load_seconds: How long loading took, once it was loaded.
        origin: Where it was registered.
    """

    __slots__ = (
        "_lock",
        "_source",
        "device",
        "instances",
        "kernel",
        "kind",
        "load_seconds",
        "mode",
        "notes",
        "origin",
        "proof",
        "reason",
        "state",
        "target",
    )

    def __init__(
        self,
        kind: str,
        target: str,
        kernel: str,
        source: Source | str,
        *,
        device: str | None = None,
        mode: Mode | None = None,
        origin: str = "",
    ) -> None:
        self.kind = kind
        self.target = target
        self.kernel = kernel
        self._source = source
        self.device = device or "any"
        self.mode = str(mode) if mode is not None else "any"
        self.origin = origin
        self.state = "pending"
        self.reason = ""
        self.notes: list[str] = []
        self.instances = 0
        self.proof = "unproven"
        self.load_seconds: float | None = None
        self._lock = allocate_lock()

    @property
    def source(self) -> str:
        """The source in words; one of the Hub says more once it was resolved."""
        return self._source if isinstance(self._source, str) else self._source.describe()

    def set(self, state: str, reason: str = "") -> None:
        """Move to ``state``; every state but ``active`` needs its reason in words."""
        if state not in STATES:
            raise ValueError(f"unknown state {state!r}")
        if state != "active" and not reason:
            raise ValueError(f"state {state!r} needs a reason")
        with self._lock:
            self.state = state
            self.reason = reason

    def note(self, text: str) -> None:
        """Add a remark that does not change the state (a stale alias, a fallback call site)."""
        with self._lock:
            if text not in self.notes:
                self.notes.append(text)

    def count(self, change: int) -> None:
        """Add to (or take from) the number of instances."""
        with self._lock:
            self.instances += change

    def __repr__(self) -> str:
        return f"<Binding {self.target} <- {self.kernel} [{self.device}/{self.mode}] {self.state}>"
