"""How torch's functions are called: their parameters, other names and defaults."""

from __future__ import annotations

from typing import Any

__all__ = ["ALIASES", "BINARY", "BOUND", "CASTS", "KEYWORDS", "MISSING", "SIGNATURES"]

MISSING = object()

# name: parameters behind the tensor, "name" or "name=default".
SIGNATURES = {
    "abs": "",
    "addcmul": "tensor1 tensor2 value=1",
    "bmm": "mat2",
    "cat": "dim=0",
    "chunk": "chunks dim=0",
    "clamp": "min=None max=None",
    "complex": "imag",
    "cos": "",
    "dropout": "p=0.5 training=True inplace=False",
    "empty_like": "dtype=None device=None",
    "exp": "",
    "expand": None,
    "flatten": "start_dim=0 end_dim=-1",
    "gelu": "approximate='none'",
    "greater": "other",
    "index_add": "dim index source alpha=1",
    "layer_norm": "normalized_shape weight=None bias=None eps=1e-05",
    "linear": "weight bias=None",
    "matmul": "other",
    "maximum": "other",
    "mean": "dim=None keepdim=False dtype=None",
    "minimum": "other",
    "narrow": "dim start length",
    "neg": "",
    "new_zeros": None,
    "nonzero": "as_tuple=False",
    "numel": "",
    "one_hot": "num_classes=-1",
    "ones_like": "dtype=None device=None",
    "permute": None,
    "polar": "angle",
    "pow": "exponent",
    "relu": "inplace=False",
    "repeat": None,
    "repeat_interleave": "repeats dim=None",
    "reshape": None,
    "rms_norm": "normalized_shape weight=None eps=None",
    "rsqrt": "",
    "sigmoid": "",
    "silu": "inplace=False",
    "sin": "",
    "softmax": "dim=None dtype=None",
    "split": "split_size dim=0",
    "sqrt": "",
    "squeeze": "dim=None",
    "stack": "dim=0",
    "std": "dim=None unbiased=True keepdim=False",
    "sum": "dim=None keepdim=False dtype=None",
    "tanh": "",
    "tensor_split": "indices_or_sections dim=0",
    "transpose": "dim0 dim1",
    "unbind": "dim=0",
    "unflatten": "dim sizes",
    "unsqueeze": "dim",
    "var": "dim=None unbiased=True keepdim=False",
    "vector_norm": "ord=2 dim=None keepdim=False dtype=None",
    "view_as_complex": "",
    "view_as_real": "",
    "where": "a=None b=None",
    "zeros_like": "dtype=None device=None",
}
ALIASES = {
    "absolute": "abs",
    "concat": "cat",
    "concatenate": "cat",
    "gt": "greater",
    "mm": "matmul",
    "linalg_vector_norm": "vector_norm",
    "negative": "neg",
    "view": "reshape",
    "swapaxes": "transpose",
    "clip": "clamp",
}
BINARY = {"add": "add", "sub": "sub", "mul": "mul", "multiply": "mul", "div": "div", "true_divide": "div"}
CASTS = {"float": "float32", "half": "float16", "bfloat16": "bfloat16", "double": "float64"}
KEYWORDS = {"axis": "dim", "keepdims": "keepdim", "input": None, "tensors": None, "self": None, "x": None}


def _signature(text: str) -> list[tuple[str, Any]]:
    result: list[tuple[str, Any]] = []
    for part in text.split():
        name, equals, default = part.partition("=")
        result.append((name, eval(default) if equals else MISSING))
    return result


BOUND = {name: _signature(text) for name, text in SIGNATURES.items() if text is not None}
