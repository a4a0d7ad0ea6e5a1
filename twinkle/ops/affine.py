"""What the backends of norms with weight and bias share: backward, its fake, gradients and layer classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinkle.ops.build import forward_class, once_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor, nn

__all__ = ["affine_layers", "fake_backward", "gradients", "launched_backward"]


def launched_backward(kernels: Callable[[], Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of a ``Derivative``: of the gradient, the inputs, what else there is, and what is wanted.

    Args:
        kernels: Gives the module whose ``backward`` launches the kernel.
    """

    def backward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *given, (dx, dw, db) = inputs
        return kernels().backward(  # type: ignore[no-any-return]
            *given, input_grad=dx, weight_grad=dw, bias_grad=db
        )

    return backward


def fake_backward(empty: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The fake of that backward.

    Args:
        empty: Makes a gradient of the strides that the kernel gives it.
    """

    def fake(
        dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        return tuple(
            empty(p) if p is not None and wanted else None
            for p, wanted in zip((x, weight, bias), rest[-1], strict=True)
        )

    return fake


def gradients(*kept: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradients of a ``Derivative`` that saves ``x``, the weight, the bias and the statistics.

    Args:
        kept: Which of the inputs behind these three backward takes.
    """

    def found(ctx: Any, function: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_x, of_w, of_b = needs[0], weight is not None and needs[1], bias is not None and needs[2]
        rest = ctx.rest
        dx, dw, db = function(dy, x, weight, bias, stats, *[rest[at] for at in kept], [of_x, of_w, of_b])
        none = (None,) * len(rest)
        return (dx if of_x else None, dw if of_w else None, db if of_b else None, *none)

    return found


def affine_layers(
    name: str, function: Callable[..., Tensor], *numbers: str
) -> Callable[[Any, Mapping[str, Any]], type[nn.Module]]:
    """The ``layer_class`` of a backend: from a variant and facts to a layer that calls ``function``.

    A layer has ``forward`` alone, and it is the same class for the same arguments. The facts say for each
    argument of the definition the name of the attribute, for ``x`` that of the argument of ``forward``, or
    the value itself.

    Args:
        name: What the names of the classes begin with.
        function: The norm; takes ``x``, ``weight``, ``bias``, ``numbers`` and ``variant``.
        numbers: Its other arguments that facts may tell.
    """

    @once_for("x", "weight", "bias", *numbers)
    def layer_class(variant: Any, facts: Mapping[str, Any]) -> type[nn.Module]:
        values = {"weight": None, "bias": None, **facts}
        return forward_class(
            f"{name}_{variant.name}", function, values, inputs=("x",), constants={"variant": variant}
        )

    return layer_class
