"""Device names: what users write, what torch calls them, and what this machine has.

Standard library only at import; torch is imported by the functions that need it.
"""

from __future__ import annotations

from twinkle.errors import ConfigError, suggest

__all__ = ["DEVICES", "absent_reason", "current_type", "parse_device", "torch_type"]

DEVICES = ("cpu", "cuda", "rocm", "mps", "npu", "xpu")


def parse_device(value: object, *, where: str | None = None) -> str | None:
    """Read the name of a device type: ``"cuda:0"`` and ``torch.device("cuda", 0)`` are ``"cuda"``.

    ``None`` and ``"auto"`` mean any device and give ``None``.

    Raises:
        ConfigError: The value names no device that Twinkle knows.
    """
    if value is None:
        return None
    text = value if isinstance(value, str) else getattr(value, "type", None)
    expected = ", ".join(DEVICES)
    if not isinstance(text, str):
        raise ConfigError("unknown device", where=where, found=repr(value), expected=expected)
    name, _, index = text.strip().lower().partition(":")
    if name == "auto" and not index:
        return None
    if name not in DEVICES or (index and not index.isdigit()) or text.endswith(":"):
        raise ConfigError(
            "unknown device",
            where=where,
            found=repr(value),
            expected=expected,
            fix=suggest(name, DEVICES),
        )
    return name


def torch_type(device: str) -> str:
    """The ``tensor.device.type`` of a tensor on such a device: ``cuda`` for ``rocm``, else the same name."""
    return "cuda" if device == "rocm" else device


def absent_reason(device: str | None) -> str | None:
    """Why kernels for ``device`` cannot run on this machine, or ``None`` when they can."""
    if device is None or device == "cpu":
        return None
    import torch

    if device in ("cuda", "rocm"):
        built_for = "rocm" if torch.version.hip else "cuda"
        if built_for != device and (torch.version.cuda or torch.version.hip):
            return f"this torch is built for {built_for}, not for {device}"
        if not torch.cuda.is_available():
            return f"no {device} device on this machine"
        return None
    backend = getattr(torch, device, None)
    if backend is None or not backend.is_available():
        return f"no {device} device on this machine"
    return None


def current_type(torch_device_type: str) -> str:
    """The device name for a ``tensor.device.type``: ``cuda`` is ``rocm`` on a build of torch for ROCm."""
    if torch_device_type == "cuda":
        import torch

        return "rocm" if torch.version.hip else "cuda"
    return torch_device_type
