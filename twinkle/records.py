"""What flows through the rooms: registrations on the way in, bindings on the way to the report.

Standard library only, and no dataclasses (they import ``inspect``): this module is imported at
interpreter start.
"""

from __future__ import annotations

from _thread import allocate_lock

from twinkle.targets import Name, Op

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sized
    from typing import Literal, Protocol, TypeVar

    from twinkle.modes import Mode
    from twinkle.targets import Target
    from twinkle.where import Where

    ChosenBy = Literal["user", "twinkle"]
    Registered = TypeVar("Registered", bound="Kernel")

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


__all__ = ["STATES", "Binding", "FunctionKernel", "Kernel", "LayerKernel", "LayerTarget", "Source"]

STATES = ("pending", "active", "skipped", "failed", "quarantined", "displaced", "reverted")


class Kernel:
    """One implementation as it was registered; a layer's or a function's.

    Attributes:
        name: What it is registered under.
        source: Where it is loaded from.
        device: The device it is for, or ``None`` for any.
        mode: The mode it is for, or ``None`` for any.
        verify: ``auto``, ``off``, ``first-use``, ``always``, or ``None`` for the global setting.
        watch: ``off``, ``nan``, ``nan:N``, or ``None`` for the global setting.
        origin: Where it was registered: ``file:line (key)`` or the calling line.
        chosen_by: Who chose it: a ``user`` who registered it, or ``twinkle``.
        recognised: Whether the target was recognised by its structure; otherwise it was named.
        alike: What it has in common with kernels that were made for other classes of the same path: one
            record is theirs, however often a class is made. None for one that was registered.
    """

    __slots__ = (
        "alike",
        "chosen_by",
        "device",
        "mode",
        "name",
        "origin",
        "recognised",
        "source",
        "verify",
        "watch",
    )

    def __init__(
        self,
        name: str,
        source: Source,
        device: str | None,
        mode: Mode | None,
        verify: str | None,
        origin: str,
        chosen_by: ChosenBy,
        recognised: bool,
    ) -> None:
        self.name = name
        self.source = source
        self.device = device
        self.mode = mode
        self.verify = verify
        self.watch: str | None = None
        self.alike: object = None
        self.origin = origin
        self.chosen_by = chosen_by
        self.recognised = recognised

    @property
    def bound_by_name(self) -> bool:
        """Whether a user bound it to its target by name, and so vouches for it."""
        return self.chosen_by == "user" and not self.recognised

    def specialised(self: Registered, source: Source, *, device: str | None) -> Registered:
        """The same kernel for one layer or function that was recognised as the op it was registered for.

        Args:
            source: Where that kernel comes from.
            device: What it is for where the registration does not say.
        """
        from copy import copy

        made = copy(self)
        made.source = source
        made.device = self.device or device
        made.recognised = True
        return made


class LayerKernel(Kernel):
    """One implementation registered under a kernel name.

    Attributes:
        attributes: Class attributes the kernel reads and its target lacks.
    """

    __slots__ = ("attributes",)

    def __init__(
        self,
        name: str,
        source: Source,
        *,
        device: str | None = None,
        mode: Mode | None = None,
        attributes: Mapping[str, object] | None = None,
        verify: str | None = None,
        watch: str | None = None,
        origin: str = "",
        chosen_by: ChosenBy = "user",
        recognised: bool = False,
    ) -> None:
        super().__init__(name, source, device, mode, verify, origin, chosen_by, recognised)
        self.watch = watch
        self.attributes = dict(attributes or {})


class LayerTarget:
    """The layer classes that are bound to a kernel name.

    Attributes:
        target: Which classes.
        kernel_name: The name whose kernels replace them.
        origin: Where it was registered.
        where: The places in a model that it is for; ``None`` for every place.
        met: A class was met for it under another name; the records are that class's now.
        classes: The classes that were met for it, as the report writes them.
    """

    __slots__ = ("classes", "kernel_name", "met", "origin", "target", "where")

    def __init__(
        self, target: Target, kernel_name: str, *, origin: str = "", where: Where | None = None
    ) -> None:
        self.target = target
        self.kernel_name = kernel_name
        self.origin = origin
        self.where = where
        self.met = False
        self.classes: set[str] = set()


class FunctionKernel(Kernel):
    """One implementation registered for a function of a module; its name is the function's there.

    Attributes:
        target: The function by name (dotted for a method: ``Class.method``), or the op that functions
            are recognised as.
    """

    __slots__ = ("target",)

    target: Name | Op

    def __init__(
        self,
        name: str,
        target_module: str | Op,
        source: Source,
        *,
        device: str | None = None,
        mode: Mode | None = None,
        verify: str | None = None,
        watch: str | None = None,
        origin: str = "",
        chosen_by: ChosenBy = "user",
        recognised: bool = False,
    ) -> None:
        super().__init__(name, source, device, mode, verify, origin, chosen_by, recognised)
        self.watch = watch
        self.target = target_module if isinstance(target_module, Op) else Name(target_module, name)

    @property
    def target_module(self) -> str | None:
        """The module of the function; ``None`` for a kernel that was registered for an op."""
        return None if isinstance(self.target, Op) else self.target.module

    @property
    def op(self) -> str | None:
        """The op whose functions it is for, where it was registered for one."""
        return self.target.op if isinstance(self.target, Op) else None


class Binding:
    """A kernel with a target, a device and a mode, and what became of it.

    Attributes:
        scope: What is replaced: a ``layer`` or a ``function``.
        target: ``module:Class`` or ``module:function``.
        kernel: The kernel name (for a function, the function's name).
        source: The source in words, as it describes itself now.
        device, mode: As registered, in words; ``any`` when not given.
        state: One of :data:`STATES`.
        reason: Why the state is not ``active``; notes when it is.
        ran: Whether it was called; ``None`` where it stands in place itself and its calls are not seen.
        proof: ``unproven``, ``proven`` or ``rejected``, with figures in words.
        speeds: How fast it is beside its original, by what it was measured at.
        most_instances: The largest that ``instances`` has been.
        load_seconds: How long loading took, once it was loaded.
        origin: Where it was registered.
        on_change: Called when the state, its reason or ``ran`` has changed.
    """

    __slots__ = (
        "_counted",
        "_homes",
        "_lock",
        "_source",
        "device",
        "kernel",
        "load_seconds",
        "mode",
        "most_instances",
        "notes",
        "on_change",
        "origin",
        "proof",
        "ran",
        "reason",
        "scope",
        "speeds",
        "state",
        "target",
    )

    def __init__(
        self,
        scope: str,
        target: str,
        kernel: str,
        source: Source | str,
        *,
        device: str | None = None,
        mode: Mode | None = None,
        origin: str = "",
    ) -> None:
        self.scope = scope
        self.target = target
        self.kernel = kernel
        self._source = source
        self.device = device or "any"
        self.mode = str(mode) if mode is not None else "any"
        self.origin = origin
        self.state = "pending"
        self.reason = ""
        self.notes: list[str] = []
        self.proof = "unproven"
        self.speeds: dict[str, dict[str, object]] = {}
        self.ran: bool | None = None
        self.load_seconds: float | None = None
        self.on_change: Callable[[], object] | None = None
        self.most_instances = 0
        self._counted = 0
        self._homes: list[Sized] = []
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
            changed = (self.state, self.reason) != (state, reason)
            self.state = state
            self.reason = reason
        if changed and self.on_change is not None:
            self.on_change()

    def note(self, text: str) -> None:
        """Add a remark that does not change the state (a stale alias, a fallback call site)."""
        with self._lock:
            if text not in self.notes:
                self.notes.append(text)

    def measured(self, at: str, figures: dict[str, object]) -> None:
        """Add how fast the kernel is at a size, in figures as the report has them."""
        with self._lock:
            self.speeds = {**self.speeds, at: figures}

    def has_run(self) -> None:
        """Record that it was called."""
        if not self.ran:
            self.ran = True
            if self.on_change is not None:
                self.on_change()

    @property
    def instances(self) -> int:
        """The modules that are alive (or the importing modules, for a function) it is in place on now."""
        return self._counted + sum(map(len, self._homes))

    def count(self, change: int) -> None:
        """Add to (or take from) the number of names it is in place under."""
        with self._lock:
            self._counted += change
            self.most_instances = max(self.most_instances, self.instances)

    def lives_in(self, home: Sized) -> None:
        """Count what is in a collection, now and whenever it is asked: who dies leaves it."""
        with self._lock:
            if not any(known is home for known in self._homes):
                self._homes = [*filter(len, self._homes), home]
            self.most_instances = max(self.most_instances, self.instances)

    def look(self) -> None:
        """Have the places that it is in say what has changed there; before the notes are read."""
        for home in self._homes:
            changed = getattr(home, "changed", None)
            what = changed() if changed is not None else None
            if what is not None:
                self.note(what)

    def __repr__(self) -> str:
        return f"<Binding {self.target} <- {self.kernel} [{self.device}/{self.mode}] {self.state}>"
