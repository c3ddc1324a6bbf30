"""Tables for the README, made from the records in `results/*.jsonl`."""

import re
from pathlib import Path

from turboquant.results import DecodeBench

START, END = "<!-- results: {name} -->", "<!-- end of results -->"


def load_decode_benches(folder: Path) -> list[DecodeBench]:
    """Read every decode benchmark, the newest of each model, method, size and device."""
    newest: dict[tuple[str, str, int, int, str], DecodeBench] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if '"kind":"bench-decode"' not in line:
                continue
            record = DecodeBench.model_validate_json(line)
            key = (
                record.model.name,
                record.method,
                record.prompt_tokens,
                record.new_tokens,
                record.environment.device,
            )
            if key not in newest or record.environment.created >= newest[key].environment.created:
                newest[key] = record
    return list(newest.values())


def decode_table(records: list[DecodeBench]) -> str:
    """Return a Markdown table of decode speed, with hardware and commit."""
    rows = [
        "| model, weights | method | prompt + new tokens | full, tokens/s | compressed, tokens/s | ratio "
        "| bits a value held | measured on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(records, key=lambda r: (r.model.name, r.prompt_tokens, r.method)):
        where = f"{r.environment.device}, {r.environment.cpu_threads} threads, {r.environment.created[:10]}"
        rows.append(
            f"| {r.model.name}, {r.model.weights} | `{r.method}` | {r.prompt_tokens} + {r.new_tokens} "
            f"| {r.full_tokens_per_second.median:.1f} | {r.tokens_per_second.median:.1f} | {r.ratio:.2f} "
            f"| {r.report.bits_per_value:.2f} | {where}, {r.environment.commit or 'no commit'} |"
        )
    return "\n".join(rows)


def fill_readme(readme: str, folder: Path) -> str:
    """Return the README's text with its results table made anew.

    Raises:
        ValueError: If the markers are missing.
    """
    start = START.format(name="decode")
    pattern = re.compile(re.escape(start) + r".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(readme):
        raise ValueError(f"the README has no place for results: {start} ... {END} is missing")
    table = decode_table(load_decode_benches(folder))
    return pattern.sub(lambda _: f"{start}\n{table}\n{END}", readme)
