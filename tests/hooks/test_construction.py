"""watch_class: the end of the construction of any class, and what must not change by it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import inspect
import io
import pickle
import threading
import traceback
import typing
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from twinkle.errors import TwinkleWarning
from twinkle.hooks import construction
from twinkle.hooks.construction import watch_class

Size = int


class Layer(nn.Module):
    """A layer of a user."""

    def __init__(self, size: Size, *, bias: bool = True) -> None:
        """Make it."""
        super().__init__()
        self.linear = nn.Linear(size, size, bias=bias)

    def forward(self, x):
        return self.linear(x)


class Sub(Layer):
    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.last = True


class Plain(nn.Module):
    """It has no ``__init__`` of its own."""

    def forward(self, x):
        return x


@pytest.fixture
def seen():
    """The instances that were reported; afterwards no watch is left."""
    watches = []

    class Seen(list):
        def watch(self, cls, **options):
            watches.append(watch_class(cls, self.append, **options))
            return watches[-1]

    yield Seen()
    for watch in watches:
        watch.cancel()
    assert construction.watched_classes() == ()


def test_an_instance_is_reported_when_it_is_finished(seen):
    seen.watch(Layer)
    layer = Layer(2)
    assert seen == [layer]


def test_an_instance_of_a_subclass_is_reported_after_its_own_init(seen):
    finished = []
    watch = watch_class(Layer, lambda module: finished.append(module.last))
    Sub(2)
    watch.cancel()
    assert finished == [True]


def test_a_subclass_that_is_defined_later_is_observed(seen):
    finished = []
    watch = watch_class(Layer, lambda module: finished.append(module.late))

    class Late(Layer):
        def __init__(self):
            super().__init__(2)
            self.late = 1

    Late()
    watch.cancel()
    assert finished == [1]


def test_a_class_without_an_init_of_its_own(seen):
    seen.watch(Plain)
    plain = Plain()
    nn.Identity()
    assert seen == [plain]


def test_a_class_without_an_init_keeps_the_order_of_its_bases(seen):
    class Mixin:
        def __init__(self):
            super().__init__()
            self.mixed = True

    class Both(Plain, Mixin):
        pass

    class Other(nn.Module):
        pass

    seen.watch(Other)

    class Combined(Other, Layer):
        pass

    assert Combined(3).linear.in_features == 3
    assert len(seen) == 1


def test_instances_inside_others_are_reported_each(seen):
    seen.watch(Layer)

    class Nest(Layer):
        def __init__(self):
            super().__init__(2)
            self.inner = Layer(2)

    nest = Nest()
    assert seen == [nest.inner, nest]


def test_other_classes_are_left_alone(seen):
    init = nn.Linear.__init__
    seen.watch(Layer)
    assert nn.Linear.__init__ is init
    assert nn.Module.__init__ is Plain.__init__


def test_threads_are_independent(seen):
    seen.watch(Layer)
    inside, go = threading.Event(), threading.Event()

    class Waits(Layer):
        def __init__(self):
            super().__init__(2)
            inside.set()
            assert go.wait(10)

    thread = threading.Thread(target=Waits)
    thread.start()
    assert inside.wait(10)
    layer = Layer(2)
    assert seen == [layer]
    go.set()
    thread.join(10)
    assert [type(one) for one in seen] == [Layer, Waits]


class Fails(Layer):
    def __init__(self):
        super().__init__(2)
        raise ZeroDivisionError("in the constructor")


def test_an_exception_of_a_constructor_passes_and_the_next_instance_is_reported(seen):
    seen.watch(Layer)
    with pytest.raises(ZeroDivisionError):
        Fails()
    assert seen == []
    layer = Layer(2)
    assert seen == [layer]


def test_an_instance_whose_constructor_raised_is_not_kept(seen):
    class Gone(Layer):
        def __init__(self):
            super().__init__(2)
            kept.append(weakref.ref(self))
            raise ZeroDivisionError

    kept = []
    seen.watch(Layer)
    with contextlib.suppress(ZeroDivisionError):
        Gone()
    gc.collect()
    assert kept[0]() is None


@pytest.mark.parametrize("build", [Fails, lambda: Layer("no size"), lambda: Layer(), lambda: Sub(1, 2)])
def test_the_traceback_of_a_constructor_that_raises_is_the_one_without_us(seen, build):
    def lines():
        try:
            build()
        except Exception:
            return traceback.format_exc()

    plain = lines()
    seen.watch(Layer)
    assert lines() == plain


def test_a_warning_of_a_constructor_points_at_its_caller(seen):
    class Warns(Layer):
        def __init__(self):
            super().__init__(2)
            warnings.warn("old", DeprecationWarning, stacklevel=2)

    seen.watch(Layer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Warns()
    assert [Path(one.filename).name for one in caught] == ["test_construction.py"]


def test_the_constructor_reads_as_before(seen):
    def facts():
        init = Layer.__init__
        return (
            inspect.signature(Layer),
            inspect.signature(init),
            inspect.getfullargspec(init),
            typing.get_type_hints(init),
            inspect.getsource(init),
            inspect.getdoc(init),
            inspect.isfunction(init),
            init.__name__,
            init.__qualname__,
            init.__module__,
            init.__defaults__,
            init.__kwdefaults__,
            hasattr(init, "__wrapped__"),
            inspect.signature(Sub),
            inspect.signature(Plain),
            repr(init),
        )

    plain = facts()
    seen.watch(Layer)
    seen.watch(Plain)
    assert facts() == plain


def test_the_constructor_cannot_be_stripped_by_unwrapping(seen):
    seen.watch(Layer)
    assert inspect.unwrap(Layer.__init__) is Layer.__init__


def test_instances_and_classes_copy_and_pickle_as_before(seen):
    seen.watch(Layer)
    layer = Layer(2)
    assert pickle.loads(pickle.dumps(Layer)) is Layer
    assert pickle.loads(pickle.dumps(Layer.__init__)) is Layer.__init__
    assert copy.deepcopy(Layer.__init__) is Layer.__init__
    copied = copy.deepcopy(layer)
    loaded = pickle.loads(pickle.dumps(layer))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    assert b"twinkle" not in buffer.getvalue()
    for other in (copied, loaded):
        assert torch.equal(other.linear.weight, layer.linear.weight)
    assert seen == [layer]


def test_a_class_pickled_by_value_is_the_original(seen):
    cloudpickle = pytest.importorskip("cloudpickle")
    source = (
        "class Main(Base):\n    def __init__(self, n):\n        super().__init__(n)\n        self.n = n\n"
    )
    namespace = {"__name__": "__main__", "Base": Layer}
    exec(source, namespace)
    seen.watch(namespace["Main"])
    data = cloudpickle.dumps(namespace["Main"])
    assert b"twinkle" not in data
    assert pickle.loads(data)(2).n == 2


def test_cancel_puts_everything_back():
    def members():
        return [dict(vars(cls)) for cls in (Layer, Sub, Plain)]

    before = members()
    first, second = watch_class(Layer, lambda _: None), watch_class(Sub, lambda _: None)
    third = watch_class(Plain, lambda _: None)

    class Late(Layer):
        def __init__(self):
            super().__init__(2)

    late = vars(Late)["__init__"]
    assert construction.is_observed(late)
    first.cancel()
    assert type(vars(Late)["__init__"]) is type(lambda: None)
    assert construction.is_observed(vars(Sub)["__init__"])
    second.cancel()
    third.cancel()
    third.cancel()
    assert members() == before


def test_an_init_that_someone_else_wrapped_since_is_left_to_them(seen):
    class Target(nn.Module):
        def __init__(self):
            super().__init__()

    watch = seen.watch(Target)
    observed = Target.__init__

    def theirs(self):
        observed(self)
        self.theirs = True

    Target.__init__ = theirs
    assert Target().theirs
    assert len(seen) == 1
    watch.cancel()
    assert Target.__init__ is theirs
    assert Target().theirs
    assert len(seen) == 1


def test_an_init_that_a_class_decorator_made_is_observed_from_the_second_instance_on(seen):
    seen.watch(Plain)

    @dataclasses.dataclass(eq=False)
    class Data(Plain):
        size: int = 1

        def __post_init__(self):
            super().__init__()
            self.last = True

    Data()
    finished = []
    watch = watch_class(Plain, lambda module: finished.append(hasattr(module, "last")))
    Data()
    Data()
    watch.cancel()
    assert finished == [True, True]


def test_a_subclass_hook_of_the_class_still_runs(seen):
    made = []

    class Hooked(nn.Module):
        def __init_subclass__(cls, *, tag, **keywords):
            super().__init_subclass__(**keywords)
            made.append((cls.__name__, tag))

    own = vars(Hooked)["__init_subclass__"]
    watch = seen.watch(Hooked)

    class Child(Hooked, tag=1):
        pass

    assert made == [("Child", 1)]
    with pytest.raises(TypeError, match="tag"):

        class Bad(Hooked):
            pass

    watch.cancel()
    assert vars(Hooked)["__init_subclass__"] is own


def test_a_callback_that_raises_leaves_the_constructor_alone(seen):
    watch = watch_class(Layer, lambda module: 1 / 0, owner="a test")
    seen.watch(Layer)
    with pytest.warns(TwinkleWarning, match=r"a hook of a test on .*:Layer raised ZeroDivisionError"):
        layer = Layer(2)
    watch.cancel()
    assert seen == [layer]


def test_a_strict_callback_that_raises_leaves_the_constructor():
    watch = watch_class(Layer, lambda module: 1 / 0, strict=True)
    with pytest.raises(ZeroDivisionError):
        Layer(2)
    watch.cancel()


def test_what_a_callback_constructs_is_not_reported():
    built = []

    def build(module):
        built.append(Layer(2))

    watch = watch_class(Layer, build)
    Layer(2)
    watch.cancel()
    assert len(built) == 1


def test_what_is_no_class_is_refused():
    with pytest.raises(TypeError, match="expected a class"):
        watch_class("Layer", print)
    with pytest.raises(TypeError):
        watch_class(int, print)
    assert construction.watched_classes() == ()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_scripted_and_traced_instances_work(seen):
    seen.watch(Layer)
    layer = Layer(2)
    x = torch.ones(1, 2)
    assert torch.equal(torch.jit.script(layer)(x), layer(x))
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))
    assert torch.allclose(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_a_compiled_function_that_constructs_works(seen):
    seen.watch(Layer)

    def build(x):
        return Layer(2)(x).shape

    assert torch.compile(build, backend="eager")(torch.ones(1, 2)) == (1, 2)
