"""Comparisons made by hand, for pages and exports: no model runs here and no number in them was measured."""

from turboquant.records.comparison import (
    CacheReport,
    Comparison,
    Divergence,
    HeadMetrics,
    HeadScores,
    ModelInfo,
    Settings,
    SideResult,
    TokenMetrics,
)
from turboquant.records.environment import Environment

LAYERS, HEADS = 3, 4


def report(cache_class: str, packed: int, tokens: int) -> CacheReport:
    return CacheReport(
        cache_class=cache_class,
        tokens=tokens,
        compressed_tokens=packed,
        exact_tokens=tokens - packed,
        layers=LAYERS,
        compressed_layers=LAYERS if packed else 0,
        bytes=tokens * 40 if packed else tokens * 160,
        key_bytes=packed * 10,
        value_bytes=packed * 10,
        scale_bytes=packed * 2,
        exact_bytes=(tokens - packed) * 160,
        spare_bytes=64,
        shared_bytes=128,
        full_precision_bytes=tokens * 160,
        bits_per_value=4.6 if packed else 16.0,
        compression_ratio=4.0 if packed else 1.0,
        payload_ratio=4.0 if packed else None,
    )


def scores(steps: int) -> HeadScores:
    table: list[list[float | None]] = [
        [1.0 - 0.05 * (layer + head) for head in range(HEADS)] for layer in range(LAYERS)
    ]
    line: list[float | None] = [None, *[0.9] * (steps - 1)]
    return HeadScores(
        per_head_cosine_scores=table,
        per_head_cosine_weights=table,
        per_head_top1=table,
        per_head_top5=table,
        per_step_cosine_scores=line,
        per_step_cosine_weights=line,
        per_step_top1=line,
        per_step_top5=line,
        cosine_scores=0.99,
        cosine_weights=0.98,
        top1_match_pct=87.5,
        top5_match_pct=91.0,
        heads_at_risk_pct=12.5,
    )


def comparison(
    texts: tuple[str, ...] = (" the", " river", " runs", " low"),
    other: tuple[str, ...] = (" the", " stream", " runs", " low"),
    *,
    packed: int = 96,
    finish: str = "stop",
    prompt: str = "Where does the water go?",
    method: str = "turboquant:bits=4",
    measured: bool = True,
) -> Comparison:
    ids, other_ids = [hash(t) % 1000 for t in texts], [hash(t) % 1000 for t in other]
    place = next((i for i in range(max(len(texts), len(other))) if texts[i : i + 1] != other[i : i + 1]), None)
    tokens = packed + 20
    count = len(texts)
    quality = measured and packed > 0 and count > 0
    sides = [
        SideResult(
            method=name,
            text="".join(parts),
            token_ids=numbers,
            token_texts=list(parts),
            finish=finish,
            time_to_first_token_ms=12.0,
            tokens_per_second=30.0,
            step_ms=[33.0] * len(parts),
            cache_bytes=[1000 * (i + 1) for i in range(len(parts))],
            report=report(cls, part, tokens),
        )
        for name, parts, numbers, cls, part in (
            ("full", texts, ids, "DynamicCache", 0),
            (method, other, other_ids, "QuantizedCache", packed),
        )
    ]
    return Comparison(
        environment=Environment(
            created="2026-01-02T03:04:05+00:00",
            commit="abc1234",
            device="cpu: test",
            cpu_threads=2,
            python="3",
            torch="2",
            transformers="5",
        ),
        model=ModelInfo(
            name="tiny",
            hub_id="test/tiny",
            revision=None,
            weights="fp32",
            device="cpu",
            dtype="float32",
            layers=LAYERS,
            query_heads=HEADS,
            kv_heads=2,
            head_dim=16,
        ),
        prompt=prompt,
        chat=True,
        prompt_tokens=20,
        settings=Settings(max_new_tokens=128, temperature=0.0, top_p=1.0, top_k=0, seed=0),
        original=sides[0],
        compressed=sides[1],
        divergence=None
        if place is None
        else Divergence(
            index=place,
            original=texts[place] if place < len(texts) else None,
            compressed=other[place] if place < len(other) else None,
        ),
        heads=HeadMetrics(
            positions=list(range(20, 20 + count + 1)),
            packed_tokens=list(range(count + 1)),
            layer_indices=list(range(LAYERS)),
            served=scores(count + 1),
            packed=scores(count + 1),
        )
        if quality
        else None,
        tokens=TokenMetrics(
            kl=[0.01 * (i + 1) for i in range(count)],
            same_top=[i != 1 for i in range(count)],
            probability_full=[0.5] * count,
            probability_compressed=[0.4] * count,
            mean_kl=0.025,
            same_top_pct=75.0,
        )
        if quality
        else None,
        notes=[] if packed else ["No token was packed: the 20 cached tokens fit in 4 sinks and 64 recent tokens."],
    )
