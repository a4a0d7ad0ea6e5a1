"""Where two steps of a forward stand next to each other, and where something between them forbids it."""

from __future__ import annotations

import ast
import textwrap

import pytest

from twinkle.fuse.places import RotatedPair, SumThenLayer, find_places


def places(body, signature="self, x, r, cos, sin"):
    text = f"def forward({signature}):\n{textwrap.indent(textwrap.dedent(body), '    ')}"
    return find_places(ast.parse(text).body[0])


@pytest.mark.parametrize(
    "body",
    [
        "h = r + x\ny = self.norm(h)\nreturn h, y",
        "h = r + x\nr = h\nh = self.norm(h)\nreturn r + self.mlp(h)",
        "r = h = r + x\nreturn r, self.norm(h)",
        "h: object = r + self.attn(x)\nreturn h + self.mlp(self.norm(h))",
        "x = x + self.attn(x)\nx = x + self.mlp(self.norm(x)).view(-1)\nreturn x",
        "if self.flag:\n    h = r + x\n    x = self.norm(h)\nreturn x",
    ],
)
def test_a_sum_and_the_layer_behind_it(body):
    [place] = places(body)
    assert isinstance(place, SumThenLayer)
    assert (place.path, place.scale) == ("norm", None)


@pytest.mark.parametrize(
    "body",
    [
        "h = r + x\nself.log(x)\ny = self.norm(h)\nreturn h, y",  # something else is computed first
        "h = r + x\ny = self.mlp(x) + self.norm(h)\nreturn y",
        "h = r + x\nh = self.norm(h, 1)\nreturn h",  # another argument
        "h = r + x\nh = self.norm(x=h)\nreturn h",
        "h = r + x\nh = norm(h)\nreturn h",  # no layer of the instance
        "h = r - x\nreturn self.norm(h)",
        "h += x\nreturn self.norm(h)",  # in place
        "h[0] = r + x\nreturn self.norm(h)",
        "h = r + x\nif x.any():\n    h = self.norm(h)\nreturn h",  # not always, and asking takes time
        "h = r + x\nif h is not None:\n    h = self.norm(h)\nreturn h",  # not to be asked before
        "h = r + x\nif self.flag:\n    x = self.mlp(x)\n    h = self.norm(h)\nreturn h",
        "return lambda: self.norm(r + x)",  # at another time
        "return self.norm(r + x, 1)",
        "h = r + x\nh = self.norms[r](h)\nreturn h",  # which one, only a run tells
        "h = r + x\nreturn [self.norm(h) for _ in x]",
        "h = r + x\nreturn self.flag and self.norm(h)",
        "self = x\nh = r + x\nreturn self.norm(h)",
        "h = r + x\nif self.flag:\n    h = h * 2\nreturn self.norm(h)",  # may change in between
        "h = r + x\nif h is None:\n    h = h * 2\nreturn self.norm(h)",
        "h = r + x\nif cos:\n    h = h * 2\nreturn self.norm(h)",  # asking may do something
        "h = r + x\nif cos is sin:\n    h = h * 2\nreturn self.norm(h)",
        "h = r + x\nif cos is None:\n    pass\nelse:\n    self.log(x)\nreturn self.norm(h)",
        "h = r + x\nif cos is None:\n    pass\nself.log(x)\nreturn self.norm(h)",
    ],
)
def test_what_is_no_sum_before_a_layer(body):
    assert places(body) == []


@pytest.mark.parametrize(
    ("body", "path", "when"),
    [
        ("return self.norm(r + x)", "norm", None),
        ("y = self.mlp(self.norm(r + self.attn(x)))\nreturn y", "norm", None),
        ("h = r + x\nreturn self.norms[1](h)", "norms[1]", None),
        ("h = r + x\nif not self.last:\n    h = self.norm(h)\nreturn h", "norm", "not self.last"),
        ("h = r + x\nr = h\nif cos is None:\n    y = self.norm(h)\nreturn y", "norm", "cos is None"),
    ],
)
def test_other_ways_to_write_a_sum_before_a_layer(body, path, when):
    [place] = places(body)
    assert place.path == path
    assert (place.when and ast.unparse(place.when)) == when


@pytest.mark.parametrize("test", ["cos is not None", "cos is None and sin is not None"])
def test_what_is_left_out_may_stand_between(test):
    [place] = places(
        f"h = r + x\nif {test}:\n    r = h\n    h = r + self.cross(h)\nr = h\nh = self.norm(h)\nreturn h"
    )
    assert (place.path, place.skipped, ast.unparse(place.when)) == ("norm", True, test)


def test_two_sums_in_one_expression():
    assert [place.path for place in places("return self.outer(r + self.inner(r + x))")] == ["outer", "inner"]


def test_a_factor_of_the_addend_is_told_apart():
    [place] = places("h = r + x * self.multiplier\nreturn h, self.norm(h)")
    assert ast.unparse(place.right) == "x"
    assert ast.unparse(place.scale) == "self.multiplier"


PAIR = """
q = self.q_norm(self.q_proj(x).view(s)).transpose(1, 2)
k = self.k_norm(self.k_proj(x).view(s)).transpose(1, 2)
v = self.v_proj(x)
q, k = rotate(q, k, cos, sin)
return q, k, v
"""


@pytest.mark.parametrize(
    ("body", "between"),
    [
        (PAIR, "transpose"),
        ("q = self.q_norm(x)\nk = self.k_norm(r)\nq, k = rotate(q, k, cos, sin)\nreturn q, k", "nothing"),
        (
            "q = self.q_norm(x)\nk = self.k_norm(r)\nq = q.view(s).transpose(1, 2)\n"
            "k = k.view(s).transpose(1, 2)\na, b = rotate(q, k, cos, sin)\nreturn a, b",
            "split",
        ),
        (
            "q = x.transpose(1, 2)\nk = r\nif self.normed:\n    q = self.q_norm(q)\n    k = self.k_norm(k)\n"
            "q, k = rotate(q, k, cos, sin)\nreturn q, k",
            "nothing",
        ),
    ],
)
def test_queries_and_keys(body, between):
    [place] = places(body)
    assert isinstance(place, RotatedPair)
    assert (place.paths, place.function, place.between) == (("q_norm", "k_norm"), "rotate", between)


@pytest.mark.parametrize(
    ("body", "conditions"),
    [
        (
            "{0}if self.window is None or self.slides:\n    q, k = rotate(q, k, cos, sin)\nreturn q, k",
            [("self.window is None or self.slides", True)],
        ),
        (
            "{0}if x is not None:\n    cos, sin = x\n    q, k = rotate(q, k, cos, sin)\nreturn q, k",
            [("x is not None", True)],
        ),
        (
            "{0}if self.clip is not None:\n    q.clamp_(self.clip)\n    k.clamp_(self.clip)\n"
            "if self.kind == 'a':\n    q, k = rotate(q, k, cos, sin)\nreturn q, k",
            [("self.clip is not None", False), ("self.kind == 'a'", True)],
        ),
        (
            "{0}if self.a is not None:\n    if self.a.b:\n        q, k = rotate(q, k, cos, sin)\nreturn q, k",
            [("self.a is not None", True), ("self.a.b", True)],
        ),
    ],
)
def test_conditions_between_the_layers_and_the_rotation(body, conditions):
    [place] = places(body.format("q = self.q_norm(x)\nk = self.k_norm(r)\n"))
    assert [(ast.unparse(branch.test), wanted) for branch, wanted in place.conditions] == conditions


@pytest.mark.parametrize(
    "between",
    [
        "if q.any():",  # sees the queries
        "if self.asks():",
        "self.flag = r\nif self.flag:",  # has another answer by then
        "x = r\nif x is not None:",
        "if r:",  # may be a tensor: the host would wait for it
        "if self.clip:\n    q.clamp_(1)\nelse:\n    q.clamp_(2)\nif self.flag:",
        "for _ in r:",
    ],
)
def test_what_cannot_be_asked_ahead_of_the_layers(between):
    body = "q = self.q_norm(x)\nk = self.k_norm(r)\n{}\n    q, k = rotate(q, k, cos, sin)\nreturn q, k"
    assert places(body.format(between)) == []


def test_a_call_is_one_place_only():
    found = places("q = self.q_norm(x + r)\nk = self.k_norm(r)\nq, k = rotate(q, k, cos, sin)\nreturn q, k")
    assert [type(place) for place in found] == [SumThenLayer]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("v = self.v_proj(x)", "v = self.v_proj(q)"),  # sees the queries in between
        ("q, k = rotate", "a, b = rotate"),  # and later
        ("transpose(1, 2)\nk", "transpose(1, 3)\nk"),
        ("transpose(1, 2)\nk", "contiguous()\nk"),
        ("self.k_norm(self.k_proj(x).view(s))", "self.k_proj(x).view(s)"),
        ("rotate(q, k, cos, sin)", "self.rotate(q, k, cos, sin)"),
        ("rotate(q, k, cos, sin)", "rotate(q, q, cos, sin)"),
        ("rotate(q, k, cos, sin)", "rotate(q, k, *cos, sin)"),
        ("v = self.v_proj(x)", "rotate = self.v_proj\nv = 0"),  # not the function of the module
        ("v = self.v_proj(x)", "if x:\n    q = x"),
    ],
)
def test_what_is_no_pair(old, new):
    assert old in PAIR
    assert places(PAIR.replace(old, new, 1)) == []


def test_in_a_loop_a_name_may_be_seen_in_the_next_round():
    assert places(f"for x in r:\n{textwrap.indent(PAIR.replace('return', 'z ='), '    ')}") == []
