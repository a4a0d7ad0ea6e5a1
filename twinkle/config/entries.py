"""The entries of a validated document, and the records that are made of them."""

from __future__ import annotations

from twinkle.errors import ConfigError
from twinkle.targets import Op

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from twinkle.modes import Mode
    from twinkle.records import FunctionKernel, LayerKernel, LayerTarget, Source
    from twinkle.targets import Target
    from twinkle.where import Where

    Records = tuple[tuple[LayerKernel, ...], tuple[LayerTarget, ...], tuple[FunctionKernel, ...]]

__all__ = [
    "Checked",
    "Entry",
    "FunctionEntry",
    "LayerEntry",
    "SeveralConfigErrors",
    "raise_all",
    "records_of",
]

SHOWN = 20


class SeveralConfigErrors(ConfigError):
    """Several mistakes of one document, listed in one message.

    Attributes:
        errors: One :class:`~twinkle.errors.ConfigError` each.
    """

    def __init__(self, errors: Iterable[ConfigError]) -> None:
        self.errors = tuple(errors)
        texts = [
            f"{number}. " + str(error).replace("\n", "\n   ")
            for number, error in enumerate(self.errors[:SHOWN], 1)
        ]
        if len(self.errors) > SHOWN:
            texts.append(f"and {len(self.errors) - SHOWN} more")
        super().__init__(f"{len(self.errors)} mistakes in the configuration\n" + "\n".join(texts))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.errors,)

    @property
    def reason(self) -> str:
        """The mistakes on one line, as a report shows them."""
        return " | ".join(error.reason for error in self.errors[:SHOWN])


def raise_all(errors: list[ConfigError]) -> None:
    """Raise the errors: one as it is, several as one; return where there is none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise SeveralConfigErrors(errors)


class Entry:
    """One kernel as a document describes it.

    Attributes:
        kind: ``layer`` or ``function``.
        name: The kernel name, or the function's name in its module.
        device, mode: What it is for; ``None`` is any.
        verify, watch: As in the document; ``None`` is the global setting.
        spec: The keys that say where the implementation comes from.
        base_dir: What a relative ``repo_path`` is relative to.
        enabled: ``False`` when the document turns it off.
        origin: ``file:line (key)``.
    """

    __slots__ = ("base_dir", "device", "enabled", "mode", "name", "origin", "spec", "verify", "watch")

    kind = ""

    def __init__(
        self,
        name: str,
        *,
        device: str | None,
        mode: Mode | None,
        verify: str | None,
        watch: str | None,
        spec: Mapping[str, object],
        base_dir: str | None,
        enabled: bool,
        origin: str,
    ) -> None:
        self.name = name
        self.device = device
        self.mode = mode
        self.verify = verify
        self.watch = watch
        self.spec = spec
        self.base_dir = base_dir
        self.enabled = enabled
        self.origin = origin

    @property
    def key(self) -> Hashable:
        """The identity of the binding: of two entries with one key the later counts."""
        raise NotImplementedError

    @property
    def labels(self) -> tuple[str, ...]:
        """The names under which ``TWINKLE_DISABLE`` turns the entry off."""
        raise NotImplementedError

    def source(self, trust_remote_code: object) -> Source:
        """The source of the implementation.

        Raises:
            ConfigError: The keys cannot be right together.
        """
        from twinkle.sources import from_spec

        return from_spec(
            self.spec,
            kind=self.kind,
            default_name=self.name,
            base_dir=self.base_dir,
            trust_remote_code=trust_remote_code,
            where=self.origin,
        )


class LayerEntry(Entry):
    """An entry of ``layers``.

    Attributes:
        targets: The layer classes that the kernel is for.
        attributes: What the kernel reads and its target lacks.
        where: The places in a model that it is for; ``None`` for every place.
    """

    __slots__ = ("attributes", "targets", "where")

    kind = "layer"

    targets: tuple[Target, ...]
    attributes: Mapping[str, object]
    where: Where | None

    @property
    def key(self) -> Hashable:
        """Name, device and mode."""
        return (self.name, self.device, self.mode)

    @property
    def labels(self) -> tuple[str, ...]:
        """The kernel name."""
        return (self.name,)


class FunctionEntry(Entry):
    """An entry of ``functions``.

    Attributes:
        target_module: The module that defines the function, or the op that it is recognised as.
    """

    __slots__ = ("target_module",)

    kind = "function"

    target_module: str | Op

    @property
    def key(self) -> Hashable:
        """Target, device and mode."""
        name = None if isinstance(self.target_module, Op) else self.name
        return (self.target_module, name, self.device, self.mode)

    @property
    def labels(self) -> tuple[str, ...]:
        """The function's name, alone and with its module."""
        return (self.name, f"{self.target_module}:{self.name}", f"{self.target_module}.{self.name}")


class Checked:
    """A document that passed every check.

    Attributes:
        settings: The ``[twinkle]`` table: only what was given, as checked values.
        origins: ``file:line (key)`` of each of the settings.
        layers, functions: The entries, in their order.
        base_dir: What relative paths are relative to.
    """

    __slots__ = ("base_dir", "functions", "layers", "origins", "settings")

    def __init__(
        self,
        *,
        settings: dict[str, object],
        origins: dict[str, str],
        layers: tuple[LayerEntry, ...],
        functions: tuple[FunctionEntry, ...],
        base_dir: str | None,
    ) -> None:
        self.settings = settings
        self.origins = origins
        self.layers = layers
        self.functions = functions
        self.base_dir = base_dir

    def records(self, *, trust_remote_code: object = False) -> Records:
        """The records of all enabled entries.

        Args:
            trust_remote_code: What holds for entries that say nothing.

        Raises:
            ConfigError: A source cannot be right; all such mistakes are listed.
        """
        return records_of(self.layers, self.functions, trust_remote_code=trust_remote_code)


def records_of(
    layers: Iterable[LayerEntry], functions: Iterable[FunctionEntry], *, trust_remote_code: object
) -> Records:
    """The records of the enabled ones among these entries; see :meth:`Checked.records`."""
    from twinkle.records import FunctionKernel, LayerKernel, LayerTarget

    errors: list[ConfigError] = []
    layer_kernels: list[LayerKernel] = []
    layer_targets: dict[tuple[Target, str, Where | None], LayerTarget] = {}
    function_kernels: list[FunctionKernel] = []
    for layer in layers:
        if not layer.enabled:
            continue
        try:
            for target in layer.targets:
                if isinstance(target, Op):
                    check_op(target.op, layer)
                # The registry keeps the last of two records for one target.
                where = None if layer.where is None else layer.where.anew()
                layer_targets.setdefault(
                    (target, layer.name, where),
                    LayerTarget(target, layer.name, origin=layer.origin, where=where),
                )
            layer_kernels.append(
                LayerKernel(
                    layer.name,
                    layer.source(trust_remote_code),
                    device=layer.device,
                    mode=layer.mode,
                    attributes=layer.attributes,
                    verify=layer.verify,
                    watch=layer.watch,
                    origin=layer.origin,
                )
            )
        except ConfigError as error:
            errors.append(error)
    for function in functions:
        if not function.enabled:
            continue
        try:
            if isinstance(function.target_module, Op):
                check_op(function.target_module.op, function)
            function_kernels.append(
                FunctionKernel(
                    function.name,
                    function.target_module,
                    function.source(trust_remote_code),
                    device=function.device,
                    mode=function.mode,
                    verify=function.verify,
                    watch=function.watch,
                    origin=function.origin,
                )
            )
        except ConfigError as error:
            errors.append(error)
    raise_all(errors)
    return tuple(layer_kernels), tuple(layer_targets.values()), tuple(function_kernels)


def check_op(op: str, entry: Entry) -> None:
    """``match = "op"`` names an op that layers, or functions, are recognised as."""
    from twinkle.errors import suggest
    from twinkle.op_names import FUNCTION_OPS, LAYER_OPS

    ops = LAYER_OPS if entry.kind == "layer" else FUNCTION_OPS
    if op not in ops:
        raise ConfigError(
            "unknown op",
            where=entry.origin,
            found=f'match = "{op}"',
            expected=", ".join(ops),
            fix=suggest(op, ops),
        )
