"""What charts, tables and estimates mean, in one or two plain sentences; shown as their help.

What a metric means stands in the catalogue, `turboquant.records.metrics`; `FIGURES` says where which one is shown.
"""

from turboquant.records.metrics import metric

FIGURES = {
    "Compare and others": (
        *("bytes", "compression_ratio", "payload_ratio", "bits_per_value", "tokens_per_second"),
        *("time_to_first_token_ms", "heads_at_risk_pct", "top1_match_pct", "top5_match_pct", "cosine_scores"),
        *("cosine_weights", "mean_kl", "same_top_pct"),
    ),
    "Heads": ("top1_miss_pct", "top5_miss_pct"),
    "Seeds": ("identical_pct", "agreed_tokens"),
    "Benchmarks": (
        *("speed_ratio", "encode_prompt_ms", "encode_step_ms", "encode_share_pct", "attention_prompt_ms"),
        *("attention_step_ms", "peak_memory_bytes", "byte_floor"),
    ),
    "Needle": ("success_pct",),
    "Methods": ("kl_mean", "delta_ppl_pct", "packed_bits_per_value", "estimated_bytes"),
}
"""Metrics by the page where they are met first."""

RISK_MAP = (
    "For every head, in which share of the measured steps the token it attends to most changes. Packed positions only. "
    "Diamonds mark the most endangered heads."
)
PACKED = (
    "Packed: only over cached tokens that are really compressed. Served: over all tokens, the exact window included, "
    "as the model sees them."
)
STRIP = (
    "The original answer, token by token. The first token where the compressed answer differs stands between arrows. "
    "Brackets mark tokens where the compressed cache would have made another token the most likely one."
)

# --- Heads
QUERY_POSITION = (
    "Which token asks. Its query is scored against the keys of all earlier tokens and its own; scores are kept at "
    "a few positions, evenly over the answer."
)
ATTENTION = (
    "Softmax of the head's scores: how it shares its attention among the tokens. Packed only: among the packed tokens "
    "alone. As served: among all tokens, as the model sees them."
)
HEAD_SCORES = (
    "Query times key, scaled as the model does. Two scores that differ by 0.7 differ by a factor of two in weight. Off "
    "the diagonal lies what compression did to a token's key."
)
MARGIN = (
    "Margin: how far the best packed token's score stands above the second best, mean over the steps. Error: root mean "
    "square change of the packed tokens' scores. A head whose error is about as large as its margin flips."
)

# --- Memory
KV_ESTIMATE = (
    "Estimated bytes of the cache at the chosen context and batch, everything counted: codes, scales, exact tokens, "
    "spare room, tables and recurrent states. The same sum as a measurement would find after the context was read in "
    "one call."
)
LONGEST = (
    "The most tokens a row for which weights, cache and what is kept free fit in the GPU's memory; one more does not. "
    "It may be more than the model has positions for."
)
LARGEST_BATCH = "The most rows of the chosen context whose caches fit beside the weights; 0 when not even one does."
WEIGHTS = (
    "Parameters times bits. The parameters are those of transformers' model of this config; of an image-text model "
    "those of its language model, where that is one by itself."
)
GROWTH = (
    "Lines are estimates; both axes are logarithmic. Above the dashed line weights and cache no longer fit in the GPU; "
    "filled markers show where each cache reaches it. Open markers are measured runs of a model of this shape."
)
CACHE_PARTS = (
    "Codes are the packed keys and values. Scales and means are what is stored to read them back. Exact tokens are not "
    "packed at all. Spare room is held in advance. Tables (rotations, codebooks) serve all rows and tokens. "
    "Recurrent layers of hybrids hold states of a fixed size, which are never compressed."
)
METHODS_TABLE = (
    "Each method with the chosen bits and its own defaults. What they do to quality stands on the Methods page."
)
ROOM_TO_GROW = (
    "A cache that grows token by token keeps up to a sixteenth more room behind its codes, and held up to one block "
    "more exact tokens before it last packed. Off: the context is read in one call, which leaves none."
)

# --- Theory
LOST_LENGTH = (
    "Squared length of what is missing after a unit vector was rounded and read back, as a share of its own. "
    "The paper calls it the mean squared error of a vector."
)
GAIN = (
    "The mean estimated inner product divided by the true one. 1 is unbiased; below 1 every score shrinks by the same "
    "share."
)
PRODUCT_ERROR = (
    "Mean squared error of the inner product of a key with a random query, both of length 1, times the dimensions d. "
    "Without QJL it equals the lost squared length."
)
RECALL = (
    "How often the key with the highest true score still has the highest score after rounding, among keys some of "
    "which were placed close to it. It is what a softmax sees when it picks one token."
)

# --- Session
TURN_BYTES = (
    "Bytes both caches really hold at the end of each turn. The compressed one keeps its first and its most recent "
    "tokens exact, in the model's dtype, and needs its tables once: in a short conversation these outweigh the codes."
)
TURN_KL = (
    "How far the compressed cache's next-token distribution is from the full one's, averaged over the original answer "
    "of each turn (teacher forced). Where it rises from turn to turn, the compressed cache drifts."
)
TURN_SAME = (
    "Tokens from the start of the two answers that are the same. Turns whose sides answered different conversations "
    "are left out: there, different texts say nothing about the cache."
)

# --- Seeds
SEED_STRIP = (
    "A rotation seed chooses the random rotation that every vector goes through before it is rounded; it is arbitrary, "
    "so what depends on it is luck. Each dot is one cell. Beside the dots stand the mean and its interval over seeds "
    "(Student's t); it holds for these texts and prompts."
)
SEED_GAPS = (
    "Pairs are equal things measured under both settings. The interval is a bootstrap over pairs, p comes from a "
    "permutation test with flipped signs. A difference is called real where both exclude none. Answers to one prompt "
    "resemble each other, so what is said over answers holds for these prompts."
)
DIVERGENCE_HISTOGRAM = (
    "The place of the first token that differs from the full cache's answer, one count an answer. Sampled answers draw "
    "the same random numbers on both sides, so that a difference is the compression's."
)

# --- Benchmarks
BENCH_SPEED = (
    "New tokens of all rows a second, the first of each row left out: median of the timed rounds; whiskers are the "
    "range from the 20th to the 80th percentile. All sides take turns in every round."
)

# --- Needle
NEEDLE_FOUND = (
    f"{metric('success_pct').definition} Below it stands the Wilson interval at a confidence "
    "of 0.95: few prompts give a wide one. Depth 0 is the start of the text, 1 its end, next to the question."
)
NEEDLE_CHANGE = "The compressed cache's share less the full cache's, in percentage points. Below 0, facts were lost."
NEEDLE_TOTAL = "All lengths and depths together. Bits held is the mean over them of everything the cache holds."

# --- Methods
PARETO = (
    "One point a method; lower left is better. On the dotted front are the methods that no other one beats: nobody has "
    "both fewer bits and less KL."
)
RECOMMENDED = (
    "The smallest cache, at the model's longest context (at most 32,768 tokens), whose predictions stay within both "
    "limits on both halves of the text. What is smaller failed, or has no more bits than one that failed."
)
HELD_OUT = (
    "The half of the text that took no part in choosing. A setting that stays within the limits on the first half and "
    "not on this one is passed over."
)
METHOD_FRONT = "Whether no other method has both fewer of the bits shown in the plot and less KL."
