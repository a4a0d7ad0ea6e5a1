"""Each class below a root is asked about once, at its first construction."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from dataclasses import dataclass

import pytest

from twinkle.hooks.classes import watch_classes
from twinkle.hooks.construction import watch_class


class Root:
    def __init__(self) -> None:
        self.made = True


class Own(Root):
    def __init__(self, size: int = 1) -> None:
        """Documented."""
        super().__init__()
        self.size = size


class Inherits(Own):
    pass


class Watched:
    """A watch of :class:`Root` that wants some classes, and what it was asked and told."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)
        self.asked: list[str] = []
        self.told: list[object] = []
        self.watch = watch_classes(Root, self.wants, self.told.append)

    def wants(self, cls: type) -> bool:
        self.asked.append(cls.__name__)
        return cls.__name__ in self.names


@pytest.fixture
def watched():
    made = []

    def begin(*names: str) -> Watched:
        made.append(Watched(*names))
        return made[-1]

    yield begin
    for one in made:
        one.watch.cancel()


def test_a_class_that_nobody_wants_has_its_own_constructor_from_its_first_construction_on(watched):
    before = vars(Own)["__init__"], vars(Root)["__init__"]
    seen = watched("Other")
    Own()
    assert (vars(Own)["__init__"], vars(Root)["__init__"]) == before
    assert seen.asked.count("Own") == 1
    assert seen.told == []


def test_each_instance_of_a_wanted_class_is_told_of_once_it_is_whole(watched):
    seen = watched("Own")
    first, second = Own(3), Own(4)
    assert seen.told == [first, second]
    assert second.size == 4


def test_a_subclass_is_asked_about_by_itself(watched):
    seen = watched("Own")
    Inherits()
    assert seen.told == []
    seen.watch.cancel()
    seen = watched("Inherits")
    made = Inherits()
    Own()
    assert seen.told == [made]


def test_a_class_without_a_constructor_is_given_none(watched):
    watched("Other")

    class Late(Own):
        pass

    Late()
    assert "__init__" not in vars(Late)
    assert "__init__" not in vars(Inherits)
    assert Late.__init__ is Own.__init__


def test_a_class_that_is_made_later_is_asked_about(watched):
    seen = watched("Late", "LateOwn")

    class Late(Own):
        pass

    class LateOwn(Own):
        def __init__(self) -> None:
            super().__init__(2)

    late, own = Late(), LateOwn()
    assert seen.told == [late, own]


def test_the_only_new_class_without_a_constructor_is_told_of_at_its_first_instance(watched):
    seen = watched("Late")
    Own()  # settled, and asked once more for the class below

    class Late(Own):
        pass

    made = [Late(), Late()]
    assert seen.told == made


def test_a_dataclass_has_its_generated_constructor(watched):
    seen = watched("Point")

    @dataclass
    class Point(Root):
        x: int = 0

        def __post_init__(self) -> None:
            super().__init__()

    made = [Point(3), Point(4)]
    assert [one.x for one in made] == [3, 4]
    assert seen.told == made


def test_a_decorated_constructor_is_kept(watched):
    seen = watched("Counted")
    calls = []

    def counted(cls):
        original = cls.__init__

        def init(self, *arguments):
            calls.append(cls)
            original(self, *arguments)

        cls.__init__ = init
        return cls

    @counted
    class Counted(Own):
        def __init__(self, size: int) -> None:
            super().__init__(size)

    made = [Counted(1), Counted(2)]
    assert seen.told == made
    assert len(calls) == 2


def test_the_constructor_that_asks_looks_like_its_own(watched):
    before = str(inspect.signature(Own))
    watched("Other")
    assert str(inspect.signature(Own)) == before
    assert Own.__init__.__doc__ == "Documented."
    assert pickle.loads(pickle.dumps(Own.__init__)) is Own.__init__


def test_an_error_of_a_constructor_shows_no_frame_of_ours(watched):
    watched("Other")

    class Broken(Root):
        def __init__(self) -> None:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        Broken()
    assert [entry.name for entry in caught.traceback][-1] == "__init__"
    assert not any("twinkle/hooks" in str(entry.path) for entry in caught.traceback)


def test_a_class_is_asked_about_again_when_something_new_came(watched):
    seen = watched()
    Own()
    seen.names.add("Own")
    Own()
    assert seen.told == []
    seen.watch.reconsider(Root)
    made = Own()
    assert seen.told == [made]


def test_what_is_inside_one_that_is_reported_as_a_whole_is_left_to_it():
    whole, parts = [], []

    class Model(Root):
        def __init__(self) -> None:
            super().__init__()
            self.part = Own()

    models = watch_class(Model, whole.append)
    watch = watch_classes(Root, lambda cls: cls is Own, parts.append, instead=models)
    try:
        model, alone = Model(), Own()
    finally:
        watch.cancel()
        models.cancel()
    assert (whole, parts) == ([model], [alone])
    assert not type(vars(Model)["__init__"]).__module__.startswith("twinkle")


def test_a_family_that_is_watched_stays_watched_beneath_the_question(watched):
    seen = watched("Other")
    told = []
    watch = watch_class(Own, told.append)
    try:
        made = [Own(), Own()]
    finally:
        watch.cancel()
    assert (told, seen.told) == (made, [])
    Own()
    assert told == made


def test_a_question_that_fails_leaves_the_program_alone():
    def wants(cls: type) -> bool:
        raise RuntimeError("on purpose")

    watch = watch_classes(Own, wants, print)
    try:
        with pytest.warns(Warning, match="goes on without it"):
            assert Own().made
    finally:
        watch.cancel()


def test_cancelling_gives_every_class_its_own_back():
    before = {cls: dict(vars(cls)) for cls in (Root, Own, Inherits)}
    watch = watch_classes(Root, lambda cls: True, print)
    watch.cancel()
    for cls, names in before.items():
        assert {name: vars(cls)[name] for name in names} == names
        assert "__init_subclass__" not in vars(cls)
        assert ("__init__" in vars(cls)) is ("__init__" in names)


def test_no_class_is_kept_alive(watched):
    watched("Other")

    class Late(Root):
        def __init__(self) -> None:
            super().__init__()

    copy.deepcopy(Late())
    gone = weakref.ref(Late)
    del Late
    gc.collect()
    assert gone() is None
