"""Configuration: the settings and entries that files and variables ask for.

``twinkle.toml`` and the ``TWINKLE_`` variables become :class:`Settings`: one set of values and the
entries whose records fill the registry. The dict given to ``register_kernels`` passes the same
validator, :func:`twinkle.config.schema.validate`.

Standard library only, and little of it: this package is imported at interpreter start.
"""

from __future__ import annotations

import os

from twinkle._environment import switched_off, variables
from twinkle.config.entries import Checked, records_of
from twinkle.config.environment import (
    check_config_path,
    check_disabled,
    checked_variables,
    config_paths,
    disabled,
    unknown_variables,
)
from twinkle.config.files import read
from twinkle.config.schema import validate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from twinkle.config.entries import Entry, FunctionEntry, LayerEntry, Records
    from twinkle.modes import Mode
    from twinkle.where import Where

__all__ = ["Checked", "Settings", "load", "validate"]


class Settings:
    """The merged settings and entries of all configuration files and variables.

    Attributes:
        mode: The mode kernels are chosen for, or ``None`` to follow each model.
        device: The device kernels are chosen for, or ``None`` to follow each model.
        use_fallback: Keep the original where a kernel cannot be put in place.
        strict: Raise instead.
        verify: ``auto``, ``off``, ``first-use`` or ``always``.
        watch: ``off``, ``nan`` or ``nan:N``.
        kernels: The embedded kernels: ``auto``, ``off`` or a tuple of ops.
        sizes: The sizes that embedded kernels run at: ``fixed``, ``auto`` or ``all``.
        capture: The calls of layers that may be captured: ``auto``, ``off``, ``inference`` or ``train``.
        capture_memory: The most that captures may hold: a share of the device as a float, or bytes as an int.
        trust_remote_code: ``True``, ``False`` or a tuple of repositories.
        plugins: The entry points of other packages to take kernels from.
        off: The off switch is set; nothing else was read.
        disable: Names of kernels, ops and functions to leave alone.
        log: ``off``, ``warning``, ``info`` or ``debug``.
        report: The absolute path of the JSON report, or ``None``.
        where: The places in models that embedded kernels are for; ``None`` for every place.
        layers, functions: The entries of all documents, the later one where two are the same.
        origins: Where each setting that was given stands.
        paths: The absolute paths of the files read.
        warnings: Remarks that are no errors.
    """

    mode: Mode | None
    device: str | None
    use_fallback: bool
    strict: bool
    verify: str
    watch: str
    kernels: str | tuple[str, ...]
    sizes: str
    capture: str
    capture_memory: float | int
    trust_remote_code: bool | tuple[str, ...]
    plugins: tuple[str, ...]
    log: str
    report: str | None
    where: Where | None

    def __init__(
        self,
        documents: Sequence[Checked] = (),
        *,
        kernels: str = "auto",
        disable: Sequence[str] = (),
        off: bool = False,
        paths: Sequence[str] = (),
        warnings: Sequence[str] = (),
    ) -> None:
        self.mode = None
        self.device = None
        self.use_fallback = True
        self.strict = False
        self.verify = "auto"
        self.watch = "off"
        self.kernels = kernels
        self.sizes = "auto"
        self.capture = "auto"
        self.capture_memory = 0.1
        self.trust_remote_code = False
        self.plugins = ()
        self.log = "warning"
        self.report = None
        self.where = None
        self.off = off
        self.disable = tuple(disable)
        self.paths = tuple(paths)
        self.warnings = list(warnings)
        self.origins: dict[str, str] = {}
        layers: dict[object, LayerEntry] = {}
        functions: dict[object, FunctionEntry] = {}
        for document in documents:
            for key, value in document.settings.items():
                if key == "report":
                    value = os.path.join(
                        document.base_dir or _working_directory(), os.path.expanduser(str(value))
                    )
                setattr(self, key, value)
            self.origins.update(document.origins)
            # Popped first, so that the order is that of the entries that count.
            for layer in document.layers:
                layers.pop(layer.key, None)
                layers[layer.key] = layer
            for function in document.functions:
                functions.pop(function.key, None)
                functions[function.key] = function
        self.layers = tuple(layers.values())
        self.functions = tuple(functions.values())

    def is_disabled(self, *names: str) -> bool:
        """Whether one of these names of a kernel, op or function is turned off."""
        return self.off or any(name in self.disable for name in names)

    def left_out(self) -> list[tuple[Entry, str]]:
        """The entries that make no records, each with its reason."""
        reasons = []
        entries: tuple[Entry, ...] = (*self.layers, *self.functions)
        for entry in entries:
            if self.is_disabled(*entry.labels):
                reasons.append((entry, "turned off by TWINKLE_DISABLE"))
            elif not entry.enabled:
                reasons.append((entry, f"enabled = false at {entry.origin}"))
        return reasons

    def records(self) -> Records:
        """``(layer_kernels, layer_targets, function_kernels)`` for the registry.

        Raises:
            ConfigError: A source cannot be right; all such mistakes are listed.
        """
        return records_of(
            [entry for entry in self.layers if not self.is_disabled(*entry.labels)],
            [entry for entry in self.functions if not self.is_disabled(*entry.labels)],
            trust_remote_code=self.trust_remote_code,
        )


def load(
    paths: Sequence[str | os.PathLike[str]] = (),
    environ: Mapping[str, str] | None = None,
    *,
    cwd: str | None = None,
) -> Settings:
    """Read configuration files and variables into one set of settings.

    Args:
        paths: Configuration files, later ones win; ``"auto"`` stands for the defaults without a
            file. When empty, ``TWINKLE_CONFIG`` names them.
        environ: The variables, which win over the files; by default those that Python is to read
            (:func:`twinkle._environment.variables`).
        cwd: What relative paths are relative to; the working directory when not given.

    Raises:
        ConfigError: Something cannot be read or cannot be right.
    """
    environ = variables() if environ is None else environ
    if switched_off(environ):
        return Settings(kernels="off", off=True)
    cwd = _working_directory() if cwd is None else cwd
    names = [os.fspath(path) for path in paths] or config_paths(environ)
    documents = []
    files = []
    for name in names:
        if name == "auto":
            continue
        check_config_path(name, environ)
        # Not normalised: "link/../twinkle.toml" is not "twinkle.toml".
        path = os.path.join(cwd, os.path.expanduser(name))
        document, locations = read(path, name)
        documents.append(validate(document, locate=locations, base_dir=os.path.dirname(path)))
        files.append(path)
    documents.extend(checked_variables(environ, cwd=cwd))
    settings = Settings(
        documents,
        # A file says what it wants; without one, the embedded kernels are the point.
        kernels="off" if files and "auto" not in names else "auto",
        disable=disabled(environ),
        paths=files,
        warnings=unknown_variables(environ),
    )
    if settings.disable:
        entries: tuple[Entry, ...] = (*settings.layers, *settings.functions)
        check_disabled(settings.disable, {label for entry in entries for label in entry.labels})
    return settings


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed under this process; absolute paths still work
        return os.curdir
