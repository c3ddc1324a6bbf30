"""From packed bytes to fp16 levels in registers, four bytes at a time: the innermost step of the decode kernel.

A level is two bytes, and `prmt` picks four bytes out of eight by four 4-bit selectors. A register of packed codes,
masked, *is* a row of selectors: two `prmt` (low bytes, high bytes) give four levels, two more pair the bytes up. Three
bits index the eight magnitudes of 4-bit codes; their sign is the fourth bit, spread over a byte by `prmt`'s sign mode.

A row of d codes is cut into slices that lie side by side in its bytes (see `packing`): two halves at 4 bits, four
quarters below. At 3 bits the one-bit plane is read as if it were as wide as the two-bit one: byte j % (d/8), shifted
by j // (d/8).

The assembly cannot run under Triton's interpreter, nor where four neighbouring bytes need different shifts; there
`LUT` does the same by a lookup in memory.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TABLE_COLUMNS = 256
"""Columns of a table; each thread reads its own, so that the compiler keeps tables in ordinary registers."""
_TABLES = ("lo0", "lo1", "hi0", "hi1")
_PAIR = ("0x6240", "0x7351")  # bytes 0 and 2, or 1 and 3, of the low and of the high bytes


def _constraints(outputs: int, inputs: int) -> str:
    return ",".join(["=r"] * outputs + ["r"] * (inputs + 4 * len(_TABLES)))


def _assembly_4() -> str:
    lo0, lo1, hi0, hi1 = (f"${5 + 4 * i}" for i in range(4))
    lines = [
        "not.b32 n, $4;",  # codes below 8 stand for negative levels, largest first
        "and.b32 n, n, 0x88888888;",
        "shr.u32 u, n, 3;",
        "sub.u32 u, n, u;",  # 7 where negative
        "lop3.b32 s, $4, u, 0x77777777, 0x28;",  # (code ^ u) & 7: index of the magnitude
        "shl.b32 u, $4, 4;",
    ]
    for half, signs in enumerate(("0xD9C8", "0xFBEA")):
        lines += ["shr.u32 s, s, 16;"] * half
        lines += [
            f"prmt.b32 m, u, $4, {signs};",  # 0xFF where positive
            f"prmt.b32 h, {hi0}, {hi1}, s;",
            f"prmt.b32 l, {lo0}, {lo1}, s;",
            "lop3.b32 h, h, m, 0x80808080, 0xF2;",  # h | (~m & sign)
            f"prmt.b32 ${half}, l, h, {_PAIR[0]};",
            f"prmt.b32 ${2 + half}, l, h, {_PAIR[1]};",
        ]
    return "{ .reg .b32 n, s, u, h, l, m;\n" + "\n".join(lines) + "\n}"


def _assembly_quarters(bits: int) -> str:
    inputs = {1: 2, 2: 1, 3: 3}[bits]
    lo0, lo1, hi0, hi1 = (f"${8 + inputs + 4 * i}" for i in range(4))
    if bits == 1:
        lines = [
            "shf.r.wrap.b32 v, $8, $8, $9;",
            "and.b32 s0, v, 0x11111111;",
            "shr.u32 t, v, 2;",
            "and.b32 s1, t, 0x11111111;",
        ]
    elif bits == 2:
        lines = ["and.b32 s0, $8, 0x33333333;", "shr.u32 t, $8, 2;", "and.b32 s1, t, 0x33333333;"]
    else:
        lines = [
            "shf.r.wrap.b32 v, $9, $9, $10;",
            "shl.b32 x, v, 2;",
            "and.b32 x, x, 0x44444444;",
            "lop3.b32 s0, $8, 0x33333333, x, 0xEA;",  # (plane & 0x33) | x
            "and.b32 x, v, 0x44444444;",
            "shr.u32 t, $8, 2;",
            "lop3.b32 s1, t, 0x33333333, x, 0xEA;",
        ]
    for source, (one, other) in (("s0", (0, 2)), ("s1", (1, 3))):
        for half in (0, 1):
            lines += [f"shr.u32 {source}, {source}, 16;"] * half
            lines += [
                f"prmt.b32 h, {hi0}, {hi1}, {source};",
                f"prmt.b32 l, {lo0}, {lo1}, {source};",
                f"prmt.b32 ${2 * one + half}, l, h, {_PAIR[0]};",
                f"prmt.b32 ${2 * other + half}, l, h, {_PAIR[1]};",
            ]
    return "{ .reg .b32 v, x, s0, s1, t, h, l;\n" + "\n".join(lines) + "\n}"


ASM_1, CONSTRAINTS_1 = tl.constexpr(_assembly_quarters(1)), tl.constexpr(_constraints(8, 2))
ASM_2, CONSTRAINTS_2 = tl.constexpr(_assembly_quarters(2)), tl.constexpr(_constraints(8, 1))
ASM_3, CONSTRAINTS_3 = tl.constexpr(_assembly_quarters(3)), tl.constexpr(_constraints(8, 3))
ASM_4, CONSTRAINTS_4 = tl.constexpr(_assembly_4()), tl.constexpr(_constraints(4, 1))


@triton.jit
def load_table(TABLE, columns):
    """The four words of a table, one column for each of `columns`."""
    return (
        tl.load(TABLE + columns),
        tl.load(TABLE + 256 + columns),
        tl.load(TABLE + 512 + columns),
        tl.load(TABLE + 768 + columns),
    )


@triton.jit
def halves(codes, LUT, table, ASM: tl.constexpr):
    """Two tensors of levels from a tensor of bytes that hold 4-bit codes."""
    if ASM:
        a, b, c, d = table
        return tl.inline_asm_elementwise(
            ASM_4, CONSTRAINTS_4, [codes, a, b, c, d], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        return tl.load(LUT + (codes & 15)), tl.load(LUT + (codes >> 4))


@triton.jit
def quarters(codes, high, shift, LUT, table, BITS: tl.constexpr, ASM: tl.constexpr):
    """Four tensors of levels. `codes`: two-bit plane (one-bit at 1 bit); `high`: one-bit plane at 3 bits."""
    if ASM:
        a, b, c, d = table
        if BITS == 1:
            return tl.inline_asm_elementwise(
                ASM_1, CONSTRAINTS_1, [codes, shift, a, b, c, d], (tl.float16,) * 4, is_pure=True, pack=4
            )
        elif BITS == 2:
            return tl.inline_asm_elementwise(
                ASM_2, CONSTRAINTS_2, [codes, a, b, c, d], (tl.float16,) * 4, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                ASM_3, CONSTRAINTS_3, [codes, high, shift, a, b, c, d], (tl.float16,) * 4, is_pure=True, pack=4
            )
    else:
        if BITS == 1:
            bits = codes >> shift
            c0, c1, c2, c3 = bits & 1, (bits >> 2) & 1, (bits >> 4) & 1, (bits >> 6) & 1
        else:
            c0, c1, c2, c3 = codes & 3, (codes >> 2) & 3, (codes >> 4) & 3, codes >> 6
            if BITS == 3:
                bits = high >> shift
                c0 |= (bits & 1) << 2
                c1 |= ((bits >> 2) & 1) << 2
                c2 |= ((bits >> 4) & 1) << 2
                c3 |= ((bits >> 6) & 1) << 2
        return tl.load(LUT + c0), tl.load(LUT + c1), tl.load(LUT + c2), tl.load(LUT + c3)


def _words(values: list[int]) -> list[int]:
    """Bytes 0 to 3 and 4 to 7 as two little-endian 32-bit words."""
    padded = (values + [0] * 8)[:8]
    return [int.from_bytes(bytes(padded[i : i + 4]), "little") for i in (0, 4)]


@lru_cache(maxsize=64)
def tables(codebook: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the levels times sqrt(dim) as fp16 (16 entries), and the words that `prmt` reads (4 x TABLE_COLUMNS)."""
    levels = (codebook.float() * dim**0.5).half().cpu()
    lut = torch.zeros(16, dtype=torch.float16)
    lut[: len(levels)] = levels
    kept = levels[8:] if len(levels) == 16 else levels  # 4-bit levels are a sign and eight magnitudes
    patterns = [int(pattern) & 0xFFFF for pattern in kept.view(torch.int16)]
    words = [*_words([p & 255 for p in patterns]), *_words([p >> 8 for p in patterns])]
    signed = torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32)
    table = signed[:, None].expand(-1, TABLE_COLUMNS).contiguous()
    return lut.to(codebook.device), table.to(codebook.device)


@lru_cache(maxsize=64)
def shifts(dim: int, device: torch.device) -> Tensor:
    """Return j // (dim / 8) for the bytes of a quarter: how far the one-bit plane is shifted there."""
    return (torch.arange(TABLE_COLUMNS, device=device) // max(1, dim // 8)).clamp(max=7).to(torch.uint8)


def has_assembly(bits: int, dim: int, interpreted: bool) -> bool:
    """Whether the assembly is right for codes of this width: four neighbouring bytes must share a shift."""
    return not interpreted and (bits in (2, 4) or dim % 32 == 0)
