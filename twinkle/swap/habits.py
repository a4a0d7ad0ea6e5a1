"""What was seen of a kernel when it ran, and the tests that later calls are held to.

A kernel of the user's is looked at closely once, at its first run: which arguments are tensors, whether it
writes to any, whether it draws random numbers, and how the shapes and dtypes of its results follow from those
of its arguments. The first calls and one of eight later ones are held to all of that, the others to how many
bytes or dimensions a result has.
"""

from __future__ import annotations

from itertools import chain, cycle, repeat
from typing import TYPE_CHECKING, Any

from torch import Tensor

from twinkle.swap.tensors import version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["Habits", "described"]

_MOST_FORMS = 4
"""So many ways in which results follow from arguments are looked for at each call; then none is."""
_LOOKED_AT, _WHOLE_EVERY = 64, 8
"""So many first calls are looked at whole, and one of so many later ones (0.4 us; the others 0.1 us)."""


class Habits:
    """What one kernel does in one place.

    Attributes:
        tensors: The expressions of the arguments that were tensors at the first run.
        state: Those of the weights and buffers of the layer that it writes to.
        writes: It writes to its arguments.
        draws: It draws random numbers.
        inference: Some arguments were tensors of inference, which have no version.
        blind: The versions cannot be read by these expressions: other calls have other arguments.
        forms: How results follow from arguments, see :meth:`learn`: for each way a text, and a shorter one,
            which is true wherever the first is.
        tick: Says at each call whether the whole of it is looked at.
        constants: What the text names, without ``_tw_``.
        varies: Its results follow from its arguments in more ways than are looked for.
        own_backward: How many steps the graph has between the result and an ``autograd.Function`` that the
            kernel comes with; None where there is no such function.
    """

    def __init__(self) -> None:
        self.tensors: tuple[str, ...] = ()
        self.state: tuple[str, ...] = ()
        self.writes = False
        self.draws = False
        self.inference = False
        self.blind = False
        self.forms: dict[str, str] = {}
        self.tick: Callable[[], bool] = chain(
            repeat(True, _LOOKED_AT), cycle([True] + [False] * (_WHOLE_EVERY - 1))
        ).__next__
        self.constants: dict[str, Any] = {}
        self.varies = False
        self.own_backward: int | None = None

    def learn(self, result: Any, given: Mapping[str, Any]) -> bool:
        """Take note of how a result follows from arguments; true where that was not known.

        Args:
            result: A tensor, or a tuple or list of tensors and None; of others nothing is asked later.
            given: The arguments by the expressions of :meth:`twinkle.swap.code.CallForm.given`.
        """
        if self.varies:
            return False
        tensors = {name: given[name] for name in self.tensors if isinstance(given.get(name), Tensor)}
        form = self._form_of(result, tensors)
        if form is None or form[0] in self.forms:
            return False
        self.forms[form[0]] = form[1]
        if len(self.forms) > _MOST_FORMS:
            self.forms, self.varies = {}, True
        return True

    @property
    def before(self) -> str:
        """The expression of the versions of all that it may write to; no text for nothing."""
        names = (*self.tensors, *self.state)
        return "" if self.blind or not names else self._versions(names)

    @property
    def test(self) -> str:
        """The expression that is true where ``_tw_result`` is as it always was; no text for no test.

        It reads ``_tw_before``, the value of :attr:`before` from before the call.
        """
        tests = [_any_of(self.forms)] if self.forms else []
        if self.before and self.tensors and not self.writes:
            part = f"[:{len(self.tensors)}]" if self.state and len(self.tensors) > 1 else ""
            part = "[0]" if self.state and not part else part
            tests.append(f"{self._versions(self.tensors)} == _tw_before{part}")
        return " and ".join(f"({text})" for text in tests)

    @property
    def quick_test(self) -> str:
        """A shorter expression, of what is at hand, that is true wherever :attr:`test` is."""
        return _any_of(self.forms.values()) if self.forms else ""

    def versions(self, given: Mapping[str, Any]) -> Any:
        """What :attr:`before` gives for the arguments of a call, without weights and buffers."""
        found = tuple(version_of(given.get(name)) for name in self.tensors)
        return found[0] if len(found) == 1 and not self.state else found

    def written(self, before: Any, after: Any) -> list[str]:
        """The names of what has another version after a call.

        Args:
            before: What :attr:`before` gave; None where it could not be read.
            after: The same, after the call.
        """
        if before is None or after is None:
            return []
        before = before if isinstance(before, tuple) else (before,)
        after = after if isinstance(after, tuple) else (after,)
        if len(before) != len(after):
            return []  # another thread has had the text written anew in between
        names = (*self.tensors, *self.state)
        return [name for name, then, now in zip(names, before, after, strict=False) if then != now]

    def read_otherwise(self, given: Mapping[str, Any]) -> None:
        """Change :attr:`before`, which could not be read for the arguments of a call."""
        present = tuple(name for name in self.tensors if isinstance(given.get(name), Tensor))
        inference = any(given[name].is_inference() for name in present)
        if present != self.tensors:
            self.tensors = present
        else:
            self.blind = self.blind or not inference
        self.inference = self.inference or inference

    def _versions(self, names: tuple[str, ...]) -> str:
        read = "None if {0}.is_inference() else {0}._version" if self.inference else "{0}._version"
        parts = [read.format(name) for name in names]
        return f"({', '.join(parts)})"  # of one the number itself: a tuple of one takes 30 ns more

    def _form_of(self, result: Any, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
        if isinstance(result, Tensor):
            return self._tensor_form("_tw_result", result, tensors)
        if type(result) not in (tuple, list) or not any(isinstance(part, Tensor) for part in result):
            return None
        kind = type(result).__name__
        self.constants[kind] = type(result)
        quick = [f"_tw_type(_tw_result) is _tw_{kind}"]
        tests = [*quick, f"_tw_result.__len__() == {len(result)}"]
        for number, part in enumerate(result):
            if isinstance(part, Tensor):
                test, shorter = self._tensor_form(f"_tw_result[{number}]", part, tensors)
                tests.append(test)
                quick.append(shorter)
            elif part is None:
                tests.append(f"_tw_result[{number}] is None")
        return " and ".join(tests), " and ".join(quick)

    def _tensor_form(self, name: str, result: Tensor, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
        shape = result.shape
        for other, tensor in tensors.items():
            if tensor.shape == shape and tensor.dtype is result.dtype:
                test = f"{name}.shape == {other}.shape and {name}.dtype is {other}.dtype"
                return test, f"{name}.nbytes == {other}.nbytes"
        quick = f"{name}.ndim == {len(shape)}"
        dtype = self._dtype(result, tensors)
        for other, tensor in tensors.items():
            if tensor.shape == shape:
                return (
                    f"{name}.shape == {other}.shape and {name}.dtype is {dtype}",
                    quick,
                )
        for other, tensor in tensors.items():
            if len(shape) > 1 and tensor.shape[:-1] == shape[:-1]:
                rows = f"{name}.shape[:-1] == {other}.shape[:-1] and {name}.shape[-1] == {shape[-1]}"
                return f"{rows} and {name}.dtype is {dtype}", quick
        return f"{quick} and {name}.dtype is {dtype}", quick

    def _dtype(self, result: Tensor, tensors: Mapping[str, Tensor]) -> str:
        for name, tensor in tensors.items():
            if tensor.dtype is result.dtype:
                return f"{name}.dtype"
        name = str(result.dtype).removeprefix("torch.")
        self.constants[name] = result.dtype
        return f"_tw_{name}"


def _any_of(texts: Iterable[str]) -> str:
    return " or ".join(f"({text})" for text in texts)


def described(result: Any) -> str:
    """The shape and dtype of a result, or its type, for a message."""
    if isinstance(result, Tensor):
        return f"{list(result.shape)} in {str(result.dtype).removeprefix('torch.')}"
    if isinstance(result, (tuple, list)):
        return f"{type(result).__name__} of {', '.join(map(described, result)) or 'nothing'}"
    return type(result).__name__
