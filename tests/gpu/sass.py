"""Compile the kernels for a GPU that need not be there, and count what the inner loops of decoding issue.

    python -m tests.gpu.sass turboquant:bits=4 turboquant:bits=2 --head-dim 128 --groups 4

Prints registers, spilled bytes (stack), shared memory, and per element of keys and values the instructions of the loop,
those of them for the logic unit, and the dots. Reads the machine code with the disassembler in Triton's wheel.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from turboquant.kernels.scoring import Scoring
from turboquant.kernels.triton import attention, encode, prefill, scores
from turboquant.methods import parse_method

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LOGIC = {
    "LOP3", "PRMT", "SHF", "ISETP", "FSETP", "FMNMX", "SEL", "FSEL", "VIMNMX", "IADD3", "LEA", "SGXT", "BMSK", "VIADD",
    "PLOP3", "FSET",
}  # fmt: skip


class _Absent:
    """Stands for a driver, so that nothing asks for a device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


Compiled = list[tuple[str, Any, dict[str, Any]]]


def compile_only(capability: int) -> Compiled:
    """From now on kernels are compiled and not launched; returns the list that they are added to."""
    driver.set_active(_Absent(capability))
    found: Compiled = []
    run = jit.JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, kernel, options))
        return kernel

    jit.JITFunction.run = record
    attention._launches_early = lambda device: capability >= 90  # type: ignore[assignment]
    return found


def _tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def longest_loop(code: str) -> list[str]:
    """Return the instructions between a label and the branch back to it, of the longest such loop that has dots."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    best: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", line):
            lines.append(found[1])
            target = re.search(r"`\((\.L_\w+)\)", line)
            if found[1].startswith("BRA") and target and target[1] in labels:
                body = lines[labels[target[1]] :]
                best = max(best, body, key=len) if any(op.startswith("HMMA") for op in body) else best
    return best


def describe(name: str, kernel: Any, elements: float) -> str:
    """One line about a compiled kernel; `elements` is how many a thread reads in one turn of the loop."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", kernel.asm["cubin"], "-res-usage"))
    assert usage is not None
    line = f"{name:10} registers {usage[1]:>3}, spilled {usage[2]:>4} B, shared {kernel.metadata.shared:>6} B"
    body = [op.split(".")[0] for op in longest_loop(_tool("nvdisasm", kernel.asm["cubin"], "-c"))]
    if body and elements:
        logic, counts = sum(op in LOGIC for op in body), Counter(body)
        line += f", loop {len(body)}: {len(body) / elements:.2f} an element, {logic / elements:.2f} logic"
        line += f", {counts['HMMA']} dots; {', '.join(f'{op} {n}' for op, n in counts.most_common(6))}"
    return line


def _unattended(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Take the place of torch's attention, which needs the GPU."""
    return query.clone(), query.new_zeros(query.shape[:3], dtype=torch.float32)


def launch_all(spec: str, dim: int, groups: int, tile: int | None, registers: int | None) -> None:
    """Call everything that launches a kernel for this method."""
    quantizers = parse_method(spec).quantizers(dim, dim, 0, torch.device("cpu"))
    states: list[Tensor] = [torch.randn(1, 2, 1024, dim, dtype=torch.bfloat16) for _ in range(2)]
    keys, values = (one.view(one.quantize(x)) for one, x in zip(quantizers, states, strict=True))
    exact = torch.randn(1, 2, 100, dim, dtype=torch.bfloat16)
    query = torch.randn(1, 2 * groups, 1, dim, dtype=torch.bfloat16)
    plan = attention.plan(keys, 2, 1024, groups)
    launch = attention.Plan(tile or plan.tile, plan.warps, plan.stages, 4, registers)
    attention.attend(query, exact, exact, keys, values, Scoring(dim**-0.5), launch=launch)
    if scores.unsupported(query, keys) is None:
        scores.scores(query, keys, dim**-0.5)
    if keys.signs is None:
        prefill.attend(query.expand(-1, -1, 16, -1).contiguous(), exact, exact, keys, values, Scoring(dim**-0.5))
    if encode.unsupported(states[0], keys, values) is None:
        encode.encode(states[0], states[1], keys, values)


def main() -> None:
    """Print a line for every kernel of every method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--groups", type=int, default=4, help="query heads a KV head")
    parser.add_argument("--tile", type=int, help="tokens a turn of the loop; chosen as for a launch if not given")
    parser.add_argument("--registers", type=int, help="the most a thread may have")
    parser.add_argument("--capability", type=int, default=90)
    options = parser.parse_args()
    found, dim = compile_only(options.capability), options.head_dim
    prefill._attention = _unattended  # type: ignore[assignment]
    for spec in options.methods:
        found.clear()
        launch_all(spec, dim, options.groups, options.tile, options.registers)
        print(spec)
        for name, kernel, launched in {id(one[1]): one for one in found}.values():
            sides = {"split": 2, "score_keys": 1}.get(name, 0)
            elements = launched["BN"] * dim * sides / 32 / launched["num_warps"] if sides else 0
            print(" ", describe(name, kernel, elements))


if __name__ == "__main__":
    main()
