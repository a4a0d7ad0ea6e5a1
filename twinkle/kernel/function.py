"""Function kernels: single functions of a module replaced by other implementations."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from twinkle._bootstrap import settle
from twinkle.kernel._calling import caller, given, moment, register_document

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch import nn

    from twinkle.apply.functions import Change

__all__ = [
    "FuncRepositoryProtocol",
    "apply_function_kernel",
    "function_kernels",
    "register_function_kernel",
    "unapply_function_kernel",
]


@runtime_checkable
class FuncRepositoryProtocol(Protocol):
    """Anything that can load an implementation of a function."""

    def load(self) -> type[nn.Module] | Callable[..., Any]:
        """An ``nn.Module`` class, whose ``forward`` is the function, or a callable."""
        ...


def register_function_kernel(
    func_name: str,
    target_module: str,
    func_impl: Callable[..., Any] | type | str | None = None,
    repo: FuncRepositoryProtocol | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    version: int | str | None = None,
    device: str | torch.device | None = None,
    mode: str | None = None,
    *,
    repo_path: str | os.PathLike[str] | None = None,
    package_name: str | None = None,
    verify: str | None = None,
    watch: str | None = None,
    trust_remote_code: bool | Sequence[str] | None = None,
) -> None:
    """Register an implementation of a function.

    Args:
        func_name: The function's name in ``target_module``; dotted for a method (``Class.method``).
        target_module: The module that defines it.
        func_impl: A callable, an ``nn.Module`` class, or ``"module:name"``. It is of the kind of the
            function (called, awaited or iterated), and gets that by a keyword-only parameter ``original``
            where it has one.
        repo: An object with ``load()`` (:class:`FuncRepositoryProtocol`).
        repo_id: A kernel repository of the Hub that exports ``func_name``.
        revision: A branch, tag or commit of the Hub repository.
        version: A version of it (``1``, ``"1"``, ``"0.1.0"``, ``">=1,<3"``).
        device: ``cpu``, ``cuda``, ``rocm``, ``mps``, ``npu`` or ``xpu``; any when not given.
        mode: ``train``, ``inference``, ``compile`` or a combination; any when not given.
        repo_path: A directory that holds the package ``package_name``.
        package_name: The package in ``repo_path``; alone, an installed package.
        verify: ``auto``, ``off``, ``first-use`` or ``always`` for this kernel alone.
        watch: ``off``, ``nan`` or ``nan:N`` for this kernel alone: at one of N calls (16 by default) its
            result is looked at for NaN.
        trust_remote_code: Load a Hub repository whose publisher is not trusted.

    Raises:
        ConfigError: The arguments cannot be right; nothing was registered.
    """
    spec = given(
        target_module=target_module,
        func_impl=func_impl,
        repo=repo,
        repo_id=repo_id,
        revision=revision,
        version=version,
        device=device,
        mode=mode,
        repo_path=repo_path,
        package_name=package_name,
        verify=verify,
        watch=watch,
        trust_remote_code=trust_remote_code,
    )
    register_document({"functions": [{"func_name": func_name, **spec}]}, where=caller())


def apply_function_kernel(
    target_module: str,
    device: str | torch.device | None = None,
    mode: str | None = None,
    strict: bool = False,
) -> list[str]:
    """Put the registered function kernels of a module in place.

    With a device or a mode, which kernel runs is decided here, once. With neither, a kernel that
    was registered for one goes through a dispatcher that decides at each call.

    Args:
        target_module: The module whose functions are replaced; it is imported if need be.
        device: The device to decide for.
        mode: The mode to decide for.
        strict: Raise on the first failure, and when nothing was applied; everything is as it was.

    Returns:
        ``"module.function"`` of each function that runs a kernel now, in registration order; nothing where
        ``TWINKLE_DISABLE`` switches Twinkle off.

    Raises:
        ConfigError: ``mode`` or ``device`` is unknown.
        ApplyError: ``strict``, or ``TWINKLE_STRICT``, and a kernel could not be put in place or none was
            there to put.
    """
    return _applied(target_module, device, mode, strict, caller()).applied


def unapply_function_kernel(target_module: str | None = None) -> list[str]:
    """Restore the original functions of a module, or of all modules.

    Returns:
        ``"module.function"`` of each function that was restored.
    """
    from twinkle.apply.functions import unapply

    return unapply(target_module)


@contextmanager
def function_kernels(
    target_module: str,
    device: str | torch.device | None = None,
    mode: str | None = None,
    strict: bool = False,
) -> Iterator[list[str]]:
    """:func:`apply_function_kernel` for the length of a ``with`` block."""
    change = _applied(target_module, device, mode, strict, caller())
    try:
        yield change.applied
    finally:
        change.undo()


def _applied(
    target_module: str, device: str | torch.device | None, mode: str | None, strict: bool, where: str
) -> Change:
    """Put the kernels of a module's functions in place; what is off leaves everything as it is."""
    from twinkle.apply.functions import Change, apply
    from twinkle.runtime import runtime

    if not settle():
        return Change()
    strict = strict or runtime.options.strict
    # With neither, a dispatcher decides at each call: a device in force is none that the call has asked for.
    wanted = device if device is None and mode is None else moment(device, mode, where)
    return apply(target_module, device=wanted, mode=mode, strict=strict, where=where)
