"""What numba does not have: addresses, bits, counters that threads share, and the lookup of eight levels at once."""

from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.core.registry import cpu_target

intrinsic: Any = extending.intrinsic


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """The pointer to an address, which `numba.carray` makes an array of."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic
def float_of(context: Any, bits: Any) -> Any:
    """The float32 that has these 32 bits."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def take(context: Any, address: Any) -> Any:
    """Add one to the 64-bit counter at an address, for all threads, and return what it was."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(address), generate


@intrinsic(prefer_literal=True)
def spread(context: Any, low: Any, high: Any, size: Any, magnitudes: Any, levels: Any, bits: Any) -> Any:
    """Write the levels of all codes of 1 to 4 bits whose highest bits lie in eight bytes of a plane.

    `high` is the address of those bytes, `low` that of the bytes at the same place of the plane that has the other bits
    (3 bits have two planes; others the same one twice), `size` the bytes of a row of `high`, and `levels` where the
    level of the first byte's first code goes. A code is a sign and a magnitude, of which there are eight to look up.
    """
    sign_width, width = (1, 2) if bits.literal_value == 3 else (bits.literal_value,) * 2
    slots, ratio = 8 // sign_width, width // sign_width

    def generate(backend: Any, builder: Any, _: Any, arguments: Any) -> Any:
        word, real = ir.IntType(32), ir.FloatType()
        words, reals = ir.VectorType(word, 8), ir.VectorType(real, 8)
        low, high, size, magnitudes, levels, _ = arguments

        def at(address: Any, slot: int, unit: int) -> Any:
            return builder.add(address, builder.mul(size, ir.Constant(size.type, slot * unit)))

        def eight_bytes(address: Any) -> Any:
            pointer = builder.inttoptr(address, ir.VectorType(ir.IntType(8), 8).as_pointer())
            return builder.zext(builder.load(pointer, align=1), words)

        signs = eight_bytes(high)
        rest = [eight_bytes(at(low, k, 1)) for k in range(ratio)] if ratio > 1 else [signs]
        table = builder.load(builder.inttoptr(magnitudes, reals.as_pointer()), align=4)
        kind = ir.FunctionType(reals, (reals, words))
        permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permps")
        for slot in range(slots):
            # The lookup takes the lowest three bits of an index; magnitudes repeat where a code has fewer.
            shift = ir.Constant(words, [slot // ratio * width] * 8)
            found = builder.call(permute, (table, builder.lshr(rest[slot % ratio], shift)))
            up = ir.Constant(words, [31 - slot * sign_width - (sign_width - 1)] * 8)
            minus = builder.and_(builder.shl(signs, up), ir.Constant(words, [-(2**31)] * 8))
            level = builder.xor(builder.bitcast(found, words), minus)
            builder.store(level, builder.inttoptr(at(levels, slot, 4), words.as_pointer()), align=4)
        return backend.get_dummy_value()

    return types.none(low, high, size, magnitudes, levels, bits), generate


def _has_permute() -> bool:
    """Does the processor that numba compiles for look up eight floats at once (x86 with AVX2)?"""
    return "+avx2" in getattr(cpu_target.target_context.codegen(), "_tm_features", "").split(",")


PERMUTES = _has_permute()
