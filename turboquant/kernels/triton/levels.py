"""From packed bytes to fp16 levels in registers, four bytes at a time: the innermost step of the kernels.

A level is two bytes, and `prmt` picks four bytes out of eight by four 4-bit selectors. A register of packed codes,
masked, *is* a row of selectors: two `prmt` (low bytes, high bytes) give four levels, two more pair the bytes up. Three
bits index the eight magnitudes of 4-bit codes; their highest bit is the sign, spread over a byte by `prmt`'s sign mode.

A row of d codes is cut into slices that lie side by side in its bytes (see `packing`): two halves at 4 bits, four
quarters below. At 3 bits the one-bit plane is read as if it were as wide as the two-bit one: byte j % (d/8), shifted
by one where j >= d/8 (`late`).

Keys are read as bytes, because they lie in registers along the row. Values lie along the tokens: there two bytes of a
row are read as one 16-bit word, which `ldmatrix` can transpose, and are told apart in registers.

The assembly cannot run under Triton's interpreter, where `LUT` does the same by a lookup in memory.

Map: `_four_bits`, `_few_bits` and `_late` write assembly, `_bytes` and `_words` put it together when the module loads.
`halves`, `quarters`, `word_halves` and `word_quarters` are called by the kernels of `decode`, `scores` and `prefill`;
they launch nothing. `tables`, `late_bytes` and `late_words` make what those kernels are handed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant.quant.modes import shared_table

TABLE_COLUMNS = 256
"""Columns of a table; each thread reads its own, so that the compiler keeps tables in ordinary registers."""
_TABLES = 4
# `prmt d, a, b, s`: byte i of d is the byte of (a, b) that the i-th hex digit of s from the right names, 0-3 of a and
# 4-7 of b. With 8 added to the digit it is that byte's sign bit, eight times.
_PAIR = ("0x6240", "0x7351")  # bytes 0 and 2, or 1 and 3, of the low and of the high bytes


def _constraints(outputs: int, inputs: int) -> str:
    # Each of the four elements that the assembly takes at once (pack=4) brings its table along, in 32-bit registers.
    return ",".join(["=r"] * outputs + ["r"] * (inputs + 4 * _TABLES))


def _names(first: int) -> list[str]:
    """Registers of a table's four words, of which each of four elements brings its own copy."""
    return [f"${first + 4 * i}" for i in range(_TABLES)]


def _four_bits(codes: str, outputs: list[str], tables: list[str]) -> list[str]:
    """Four bytes of 4-bit codes to two slices of four levels, two registers each."""
    lo0, lo1, hi0, hi1 = tables
    # s: the magnitudes, eight selectors; u: the low codes' sign bits moved to the top of their bytes.
    lines = [f"and.b32 s, {codes}, 0x77777777;", f"shl.b32 u, {codes}, 4;"]
    for half, signs in enumerate(("0xD9C8", "0xFBEA")):
        lines += ["shr.u32 s, s, 16;"] * half
        lines += [
            f"prmt.b32 m, u, {codes}, {signs};",  # 0xFF where negative
            f"prmt.b32 h, {hi0}, {hi1}, s;",
            f"prmt.b32 l, {lo0}, {lo1}, s;",
            "lop3.b32 h, h, m, 0x80808080, 0xF8;",  # h | (m & sign)
            f"prmt.b32 {outputs[half]}, l, h, {_PAIR[0]};",
            f"prmt.b32 {outputs[2 + half]}, l, h, {_PAIR[1]};",
        ]
    return lines


def _few_bits(bits: int, codes: str, high: str, outputs: list[str], tables: list[str]) -> list[str]:
    """Four bytes of 2-bit codes (1-bit ones at 1 bit; `high`: their one-bit plane at 3 bits) to four slices."""
    lo0, lo1, hi0, hi1 = tables
    width = "0x11111111" if bits == 1 else "0x33333333"
    # A selector has four bits, so every second code of a byte is read from the register as it is, the others from t.
    lines = [f"shr.u32 t, {codes}, 2;"]
    if bits == 3:  # the one-bit plane gives the selectors' third bit
        lines += [
            f"shl.b32 x, {high}, 2;",
            "and.b32 x, x, 0x44444444;",
            f"lop3.b32 s0, {codes}, {width}, x, 0xEA;",  # (plane & 0x33) | x
            f"and.b32 x, {high}, 0x44444444;",
            f"lop3.b32 s1, t, {width}, x, 0xEA;",
        ]
    else:
        lines += [f"and.b32 s0, {codes}, {width};", f"and.b32 s1, t, {width};"]
    for source, (one, other) in (("s0", (0, 2)), ("s1", (1, 3))):
        for half in (0, 1):
            lines += [f"shr.u32 {source}, {source}, 16;"] * half
            lines += [
                f"prmt.b32 h, {hi0}, {hi1}, {source};",
                f"prmt.b32 l, {lo0}, {lo1}, {source};",
                f"prmt.b32 {outputs[2 * one + half]}, l, h, {_PAIR[0]};",
                f"prmt.b32 {outputs[2 * other + half]}, l, h, {_PAIR[1]};",
            ]
    return lines


def _late(target: str, plane: str, late: str) -> list[str]:
    """Shift a register of bytes of the one-bit plane by one where `late` is set."""
    return [f"shr.u32 t, {plane}, 1;", f"lop3.b32 {target}, {plane}, t, {late}, 0xD8;"]  # late ? t : plane


def _slices(bits: int) -> int:
    return 2 if bits == 4 else 4


def _wrapped(lines: list[str]) -> str:
    return "{ .reg .b32 p0, p1, v0, v1, w0, w1, s, s0, s1, t, u, x, h, l, m;\n" + "\n".join(lines) + "\n}"


def _bytes(bits: int) -> tuple[str, str]:
    """Assembly, and its constraints, for four bytes of one row."""
    count = 2 * _slices(bits)
    inputs = {1: 2, 2: 1, 3: 3, 4: 1}[bits]
    outputs, tables = [f"${i}" for i in range(count)], _names(count + inputs)
    codes, high, late = (f"${count + i}" for i in range(3))
    if bits == 4:
        lines = _four_bits(codes, outputs, tables)
    elif bits == 3:
        lines = _late("v0", high, late) + _few_bits(3, codes, "v0", outputs, tables)
    elif bits == 1:
        lines = _late("p0", codes, high) + _few_bits(1, "p0", "", outputs, tables)
    else:
        lines = _few_bits(2, codes, "", outputs, tables)
    return _wrapped(lines), _constraints(count, inputs)


def _words(bits: int) -> tuple[str, str]:
    """Assembly, and its constraints, for four words of two bytes; the slices of the first bytes come first."""
    count = 4 * _slices(bits)
    inputs = {1: 4, 2: 2, 3: 6, 4: 2}[bits]
    tables = _names(count + inputs)
    at = [f"${count + i}" for i in range(6)]
    lines = []
    codes, high = at[:2], at[2:4]
    if bits == 3:
        lines += _late("v0", at[2], at[4]) + _late("v1", at[3], at[5])
        high = ["v0", "v1"]
    elif bits == 1:
        lines += _late("w0", at[0], at[2]) + _late("w1", at[1], at[3])
        codes = ["w0", "w1"]
    for byte, pick in enumerate(("0x6420", "0x7531")):  # the first bytes of four words in one register, then the second
        outputs = [f"${count // 2 * byte + i}" for i in range(count // 2)]
        lines.append(f"prmt.b32 p0, {codes[0]}, {codes[1]}, {pick};")
        if bits == 3:
            lines.append(f"prmt.b32 p1, {high[0]}, {high[1]}, {pick};")
        lines += _four_bits("p0", outputs, tables) if bits == 4 else _few_bits(bits, "p0", "p1", outputs, tables)
    return _wrapped(lines), _constraints(count, inputs)


ASM_1, CONSTRAINTS_1 = (tl.constexpr(text) for text in _bytes(1))
ASM_2, CONSTRAINTS_2 = (tl.constexpr(text) for text in _bytes(2))
ASM_3, CONSTRAINTS_3 = (tl.constexpr(text) for text in _bytes(3))
ASM_4, CONSTRAINTS_4 = (tl.constexpr(text) for text in _bytes(4))
WORDS_1, WORD_CONSTRAINTS_1 = (tl.constexpr(text) for text in _words(1))
WORDS_2, WORD_CONSTRAINTS_2 = (tl.constexpr(text) for text in _words(2))
WORDS_3, WORD_CONSTRAINTS_3 = (tl.constexpr(text) for text in _words(3))
WORDS_4, WORD_CONSTRAINTS_4 = (tl.constexpr(text) for text in _words(4))


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
def _looked_up(codes, high, late, LUT, BITS: tl.constexpr):
    """Four tensors of levels from bytes, by lookups."""
    if BITS == 1:
        bits = tl.where(late != 0, codes >> 1, codes)
        c0, c1, c2, c3 = bits & 1, (bits >> 2) & 1, (bits >> 4) & 1, (bits >> 6) & 1
    else:
        c0, c1, c2, c3 = codes & 3, (codes >> 2) & 3, (codes >> 4) & 3, (codes >> 6) & 3
        if BITS == 3:
            bits = tl.where(late != 0, high >> 1, high)
            c0 |= (bits & 1) << 2
            c1 |= ((bits >> 2) & 1) << 2
            c2 |= ((bits >> 4) & 1) << 2
            c3 |= ((bits >> 6) & 1) << 2
    return tl.load(LUT + c0), tl.load(LUT + c1), tl.load(LUT + c2), tl.load(LUT + c3)


@triton.jit
def quarters(codes, high, late, LUT, table, BITS: tl.constexpr, ASM: tl.constexpr):
    """Four tensors of levels. `codes`: two-bit plane (one-bit at 1 bit); `high`: one-bit plane at 3 bits."""
    if not ASM:
        return _looked_up(codes, high, late, LUT, BITS)
    else:
        a, b, c, d = table
        if BITS == 1:
            return tl.inline_asm_elementwise(
                ASM_1, CONSTRAINTS_1, [codes, late, a, b, c, d], (tl.float16,) * 4, is_pure=True, pack=4
            )
        elif BITS == 2:
            return tl.inline_asm_elementwise(
                ASM_2, CONSTRAINTS_2, [codes, a, b, c, d], (tl.float16,) * 4, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                ASM_3, CONSTRAINTS_3, [codes, high, late, a, b, c, d], (tl.float16,) * 4, is_pure=True, pack=4
            )


@triton.jit
def word_halves(codes, LUT, table, ASM: tl.constexpr):
    """Two slices of the first bytes of words of 4-bit codes, then two of the second bytes."""
    if ASM:
        a, b, c, d = table
        return tl.inline_asm_elementwise(
            WORDS_4, WORD_CONSTRAINTS_4, [codes, a, b, c, d], (tl.float16,) * 4, is_pure=True, pack=4
        )
    else:
        return (
            tl.load(LUT + (codes & 15)), tl.load(LUT + ((codes >> 4) & 15)),
            tl.load(LUT + ((codes >> 8) & 15)), tl.load(LUT + ((codes >> 12) & 15)),
        )  # fmt: skip


@triton.jit
def word_quarters(codes, high, late, LUT, table, BITS: tl.constexpr, ASM: tl.constexpr):
    """Four slices of the first bytes of words, then four of the second bytes; see `quarters`."""
    if not ASM:
        first = _looked_up(codes & 255, high & 255, late, LUT, BITS)
        second = _looked_up((codes >> 8) & 255, (high >> 8) & 255, late, LUT, BITS)
        return first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3]
    else:
        a, b, c, d = table
        if BITS == 1:
            return tl.inline_asm_elementwise(
                WORDS_1, WORD_CONSTRAINTS_1, [codes, late, a, b, c, d], (tl.float16,) * 8, is_pure=True, pack=4
            )
        elif BITS == 2:
            return tl.inline_asm_elementwise(
                WORDS_2, WORD_CONSTRAINTS_2, [codes, a, b, c, d], (tl.float16,) * 8, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                WORDS_3, WORD_CONSTRAINTS_3, [codes, high, late, a, b, c, d], (tl.float16,) * 8, is_pure=True, pack=4
            )


def _table_words(values: list[int]) -> list[int]:
    """Bytes 0 to 3 and 4 to 7 as two little-endian 32-bit words."""
    padded = (values + [0] * 8)[:8]
    return [int.from_bytes(bytes(padded[i : i + 4]), "little") for i in (0, 4)]


@shared_table(maxsize=64)
def tables(codebook: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the levels times sqrt(dim) as fp16 (16 entries), and the words that `prmt` reads (4 x TABLE_COLUMNS).

    The words hold the first eight levels: all of them below 4 bits, the magnitudes at 4 bits.
    """
    levels = (codebook.float() * dim**0.5).half().cpu()  # about 1 in size: fp16 keeps all digits at any dim
    lut = torch.zeros(16, dtype=torch.float16, device="cpu")
    lut[: len(levels)] = levels
    patterns = [int(pattern) & 0xFFFF for pattern in levels[:8].view(torch.int16)]
    words = [*_table_words([p & 255 for p in patterns]), *_table_words([p >> 8 for p in patterns])]
    # The same 32 bits as a signed number, which is what torch can hold.
    signed = torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32, device="cpu")
    table = signed[:, None].expand(-1, TABLE_COLUMNS).contiguous()
    return lut.to(codebook.device), table.to(codebook.device)


@shared_table(maxsize=64)
def late_bytes(dim: int, device: torch.device) -> Tensor:
    """Return for the bytes of a quarter whether the one-bit plane is shifted there: all bits set where it is."""
    return ((torch.arange(TABLE_COLUMNS, device=device) >= max(1, dim // 8)) * 255).to(torch.uint8)


@shared_table(maxsize=64)
def late_words(dim: int, device: torch.device) -> Tensor:
    """Return the same for words of two bytes."""
    return -(torch.arange(TABLE_COLUMNS, device=device) >= max(1, dim // 16)).to(torch.int16)
