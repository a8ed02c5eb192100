"""Vectors of `LANES` float32 numbers inside Numba functions, in arithmetic that is the same on every machine.

Numba leaves the use of vector instructions to the compiler, which gives up where it cannot rule out that two arrays
overlap, and spends more on short loops than the loop itself. Here they are asked for: `load` takes `LANES` neighbouring
numbers out of an array, ``+``, ``+=``, ``-`` and ``*`` act on them lane by lane, `store` puts them back. The compiler turns a
vector into as many registers as the processor needs for it.

No multiplication is fused with an addition, so every lane is rounded like a single float32: results do not depend on the
processor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing import signature as typed
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 8
"""Numbers a vector: one AVX register, or two of NEON. (Twice as many were no faster with AVX-512: runs of cells are short.)"""

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_BYTES = 4  # alignment: vectors start at any float32


class Lanes(types.Type):
    """Numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__(name=f"Lanes({LANES})")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), _VECTOR.as_pointer())


@intrinsic
def load(typing: Any, array: Any, at: Any) -> Any:
    """``load(array, at)``: the vector ``array[at:at + LANES]`` of a contiguous float32 array; `at` is not checked."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, signature.args[0], *args), align=_BYTES)

    return lanes(array, types.uint64), generate


@intrinsic
def store(typing: Any, array: Any, at: Any, vector: Any) -> Any:
    """``store(array, at, vector)``: write ``array[at:at + LANES]``; `at` is not checked."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, at, vector = args
        builder.store(vector, _pointer(context, builder, signature.args[0], array, at), align=_BYTES)
        return context.get_dummy_value()

    return types.void(array, types.uint64, lanes), generate


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """``splat(value)``: the vector that has the float32 `value` in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        blank = ir.Constant(_VECTOR, ir.Undefined)
        first = builder.insert_element(blank, args[0], ir.Constant(_INT, 0))
        return builder.shuffle_vector(first, blank, ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES))

    return lanes(types.float32), generate


def _lanewise(function: Callable, instruction: str) -> None:
    """Let `function` act on two vectors."""

    @infer_global(function)
    class Signature(ConcreteTemplate):
        cases = (typed(lanes, lanes, lanes),)

    @lower_builtin(function, lanes, lanes)
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)


_lanewise(operator.add, "fadd")
_lanewise(operator.iadd, "fadd")
_lanewise(operator.sub, "fsub")
_lanewise(operator.mul, "fmul")
