"""The symbolic executor by itself: the term, the effects and the guards of small functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

from twinkle.match.structure import recognise
from twinkle.match.symbolic.execute import Run, Unsupported, execute
from twinkle.match.symbolic.source import NoSource
from twinkle.match.symbolic.terms import Arena, Term, walk

if TYPE_CHECKING:
    from pathlib import Path


def run_of(function: Any, arena: Arena | None = None, **options: Any) -> tuple[Term, Run]:
    return execute(function, arena or Arena(), **options)


def same(one: Any, other: Any, **options: Any) -> bool:
    """Whether two functions of parameters with the same names are one term."""
    arena = Arena()
    return run_of(one, arena, **options)[0] is run_of(other, arena, **options)[0]


# -- values ---------------------------------------------------------------------------------------


def test_locals_are_substituted() -> None:
    def steps(x, w):
        y = x + 1
        x = y * w
        return x

    def at_once(x, w):
        return (x + 1) * w

    assert same(steps, at_once)


def test_two_spellings_of_torch_are_one_term() -> None:
    def one(x):
        return torch.mean(x.float() ** 2, dim=-1, keepdim=True)

    def other(x):
        return x.to(torch.float32).pow(2).mean(-1, keepdim=True)

    assert same(one, other)


def test_two_groupings_of_a_product_are_two_terms() -> None:
    def one(x, y, z):
        return (x * y) * z

    def other(x, y, z):
        return x * (y * z)

    assert not same(one, other)


def test_a_tuple_is_unpacked() -> None:
    def swapped(x, y):
        x, y = y, x
        return x - y

    def plain(x, y):
        return y - x

    assert same(swapped, plain)


def test_what_stands_behind_a_star_is_counted_from_the_end() -> None:
    def starred(x, y, z):
        first, *_, last = (x, y, z)
        return first - last

    def plain(x, y, z):
        return x - z

    assert same(starred, plain)


# -- helpers --------------------------------------------------------------------------------------


def doubled(x, by=2):
    return x * by


def writes(x):
    x.mul_(2)
    return x


def test_a_helper_is_inlined_with_its_defaults() -> None:
    def calls(x):
        return doubled(x) + doubled(x, by=3)

    def plain(x):
        return x * 2 + x * 3

    assert same(calls, plain)


def test_a_helper_longer_than_the_limit_stays_a_call() -> None:
    def calls(x):
        return doubled(x)

    assert run_of(calls)[0].op == "mul"
    assert run_of(calls, inline=0)[0].op == "call"


def test_a_helper_with_an_effect_stays_a_call() -> None:
    def calls(x):
        return writes(x)

    term, run = run_of(calls)
    assert term.op == "call"
    assert run.effects == []


def test_a_method_of_the_owner_is_inlined_and_what_a_subclass_overrides_is_the_subclasss() -> None:
    class Owner:
        def forward(self, x):
            return self.step(x) + self.bias

        def step(self, x):
            return x * self.weight

    class Below(Owner):
        def step(self, x):
            return x

    assert repr(run_of(Owner.forward, owner=Owner)[0]) == "((x * self.weight) + self.bias)"
    assert repr(run_of(Owner.forward, owner=Below)[0]) == "(x + self.bias)"


def test_a_layer_that_is_called_is_kept_as_a_call_and_listed() -> None:
    class Owner:
        def forward(self, x):
            return self.proj(x)

    term, run = run_of(Owner.forward, owner=Owner)
    assert (term.op, [name for name, _ in run.calls]) == ("call", ["proj"])


def test_a_function_that_calls_itself_is_not_followed_for_ever() -> None:
    term, _ = run_of(endless)
    assert any(part.op == "call" for part in walk(term))


def endless(x):
    return endless(x + 1)


# -- branches -------------------------------------------------------------------------------------


def optional(x, bias=None):
    if bias is None:
        return x
    return x + bias


@pytest.mark.parametrize(
    ("assume", "expected"),
    [({"bias": "absent"}, "x"), ({"bias": "given"}, "(x + bias)")],
)
def test_a_branch_on_none_is_decided_by_what_is_assumed(assume: dict[str, str], expected: str) -> None:
    assert repr(run_of(optional, assume=assume)[0]) == expected


def test_an_open_branch_is_a_choice_of_both_sides() -> None:
    term, _ = run_of(optional)
    assert term.op == "if"
    assert [repr(side) for side in term.args[1:]] == ["x", "(x + bias)"]


def test_names_after_two_branches_hold_a_choice() -> None:
    def branches(x, flag):
        y = x
        if flag:
            y = x + 1
            x = x - 1
        return y * x

    def expression(x, flag):
        return (x + 1 if flag else x) * (x - 1 if flag else x)

    assert same(branches, expression)


def test_a_constant_condition_is_no_branch() -> None:
    def asks(x):
        if isinstance(2, int) and not ():
            return x
        return -x

    def decided(x):
        if 1 < 2 and not ():
            return x
        return -x

    assert run_of(decided)[0].op == "input"
    assert run_of(asks)[0].op == "if", "builtins are not run"


def test_an_early_raise_is_a_guard_and_not_a_branch() -> None:
    class Owner:
        def forward(self, x):
            if self.broken:
                raise ValueError("broken")
            return x + 1

    term, run = run_of(Owner.forward, owner=Owner)
    assert repr(term) == "(x + 1)"
    assert [repr(guard) for guard in run.guards] == ["self.broken"]


def test_a_function_that_only_raises_has_no_value() -> None:
    def refuses(x):
        raise NotImplementedError

    assert run_of(refuses)[0].op == "raises"


def test_a_flag_is_read_from_the_instance_where_one_is_given() -> None:
    class Owner:
        scaled = True

        def forward(self, x):
            return x * 2 if self.scaled else x

    assert run_of(Owner.forward, owner=Owner)[0].op == "if"
    assert repr(run_of(Owner.forward, owner=Owner, instance=Owner())[0]) == "(x * 2)"


# -- loops ----------------------------------------------------------------------------------------


def test_a_loop_is_one_term_of_what_it_carries() -> None:
    def loop(x, ws):
        for w in ws:
            x = x * w
        return x

    def renamed(x, ws):
        for weight in ws:
            x = x * weight
        return x

    def other(x, ws):
        for w in ws:
            x = x + w
        return x

    term, run = run_of(loop)
    assert (term.op, run.effects) == ("loop", [])
    assert same(loop, renamed)
    assert not same(loop, other)


def test_a_loop_that_can_be_left_is_not_followed() -> None:
    def leaves(x, ws):
        for w in ws:
            if w is None:
                break
            x = x * w
        return x

    term, run = run_of(leaves)
    assert term.op == "unknown"
    assert run.effects == ["a loop with a second way out is not followed"]


# -- effects --------------------------------------------------------------------------------------


def in_place(x):
    x.add_(1)
    return x


def augmented(x):
    x += 1
    return x


def into_an_argument(x):
    x[0] = 1
    return x


def into_an_attribute(x, owner):
    owner.seen = x
    return x


def prints(x):
    print(x)
    return x


def under_autocast(x):
    with torch.autocast("cpu"):
        return x + 1


@pytest.mark.parametrize(
    ("function", "effect"),
    [
        (in_place, "writes in place to `x`"),
        (augmented, "writes in place to `x`"),
        (into_an_argument, "writes to `x[0]`"),
        (into_an_attribute, "writes to `owner.seen`"),
        (prints, "does `print(x)`"),
        (under_autocast, "runs under `with torch.autocast('cpu')`"),
    ],
)
def test_what_happens_besides_computing_is_an_effect(function: Any, effect: str) -> None:
    assert run_of(function)[1].effects == [effect]


def logs(x):
    logger.warning_once("slow")  # noqa: F821
    return x


def writes_to_its_own(x):
    y = torch.zeros_like(x)
    y[0] = x
    return y


def adds_to_a_result(x):
    y = x * 2
    y += 1
    return y


@pytest.mark.parametrize("function", [logs, writes_to_its_own, adds_to_a_result])
def test_what_nobody_else_can_see_is_no_effect(function: Any) -> None:
    assert run_of(function)[1].effects == []


# -- what is not followed -------------------------------------------------------------------------


def with_while(x):
    while x.sum() > 0:
        x = x - 1
    return x


def with_try(x):
    try:
        y = x + 1
    except ValueError:
        y = x
    return y


@pytest.mark.parametrize(("function", "word"), [(with_while, "while"), (with_try, "try")])
def test_a_statement_that_is_not_followed_leaves_unknown_names(function: Any, word: str) -> None:
    term, run = run_of(function)
    assert term.op == "unknown"
    assert run.effects == [f"`{word}` is not followed"]


def test_an_unknown_term_equals_no_other() -> None:
    assert not same(with_while, with_while)


def test_an_argument_that_is_missing_is_unsupported() -> None:
    def wants(x, y):
        return x + y

    arena = Arena()
    with pytest.raises(Unsupported, match="no argument for y"):
        Run(arena).function(wants, [arena.term("input", "x")], {})


def test_a_function_without_a_file_has_no_source() -> None:
    scope: dict[str, Any] = {}
    exec("def made(x):\n    return x", scope)
    with pytest.raises(NoSource, match="no source for"):
        run_of(scope["made"])


def test_source_that_was_changed_since_is_not_taken_for_the_functions(tmp_path: Path) -> None:
    file = tmp_path / "module_of_the_test.py"
    file.write_text("def other(x):\n    return -x\n")
    scope: dict[str, Any] = {"__name__": "module_of_the_test"}
    exec(compile("def made(x):\n    return x\n", str(file), "exec"), scope)
    with pytest.raises(NoSource, match="does not hold the source of"):
        run_of(scope["made"])


def test_the_whole_of_a_norm_is_one_term() -> None:
    def norm(x, weight, eps):
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return weight * (x.float() * torch.rsqrt(variance + eps)).to(x.dtype)

    def gated(x, gate, up):
        return F.silu(gate(x)) * up(x)

    term, run = run_of(norm)
    assert not run.effects
    assert {part.op for part in walk(term)} >= {"mul", "to", "rsqrt", "mean", "add", "input"}
    assert not any(part.op in ("unknown", "call") for part in walk(term))
    assert run_of(gated)[0].op == "mul"


def nested(value: Any, made: Any) -> Any:
    if isinstance(value, list):
        return [nested(part, made) for part in value]
    if isinstance(value, tuple):
        return tuple([nested(part, made) for part in value])
    if isinstance(value, dict):
        return made((nested(key, made), nested(part, made)) for key, part in value.items())
    if made is dict:
        return {key: nested(part, dict) for key, part in value.items()}
    return value


def test_a_function_that_calls_itself_is_followed_once() -> None:
    arena = Arena()
    term, run = run_of(nested, arena)
    assert any(part.op == "call" for part in walk(term))
    assert run.steps < 100


def one(x: Any) -> Any:
    return x + 1


def five(x: Any) -> Any:
    return one(x) + one(x * 2) + one(x * 3) + one(x * 4) + one(x * 5)


def many(x: Any) -> Any:
    return five(x) + five(x + 2) + five(x + 3) + five(x + 4) + five(x + 5)


def more(x: Any) -> Any:
    return many(x) + many(x - 2) + many(x - 3) + many(x - 4) + many(x - 5)


def most(x: Any) -> Any:
    return more(x) + more(-x) + more(x / 3) + more(x / 4) + more(x / 5)


def test_paths_that_multiply_are_given_up() -> None:
    assert run_of(more)[1].steps == 156
    with pytest.raises(Unsupported, match="too many"):
        run_of(every)
    assert "too many" in str(recognise(every).reason)


def every(x: Any) -> Any:
    return most(x) + most(x @ x) + most(x.T)
