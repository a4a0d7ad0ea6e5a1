"""Layer kernels: whole ``nn.Module`` classes replaced by other implementations."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from twinkle._bootstrap import settle
from twinkle.kernel._calling import caller, given, moment, register_document

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from torch import nn

    from twinkle.apply.functions import Change
    from twinkle.targets import Target

    Only = str | Sequence[str] | Callable[[str, nn.Module], bool]

__all__ = [
    "kernelize_model",
    "kernelized",
    "register_external_layer",
    "register_layer_kernel",
    "unkernelize_model",
]

Model = TypeVar("Model", bound="nn.Module | None")


def register_layer_kernel(
    kernel_name: str,
    repo_path: str | os.PathLike[str] | None = None,
    repo_id: str | None = None,
    layer_impl: type | str | None = None,
    package_name: str | None = None,
    layer_name: str | None = None,
    version: int | str | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    mode: str | None = None,
    *,
    attributes: Mapping[str, object] | None = None,
    verify: str | None = None,
    watch: str | None = None,
    trust_remote_code: bool | Sequence[str] | None = None,
) -> None:
    """Register an implementation under a kernel name.

    Several modes and devices under one name add up; the same name, device and mode again replaces
    what was registered. Nothing is loaded until a model needs it.

    Args:
        kernel_name: The name that layer classes are bound to.
        repo_path: A directory that holds the package ``package_name``.
        repo_id: A kernel repository of the Hub (``org/name``).
        layer_impl: A class in hand, or ``"module:Class"``.
        package_name: The package in ``repo_path``; alone, an installed package.
        layer_name: The class's name there; ``kernel_name`` when not given.
        version: A version of the Hub repository (``1``, ``"1"``, ``"0.1.0"``, ``">=1,<3"``).
        revision: A branch, tag or commit of the Hub repository.
        device: ``cpu``, ``cuda``, ``rocm``, ``mps``, ``npu`` or ``xpu``; any when not given.
        mode: ``train``, ``inference``, ``compile`` or a combination (``train|compile``); any when
            not given.
        attributes: Class attributes that the kernel reads and its target lacks.
        verify: ``auto``, ``off``, ``first-use`` or ``always`` for this kernel alone.
        watch: ``off``, ``nan`` or ``nan:N`` for this kernel alone: at one of N calls (16 by default) its
            result is looked at for NaN.
        trust_remote_code: Load a Hub repository whose publisher is not trusted.

    Raises:
        ConfigError: The arguments cannot be right; nothing was registered.
    """
    spec = given(
        repo_path=repo_path,
        repo_id=repo_id,
        layer_impl=layer_impl,
        package_name=package_name,
        layer_name=layer_name,
        version=version,
        revision=revision,
        device=device,
        mode=mode,
        attributes=attributes,
        verify=verify,
        watch=watch,
        trust_remote_code=trust_remote_code,
    )
    register_document({"layers": {kernel_name: spec}}, where=caller())


def register_external_layer(
    layer: type | str, kernel_name: str, *, where: str | Sequence[str] | None = None
) -> None:
    """Bind a layer class to a kernel name.

    The kernels of that name may be registered later. A name that has none when a model is kernelized, and a
    module or a class that does not exist, is then an error without a fallback and a warning with one.

    Args:
        layer: A class, ``"module:Class"`` (bound when that module is imported), or a pattern such
            as ``"transformers.models.*.modeling_*:*MLP"``.
        kernel_name: The name whose kernels replace it.
        where: The places in a model that it is for, such as ``"model.layers.*.mlp"`` or
            ``"!model.layers.[-1]"``; every place when not given.

    Raises:
        ConfigError: ``layer`` is no ``nn.Module`` class and no target in words, or ``where`` is no place.
    """
    from twinkle.apply.activation import watch_new
    from twinkle.errors import ConfigError
    from twinkle.records import LayerTarget
    from twinkle.runtime import runtime
    from twinkle.targets import Class, parse_target
    from twinkle.where import parse_where

    origin = caller()
    target: Target
    if isinstance(layer, str):
        target = parse_target(layer, where=origin)
    else:
        from torch import nn

        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            raise ConfigError(
                "not a layer class",
                where=origin,
                found=repr(layer),
                expected='an nn.Module class, or "module:Class"',
                fix="pass the class itself, not an instance" if isinstance(layer, nn.Module) else None,
            )
        target = Class(layer)
    if not isinstance(kernel_name, str) or not kernel_name:
        raise ConfigError("not a kernel name", where=origin, found=repr(kernel_name), expected="a string")
    places = None if where is None else parse_where(where, where=origin)
    runtime.registry.add(layer_targets=(LayerTarget(target, kernel_name, origin=origin, where=places),))
    watch_new()


def kernelize_model(
    model: Model,
    mode: str = "inference",
    device: str | torch.device | None = None,
    use_fallback: bool = True,
    *,
    only: Only | None = None,
) -> Model:
    """Put the registered kernels in place: layers of ``model``, then functions.

    Kernels for other modes and devices stay at hand: the layers follow ``.train()``, ``.eval()``
    and ``.to()`` from here on. Kernelizing twice is kernelizing once. Where ``TWINKLE_DISABLE`` switches
    Twinkle off, the model stays as it is.

    Args:
        model: Any ``nn.Module``; ``None`` for functions only.
        mode: The mode to start in: ``train``, ``inference``, ``compile`` or a combination.
        device: The device to start on; ``TWINKLE_DEVICE``, else that of the model, when not given.
        use_fallback: Keep the original where a kernel cannot be used; otherwise, and under
            ``TWINKLE_STRICT``, raise and leave everything as it was.
        only: The layers that are to have kernels; the others stay as they are, and functions do not depend
            on it. Places such as ``"model.layers.*.mlp"`` or ``["model.layers", "!model.layers.[-1]"]``,
            as ``where`` in a configuration takes them, or a callable that is given the name of a layer in
            ``model`` and the layer, and answers whether it is one.

    Returns:
        The same model.

    Raises:
        ConfigError: ``mode`` or ``device`` is unknown, ``model`` is no ``nn.Module``, or ``only`` is no
            place.
        ApplyError: ``use_fallback=False`` and a layer or function has no kernel that can be used, or
            ``only`` means no layer that a kernel is registered for.
    """
    _kernelize(model, mode, device, use_fallback, only, caller())
    return model


def unkernelize_model(model: Model) -> Model:
    """Restore the very originals: every layer of ``model``, and every function when it is ``None``.

    Returns:
        The same model.
    """
    from twinkle.apply.layers import unkernelize

    unkernelize(model)
    return model


@contextmanager
def kernelized(
    model: Model,
    mode: str = "inference",
    device: str | torch.device | None = None,
    use_fallback: bool = True,
    *,
    only: Only | None = None,
) -> Iterator[Model]:
    """:func:`kernelize_model` for the length of a ``with`` block.

    What was in place before the block is in place after it, whatever happens inside.
    """
    change = _kernelize(model, mode, device, use_fallback, only, caller())
    try:
        yield model
    finally:
        change.undo()


def _kernelize(
    model: nn.Module | None,
    mode: str,
    device: str | torch.device | None,
    use_fallback: bool,
    only: Only | None,
    where: str,
) -> Change:
    """Put kernels in place of layers and functions; what is off leaves everything as it is."""
    from twinkle.apply.functions import Change
    from twinkle.apply.layers import kernelize
    from twinkle.apply.selection import Selection
    from twinkle.errors import ApplyError, KernelError, SourceError
    from twinkle.runtime import runtime

    if not settle():
        return Change()
    fallback = use_fallback and not runtime.options.strict
    _refuse_what_cannot_be(where, raises=not fallback)
    wanted = moment(device, mode, where)
    chosen = None if only is None else Selection(only, where=where)
    try:
        change = kernelize(model, mode=mode, device=wanted, use_fallback=fallback, where=where, only=chosen)
    except (KernelError, SourceError) as error:  # under strict a kernel raises by itself
        raise ApplyError(
            "a kernel that was asked for cannot be used", where=where, found=error.reason, fix=error.fix
        ) from error
    return change


def _refuse_what_cannot_be(where: str, *, raises: bool) -> None:
    """Warn once, or raise, of layers that were bound to a name of no kernel or that do not exist."""
    from twinkle.errors import ApplyError, suggest, warn
    from twinkle.report.idle import mistake
    from twinkle.runtime import runtime
    from twinkle.targets import Name

    names = [kernel.name for kernel in runtime.registry.layer_kernels]
    for entry in runtime.registry.layer_targets:
        target, hint = entry.target, None
        if entry.kernel_name not in names:
            problem = f"{target.text} is bound to {entry.kernel_name!r}, and no kernel has that name"
            hint = suggest(entry.kernel_name, names)
        else:
            problem = (isinstance(target, Name) and mistake(target)) or ""
        if problem and raises:
            raise ApplyError(problem, where=entry.origin or where, fix=hint)
        if problem and problem not in runtime.session.remarks:
            runtime.session.remark(problem)
            warn(f"{problem}{f'; {hint}' if hint else ''} ({entry.origin or where})")
