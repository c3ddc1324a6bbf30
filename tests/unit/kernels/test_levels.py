"""The assembly that turns packed bytes into levels, read here instruction by instruction, against the codebook.

CI has no GPU. The few instructions that the assembly uses are what PTX's manual says of them.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from turboquant.methods.scalar import _shared_codebook
from turboquant.quant.packing import pack_bits, plane_widths

pytest.importorskip("triton")

from turboquant.kernels.triton import levels

CPU = torch.device("cpu")
Registers = dict[str, Any]


def prmt(a: Any, b: Any, selector: Any) -> Any:
    """Four bytes of eight; bit 3 of a selector spreads the byte's sign."""
    both = np.stack([(source >> np.uint32(8 * i)) & np.uint32(255) for source in (a, b) for i in range(4)])
    out = np.zeros_like(a)
    for place in range(4):
        pick = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = np.take_along_axis(both, (pick & np.uint32(7))[None].astype(np.int64), 0)[0]
        byte = np.where(pick & np.uint32(8), np.where(byte & np.uint32(128), 255, 0), byte).astype(np.uint32)
        out = out | byte << np.uint32(8 * place)
    return out


def lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    """Bit by bit the entry of `table` that the bits of a, b and c name, a the highest."""
    out = np.zeros_like(a)
    for entry in range(8):
        if int(table.flat[0]) >> entry & 1:
            bits = [x if entry >> place & 1 else ~x for place, x in ((2, a), (1, b), (0, c))]
            out |= bits[0] & bits[1] & bits[2]
    return out


OPERATIONS: dict[str, Callable[..., Any]] = {
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
}


def run(assembly: str, outputs: int, inputs: list[Any]) -> list[Any]:
    """Run assembly on registers of many threads at once."""
    held: Registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    shape = inputs[0]
    for line in assembly.replace("{", "").replace("}", "").split("\n"):
        text = line.strip().rstrip(";")
        if not text or text.startswith(".reg"):
            continue
        name, rest = text.split(" ", 1)
        target, *operands = [part.strip() for part in rest.split(",")]
        values = [held[x] if x in held else np.full_like(shape, int(x, 0)) for x in operands]
        held[target] = OPERATIONS[name](*values)
    return [held[f"${i}"] for i in range(outputs)]


def halves_of(registers: list[Any]) -> Any:
    """Registers of two fp16 levels each as (levels, threads)."""
    return np.concatenate([np.stack([r & 0xFFFF, r >> np.uint32(16)]) for r in registers]).astype(np.uint16)


def prepared(bits: int, dim: int) -> tuple[torch.Tensor, list[torch.Tensor], Any, list[Any]]:
    """Rows of random codes, their planes, the levels that they stand for, and a table's registers."""
    generator = torch.Generator().manual_seed(bits + dim)
    codes = torch.randint(0, 2**bits, (64, dim), generator=generator).to(torch.uint8)
    lut, table = levels.tables(_shared_codebook(bits, dim, CPU)[0], dim)
    stands_for = lut.view(torch.int16)[codes.int()].numpy().astype(np.uint16)
    words = [np.uint32(int(word) & 0xFFFFFFFF) for word in table[:, 0]]
    return codes, list(pack_bits(codes, bits)), stands_for, words


def test_the_assembly_has_no_other_instructions() -> None:
    for bits in (1, 2, 3, 4):
        for text in (levels._bytes(bits)[0], levels._words(bits)[0]):
            named = set(re.findall(r"^\s*([a-z]\w*\.\w+) ", text, flags=re.MULTILINE))
            assert named <= set(OPERATIONS)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bytes_of_a_row_become_its_levels(bits: int, dim: int) -> None:
    _, planes, expected, table = prepared(bits, dim)
    slices = 2 if bits == 4 else 4
    row = dim // slices
    held = np.stack([planes[0].numpy()[:, j % planes[0].shape[1]] for j in range(row)], axis=1).astype(np.uint32)
    high = np.stack([planes[-1].numpy()[:, j % planes[-1].shape[1]] for j in range(row)], axis=1).astype(np.uint32)
    late = levels.late_bytes(dim, CPU).numpy().astype(np.uint32)
    for first in range(0, row, 4):

        def joined(source: Any, first: int = first) -> Any:
            return sum(source[..., first + i] << np.uint32(8 * i) for i in range(4))

        inputs = [joined(held)]
        if bits == 3:
            inputs.append(joined(high))
        if bits in (1, 3):
            inputs.append(np.full_like(inputs[0], joined(late)))
        inputs += [np.full_like(inputs[0], word) for word in table for _ in range(4)]
        found = halves_of(run(levels._bytes(bits)[0], 2 * slices, inputs))
        for place in range(slices):
            for i in range(4):
                assert (found[4 * place + i] == expected[:, place * row + first + i]).all()


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_words_of_two_bytes_become_the_levels_of_both(bits: int, dim: int) -> None:
    _, planes, expected, table = prepared(bits, dim)
    slices = 2 if bits == 4 else 4
    row = dim // slices
    units = [plane.contiguous().view(torch.int16).numpy().astype(np.uint16).astype(np.uint32) for plane in planes]
    late = levels.late_words(dim, CPU).numpy().astype(np.uint16).astype(np.uint32)
    tokens = units[0].shape[0]
    assert plane_widths(bits)[0] == (2 if bits == 3 else bits)
    for unit in range(row // 2):
        # Four elements as ldmatrix leaves them: two tokens of one unit, then two tokens of it further on.
        def pairs(column: Any) -> list[Any]:
            quarter = tokens // 4
            parts = [column[i * quarter : (i + 1) * quarter] for i in range(4)]
            return [parts[0] | parts[1] << np.uint32(16), parts[2] | parts[3] << np.uint32(16)]

        inputs = pairs(units[0][:, unit % units[0].shape[1]])
        if bits == 3:
            inputs += pairs(units[1][:, unit % units[1].shape[1]])
        if bits in (1, 3):
            inputs += [np.full_like(inputs[0], late[unit] | late[unit] << np.uint32(16))] * 2
        inputs += [np.full_like(inputs[0], word) for word in table for _ in range(4)]
        found = halves_of(run(levels._words(bits)[0], 4 * slices, inputs))
        for byte in range(2):
            for place in range(slices):
                wanted = expected[:, place * row + 2 * unit + byte].reshape(4, -1)
                start = 4 * (byte * slices + place)
                assert (found[start : start + 4] == wanted).all()
