"""What became of the places that registrations are for: how many layers they chose, and which chose none."""

from __future__ import annotations

from twinkle.runtime import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from twinkle.records import Binding
    from twinkle.where import Where

__all__ = ["lines", "note", "reason"]


def note(binding: Binding) -> list[str]:
    """How many layers were chosen for a binding by their places, and how many were left out."""
    return [
        f"where = {where.text}: {chosen} chosen, {left} left out"
        for where in _wheres(binding)
        for chosen, left in [where.counts]
        if chosen or left
    ]


def reason(binding: Binding) -> str | None:
    """Why a binding waits, where its layers were met in other places than its own."""
    for where in _wheres(binding):
        chosen, left = where.counts
        if left and not chosen:
            return f"where = {where.text} means none of the {left} layers that were met: {_nearest(where)}"
    return None


def lines() -> Iterator[tuple[str, str, str]]:
    """The places of the user's that mean no layer: the target, the kernel, and a line that says it."""
    for entry in runtime.registry.layer_targets:
        if entry.where is None or not any(entry.where.counts):
            continue
        told: set[str] = set()
        for pattern in entry.where.patterns:
            if not pattern.met and pattern.text not in told:
                told.add(pattern.text)
                yield (
                    entry.target.text,
                    entry.kernel_name,
                    f'{entry.target.text}: "{pattern.text}" means no layer: '
                    f"{entry.where.nearest(pattern)} ({entry.origin})",
                )
    where = runtime.options.where
    for pattern in where.patterns if where is not None and any(where.counts) else ():
        if not pattern.met and where is not None:
            text = f'where: "{pattern.text}" means no layer that embedded kernels are for: '
            yield ("", "", text + where.nearest(pattern))


def _nearest(where: Where) -> str:
    return where.nearest(next((one for one in where.patterns if not one.met), where.patterns[0]))


def _wheres(binding: Binding) -> list[Where]:
    if binding.scope != "layer":
        return []
    if binding.source.startswith("embedded"):
        return [] if runtime.options.where is None else [runtime.options.where]
    return [
        entry.where
        for entry in runtime.registry.layer_targets
        if entry.where is not None
        and entry.kernel_name == binding.kernel
        and (binding.target == entry.target.text or binding.target in entry.classes)
    ]
