"""The modes a kernel is registered for, and the order of kernels in a mode.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

from twinkle.errors import ConfigError, suggest

__all__ = ["Mode", "rank"]

_WORDS = ("train", "inference", "compile")


class Mode:
    """The moments a kernel may run in: some of ``train``, ``inference`` and ``compile``.

    ``compile`` alone means the model's current mode, whichever it is, under ``torch.compile``.
    Modes are equal when they say the same, in whatever order they were written.

    Attributes:
        train: May run in training.
        inference: May run in inference.
        compile: Was registered for ``torch.compile``.
        bare_compile: Registered for ``compile`` and for nothing else.
    """

    __slots__ = ("bare_compile", "compile", "inference", "train")

    def __init__(self, *, train: bool, inference: bool, compile: bool) -> None:
        self.bare_compile = compile and not train and not inference
        self.train = train or self.bare_compile
        self.inference = inference or self.bare_compile
        self.compile = compile

    @classmethod
    def parse(cls, text: object, *, where: str | None = None) -> Mode | None:
        """Read ``"train"``, ``"train|compile"`` and the like; ``None`` and ``"auto"`` mean any mode.

        Raises:
            ConfigError: The value is no string, is empty or names an unknown mode.
        """
        if text is None or isinstance(text, Mode):
            return text
        expected = "train, inference, compile or a combination such as train|compile"
        if not isinstance(text, str):
            raise ConfigError("unknown mode", where=where, found=repr(text), expected=expected)
        words = [word.strip().lower() for word in text.split("|")]
        if words == ["auto"]:
            return None
        unknown = [word for word in words if word not in _WORDS]
        if unknown:
            raise ConfigError(
                "unknown mode",
                where=where,
                found=repr(text),
                expected=expected,
                fix=suggest(unknown[0], _WORDS),
            )
        return cls(train="train" in words, inference="inference" in words, compile="compile" in words)

    def __str__(self) -> str:
        if self.bare_compile:
            return "compile"
        return "|".join(word for word in _WORDS if getattr(self, word))

    def __repr__(self) -> str:
        return f"Mode({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mode) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


def rank(
    mode: Mode | None, *, training: bool, compiling: bool, can_torch_compile: bool | None = None
) -> int | None:
    """Rank a kernel registered for ``mode`` in a situation: smaller first, ``None`` never.

    The order is that of the ``kernels`` package (inference may use a training kernel, never the
    reverse; a kernel for any mode comes last). Under ``torch.compile`` the kernels registered for
    it come first, then those for any mode, then the others, which are traced all the same unless
    they say ``can_torch_compile = False``.

    Args:
        mode: What the kernel was registered for; ``None`` is any mode.
        training: The layer is in training mode, or gradients are recorded for a function.
        compiling: ``torch.compile`` is tracing.
        can_torch_compile: The kernel's flag of that name; ``None`` where it has none.
    """
    if compiling and can_torch_compile is False:
        return None
    if mode is None:
        return 4
    if mode.bare_compile:
        return 1 if compiling else None
    if training:
        if not mode.train:
            return None
        order = 0
    else:
        order = 0 if mode.inference else 2
    if compiling:
        return order if mode.compile else order + 5
    return order + (1 if mode.compile else 0)
