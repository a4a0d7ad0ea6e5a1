"""The source text of a dispatch function, from its decision tree.

The text refers to these names, which :class:`twinkle.swap.dispatch.Dispatch` gives the function (none is a
global or a builtin: the globals are the original's, see :mod:`twinkle.swap.scope`):
``_tw_original``, ``_tw_k0`` … (the kernels by the index of their entry), ``_tw_pending`` (the first call),
``_tw_traced_…`` and ``_tw_load`` (calls under a compiler), the functions that look at the moment
(``_tw_where``, ``_tw_grad``, ``_tw_compiling``, ``_tw_autocast``, ``_tw_dtype_key``, ``_tw_current``,
``_tw_astray``), ``_tw_there`` (a call with another GPU as the current one), what looks after kernels that
fail (``_tw_failed``, ``_tw_instead``, ``_tw_odd``, ``_tw_look`` …), what finds the way of a call of its size
(``_tw_ways0`` …, ``_tw_decide``), and the ``constants`` below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from twinkle.ops.plain import FORCED, Least
from twinkle.runtime import runtime
from twinkle.swap.entry import Split, is_checked
from twinkle.swap.kinds import PLAIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twinkle.match.reads import Guard
    from twinkle.swap.code import CallForm
    from twinkle.swap.dtype_keys import DtypeKey
    from twinkle.swap.entry import Entry, Leaf

__all__ = ["DispatchCode"]

# `x.is_cuda` takes a sixth of the time of `x.device.type`.
_QUICK = {"cpu": "is_cpu", "cuda": "is_cuda", "mps": "is_mps", "xpu": "is_xpu"}


class DispatchCode:
    """Writes the text of one dispatch function.

    Args:
        form: How the function takes its arguments and hands them on.
        training: The expression that says whether a call is one in training.
        standing: The expression of what would run without Twinkle, and of the test that it is the original.
        always_compiling: Every call counts as one under a compiler.
        with_dtype: Kernels are proven by dtype, so that a trace has to say which it is for.
        kind: What kind of function it is.

    Attributes:
        devices: The device types that there are kernels for; a call is on device 1, 2 … of them, or 0.
        holds_layers: The layers it is for hold others, which run programs of their own.
        several_gpus: A tensor may lie on another GPU than the current one, where a kernel would be launched.
        constants: What the text needs besides functions, without ``_tw_``: dtypes, and sets of dtype keys.
        traced: The moments, in letters, for which the text calls a function ``_tw_traced_…``.
    """

    def __init__(
        self,
        form: CallForm,
        *,
        training: str,
        standing: tuple[str, str],
        always_compiling: bool,
        with_dtype: bool,
        kind: str = PLAIN,
    ) -> None:
        self.form = form
        self.standing, self.standing_test = standing
        self.training = training
        self.always_compiling = always_compiling
        self.with_dtype = with_dtype
        self.kind = kind
        self.holds_layers = False
        self.devices: list[str] = []
        self.several_gpus = False
        self.constants: dict[str, Any] = {}
        self.traced: set[str] = set()
        self._key_sets: list[frozenset[DtypeKey]] = []

    def text(self, tree: Split | Leaf | None) -> str:
        """The function that chooses as the tree says; None for the original alone."""
        lines: list[str] = []
        known: dict[str, Any] = {}
        entries = list(_entries_of(tree))
        if len(entries) == 1:  # wherever its kernel is not called the original is: sizes come first
            lines += self._size_lines(entries[0], "    ")
            known["size"] = True
        lines += [*self._device_lines(tree), *self._lines(tree, "    ", known)]
        return "\n".join([self.form.head("forward"), *lines, ""])

    def traced_text(self, never_ran: bool) -> str:
        """The function that a compiler traces; with the original behind a kernel that never ran."""
        call = f"return _tw_kernel({self.form.arguments})"
        lines = [self.form.head("forward")]
        if never_ran:
            lines += ["    try:", f"        {call}", "    except Exception:", "        _tw_blame(_tw_entry)"]
            lines += [f"    return _tw_original({self.form.arguments})", ""]
        else:
            lines += [f"    {call}", ""]
        return "\n".join(lines)

    def _device_lines(self, tree: Split | Leaf | None) -> Iterator[str]:
        """The lines that look at the device of a call.

        ``_tw_device`` is its number; ``_tw_away`` says that it is another GPU than the current one.
        """
        by_device = isinstance(tree, Split) and tree.name == "device"
        gpus = self.several_gpus and tree is not None
        devices, values, argument = self.devices, self.form.values(), self.form.probe
        slow = [f"_tw_device = _tw_where({tuple(devices)!r}, {values})"] if by_device else []
        slow += [f"_tw_away = _tw_astray({values})"] if gpus else []
        if not slow:
            return
        if argument is None or (by_device and any(d not in _QUICK for d in devices)):
            yield from (f"    {line}" for line in slow)
            return
        yield "    try:"
        if by_device:
            number_of = " else ".join(f"{n} if {argument}.{_QUICK[d]}" for n, d in enumerate(devices, 1))
            yield f"        _tw_device = {number_of} else 0"
        if gpus:
            known = by_device and "cuda" in devices
            on_gpu = self._condition("device", "cuda") if known else f"{argument}.is_cuda"
            yield f"        _tw_away = {on_gpu} and {argument}.get_device() != _tw_current()"
        # No tensor (AttributeError), or one that torch.fx traces and that has no answer.
        yield "    except _tw_Exception:"
        yield from (f"        {line}" for line in slow)

    def _lines(self, tree: Split | Leaf | None, pad: str, known: dict[str, Any]) -> Iterator[str]:
        """The lines of a subtree; ``known`` holds the attributes of the moment that are decided above it."""
        if isinstance(tree, Split):
            *first, last = tree.branches
            for value, branch in first:
                yield f"{pad}if {self._condition(tree.name, value)}:"
                yield from self._lines(branch, pad + "    ", {**known, tree.name: value})
            yield from self._lines(last[1], pad, {**known, tree.name: last[0]})
        elif tree is None:
            yield f"{pad}return {self.standing}({self.form.arguments})"
        elif "size" not in known:
            yield from self._size_lines(tree.entry, pad)
            yield from self._lines(tree, pad, {**known, "size": True})
        elif tree.entry.guard is not None and "guard" not in known:
            yield from self._guard_lines(tree.entry, tree.entry.guard, pad)
            yield from self._lines(tree, pad, {**known, "guard": True})
        elif tree.live:
            yield from self._kernel_lines(tree.entry, pad, known)
        elif tree.dtype_keys and self.form.probe is None:
            yield from self._lines_by_size(tree.entry, pad, known, f"{self.form.values()}[{self.form.skip}]")
        elif tree.dtype_keys and (self.always_compiling or known.get("compiling") is not True):
            yield from self._lines_for_keys(tree.entry, tree.dtype_keys, pad, known)
        elif known.get("compiling") is True and not self.always_compiling:
            yield from self._traced_lines(pad, known)
        elif known.get("compiling") is False:
            yield f"{pad}return _tw_pending({self.form.packed})"
        else:
            yield f"{pad}if _tw_compiling():"
            yield from self._traced_lines(pad + "    ", known)
            yield f"{pad}return _tw_pending({self.form.packed})"

    def _size_lines(self, entry: Entry, pad: str) -> Iterator[str]:
        """The lines that run the original for what is too small for a kernel of Twinkle's own.

        It is asked before anything else: the kernel would come to its definition, some calls later.
        """
        if entry.ways is not None:
            yield from self._small_lines(entry, pad)
            return
        least = None if is_checked(entry.candidate) else getattr(entry.function, "least", None)
        if (
            not isinstance(least, Least)
            or runtime.options.sizes != "fixed"  # every size, or what was measured of each
            or not self.form.has(least.argument)
        ):
            return
        x, elements, others = least
        self.constants |= {"Tensor": Tensor, "forced": FORCED}
        few = f"{x}.numel() < {elements}"
        if elements < others:
            few = f"({few} or {x}.numel() < {others} and not _tw_grad())"
        # A stand-in for a tensor (torch.fx) has no number of elements to compare.
        yield f"{pad}if _tw_type({x}) is _tw_Tensor and {few} and not _tw_forced:"
        yield f"{pad}    return {self.standing}({self.form.arguments})"

    def _small_lines(self, entry: Entry, pad: str) -> Iterator[str]:
        """The lines that run the original below the sizes at which it was measured to be the faster one."""
        x = self.form.probe
        if x is not None and not self.always_compiling:
            self.constants |= {"Tensor": Tensor, "forced": FORCED}
            small = f"_tw_small{entry.index}"
            few = f"{x}.numel() < {small}[_tw_grad()] and {x}.dtype is {small}[2]"
            yield f"{pad}if _tw_type({x}) is _tw_Tensor and {few} and not (_tw_forced or _tw_any_autocast()):"
            yield f"{pad}    return {self.standing}({self.form.arguments})"

    def _guard_lines(self, entry: Entry, guard: Guard, pad: str) -> Iterator[str]:
        """The lines that run what stands now where the kernel was made for something else."""
        tests = [self.standing_test] if self.standing_test else []
        if guard.reads:
            tests.append(self.inlined(entry, guard)[0])
        if not tests:
            return
        if guard.reads:
            yield f"{pad}try:"
            yield f"{pad}    _tw_holds = {' and '.join(tests)}"
            yield f"{pad}except _tw_Exception:"
            yield f"{pad}    _tw_holds = False"
            yield f"{pad}if not _tw_holds:"
        else:
            yield f"{pad}if not {tests[0]}:"
        yield f"{pad}    _tw_changed({entry.index})"
        yield f"{pad}    return {self.standing}({self.form.arguments})"

    def inlined(self, entry: Entry, guard: Guard) -> tuple[str, dict[str, Any]]:
        """The expression of what an entry rests on, and what the names in it stand for."""
        return guard.inline(self.form.first, f"_tw_guard{entry.index}_")

    def _lines_by_size(
        self, entry: Entry, pad: str, known: dict[str, Any], first: str | None, dtype: str = ""
    ) -> Iterator[str]:
        """The lines of a call of a kernel that takes those of some sizes: ``_tw_way`` is what takes this one.

        Under a compiler, and for what is no tensor in memory, that is the kernel: nothing can be measured.

        Args:
            entry: The kernel.
            pad: The indentation.
            known: See :meth:`_lines`.
            first: The expression of the first tensor.
            dtype: The expression of the first part of the key, by which ways are known.
        """
        if entry.ways is None or self.always_compiling:
            yield from self._kernel_lines(entry, pad, known)
            return
        index, arguments = entry.index, self.form.arguments
        if known.get("compiling") is not False:
            yield f"{pad}if _tw_by_dynamo():"
            yield f"{pad}    return _tw_k{index}({arguments})"
        self.constants["forced"] = FORCED
        yield f"{pad}try:"
        yield f"{pad}    _tw_first = {first}"
        dtype = dtype or "_tw_dtype_key(_tw_first)"
        grad = "_tw_grad()" if known.get("grad") is None else repr(known["grad"])
        yield f"{pad}    _tw_key = {dtype}, _tw_first.numel().bit_length(), {grad}"
        # Calls whose sizes do not count are about to be recorded: the host will be spared what they cost it.
        yield f"{pad}    _tw_way = None if _tw_forced else _tw_ways{index}(_tw_key)"
        yield f"{pad}except _tw_Exception:"
        yield f"{pad}    _tw_way = _tw_k{index}"
        yield f"{pad}if _tw_way is None:"
        yield f"{pad}    _tw_way = _tw_decide({index}, _tw_key, {self.form.packed})"
        yield f"{pad}if _tw_way is False:"
        yield f"{pad}    return {self.standing}({arguments})"
        yield from self._kernel_lines(entry, pad, known, "_tw_way")

    def _kernel_lines(self, entry: Entry, pad: str, known: dict[str, Any], kernel: str = "") -> Iterator[str]:
        """The lines of a call of a kernel that ran before, and of what becomes of it where it fails.

        Args:
            entry: The kernel.
            pad: The indentation.
            known: See :meth:`_lines`.
            kernel: Its name in the text; by default the one that goes with its index.
        """
        index, packed, kernel = entry.index, self.form.packed, kernel or f"_tw_k{entry.index}"
        call = f"{kernel}({self.form.arguments})"
        away = known.get("device", "cuda") in (None, "cuda") and self.several_gpus
        source = entry.candidate.kernel.source
        # Once it ran, what comes out of a forward that is the program's own in parts is the program's affair.
        if getattr(source, "guarded", False) or getattr(source, "wraps", False):
            if away:
                yield f"{pad}if _tw_away:"
                yield f"{pad}    return _tw_there(_tw_k{index}, {packed})"
            yield f"{pad}return {call}"
            return
        if self.kind != PLAIN:
            yield f"{pad}return _tw_again({index}, {packed})"
            return
        if known.get("compiling") is True and not self.always_compiling:
            yield f"{pad}return {call}"
            return
        traced = self._traced_test(entry, known)
        if traced:
            yield f"{pad}if {traced}:"
            yield f"{pad}    return {call}"
        if away:
            call = f"_tw_there({kernel}, {packed}) if _tw_away else {call}"
        habits = entry.habits
        state = "_tw_state" if habits is not None and habits.draws else "None"
        before = habits.before if habits is not None else ""
        if state != "None":
            yield f"{pad}{state} = _tw_random()"
        if before:
            yield f"{pad}try:"
            yield f"{pad}    _tw_before = {before}"
            yield f"{pad}except _tw_Exception:"
            yield f"{pad}    _tw_before = _tw_unversioned({index}, {packed})"
        before_then = "_tw_before" if before else "None"
        test = habits.test if habits is not None else ""
        bare = not test and entry.watch is None and (habits is None or habits.own_backward is None)
        yield f"{pad}try:"
        yield f"{pad}    {'return' if bare else '_tw_result ='} {call}"
        yield f"{pad}except _tw_Exception as _tw_error:"
        values = [str(index), "_tw_error", before_then, before or "None", state, packed]
        yield f"{pad}    _tw_failure = _tw_failed({', '.join(values)})"
        if not bare:
            yield f"{pad}else:"
            yield from self._result_lines(entry, pad + "    ", test, before_then, state)
        yield f"{pad}return _tw_instead({index}, _tw_failure, {packed})"

    def _traced_test(self, entry: Entry, known: dict[str, Any]) -> str:
        """The test for calls whose code somebody follows, which go to the kernel as they are; or no text."""
        if is_checked(entry.candidate):
            # What the lines below read of tensors would be in the graphs of this tracer.
            tests = ["_tw_fx._is_fx_tracing_flag"]
        elif self.holds_layers:
            tests = []
        else:
            return ""
        # A graph break within `try` would leave all of the function to Python.
        asked = known.get("compiling") is not False or self.always_compiling
        return " or ".join((["_tw_by_dynamo()"] if asked else []) + tests)

    def _result_lines(self, entry: Entry, pad: str, test: str, before: str, state: str) -> Iterator[str]:
        """The lines that look at a result before it is handed out.

        Args:
            entry: The kernel.
            pad: The indentation.
            test: What is true of a right result; no text for no test.
            before: The expression of the versions from before the call.
            state: The same of the random numbers.
        """
        index, packed = entry.index, self.form.packed
        if test and entry.habits is not None:
            quick = entry.habits.quick_test or "True"
            yield f"{pad}try:"
            yield f"{pad}    if _tw_tick{index}() and _tw_jit() is None:"
            yield f"{pad}        _tw_holds = {test}"
            yield f"{pad}    else:"
            yield f"{pad}        _tw_holds = {quick}"
            yield f"{pad}except _tw_Exception:"
            yield f"{pad}    _tw_holds = False"
            yield f"{pad}if not _tw_holds:"
            yield f"{pad}    return _tw_odd({index}, _tw_result, {before}, {state}, {packed})"
        if entry.watch is not None:
            yield f"{pad}if _tw_watch{index}():"
            yield f"{pad}    _tw_result = _tw_look({index}, _tw_result, {state}, {packed})"
        if entry.habits is not None and entry.habits.own_backward is not None:
            yield f"{pad}if _tw_result.requires_grad:"
            yield f"{pad}    _tw_guard_backward({index}, _tw_result, {packed})"
        yield f"{pad}return _tw_result"

    def _lines_for_keys(
        self, entry: Entry, keys: frozenset[DtypeKey], pad: str, known: dict[str, Any]
    ) -> Iterator[str]:
        """The kernel for calls whose dtype key it was proven for, a comparison for others."""
        yield f"{pad}if {self._dtype_condition(keys)}:"
        plain = [dtype for dtype, autocast in keys if dtype and autocast is None]
        dtype = f"_tw_{str(plain[0]).removeprefix('torch.')}" if len(plain) == 1 else "_tw_first.dtype"
        yield from self._lines_by_size(entry, pad + "    ", known, self.form.probe, dtype)
        if known.get("compiling") is not False:
            yield f"{pad}if _tw_compiling():"
            yield from self._traced_lines(pad + "    ", known)
        # One name for each set: a call in another thread may still run the text before.
        if keys not in self._key_sets:
            self._key_sets.append(keys)
        name = f"keys{self._key_sets.index(keys)}"
        self.constants[name] = keys
        yield f"{pad}if _tw_dtype_key({self.form.probe}) in _tw_{name}:"
        yield from self._lines_by_size(entry, pad + "    ", known, self.form.probe)
        yield f"{pad}return _tw_pending({self.form.packed})"

    def _dtype_condition(self, keys: frozenset[DtypeKey]) -> str:
        """Whether the first tensor has a dtype that the kernel was proven for, without autocast.

        Quick, and a compiler can tell: it goes on with constants.
        """
        dtypes = sorted((dtype for dtype, autocast in keys if dtype and autocast is None), key=str)
        tests = []
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            self.constants[name] = dtype
            tests.append(f"_tw_getattr({self.form.probe}, 'dtype', None) is _tw_{name}")
        return f"({' or '.join(tests)}) and not _tw_autocast()" if tests else "False"

    def _condition(self, name: str, value: Any) -> str:
        if name == "device":
            if value is None or len(self.devices) == 1:
                return "_tw_device" if value else "True"
            return f"_tw_device == {self.devices.index(value) + 1}"
        return {"grad": "_tw_grad()", "training": self.training, "compiling": "_tw_compiling()"}[name]

    def _traced_lines(self, pad: str, known: dict[str, Any]) -> Iterator[str]:
        """The lines of a call under a compiler: load for the trace, then the function that is traced."""
        letters = [{None: "x", True: "1", False: "0"}[known.get(n)] for n in ("training", "grad")]
        name = "_".join([str(known.get("device") or "any"), *letters])
        self.traced.add(name)
        # The kernel is loaded between the two lines: the trace meets it in the second.
        values = [repr(name), repr(known.get("device")), self.training, "_tw_grad()"]
        if self.form.probe is not None and self.with_dtype:
            values.append(f"_tw_getattr({self.form.probe}, 'dtype', None)")
        yield f"{pad}_tw_load({', '.join(values)})"
        yield f"{pad}return _tw_traced_{name}({self.form.arguments})"


def _entries_of(tree: Split | Leaf | None) -> set[Entry]:
    """The entries that a tree chooses from."""
    if isinstance(tree, Split):
        return {entry for _, branch in tree.branches for entry in _entries_of(branch)}
    return set() if tree is None else {tree.entry}
