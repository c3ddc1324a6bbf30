"""Records as experiments leave them, with made-up figures: the more bits, the smaller the loss."""

import re
from pathlib import Path

from turboquant.records.comparison import CacheReport
from turboquant.records.environment import Environment
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.records.files import append_record

METHOD_NAMES = ("full", "turboquant:bits=4", "turboquant:bits=2", "turboquant-paper:bits=4", "turboquant-paper:bits=2")


def where(day: int = 1, commit: str | None = "abc123") -> Environment:
    return Environment(
        created=f"2026-01-{day:02}T00:00:00+00:00",
        commit=commit,
        device="cpu: Some Processor",
        cpu_threads=2,
        python="3.11",
        torch="2.13",
        transformers="5.23",
    )


def cache(bits: float, tokens: int = 1024) -> CacheReport:
    sizes = dict.fromkeys(("key_bytes", "value_bytes", "scale_bytes", "exact_bytes", "spare_bytes", "shared_bytes"), 0)
    return CacheReport(
        **sizes,
        cache_class="CompressedCache",
        tokens=tokens,
        compressed_tokens=tokens if bits < 16 else 0,
        exact_tokens=0,
        layers=2,
        compressed_layers=2,
        bytes=int(tokens * 64 * bits / 8),
        full_precision_bytes=tokens * 64 * 2,
        bits_per_value=bits,
        compression_ratio=16 / bits,
        payload_ratio=None,
    )


def record(
    method: str | None = "full", context: int = 1024, day: int = 1, experiment: str = "attention", **more
) -> ExperimentRecord:
    settings = {"context": context, "seed": 0, "filler": "sentences"} | more.pop("settings", {})
    model = more.pop("model", "tiny")
    bits = 16.0 if method == "full" else float((re.findall(r"bits=(\d)", method or "")[-1:] or ["4"])[0]) + 0.25
    loss = 0.0 if method == "full" else 2.0**-bits * context / 1024
    figures = {
        "compression_ratio": 16 / bits,
        "cosine_similarity": 1 - loss / 10,
        "top1_match_pct": 100 - 10 * loss,
        "top5_match_pct": 100 - 5 * loss,
    }
    metrics = {**figures, "kl_mean": loss, "same_top_pct": 100 - loss, "success_pct": 50.0, "success_full_pct": 100.0}
    fields = {"metrics": metrics, "cache": cache(bits, context), "environment": where(day)}
    cell = Cell(experiment=experiment, model=model, method=method, settings=settings)
    return ExperimentRecord(cell=cell, **(fields | more))


def grid(**more) -> list[ExperimentRecord]:
    return [record(method, context, **more) for method in METHOD_NAMES for context in (512, 1024, 2048)]


def write(path: Path, *records) -> Path:
    for one in records:
        append_record(one, path)
    return path
