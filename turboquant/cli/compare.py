"""`turboquant compare`: one prompt, several, or a conversation, answered with both caches while you watch."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turboquant.cli.app import (
    JsonOption,
    MethodOption,
    ModelOption,
    NoTemplateOption,
    OverwriteOption,
    Stop,
    WeightsOption,
    app,
    at_terminal,
    check_writable,
    fail,
    load,
    read_method,
    say,
)
from turboquant.cli.options import read_settings
from turboquant.cli.tables import cells, print_table
from turboquant.cli.tables import heads as head_row
from turboquant.records.metrics import human_bytes, metric
from turboquant.records.settings import MOST_ANSWER

if TYPE_CHECKING:
    from turboquant.records.base import Record
    from turboquant.records.comparison import Comparison, SideResult
    from turboquant.run.chat import Session, Turn
    from turboquant.run.compare import Event

MARK = "\ufeff"
"""The byte order mark that some programs write in front of text."""
HELP = """Type a prompt; both answers appear, then the figures.
/help    this text
/reset   begin a new conversation (with --chat)
/fork original, /fork compressed   make that side's conversation the context of both (with --chat)
/exit    end; so does Ctrl-D. Ctrl-C stops the answer in hand."""


@app.command()
def compare(
    text: Annotated[str | None, typer.Argument(help="The prompt; - reads all of standard input.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt, as an option.")] = None,
    model: ModelOption = "smollm2-135m",
    method: MethodOption = "turboquant:bits=4",
    weights: WeightsOption = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="One conversation; each side keeps its cache.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_ANSWER, help="Tokens of an answer, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, max=5.0, help="0: the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Sample from this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    rows: Annotated[
        int, typer.Option(min=0, max=MOST_ANSWER, help="Rows of the table of steps, evenly spaced; 0 for all.")
    ] = 12,
    no_chat_template: NoTemplateOption = False,
    output: Annotated[Path | None, typer.Option(help="Append the records to this file.")] = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Answer prompts with the full cache and with a compressed one, and say what changed.

    The record goes to --output, and as a JSON line to standard output where that is a pipe or a file. Without a prompt
    it asks for one after the other: at the terminal, or one a line from standard input.
    """
    from turboquant.records.comparison import Settings
    from turboquant.run.generate import PromptError, check_prompt

    if text is not None and prompt is not None:
        fail("the prompt is given twice, as an argument and by --prompt", 2)
    first = sys.stdin.read().removeprefix(MARK) if text == "-" else text if text is not None else prompt
    if first is not None:
        try:
            check_prompt(first)
        except PromptError as error:
            fail(error, 2)
    chosen = read_method(method)
    values = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    settings = read_settings(Settings, values)
    if output is not None:
        _check_output(output, chat, overwrite)
    loaded = load(model, weights)
    if output is not None and overwrite:
        output.write_bytes(b"")
    answerer = (_chat if chat else _single)(loaded, chosen, settings, not no_chat_template)
    asking = _Asking(answerer, rows, output, json_ or not at_terminal())
    if first is not None and not chat:
        if not asking.answer(first):
            raise typer.Exit(asking.code)
        return
    _loop(asking, first)


def _check_output(path: Path, chat: bool, overwrite: bool) -> None:
    """Leave with code 2 where the file cannot be written or holds something else."""
    from pydantic import ValidationError

    from turboquant.records.comparison import Comparison
    from turboquant.records.files import read_lines
    from turboquant.run.chat import Turn

    check_writable(path)
    if overwrite or not path.exists():
        return
    kind: type[Record] = Turn if chat else Comparison
    for number, line in read_lines(path)[0]:
        try:
            kind.model_validate_json(line)
        except ValidationError:
            what = "a turn of a conversation" if chat else "a comparison"
            fail(f"line {number} of {path} is not {what}: give another --output, or --overwrite", 2)


Ask = Callable[[str, "Callable[[Event], None]", Callable[[], bool]], "Comparison | Turn"]


@dataclass(frozen=True)
class _Answerer:
    """Puts a prompt to both sides; `session` is the conversation, if there is one."""

    ask: Ask
    session: "Session | None" = None


def _single(loaded: Any, method: Any, settings: Any, template: bool) -> _Answerer:
    from turboquant.run.compare import compare

    return _Answerer(
        lambda p, show, stop: compare(loaded, p, method, settings, chat=template, on_event=show, cancelled=stop)
    )


def _chat(loaded: Any, method: Any, settings: Any, template: bool) -> _Answerer:
    from turboquant.run.chat import Session

    session = Session(loaded, method, chat=template)
    return _Answerer(lambda p, show, stop: session.ask(p, settings, on_event=show, cancelled=stop), session)


class _StopAnswer(Stop):
    """Ctrl-C stops the answer in hand; the second time it leaves at once."""

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("stopping this answer (press Ctrl-C again to leave at once)")


@dataclass
class _Asking:
    """Answers prompts, keeps the records and prints what came of them; `code` is the exit code of the last failure."""

    answerer: _Answerer
    rows: int
    output: Path | None
    json: bool
    code: int = 0

    def answer(self, prompt: str) -> bool:
        """Answer one prompt; return False where it was refused or stopped, or its record could not be kept."""
        from turboquant.run.compare import PromptError

        with _StopAnswer().listening() as stop, _streaming() as show:
            try:
                result = self.answerer.ask(prompt, show, stop)
            except PromptError as error:
                say(f"turboquant: {error}")
                self.code = 2
                return False
        kept = self._keep(result)
        _print_result(result, self.rows)
        if self.json or not kept:
            typer.echo(result.model_dump_json())
        if stop.asked or not kept:
            self.code = 1
        return kept and not stop.asked

    def _keep(self, result: "Comparison | Turn") -> bool:
        """Append the record to the output, before anything is printed; return False where that cannot be."""
        from turboquant.records.files import append_record

        if self.output is None:
            return True
        try:
            append_record(result, self.output)
        except OSError as error:
            reason = error.strerror or error
            say(f"turboquant: {self.output} cannot be written: {reason}; the record follows on standard output")
            return False
        return True

    def command(self, line: str) -> None:
        """Carry out a command other than /exit."""
        name, _, rest = line.partition(" ")
        session = self.answerer.session
        if name == "/help":
            say(HELP)
        elif name in ("/reset", "/fork") and session is None:
            say(f"{name} needs a conversation: start with --chat")
        elif name == "/reset" and session is not None:
            session.reset()
            say("a new conversation, both caches empty")
        elif name == "/fork" and session is not None and rest.strip() in ("original", "compressed"):
            session.fork("original" if rest.strip() == "original" else "compressed")
            say(f"both sides go on from the {rest.strip()} conversation")
        else:
            say(f"unknown command {line!r}: /help lists them")


def _loop(asking: _Asking, first: str | None) -> None:
    """Answer prompt after prompt; from a pipe the exit code tells whether all of them were answered."""
    typing = sys.stdin.isatty()
    failed = first is not None and not asking.answer(first)
    if typing:
        say("Type a prompt; /help lists commands, Ctrl-D ends.")
    for line in _lines(typing):
        if line.strip() == "/exit":
            break
        if line.startswith("/"):
            asking.command(line.strip())
        elif line.strip():
            failed |= not asking.answer(line)
    if failed and not typing:
        raise typer.Exit(1)


def _lines(typing: bool) -> Iterator[str]:
    while True:
        try:
            line = input("\n> ") + "\n" if typing else sys.stdin.readline().removeprefix(MARK)
        except EOFError:
            return
        except KeyboardInterrupt:
            say("nothing to stop: /exit or Ctrl-D ends")
            continue
        if not line:
            return
        yield line.rstrip("\n")


@contextlib.contextmanager
def _streaming() -> "Iterator[Callable[[Event], None]]":
    """Show both texts side by side as they grow, where standard error is a terminal."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda event: None
        return
    texts, phase = {"original": "", "compressed": ""}, [""]

    def drawing() -> Columns:
        width, height = max(20, console.width // 2 - 1), max(6, console.height - 6)
        panels = []
        for side, text in texts.items():
            lines = Text(text).wrap(console, width - 4)
            shown = Text("\n").join(lines[-height:])
            panels.append(Panel(shown, title=side, subtitle=phase[0], width=width))
        return Columns(panels)

    with Live(console=console, transient=True, refresh_per_second=10) as live:

        def show(event: "Event") -> None:
            if event.kind == "phase":
                phase[0] = f"{event.text} {100 * (event.fraction or 0):.0f} %"
            elif event.side is not None:
                texts[event.side] = event.text
            live.update(drawing())

        yield show


def _print_result(result: "Comparison | Turn", rows: int) -> None:
    from turboquant.records.comparison import Comparison
    from turboquant.records.verdict import verdict

    comparison = result if isinstance(result, Comparison) else result.comparison
    packed = comparison.compressed.report.compressed_tokens > 0
    for title, side in (("full cache", comparison.original), (comparison.compressed.method, comparison.compressed)):
        typer.echo(f"--- {title}: {_side_line(side, packed)}\n{side.text}\n")
    if not isinstance(result, Comparison):
        _print_contexts(result)
    if packed:
        _print_quality(comparison)
        _print_steps(comparison, rows)
    for note in comparison.notes:
        typer.echo(note)
    if isinstance(result, Comparison) or result.same_history:
        typer.echo(verdict(comparison))


def _side_line(side: "SideResult", packed: bool) -> str:
    from turboquant.records.verdict import cache_size

    parts = [f"{len(side.token_ids)} tokens"]
    if side.tokens_per_second:
        parts.append(metric("tokens_per_second").said(side.tokens_per_second))
    if side.time_to_first_token_ms is not None:
        parts.append(f"first token after {metric('time_to_first_token_ms').said(side.time_to_first_token_ms)}")
    if packed:
        report = side.report
        parts.append(f"{human_bytes(report.bytes)} held for {report.tokens:,} tokens")
        if report.compressed_tokens:
            parts.append(f"{report.compressed_tokens:,} of them packed")
            parts.append(cache_size(report))
    if side.report.graph_bytes:
        parts.append(f"{human_bytes(side.report.graph_bytes)} more for captured steps")
    return ", ".join(parts)


def _print_contexts(turn: "Turn") -> None:
    for name, context in (("original", turn.original), ("compressed", turn.compressed)):
        how = "cache built anew" if context.rebuilt else f"{context.reused_tokens:,} tokens held"
        cut = f", {context.cropped_tokens:,} taken back" if context.cropped_tokens and not context.rebuilt else ""
        typer.echo(f"turn {turn.index + 1}, {name}: {how}{cut}, {context.fed_tokens:,} read")
    if not turn.kept:
        typer.echo("Stopped before both sides had begun to answer: the turn is undone.")


def _print_quality(comparison: "Comparison") -> None:
    heads, tokens = comparison.heads, comparison.tokens
    names = ("heads_at_risk_pct", "top1_match_pct", "top5_match_pct", "cosine_scores") if heads else ()
    figures = {f"served_{name}": getattr(heads and heads.served, name) for name in names}
    figures |= {"mean_kl": tokens.mean_kl, "same_top_pct": tokens.same_top_pct} if tokens else {}
    if known := {name: value for name, value in figures.items() if value is not None}:
        typer.echo("; ".join(f"{metric(name).title} {metric(name).said(value)}" for name, value in known.items()))


def _print_steps(comparison: "Comparison", rows: int) -> None:
    """A row a generation step: attention agreement and KL for the original answer, and what both caches held."""
    heads, tokens = comparison.heads, comparison.tokens
    figures: dict[str, Sequence[float | None]] = {}
    if heads is not None:
        served = heads.served
        figures["cosine_scores"] = served.per_step_cosine_scores
        figures["top1_match_pct"] = [None if v is None else 100 * v for v in served.per_step_top1]
        figures["top5_match_pct"] = [None if v is None else 100 * v for v in served.per_step_top5]
    if tokens is not None:
        figures["kl"] = tokens.kl
    figures |= {"full_bytes": comparison.original.cache_bytes, "bytes": comparison.compressed.cache_bytes}
    steps = [cells(dict(zip(figures, step, strict=True)), [*figures]) for step in zip_longest(*figures.values())]
    print_table(("step", *head_row([*figures])), [[str(i + 1), *steps[i]] for i in _spaced(len(steps), rows)])


def _spaced(count: int, rows: int) -> list[int]:
    """Return `rows` of `count` steps, evenly spaced with both ends; all of them for 0."""
    if not rows or count <= rows:
        return list(range(count))
    return sorted({round(i * (count - 1) / max(1, rows - 1)) for i in range(rows)})
