"""Where two steps of a forward stand next to each other, and where something between them forbids it."""

from __future__ import annotations

import ast
import textwrap

import pytest

from twinkle.fuse.places import LayerThenActivation, RotatedPair, SumThenLayer, find_places


def all_places(body, signature="self, x, r, cos, sin"):
    text = f"def forward({signature}):\n{textwrap.indent(textwrap.dedent(body), '    ')}"
    return find_places(ast.parse(text).body[0])


def places(body):
    """Without the layers that are called with what another one gave: which these are, a class tells."""
    return [place for place in all_places(body) if not isinstance(place, LayerThenActivation)]


def activations(body):
    return [place for place in all_places(body) if isinstance(place, LayerThenActivation)]


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


BRANCHES = """
if self.kind == "plain":
    x = x + r
    x = self.norm(x)
elif self.kind == "scaled":
    x = self.norm(x)
    x = x * cos + sin
else:
    x = self.norm(x)
return self.conv(self.act(x))
"""


@pytest.mark.parametrize(
    ("body", "function", "calls"),
    [
        ("x = self.norm(x)\nx = self.act(x)\nreturn self.conv(x)", "self.act", 1),
        ("h = self.norm(x)\nreturn self.act(h)", "self.act", 1),
        ("h = self.norm(x)\nh = F.silu(h)\nreturn h + x", "F.silu", 1),
        ("h = self.norm(x)\nh = F.silu(h, inplace=True)\nreturn h + x", "F.silu", 1),
        ("h: object = self.norm(x)\nh = nonlinearity(h)\nh = self.conv(h)\nreturn h + x", "nonlinearity", 1),
        ("h = self.norm(x)\nh = h * torch.sigmoid(h)\nreturn h", "torch.sigmoid", 1),
        ("h = self.norm(x)\nreturn x + torch.sigmoid(h) * h", "torch.sigmoid", 1),
        ("h = self.norm(x)\nh *= torch.sigmoid(h)\nreturn h", "torch.sigmoid", 1),
        ("h = self.norm(x)\nh = h * h.sigmoid()\nreturn h", None, 1),
        ("return r + F.silu(self.norm(x))", "F.silu", 1),
        ("x = self.conv(x)\nx = self.norm(x)\nreturn self.act(x)", "self.act", 1),
        ("x = self.conv(x)\nx = self.norm(x)\ny = self.act(x)\nreturn self.conv(y)", "self.act", 1),
        ("for i in r:\n    x = self.conv(x)\nx = self.norm(x)\nreturn self.act(x)", "self.act", 1),
        ("return self.act(self.norms[0](x))", "self.act", 1),
        ("for i in r:\n    x = self.norm(x)\n    x = self.act(x)\nreturn x", "self.act", 1),
        ("if r is not None:\n    x = self.norm(x)\n    x = self.act(x)\nreturn x", "self.act", 1),
        ("if r is not None:\n    x = self.norm(x)\nx = self.act(x)\nreturn x", "self.act", 1),
        (BRANCHES.replace("return self.conv(self.act(x))", "x = self.act(x)\nreturn x"), "self.act", 2),
    ],
)
def test_a_layer_and_the_function_behind_it(body, function, calls):
    place = next(place for place in activations(body) if place.path.startswith("norm"))
    assert (place.path.removesuffix("s[0]"), len(place.calls)) == ("norm", calls)
    assert (None if place.function is None else ast.unparse(place.function)) == function


@pytest.mark.parametrize(
    "body",
    [
        "h = self.norm(x)\ny = self.act(h)\nreturn y + h",  # read once more
        "h = self.norm(x)\nh = self.act(h) + h\nreturn h",
        "h = self.norm(x)\nh = h * torch.sigmoid(x)\nreturn h",
        "h = self.norm(x)\nh = h + torch.sigmoid(h)\nreturn h",
        "h = self.norm(x)\nh += torch.sigmoid(h)\nreturn h",
        "h = self.norm(x)\nx *= torch.sigmoid(h)\nreturn h",
        "h = self.norm(x)\nh = h * torch.sigmoid(1.702 * h)\nreturn h",
        "h = self.norm(x)\nh = h * h.sigmoid(1)\nreturn h",
        "h = k = self.norm(x)\nh = self.act(h)\nreturn h + k",
        "h = self.norm(x)\nself.log(x)\nh = self.act(h)\nreturn h",
        "h = self.norm(x)\nh = self.drop(x) + self.act(h)\nreturn h",  # something else is computed first
        "h = self.norm(x)\nh = self.act(h, 1)\nreturn h",
        "h = self.norm(x)\nh = self.act(h, beta=2)\nreturn h",
        "h = self.norm(x)\nh = self.act(x)\nreturn h",
        "h = self.norm(x, r)\nh = self.act(h)\nreturn h",
        "h = norm(x)\nh = self.act(h)\nreturn h",
        "h = self.norm(x)\nh = self.acts[r](h)\nreturn h",  # which one, only a run tells
        "h = self.norm(x)\nif r.any():\n    h = self.act(h)\nreturn h",
        "h = self.norm(x)\nh = self.act(h) if self.flag else h\nreturn h",
        "h = self.norm(x)\nf = lambda: h\nh = self.act(h)\nreturn h",
        "f = lambda: h\nh = self.norm(x)\nh = self.act(h)\nreturn f()",  # sees what has no activation
        "def f():\n    return h\nh = self.norm(x)\nh = self.act(h)\nreturn f()",
        "h = self.norm(x)\nh = self.act(h)\nreturn locals()",
        "global h\nh = self.norm(x)\nh = self.act(h)\nreturn h",
        "for i in r:\n    x = self.norm(x)\n    y = self.act(x)\nreturn y",  # the next round reads it
        "if self.flag:\n    h = self.norm(x)\nelse:\n    h = self.other(x)\nh = self.act(h)\nreturn h",
        "if self.flag:\n    h = self.norm(x)\n    k = r\nh = self.act(h)\nreturn h",
        "try:\n    h = self.norm(x)\nfinally:\n    h = self.act(h)\nreturn h",
        "try:\n    h = self.norm(x)\n    return self.act(h)\nfinally:\n    self.log(h)",
        "h = self.norm(x)\ny = self.act(h); self.log(h)\nreturn y",
        "while r:\n    self.log(h)\n    h = self.norm(x)\n    y = self.act(h)\nreturn y",
        "h[0] = self.norm(x)\nh = self.act(h)\nreturn h",
        "return [F.silu(self.norm(i)) for i in x]",
        "return lambda: F.silu(self.norm(x))",
        "return F.silu(self.norm(x), 1)",
        "return F.silu(self.norm(x) + r)",
        "return F.silu(self.norm(*x))",
        "return x.act(self)(self.norm(x))",
    ],
)
def test_what_is_no_layer_before_its_activation(body):
    assert [place for place in activations(body) if place.path == "norm"] == []
