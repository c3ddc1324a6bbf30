"""What each figure means, in one or two plain sentences; shown as the help of the figure."""

from turboquant.records.metrics import metric

KV_BYTES = (
    "Bytes the compressed cache really holds at the end, summed over every storage reachable from it: codes, scales, "
    "exact tokens, spare room and shared tables."
)
RATIO = (
    "The 16-bit baseline (2 bytes a value) divided by the bytes really held, everything counted. Payload is a "
    "formula: 16 divided by the bits of a code, without norms, exact tokens, spare room or tables."
)
BITS_PER_VALUE = (
    "Everything the cache holds, in bits, divided by the number of cached values. 16 is the uncompressed baseline."
)
AT_RISK = (
    "A head is at risk in a step when the token it attends to most changes once its keys are compressed. It equals "
    "one minus the top-1 match. A head at risk does not by itself change the next token."
)
RISK_MAP = (
    "For every head, in which share of the measured steps the token it attends to most changes. Packed positions only. "
    "Diamonds mark the most endangered heads."
)
COSINE = (
    "How alike a head's attention is under full and compressed keys; 1 is the same. It can look fine while the "
    "most attended token changes, so read it next to the top-1 match and the KL."
)
TOP1 = metric("top1_match_pct").definition
TOP5 = metric("top5_match_pct").definition
KL = (
    "How far the next-token distribution moves when the original answer is read through the compressed cache, in nats; "
    "0 is no change. Mean over the answer's tokens."
)
SAME_TOP = (
    "How often the most likely next token is the same when the original answer is read through the compressed cache."
)
SPEED = "New tokens per second of the compressed side, without the prompt. Both sides took turns on the same machine."
FIRST_TOKEN = "Time from the start of the prompt's reading to the first new token of the compressed side."
PACKED = (
    "Packed: only over cached tokens that are really compressed. Served: over all tokens, the exact window included, "
    "as the model sees them."
)
STRIP = (
    "The original answer, token by token. The first token where the compressed answer differs stands between arrows. "
    "Brackets mark tokens where the compressed cache would have made another token the most likely one."
)

# --- Heads
HEAD_METRIC = (
    "Top-1 miss: share of steps in which the most attended token changes. Top-5 miss: it is not even among the five "
    "most attended ones. Cosines: how alike scores, or softmax weights, are; they can look fine while the top changes."
)
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
    "spare room and tables. The same sum as a measurement would find after the context was read in one call."
)
LONGEST = (
    "The most tokens a row for which weights, cache and what is kept free fit in the GPU's memory; one more does not. "
    "It may be more than the model has positions for."
)
LARGEST_BATCH = "The most rows of the chosen context whose caches fit beside the weights; 0 when not even one does."
WEIGHTS = (
    "Parameters times bits. The number of parameters is estimated from the config (embeddings, attention, MLP, "
    "experts; biases and norms are left out), which is right to about a thousandth for the models offered here."
)
GROWTH = (
    "Lines are estimates; both axes are logarithmic. Above the dashed line weights and cache no longer fit in the GPU; "
    "filled markers show where each cache reaches it. Open markers are measured runs of a model of this shape."
)
CACHE_PARTS = (
    "Codes are the packed keys and values. Scales and means are what is stored to read them back. Exact tokens are not "
    "packed at all. Spare room is held in advance. Tables (rotations, codebooks) serve all rows and tokens."
)
METHODS_TABLE = (
    "Each method with the chosen bits and its own defaults. What they do to quality stands on the Methods page."
)
ROOM_TO_GROW = (
    "A cache that grows token by token keeps up to a sixteenth more room behind its codes. Off: the context is read in "
    "one call, which leaves none."
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
SEED_METRICS = (
    "KL: how far the next-token distribution moves, mean over the texts' tokens. Same top token: how often the most "
    "likely next token stays the same. Perplexity change: of the texts. Identical answers: share of greedy answers "
    "without any difference. First divergence: tokens before the answer first differs; all of them where it never does."
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
BENCH_FIRST = "Time from the start of the prompt's reading to the first new token: median of the timed rounds."
BENCH_PARTS = (
    "Encode: time spent packing keys and values. Attention: time spent on scores, softmax and weighted values in all "
    "layers. Both come from one extra run with instruments, a step at a time; the whole step is timed without them."
)
BENCH_MEMORY = (
    "Bytes held by the cache at the end. Peak is how far memory grew during the run, activations included: what the "
    "allocator reached on a GPU, the process's resident memory, sampled, on a CPU."
)
BYTE_FLOOR = (
    "Bytes held, divided by the byte floor. The floor is a formula: every cached value at the bits of its code alone, "
    "without scales, exact tokens, spare room or tables. 1 is the floor; nothing can go below it at these bits. It is "
    "about memory held, not about the time in which a kernel reads it."
)

# --- Needle
NEEDLE_FOUND = (
    "In how many of the prompts the answer held the hidden fact. Below it stands the Wilson interval at a confidence "
    "of 0.95: few prompts give a wide one. Depth 0 is the start of the text, 1 its end, next to the question."
)
NEEDLE_CHANGE = "The compressed cache's share less the full cache's, in percentage points. Below 0, facts were lost."
NEEDLE_TOTAL = "All lengths and depths together. Bits held is the mean over them of everything the cache holds."

# --- Methods
PARETO = (
    "One point a method; lower left is better. On the dotted front are the methods that no other one beats: nobody has "
    "both fewer bits and less KL."
)
METHOD_KL = metric("kl_mean").definition
METHOD_SAME_TOP = metric("same_top_pct").definition
METHOD_PPL = metric("delta_ppl_pct").definition
METHOD_HELD = metric("bits_per_value").definition
METHOD_PACKED = metric("packed_bits_per_value").definition
METHOD_SMALLER = metric("compression_ratio").definition
RECOMMENDED = (
    "The smallest cache, at the model's longest context (at most 32,768 tokens), whose predictions stay within both "
    "limits on both halves of the text. What is smaller failed, or has no more bits than one that failed."
)
HELD_OUT = (
    "The half of the text that took no part in choosing. A setting that stays within the limits on the first half and "
    "not on this one is passed over."
)
METHOD_FRONT = "Whether no other method has both fewer of the bits shown in the plot and less KL."
