"""Time ways to launch the decode kernel against each other, in one process, on one GPU.

    python -m tests.gpu.plans 32,1,3,8 32,1,3,12,168 64,1,2,8 --bits 4 3 2

A way is TILE,WARPS,STAGES,PROGRAMS[,REGISTERS]: tokens a turn, warps a program, pipeline stages, programs a
multiprocessor, and the most registers a thread may have. Prints microseconds (medians) of all three launches.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch

from turboquant.experiments.kernel_speed import SHAPES, _sets, _Side, _timed, packed_segment
from turboquant.kernels.triton import attention
from turboquant.methods import parse_method

EXACT = 128


def plan_of(text: str, heads: int, tokens: int) -> attention.Plan:
    """Read a way to launch."""
    tile, warps, stages, programs, *registers = (int(part) for part in text.split(","))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    splits = max(1, min(processors * programs // heads, -(-tokens // (2 * tile))))
    return attention.Plan(tile, warps, stages, splits, registers[0] if registers else None)


@torch.no_grad()
def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plans", nargs="+")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=list(SHAPES))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--cases", nargs="+", default=["1x8192", "1x32768", "1x131072", "8x32768"])
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    shape, device = SHAPES[options.shape], torch.device("cuda")
    for case in options.cases:
        batch, context = map(int, case.split("x"))
        tokens, heads = context - EXACT, batch * shape.kv_heads
        states = torch.randn(2, batch, shape.kv_heads, EXACT, shape.head_dim, dtype=torch.bfloat16, device=device)
        query = torch.randn(batch, shape.query_heads, 1, shape.head_dim, dtype=torch.bfloat16, device=device)
        for bits in options.bits:
            packed: list[Any] = []
            while not packed or len(packed) < _sets(packed[0].keys.nbytes + packed[0].values.nbytes, device):
                method = parse_method(f"turboquant:bits={bits}")
                packed.append(packed_segment(method, shape, batch, tokens, torch.bfloat16, device))
            views = [(one.key_quantizer.view(one.keys), one.value_quantizer.view(one.values)) for one in packed]
            sides = {}
            for text in options.plans:
                launch, scaling = plan_of(text, heads, tokens), shape.head_dim**-0.5
                calls = [
                    partial(attention.attend, query, states[0], states[1], keys, values, scaling, launch=launch)
                    for keys, values in views
                ]
                sides[text] = _Side(calls, device)
            times = {text: np.median(values) for text, values in _timed(sides, options.repeats).items()}
            print(f"{case} {bits} bits:", "  ".join(f"{text} {us:.1f}" for text, us in times.items()), flush=True)


if __name__ == "__main__":
    main()
