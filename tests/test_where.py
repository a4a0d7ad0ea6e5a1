"""Places in a model, as they are written: what each pattern means, and what is none."""

from __future__ import annotations

import pytest

from twinkle.errors import ConfigError
from twinkle.where import Place, parse_where


class Base: ...


class Model(Base): ...


class Layer: ...


def place(dotted: str, count: int = 4, root: type = Model) -> Place:
    made = Place(owners=((root,),))
    for name in dotted.split(".") if dotted else []:
        made = made.within(name, count, Layer)
    return made


MEANT = [
    ("model.layers.*.mlp", "model.layers.3.mlp", True),
    ("model.layers.*.mlp", "base_model.model.model.layers.3.mlp", True),
    ("model.layers.*.mlp", "module.model.layers.3.mlp", True),
    ("model.layers.*.mlp", "model.layers.3.mlp.act", True),
    ("model.layers.*.mlp", "model.layers.3.attention", False),
    ("model.layers.*.mlp", "my_model.layers.3.mlp", False),
    ("model.layers.*.mlp", "model.layers.3.extra.mlp", False),
    ("model.**.mlp", "model.layers.3.extra.mlp", True),
    ("model.**.mlp", "model.mlp", True),
    ("layers.0", "layers.0", True),
    ("layers.0", "layers.10", False),
    ("layers.1?", "layers.10", True),
    ("layers.[0]", "layers.0", True),
    ("layers[0]", "model.layers.0.mlp", True),
    ("layers.-1", "layers.3", True),
    ("layers.[-1]", "layers.3", True),
    ("layers[-1].mlp", "layers.3.mlp", True),
    ("layers.[-1]", "layers.2", False),
    ("layers.[1:3]", "layers.2", True),
    ("layers.[1:3]", "layers.3", False),
    ("layers.[:-1]", "layers.3", False),
    ("layers.[::2]", "layers.2", True),
    ("layers.[-1]", "layers.last", False),
    ("[0]", "0.norm", True),
    ("**", "", True),
    ("*", "", False),
    ("mlp", "", False),
    ("!layers.0", "layers.1", True),
    ("!layers.0", "", True),
    ("!layers.0", "layers.0.mlp", False),
    ("Model:layers", "layers.0", True),
    ("Base:layers", "layers.0", True),
    ("Mod*:layers", "layers.0", True),
    ("Other:layers", "layers.0", False),
    ("Model:layers", "model.layers.0", False),
    ("Model:**", "anything.at.all", True),
    ("!Model:**", "anything.at.all", False),
    ("Layer:mlp", "layers.0.mlp", True),
]


@pytest.mark.parametrize(("pattern", "name", "meant"), MEANT)
def test_a_pattern_means_a_module_and_what_is_in_it(pattern, name, meant):
    assert parse_where(pattern).includes([place(name)]) is meant


def test_the_last_pattern_that_means_a_module_decides():
    where = parse_where(["layers", "!layers.[-1]", "layers.*.norm"])
    names = ["layers.0.mlp", "layers.3.mlp", "layers.3.norm", "head"]
    assert [where.includes([place(name)]) for name in names] == [True, False, True, False]


def test_one_place_of_several_is_enough():
    assert parse_where("!layers.0").includes([place("layers.0"), place("layers.1")])


NO_PLACES = ["a, b", "a..b", "Model:", "a/b", "a[b]", [], ["a", 3], 3, "[1:2:0]", "a.***", "", "!", "a.[]"]


@pytest.mark.parametrize("value", [*NO_PLACES, r"layers\.\d+", "a b:c", "layers.(0|1)", "^layers", "a.b."])
def test_what_is_no_place_is_an_error_with_a_way_out(value):
    with pytest.raises(ConfigError) as caught:
        parse_where(value, where="here")
    assert caught.value.where == "here"
    assert caught.value.fix
    assert caught.value.expected


def test_a_pattern_that_met_nothing_is_told_where_such_layers_are():
    where = parse_where("layer.*.mlp")
    layer = Layer()
    assert not where.chooses(layer, [place("model.layers.3.mlp")])
    assert where.counts == (0, 1)
    (pattern,) = where.patterns
    assert not pattern.met
    assert "model.layers.*.mlp" in where.nearest(pattern)


def test_modules_that_are_gone_count_while_nothing_else_does():
    where = parse_where("layers")
    first, second = Layer(), Layer()
    where.chooses(first, [place("layers.0")])
    where.chooses(second, [place("head")])
    del second
    assert where.counts == (1, 0)
    del first
    assert where.counts == (1, 1)
