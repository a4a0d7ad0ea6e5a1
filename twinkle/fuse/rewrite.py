"""Rewrites a method so that other functions do some of its steps, and nothing else changes.

The new code is compiled from the method's own syntax tree under its own file name and line numbers, so that
tracebacks, breakpoints and ``inspect.getsource`` show the source in the file. It has the same globals (the
same dict), defaults, closure and decorators. ``docs/decisions/0006-rewritten-forwards.md`` says why.
"""

from __future__ import annotations
import __future__

import ast
import copy
import dis
import itertools
import linecache
from types import CellType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from twinkle.codegen import compile_tree
from twinkle.fuse.modulated_places import scale_in
from twinkle.fuse.places import (
    CalledModulation,
    LayerThenActivation,
    LayerThenModulation,
    RotatedPair,
    SumThenLayer,
    find_places,
)
from twinkle.match.symbolic import source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from twinkle.fuse.places import Place, RotatedPair

__all__ = ["CannotRewrite", "Draft"]

_FUTURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
_GENERATORS = 0x20 | 0x80 | 0x200  # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR


class CannotRewrite(Exception):
    """The method cannot be rewritten; the message says why."""


class Draft:
    """A method that may be rewritten.

    Args:
        method: As it stands in its class, with the decorators that
            :func:`twinkle.match.symbolic.source.unwrap` knows.

    Attributes:
        method: The method as it was given.
        function: The function below the decorators.
        owner: What the method calls ``self``.
        places: The places where steps could be replaced.

    Raises:
        CannotRewrite: Its source is not there or does not give its code, a decorator is not known, or it
            uses ``super()``.
    """

    def __init__(self, method: Any) -> None:
        self.method = method
        self._chain = _decorators(method)
        self.function: FunctionType = self._chain[-1]
        code = self.function.__code__
        if "__class__" in code.co_freevars:
            raise CannotRewrite("it uses super()")
        if code.co_flags & _GENERATORS:
            raise CannotRewrite("it is a generator")
        try:
            tree = copy.deepcopy(source.parse(self.function))
        except source.NoSource as error:
            raise CannotRewrite(str(error)) from None
        tree.decorator_list = []
        self._tree = tree
        self.owner = next((arg.arg for arg in (*tree.args.posonlyargs, *tree.args.args)), "")
        self.places = find_places(tree)
        if self.places:
            _place_in_file(tree, code)
            self._imported = _imported_names(tree, self.function)

    def build(self, steps: Mapping[int, tuple[Callable[..., Any], ...]]) -> FunctionType:
        """The method with other steps at some of its places.

        Args:
            steps: From the index of a place to its functions. For a sum and a layer: one that takes
                ``(self, left, right, layer)``, or the factor of ``right`` as well, and returns the sum and
                the layer's result, and one that returns the latter alone. For queries and keys: one that
                takes ``(self, q_layer, k_layer, function)`` and says whether the next takes over both
                layers and the function, and that one, with ``(self, q, k, q_layer, k_layer, function, cos,
                sin)``. For a modulation: one that takes ``(self, x, layer, like, scale, shift)``, or
                ``(self, x, layer, like, function, …)`` with the function's other arguments, and returns the
                result. For a layer and an activation: one that takes ``(self, x, layer, function)`` and
                returns the activation's result and True, or the layer's and False, and one that returns the
                activation's result.
        """
        memo: dict[int, Any] = {}
        tree = copy.deepcopy(self._tree, memo)
        edit = _Edit(self.owner)
        scope: dict[str, Any] = {}
        for index, functions in steps.items():
            names = tuple(f"_twinkle_{index}_{at}" for at in range(len(functions)))
            scope.update(zip(names, functions, strict=True))
            place = _moved(self.places[index], memo)
            if isinstance(place, SumThenLayer):
                edit.sum(place, names, f"_twinkle_{index}_normed")
            elif isinstance(place, LayerThenModulation | CalledModulation):
                edit.modulation(place, names[0])
            elif isinstance(place, LayerThenActivation):
                edit.activation(place, names, f"_twinkle_{index}_done")
            else:
                edit.pair(place, names, f"_twinkle_{index}_fused")
        tree = edit.visit(tree)
        ast.fix_missing_locations(tree)
        code = _compiled(tree, self.function.__code__, tuple(scope), self._imported)
        made = _function(code, self.function, scope)
        for wrapper in reversed(self._chain[:-1]):
            made = _rewrapped(wrapper, made)
        return made


# -- the tree -------------------------------------------------------------------------------------


def _moved(place: Place, memo: dict[int, Any]) -> Place:
    """The same place in a deep copy of its tree.

    Args:
        place: In the original tree.
        memo: That of ``copy.deepcopy``: from the ids of original nodes to their copies.
    """

    def there(value: Any) -> Any:
        if isinstance(value, ast.AST | list):
            return memo[id(value)]
        if isinstance(value, tuple):
            return tuple(map(there, value))
        return value

    moved: Place = type(place)(*map(there, place))
    return moved


class _Edit(ast.NodeTransformer):
    """Changes to a syntax tree, collected by id of node and carried out in one visit.

    Attributes:
        owner: What the method calls ``self``.
        instead: The node, or the statements, that replace a node.
        before: Statements to be put before a statement.
        after: Statements to be put after one.
        tests: The conditions of ``if`` statements as they were before a place changed them.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.instead: dict[int, Any] = {}
        self.before: dict[int, list[ast.stmt]] = {}
        self.after: dict[int, list[ast.stmt]] = {}
        self.tests: dict[int, ast.expr] = {}

    def visit(self, node: ast.AST) -> Any:
        """The node, or the statements, that stand there after the changes."""
        new = self.instead.pop(id(node), node)
        before, after = self.before.pop(id(node), []), self.after.pop(id(node), [])
        if isinstance(new, list):
            new = [self.generic_visit(part) for part in new]
        else:
            new = [self.generic_visit(new)]
        return [*before, *new, *after] if before or after or len(new) != 1 else new[0]

    def sum(self, place: SumThenLayer, helpers: tuple[str, ...], normed: str) -> None:
        """Replace a sum and its layer by ``total, normed = helper(self, left, right, layer)``.

        Where nothing gives the sum a name, the other helper gives ``normed`` alone.
        """
        arguments = [place.left, place.right, copy.deepcopy(place.call.func)]
        if place.scale is not None:
            arguments.append(place.scale)
        statement, then = place.total, place.then
        if statement is None or then is None:
            self.instead[id(place.call)] = _at(self._call(helpers[1], arguments), place.call)
            return
        given: Any = statement
        targets: list[Any] = given.targets if isinstance(given, ast.Assign) else [given.target]
        value: ast.expr = self._call(helpers[0], arguments)
        result: ast.expr = _name(normed)
        if place.when is not None:
            bare = ast.Tuple([copy.deepcopy(given.value), ast.Constant(None)], ast.Load())
            both, alone = (bare, value) if place.skipped else (value, bare)
            value = ast.IfExp(copy.deepcopy(place.when), both, alone)
            # What the condition reads may change in between: never use a result that was not computed.
            there = ast.Compare(_name(normed), [ast.IsNot()], [ast.Constant(None)])
            result = ast.IfExp(there, result, place.call)
        first = targets[0]
        pair = ast.Tuple([_name(first.id, store=True), _name(normed, store=True)], ast.Store())
        made: list[ast.stmt] = [ast.Assign([pair], value)]
        made += [ast.Assign([target], _name(first.id)) for target in targets[1:]]
        self.instead[id(statement)] = [_at(part, statement) for part in made]
        self.instead[id(place.call)] = _at(result, place.call)
        if not isinstance(then, ast.Return):
            # As in the original, nothing holds the result once the statement is done.
            gone = ast.Delete([ast.Name(normed, ast.Del())])
            self.after.setdefault(id(then), []).append(_at(gone, then))

    def modulation(self, place: LayerThenModulation | CalledModulation, helper: str) -> None:
        """Replace a layer and its modulation by ``helper(self, x, layer, like, …)``.

        A statement that gives the layer's result a name goes: nothing else reads it.
        """
        x: Any = place.call.args[0]
        if place.upcast:
            x = x.func.value
        like: ast.expr = ast.Constant(None) if place.like is None else copy.deepcopy(place.like)
        given: list[Any] = [x, copy.deepcopy(place.call.func), like]
        keywords: list[ast.keyword] = []
        if isinstance(place, CalledModulation):
            given += [_name(place.function), *place.node.args[1:]]
            keywords = place.node.keywords
        else:
            given += [scale_in(place.factor), place.shift or ast.Constant(None)]
        made = self._call(helper, given)
        made.keywords = keywords
        self.instead[id(place.node)] = _at(made, place.node)
        if place.named is not None:
            self.instead[id(place.named)] = []

    def pair(self, place: RotatedPair, helpers: tuple[str, ...], flag: str) -> None:
        """Put ``flag = ready(…)`` ahead of the layers; where it is True, ``fused(…)`` does their work."""
        layers = [copy.deepcopy(call.func) for call in place.calls]
        ready: ast.expr = self._call(helpers[0], [*layers, _name(place.function)])
        if place.conditions:
            # The conditions of the original: other places may have changed them by now.
            tests = [(self.tests.setdefault(id(b), b.test), wanted) for b, wanted in place.conditions]
            asked = [copy.deepcopy(test) if wanted else _not(test) for test, wanted in tests]
            ready = ast.BoolOp(ast.And(), [*asked, ready])
        ask = ast.Assign([_name(flag, store=True)], ready)
        self.before.setdefault(id(place.first), []).append(_at(ask, place.first))
        if place.outside is not None:
            off = ast.Assign([_name(flag, store=True)], ast.Constant(False))
            self.before.setdefault(id(place.outside), []).append(_at(off, place.outside))
        for branch, wanted in place.conditions:
            # The answer that was acted on holds, whatever changed in between.
            kept = [_name(flag), branch.test] if wanted else [_not(_name(flag)), branch.test]
            branch.test = _at(ast.BoolOp(ast.Or() if wanted else ast.And(), kept), branch.test)
        for call in place.calls:
            bare = ast.IfExp(_name(flag), copy.deepcopy(call.args[0]), call)
            self.instead[id(call)] = _at(bare, call)
        rotation = place.rotation
        q, k, cos, sin = rotation.args[:4]
        layers = [copy.deepcopy(call.func) for call in place.calls]
        given = [*map(copy.deepcopy, (q, k)), *layers, _name(place.function), *map(copy.deepcopy, (cos, sin))]
        fused = ast.IfExp(_name(flag), self._call(helpers[1], given), rotation)
        self.instead[id(rotation)] = _at(fused, rotation)

    def activation(self, place: LayerThenActivation, helpers: tuple[str, ...], flag: str) -> None:
        """Give the result of a layer by ``h, flag = helper(self, x, layer, function)``.

        Where the flag is True ``h`` is what the activation makes of it, which is not computed again.
        """
        function = ast.Constant(None) if place.function is None else place.function
        made = [
            self._call(helpers[bool(not place.given)], [call.args[0], call.func, copy.deepcopy(function)])
            for call in place.calls
        ]
        old = place.activation
        if isinstance(old, ast.expr) and not place.given:
            self.instead[id(old)] = _at(made[0], old)
            return
        name = ""
        for statement, call in zip(place.given, made, strict=True):
            given: Any = statement
            target: Any = given.targets[0] if isinstance(given, ast.Assign) else given.target
            name = target.id
            both = ast.Tuple([_name(name, store=True), _name(flag, store=True)], ast.Store())
            self.instead[id(statement)] = _at(ast.Assign([both], call), statement)
        if place.outside is not None:
            off = ast.Assign([_name(flag, store=True)], ast.Constant(False))
            self.before.setdefault(id(place.outside), []).append(_at(off, place.outside))
        if isinstance(old, ast.expr):
            self.instead[id(old)] = _at(ast.IfExp(_name(flag), _name(name), old), old)
        else:
            self.instead[id(old)] = _at(ast.If(_not(_name(flag)), [old], []), old)

    def _call(self, helper: str, arguments: list[Any]) -> ast.Call:
        return ast.Call(_name(helper), [_name(self.owner), *arguments], [])


def _name(name: str, *, store: bool = False) -> ast.Name:
    return ast.Name(name, ast.Store() if store else ast.Load())


def _not(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), copy.deepcopy(test))


def _at(new: Any, old: ast.AST) -> Any:
    """Give new nodes the line and column of an old one."""
    ast.copy_location(new, old)
    for child in ast.iter_child_nodes(new):
        if "lineno" in child._attributes and not hasattr(child, "lineno"):
            _at(child, old)
    return new


def _place_in_file(tree: ast.FunctionDef, code: CodeType) -> None:
    """Give the nodes of a function that was parsed alone their lines and columns in the file."""
    line = linecache.getline(code.co_filename, code.co_firstlineno)
    indent = len(line) - len(line.lstrip())
    ast.increment_lineno(tree, code.co_firstlineno - 1)
    for node in ast.walk(tree):
        for name in ("col_offset", "end_col_offset"):
            if isinstance(column := getattr(node, name, None), int):
                setattr(node, name, column + indent)


# -- the code -------------------------------------------------------------------------------------


def _compiled(
    tree: ast.FunctionDef, code: CodeType, names: tuple[str, ...], imported: Iterable[str]
) -> CodeType:
    """The code of a definition inside a function whose locals are its free variables and ``names``."""
    free = [*code.co_freevars, *names]
    arguments = ast.arguments([], [ast.arg(name) for name in free], None, [], [], None, [])
    outer = ast.FunctionDef("outer", arguments, [tree, ast.Return(_name(tree.name))], [])
    if "type_params" in ast.FunctionDef._fields:  # from Python 3.12
        outer.type_params = []  # type: ignore[attr-defined]
    taken = [ast.alias(name) for name in sorted(imported)]
    module = ast.Module([ast.Import(taken), outer] if taken else [outer], [])
    for node in module.body:
        ast.copy_location(node, tree)
    ast.fix_missing_locations(module)
    made = compile_tree(module, code.co_filename, code.co_flags & _FUTURES)
    inside = _code_in(_code_in(made, "outer"), tree.name)
    changes: dict[str, Any] = {"co_firstlineno": code.co_firstlineno}
    if hasattr(code, "co_qualname"):  # from Python 3.11
        changes["co_qualname"] = code.co_qualname
    return inside.replace(**changes)


def _imported_names(tree: ast.FunctionDef, function: FunctionType) -> set[str]:
    """The globals that are imported modules: Python compiles a call ``name.attribute()`` otherwise for them.

    Raises:
        CannotRewrite: With none of these does the source give the code of the function.
    """
    code = function.__code__
    bases = {
        part.func.value.id
        for part in ast.walk(tree)
        if isinstance(part, ast.Call)
        and isinstance(part.func, ast.Attribute)
        and isinstance(part.func.value, ast.Name)
    }
    todo = bases & {*code.co_names}
    imported = {name for name in todo if isinstance(function.__globals__.get(name), ModuleType)}
    while True:
        made = _compiled(tree, code, (), imported)
        if _same_code(made, code):
            return imported
        name = _last_global_before_a_difference(made, code)
        if name not in todo:
            raise CannotRewrite(
                f"the source at {code.co_filename}:{code.co_firstlineno} does not give the code that runs"
            )
        todo.discard(name)
        imported ^= {name}


def _last_global_before_a_difference(a: CodeType, b: CodeType) -> str | None:
    name = None
    for x, y in zip(dis.get_instructions(a), dis.get_instructions(b), strict=False):
        if x.opname == "LOAD_GLOBAL" and x.argval == y.argval:
            name = x.argval
        if (x.opcode, x.arg) != (y.opcode, y.arg):
            break
    return name


def _code_in(code: CodeType, name: str) -> CodeType:
    return next(part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == name)


def _same_code(a: CodeType, b: CodeType) -> bool:
    """Whether two code objects have the same instructions, names and constants; lines may differ."""
    if (a.co_code, a.co_names, a.co_varnames, a.co_freevars, a.co_cellvars, len(a.co_consts)) != (
        b.co_code,
        b.co_names,
        b.co_varnames,
        b.co_freevars,
        b.co_cellvars,
        len(b.co_consts),
    ):
        return False
    return all(_same_constant(x, y) for x, y in zip(a.co_consts, b.co_consts, strict=True))


def _same_constant(a: Any, b: Any) -> bool:
    if isinstance(a, CodeType) and isinstance(b, CodeType):
        return _same_code(a, b)
    if isinstance(a, str) and isinstance(b, str) and "\n" in a:
        # A text over several lines, mostly the docstring, was parsed with another indent.
        return a.split() == b.split()
    return type(a) is type(b) and repr(a) == repr(b)


def _function(code: CodeType, original: FunctionType, scope: Mapping[str, Any]) -> FunctionType:
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    cells.update({name: CellType(value) for name, value in scope.items()})
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, original.__globals__, original.__name__, original.__defaults__, closure)
    return _dressed(made, original)


def _dressed(made: FunctionType, original: FunctionType) -> FunctionType:
    made.__kwdefaults__ = original.__kwdefaults__
    for name in ("__module__", "__qualname__", "__doc__"):
        setattr(made, name, getattr(original, name))
    made.__annotations__ = dict(original.__annotations__)
    made.__dict__.update(original.__dict__)
    return made


# -- decorators -----------------------------------------------------------------------------------


def _decorators(method: Any) -> list[FunctionType]:
    """The function as it stands in its class and those it wraps, the innermost last."""
    _, foreign = source.unwrap(method)
    if foreign is not None:
        raise CannotRewrite(f"it is wrapped by {foreign}")
    chain: list[FunctionType] = []
    while method is not None:
        if not isinstance(method, FunctionType):
            raise CannotRewrite("it is no Python function")
        chain.append(method)
        method = getattr(method, "__wrapped__", None)
    for outer, inner in itertools.pairwise(chain):
        if len(_cells_of(outer, inner)) != 1:
            raise CannotRewrite(f"what wraps it does not hold it: {outer.__code__.co_name}")
    return chain


def _cells_of(wrapper: FunctionType, inner: FunctionType) -> list[int]:
    found = []
    for at, cell in enumerate(wrapper.__closure__ or ()):
        try:
            if cell.cell_contents is inner:
                found.append(at)
        except ValueError:
            continue
    return found


def _rewrapped(wrapper: FunctionType, inner: FunctionType) -> FunctionType:
    """A decorator's wrapper, made anew around another function."""
    [at] = _cells_of(wrapper, wrapper.__wrapped__)  # type: ignore[attr-defined]
    closure = list(wrapper.__closure__ or ())
    closure[at] = CellType(inner)
    made = FunctionType(
        wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, tuple(closure)
    )
    _dressed(made, wrapper)
    made.__wrapped__ = inner  # type: ignore[attr-defined]
    return made
