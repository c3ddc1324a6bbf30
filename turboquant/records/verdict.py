"""A comparison in words: sizes, quoted tokens and the verdict sentence. Plain text, for pages and the command line."""

from turboquant.records.comparison import CacheReport, Comparison
from turboquant.records.metrics import human_bytes


def against_16_bits(held: int, full: int) -> str:
    """Bytes held beside those of a 16-bit cache: `1.90 times smaller than a 16-bit cache`."""
    if not held:
        return f"nothing, where a 16-bit cache is {human_bytes(full)}"
    if f"{full / held:.2f}" == "1.00":
        return "as large as a 16-bit cache"
    if held < full:
        return f"{full / held:.2f} times smaller than a 16-bit cache"
    return f"larger by {human_bytes(held - full)} than a 16-bit cache"


def cache_size(report: CacheReport) -> str:
    """What a compressed cache holds beside a 16-bit cache, and where it is larger, why."""
    words = against_16_bits(report.bytes, report.full_precision_bytes)
    if not words.startswith("larger"):
        return f"{words}, everything counted"
    if 2 * report.compressed_tokens < report.tokens:
        return f"{words}: only {report.compressed_tokens:,} of {report.tokens:,} tokens are packed"
    return f"{words}: spare room, tables and exact tokens outweigh what packing saves"


def quoted(token: str | None) -> str:
    """A token in quotes, with its line breaks and tabs visible."""
    if token is None:
        return "the end"
    token = token.strip(" ") or token
    return "'" + token.replace("\n", "↵").replace("\t", "⇥") + "'"


def verdict(c: Comparison) -> str:
    """One sentence: where the two answers part."""
    report = c.compressed.report
    counts = len(c.original.token_ids), len(c.compressed.token_ids)
    stopped = "cancelled" in (c.original.finish, c.compressed.finish)
    if stopped and min(counts) == 0:
        return "Stopped before both answers had begun."
    if stopped and report.compressed_tokens == 0:
        return f"Stopped after {_tokens(max(counts))}; nothing was packed until then."
    if report.compressed_tokens == 0:
        return f"Nothing was packed: all {report.tokens:,} cached tokens stayed exact, so there is nothing to compare."
    start = f"Stopped after {_tokens(max(counts))}; " if stopped else ""
    return start + _parting(c, stopped)


def _parting(c: Comparison, stopped: bool) -> str:
    d = c.divergence
    if d is None and any(a != b for a, b in zip(c.original.token_ids, c.compressed.token_ids, strict=False)):
        text = "the sides answered different conversations, so their texts are not compared"
    elif d is None:
        text = f"identical for all {_tokens(min(len(c.original.token_ids), len(c.compressed.token_ids)))}"
        text = text.replace("for all", "so far, for") if stopped else text
    elif d.original is None or d.compressed is None:
        first, other = ("original", "compressed") if d.original is None else ("compressed", "original")
        token = d.compressed if d.original is None else d.original
        text = f"identical for {_tokens(d.index)}, then the {first} answer ends and the "
        text += f"{other} one goes on with {quoted(token)}"
    elif d.index == 0:
        text = f"different from the first token: {_change(d.original, d.compressed)}"
    else:
        text = f"identical for {_tokens(d.index)}, then {_change(d.original, d.compressed)}"
    return (text if stopped else text[0].upper() + text[1:]) + "."


def _change(original: str, compressed: str) -> str:
    """Both tokens quoted; where only spaces tell them apart, the spaces show."""
    pair = quoted(original), quoted(compressed)
    if pair[0] == pair[1]:
        pair = quoted(original.replace(" ", "␣")), quoted(compressed.replace(" ", "␣"))
    return f"{pair[0]} → {pair[1]}"


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"
