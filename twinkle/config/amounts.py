"""Amounts of memory: a share of a device's, or a size."""

from __future__ import annotations

__all__ = ["memory", "size_in_words"]

_UNITS = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}


def memory(value: object) -> float | int | None:
    """A share as a float in (0, 1], a size in whole bytes as an int; None for what is neither.

    Args:
        value: A number in (0, 1], such a number as text, or a size such as ``2GiB`` or ``1.5 GB``.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if 0 < value <= 1 else None
    if not isinstance(value, str):
        return None
    text = "".join(value.split()).lower()
    digits = text.rstrip("bikmgt")
    number = _number(digits)
    if number is None or number <= 0:
        return None
    if digits == text:
        return number if number <= 1 else None
    unit = _UNITS.get(text[len(digits) :])
    return (int(number * unit) or None) if unit else None


def _number(text: str) -> float | None:
    """Digits with a point at most: no sign, no exponent, no ``inf``."""
    whole, _, part = text.partition(".")
    if not (whole + part).isascii() or not (whole + part).isdecimal() or len(text) > 20:
        return None
    return float(text)


def size_in_words(size: int) -> str:
    """Bytes in the unit that reads best: ``2.0 GiB``."""
    amount, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"
