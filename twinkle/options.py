"""The settings in force in this process."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from twinkle.modes import Mode
    from twinkle.where import Where

__all__ = ["Options"]

SETTINGS = (
    "mode",
    "device",
    "use_fallback",
    "strict",
    "verify",
    "watch",
    "kernels",
    "sizes",
    "capture",
    "capture_memory",
    "trust_remote_code",
    "where",
)
"""The settings that are in force for a process, named as in ``[twinkle]``."""


class Options:
    """What ``[twinkle]`` and the environment settled for bindings put in place by a hook.

    Attributes:
        mode: The mode asked for, or ``None`` to follow each model.
        device: The device asked for, or ``None`` to follow each tensor.
        use_fallback: Keep the original where a kernel cannot be used; otherwise that is an error.
        strict: Every silent step is an error.
        verify: ``auto``, ``off``, ``first-use`` or ``always``.
        watch: ``off``, ``nan`` or ``nan:N``: results are looked at for NaN, at one of N calls.
        disabled: Kernel, op and function names that are switched off.
        kernels: The embedded kernels: ``auto``, ``off`` or names of ops.
        sizes: The sizes that embedded kernels run at: ``fixed`` for those in their code, ``auto`` for
            those at which they are measured to pay, or ``all``.
        capture: The calls of repeated layers that may be captured into CUDA graphs: ``auto`` for all,
            ``off``, ``inference`` for those without gradients, ``train`` for those with.
        capture_memory: The most memory that captures may hold: a share of the device as a float, or bytes as
            an int.
        trust_remote_code: Whose code from the Hub may run, where a registration does not say.
        where: The places in models that embedded kernels are for; ``None`` for every place.
    """

    def __init__(self) -> None:
        self.mode: Mode | None = None
        self.device: str | None = None
        self.use_fallback = True
        self.strict = False
        self.verify = "auto"
        self.watch = "off"
        self.disabled: Collection[str] = ()
        self.kernels: str | Collection[str] = "off"
        self.sizes = "auto"
        self.capture = "auto"
        self.capture_memory: float | int = 0.1
        self.trust_remote_code: bool | Collection[str] = False
        self.where: Where | None = None

    @property
    def embedded(self) -> bool:
        """Whether any of the embedded kernels are asked for."""
        return bool(self.kernels) and self.kernels != "off"

    def wants(self, op: str) -> bool:
        """Whether the embedded kernels of an op are asked for."""
        return self.embedded and op not in self.disabled and (self.kernels == "auto" or op in self.kernels)

    def captures(self, *, gradients: bool) -> bool:
        """Whether calls of layers may be captured: those that record gradients, or those that do not."""
        return self.capture in ("auto", "train" if gradients else "inference")

    def capture_bytes(self, total: int) -> int:
        """The most bytes that captures may hold on a device with so much memory in all."""
        share = self.capture_memory
        return int(share * total) if isinstance(share, float) else min(share, total)

    def take(self, settings: object, *, given: Collection[str] | None = None) -> None:
        """Bring settings into force.

        Args:
            settings: :class:`twinkle.config.Settings`, what a configuration and the variables say.
            given: The keys to take; all of them by default.
        """
        for key in SETTINGS:
            if given is None or key in given:
                setattr(self, key, getattr(settings, key))
        self.disabled = settings.disable  # type: ignore[attr-defined]

    @property
    def raises(self) -> bool:
        """Whether a kernel that cannot be used is an error of the program."""
        return self.strict or not self.use_fallback

    def proofs(self, verify: str | None, *, bound_by_name: bool) -> int:
        """How many calls of a kernel are compared with the original before it is trusted.

        Args:
            verify: What was said for this kernel; ``None`` is the setting for all.
            bound_by_name: A user bound the kernel to its target by name, which ``auto`` trusts. It proves
                what Twinkle chose by itself, the kernel or the target.
        """
        verify = verify or self.verify
        if verify == "auto":
            verify = "off" if bound_by_name else "first-use"
        return {"off": 0, "first-use": 1, "always": SHADOWED_CALLS}[verify]

    def recalls(self, verify: str | None) -> bool:
        """Whether a comparison from an earlier process will do: not where comparisons were asked for by name.

        Args:
            verify: As for :meth:`proofs`.
        """
        return (verify or self.verify) == "auto"

    def watched(self, watch: str | None) -> int:
        """Of how many calls of a kernel one is looked at for NaN; 0 for none.

        Args:
            watch: What was said for this kernel; ``None`` is the setting for all.
        """
        word, _, every = (watch or self.watch).partition(":")
        return 0 if word == "off" else int(every or WATCHED_CALLS)


SHADOWED_CALLS = 16
WATCHED_CALLS = 16
"""Of so many calls one is looked at, where nothing else is said."""
