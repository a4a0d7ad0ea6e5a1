"""The choice among the builds of a kernel: which fit this machine, and why the others do not.

Builds are named by what they were built for: ``torch-cpu``, ``torch-universal``,
``torch213-cxx11-cu130-x86_64-linux``, ``torch-stable-abi211-cpu-x86_64-linux``. Where the
``kernels`` package is installed its own resolver decides; where it is not, the reading below.
"""

from __future__ import annotations

import platform
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["System", "choose", "is_variant", "torch_backend", "wanted"]

_NOARCH = re.compile(r"torch-(cpu|cuda|rocm|metal|xpu|npu|universal|neuron|tpu)")
_ARCH = re.compile(
    r"torch(?P<stable>-stable-abi)?(?P<torch>\d{2,})(?:-(?P<abi>cxx11|cxx98))?"
    r"-(?P<backend>cpu|metal|neuron|tpu|(?:cu|rocm|xpu|cann)\d+)-(?P<cpu>[\w.]+)-(?P<os>[a-z]+)"
)
_TVM = re.compile(r"tvm-ffi\d+-.+")

Trace = list[tuple[str, bool, str]]


class System(NamedTuple):
    """The properties of a machine that a build has to match.

    Attributes:
        torch: ``(major, minor)``.
        abi: ``cxx11``, ``cxx98``, or ``None`` where there is no such difference.
        backend: ``cpu``, ``cuda``, ``rocm``, ``metal``, ``xpu`` or ``npu``.
        version: Of the backend: ``(13, 0)`` for CUDA 13.0; ``None`` for one without.
        cpu: ``x86_64``, ``aarch64`` …
        os: ``linux``, ``darwin``, ``windows``.
    """

    torch: tuple[int, int]
    abi: str | None
    backend: str
    version: tuple[int, int] | None
    cpu: str
    os: str

    @classmethod
    def here(cls, device: object = None) -> System:
        """The properties of this process: those of its torch, unless the kernel is for the CPU."""
        import torch

        system, machine = platform.system().lower(), platform.machine()
        cpu = {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
        backend, version = ("cpu", None) if device == "cpu" else torch_backend(torch)
        abi = None
        if system == "linux":
            abi = "cxx11" if torch.compiled_with_cxx11_abi() else "cxx98"
        major, minor = _two(torch.__version__)
        return cls((major, minor), abi, backend, version, cpu, system)


def _two(version: str) -> tuple[int, int]:
    numbers = re.findall(r"\d+", version)
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0


def torch_backend(torch: Any) -> tuple[str, tuple[int, int] | None]:
    """The backend that torch was built for, and its version."""
    if torch.version.cuda is not None:
        return "cuda", _two(torch.version.cuda)
    if torch.version.hip is not None:
        return "rocm", _two(torch.version.hip)
    if torch.backends.mps.is_available():
        return "metal", None
    if getattr(torch.version, "xpu", None) is not None:
        return "xpu", (int(torch.version.xpu[:4]), int(torch.version.xpu[5:6] or 0))
    if getattr(torch._C, "_get_privateuse1_backend_name", lambda: "")() == "npu":
        return "npu", None
    return "cpu", None


def is_variant(name: str) -> bool:
    """Whether a directory of this name holds a build."""
    return any(pattern.fullmatch(name) for pattern in (_NOARCH, _ARCH, _TVM))


def wanted(*, device: object = None) -> str:
    """The names of builds that would fit this machine, for a message."""
    system = System.here(device)
    abi = f"-{system.abi}" if system.abi else ""
    version = "".join(map(str, system.version or ()))
    build = {"cuda": "cu", "npu": "cann"}.get(system.backend, system.backend) + version
    torch = "".join(map(str, system.torch))
    return f"torch{torch}{abi}-{build}-{system.cpu}-{system.os}, torch-{system.backend} or torch-universal"


def choose(names: Iterable[str], *, device: object = None) -> Trace:
    """``(variant, accepted, reason)`` of every build, those that fit first and the best of all first.

    Args:
        names: The builds that there are.
        device: The device the kernel is registered for; ``"cpu"`` asks for a CPU build whatever
            torch was built for.
    """
    listed = sorted(set(names))
    own = read(listed, System.here(device))
    for resolver in (_by_resolver, _by_list):
        try:
            decided = resolver(listed, own, device)
        except Exception:
            # Not installed, another version's interface, or (0.17 with DISABLE_KERNEL_MAPPING=true)
            # an error of its own: the reading below holds for all of them.
            continue
        if {name for name, _, _ in decided} == set(listed):
            return decided
    return own


def _by_resolver(names: list[str], own: Trace, device: object) -> Trace:
    """Decide with the resolver of ``kernels`` 0.13 and later, which gives its reasons."""
    from kernels.variants import VariantAccepted, parse_variant, resolve_variants

    builds = [parse_variant(name) for name in names]
    _, decisions = resolve_variants(builds, "cpu" if device == "cpu" else None)
    result: Trace = []
    for decision in decisions:
        accepted = isinstance(decision, VariantAccepted)
        reason = "fits" if accepted else str(decision.reason)
        result.append((decision.variant.variant_str, accepted, reason))
    return result


def _by_list(names: list[str], own: Trace, device: object) -> Trace:
    """Decide with ``kernels`` up to 0.12, which lists the names that fit, without reasons."""
    from kernels.utils import build_variants

    if device == "cpu":
        raise NotImplementedError("it knows torch's own backend only")
    fitting = [name for name in build_variants() if name in names]
    reasons = {name: reason for name, accepted, reason in own if not accepted}
    others = [name for name in names if name not in fitting]
    unlisted = "not one of the builds that the installed kernels package looks for"
    return [(name, True, "fits") for name in fitting] + [
        (name, False, reasons.get(name, unlisted)) for name in others
    ]


def read(names: Iterable[str], system: System) -> Trace:
    """Decide without the ``kernels`` package."""
    fitting: list[tuple[tuple[int, ...], str]] = []
    rejected: Trace = []
    for name in names:
        verdict = _judge(name, system)
        if isinstance(verdict, str):
            rejected.append((name, False, verdict))
        else:
            fitting.append((verdict, name))
    return [(name, True, "fits") for _, name in sorted(fitting)] + rejected


def _judge(name: str, system: System) -> tuple[int, ...] | str:
    """The rank of a build (smaller is better), or the reason why it does not fit.

    First the stable ABI (newest first), then builds for this torch (without an ABI tag first, then
    the newest backend), then Python code for this backend, then for any.
    """
    noarch = _NOARCH.fullmatch(name)
    if noarch:
        if noarch[1] == "universal":
            return (3,)
        return (2,) if noarch[1] == system.backend else f"built for {noarch[1]}, this is {system.backend}"
    arch = _ARCH.fullmatch(name)
    if arch is None:
        return "needs the kernels package to be read"
    if arch["os"] != system.os or arch["cpu"] != system.cpu:
        return f"built for {arch['cpu']}-{arch['os']}, this is {system.cpu}-{system.os}"
    torch = (int(arch["torch"][0]), int(arch["torch"][1:]))
    if arch["stable"]:
        if torch > system.torch:
            return f"needs torch {torch[0]}.{torch[1]} or newer, this is {_dotted(system.torch)}"
    elif torch != system.torch:
        return f"built for torch {torch[0]}.{torch[1]}, this is {_dotted(system.torch)}"
    if arch["abi"] and arch["abi"] != system.abi:
        return f"built for the {arch['abi']} ABI, this is {system.abi}"
    reason, age = _judge_backend(arch["backend"], system)
    if reason:
        return reason
    if arch["stable"]:
        return (0, -torch[0], -torch[1], age)
    return (1, 1 if arch["abi"] else 0, age)


def _judge_backend(text: str, system: System) -> tuple[str | None, int]:
    letters = text.rstrip("0123456789")
    digits = text[len(letters) :]
    backend = {"cu": "cuda", "cann": "npu"}.get(letters, letters)
    if backend != system.backend:
        return f"built for {backend}, this is {system.backend}", 0
    if not digits or system.version is None:
        return None, 0
    version = (int(digits[:-1] or 0), int(digits[-1]))
    fits = version == system.version
    if backend == "cuda":
        # A build runs on the same major version, with the minor it was built for or a newer one.
        fits = version[0] == system.version[0] and version[1] <= system.version[1]
    if fits:
        return None, -version[1]
    return f"built for {backend} {_dotted(version)}, this is {_dotted(system.version)}", 0


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
