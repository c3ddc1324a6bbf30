"""What each figure means, in one or two plain sentences; shown as the help of the figure."""

KV_BYTES = (
    "Bytes the compressed cache really holds at the end, summed over every storage reachable from it: codes, scales, "
    "exact tokens, spare capacity and shared tables."
)
RATIO = (
    "The 16-bit baseline (2 bytes a value) divided by the bytes really held, everything counted. Payload is a "
    "formula: 16 divided by the bits of a code, without norms, exact tokens, spare capacity or tables."
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
TOP1 = "How often the token a head attends to most is the same under full and compressed keys."
TOP5 = (
    "How often the token a head attends to most under full keys is among its five most attended ones under compressed "
    "keys."
)
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
