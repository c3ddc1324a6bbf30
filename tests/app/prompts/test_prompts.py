"""Reading sets of prompts: what is read, what is refused and in which words; and the rows of results."""

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.config import AppConfig
from app.engine.job import Job
from app.prompts.charts import kl_per_prompt
from app.prompts.request import MAX_BYTES, example_set, prompts_request, read_file, read_typed
from app.prompts.rows import rows, table, to_csv, to_json, to_markdown
from app.tab.requests import Choices, RequestError
from app.tab.runs import Run, import_run
from tests.support.asked import prompts_asked
from tests.support.factory import comparison
from turboquant.records.comparison import Comparison, Settings

CONFIG = AppConfig(max_prompts=4, max_prompt_chars=50)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("one", ("one",)),
        ("one\ntwo\r\nthree\n", ("one", "two", "three")),
        ("\n\none\nmore of one\n\n\n two\n", ("one\nmore of one", "two")),
        ("one\n\nstill one\n---\ntwo", ("one\n\nstill one", "two")),
        ("---\none\n---\n---\n", ("one",)),
    ],
)
def test_typed_text_is_lines_or_blocks(text: str, prompts: tuple[str, ...]) -> None:
    assert read_typed(text, CONFIG) == prompts
    assert read_file(text.encode(), "set.TXT", CONFIG) == prompts


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.csv", 'id,Prompt\n1,hello\n2,"two\nlines, and a comma"\n\n', ("hello", "two\nlines, and a comma")),
        ("a.csv", 'first\n"second, with more"\nthird; or not\n', ("first", "second, with more", "third; or not")),
        ("a.csv", "id;prompt\n1;hello, you\n2;'so'\n", ("hello, you", "'so'")),
        ("a.csv", "id\tPROMPT \tx\n1\thello; you, \t\n\n", ("hello; you,",)),
        ("a.csv", "prompt|id\nhello|1\n", ("hello",)),
        ("a.csv", 'sep=;\nid;prompt\n1;"a;b"\n', ("a;b",)),
        ("a.csv", '\ufeff"SEP=\t"\r\nprompt\tid\r\na,b\t1\r\n', ("a,b",)),
        ("a.csv", "sep=;\none\ntwo, three\n", ("one", "two, three")),
        ("a.csv", "prompt\rone\rtwo\r", ("one", "two")),
        ("a.csv", "id,prompt\n1,one,,\n2,two,\n", ("one", "two")),
        ("a.csv", "text; more\nand\n", ("text; more", "and")),
        ("a.csv", "a; b\n", ("a; b",)),
        ("a.jsonl", '"one"\r"two"\r', ("one", "two")),
        ("a.jsonl", '"one\u2028two"\n"one\u2028two"\n', ("one\u2028two",)),
        ("a.csv", "\ufeffprompt\nhello\n", ("hello",)),
        ("a.jsonl", '{"prompt": "one", "id": 3}\n\n"two\\nlines"\n', ("one", "two\nlines")),
    ],
)
def test_files_are_read(name: str, text: str, prompts: tuple[str, ...]) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert read_file(text.removeprefix("\ufeff").encode(encoding), name, CONFIG) == prompts


def test_a_prompt_that_is_given_twice_counts_once() -> None:
    assert read_typed("one\ntwo\n one\n", CONFIG) == ("one", "two")
    assert read_file(b"prompt\none\ntwo\none\n", "a.csv", CONFIG) == ("one", "two")
    assert prompts_request(Choices(), ["one", "two", "one"], CONFIG).prompts == ("one", "two")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"", "no prompt"),
        ("a.txt", b"\n \n---\n", "no prompt"),
        ("a.txt", b"fine\nbad \xff", "Line 2: the file must be UTF-8"),
        ("a.txt", b"one\n" + b"x" * 51, "Line 2: the prompt has 51 characters; the limit is 50"),
        ("a.txt", b"\n\n---\none\n---\n" + b"x" * 51, "Line 6: the prompt has 51"),
        ("a.txt", b"1\n2\n3\n4\n5", "There are 5 prompts; the limit here is 4"),
        ("a.txt", b"one\ntw\x00o", "Line 2: .*null characters"),
        ("a.txt", b" " * (MAX_BYTES + 1), "the limit is 1,000,000"),
        ("a.pkl", b"\x80\x04.", "must end in .txt, .csv, .jsonl"),
        ("a", b"one", "must end in"),
        ("a.csv", b'prompt\none\n"open', "Line 3: this is no CSV"),
        ("a.csv", b"id,prompt\n1,one\n2\n", "Line 3: the prompt of a row must not be empty"),
        ("a.csv", b'id,prompt\n1,"one\ntwo"\n2,\n', "Line 4: the prompt of a row"),
        ("a.csv", b"prompt\n", "no prompt"),
        ("a.csv", b"sep=;\n", "no prompt"),
        ("a.csv", b"sep=x\nprompt\n1", "Line 1: the separator must be a comma, semicolon, tab or bar, got 'x'"),
        ("a.csv", b"id,text\n1,one\n", "Line 1: no column is named prompt; the first row, .* commas, has 'id', 'text'"),
        ("a.csv", b"id;text\n1;one\n2;two, three\n", "Line 1: no column is named prompt; .* by semicolons"),
        ("a.csv", b"\nid\ttext\n1\tone\n", "Line 2: no column is named prompt; .* by tabs, has 'id', 'text'"),
        ("a.csv", b"why, oh why\n", "no column is named prompt; .*or put texts with commas into quotes"),
        ("a.csv", b"first\nsecond,with more\n", "Line 2: the row has 2 cells and the first row 1; a prompt with comma"),
        ("a.csv", b"sep=;\nprompt;id\none;2;three\n", "Line 3: the row has 3 cells and the first row 2; .*semicolons"),
        ("a.csv", b"id;prompt\n1;\n", "Line 2: the prompt of a row must not be empty"),
        ("a.csv", "prompt\none\n".encode("utf-16-le"), "null characters|the prompt must be text"),
        ("a.txt", b"\xff\xfea", "the file must be UTF-8 text, or UTF-16 with its byte order mark"),
        ("a.jsonl", b'"one"\nnull\n', "Line 2: each line must be a text in quotes or .*, got None"),
        ("a.jsonl", b'{"prompt": 7}\n', "Line 1: .*and not empty, got {'prompt': 7}"),
        ("a.jsonl", b'["one", "two"]\n', "Line 1: each line must be a text in quotes"),
        ("a.jsonl", b'"one"\n{oops}\n', "Line 2: each line must be JSON"),
        ("a.jsonl", b'"one"\n{"text": "two"}\n', "Line 2: each line must be a text"),
        ("a.jsonl", b"[" * 100_000, "Line 1: each line must be JSON"),
        ("a.jsonl", b'"\\ud800"', "half characters"),
    ],
)
def test_a_bad_file_gives_one_sentence_with_line_and_rule(name: str, data: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        read_file(data, name, CONFIG)
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "x"]), inner, max_size=2),
    max_leaves=5,
)
lines = st.lists(json_values.map(json.dumps), max_size=5).map(lambda parts: "\n".join(parts).encode())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode) | lines, st.sampled_from(["txt", "csv", "jsonl"]))
@example(b'"' + b"x" * 140_000, "csv")
@example(b"1" * 5000, "jsonl")
def test_any_file_is_read_within_the_limits_or_refused(data: bytes, suffix: str) -> None:
    try:
        found = read_file(data, f"set.{suffix}", CONFIG)
    except RequestError:
        return
    assert 1 <= len(found) <= CONFIG.max_prompts
    assert all(prompt.strip() and len(prompt) <= CONFIG.max_prompt_chars for prompt in found)
    for prompt in found:
        prompt.encode("utf-8")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=120))
def test_any_typed_text_is_read_or_refused(text: str) -> None:
    try:
        assert read_typed(text, CONFIG)
    except RequestError:
        return


def test_the_report_says_how_large_a_cache_is_in_words(ran: tuple[Job, list[Run]]) -> None:
    text = to_markdown(rows(*ran))
    assert "the cache is: 4.00 times smaller than a 16-bit cache, everything counted" in text
    assert "times smaller:" not in text


def test_the_request_is_checked_once_more_on_the_server() -> None:
    asked = prompts_request(Choices(bits=3), example_set(), AppConfig())
    assert asked.items == len(example_set())
    assert asked.method.startswith("turboquant:bits=3")
    assert not asked.private
    with pytest.raises(RequestError, match="limit here is 4"):
        prompts_request(Choices(), ["x"] * 5, CONFIG)
    with pytest.raises(RequestError, match="model"):
        prompts_request(Choices(model="../x"), ["x"], CONFIG)


def damaged(prompt: str, kl: float, **options: Any) -> Comparison:
    made = comparison(prompt=prompt, **options)
    assert made.tokens is not None
    return made.model_copy(update={"tokens": made.tokens.model_copy(update={"mean_kl": kl})})


@pytest.fixture
def ran() -> tuple[Job, list[Run]]:
    """A set of five that was stopped in its fifth prompt; the third packed nothing."""
    asked = prompts_asked(("mild", "=bad", "short", "same", "late"), Settings(), "m")
    job = Job("me", asked)
    same = (" the", " river")
    results = [
        damaged("mild", 0.01),
        damaged("=bad", 0.9),
        comparison(prompt="short", packed=0),
        damaged("same", 0.02, texts=same, other=same),
    ]
    for item, result in enumerate(results):
        job.add(item, result)
    job.finish("stopped")
    return job, [Run(comparison=result) for result in reversed(results)]


def test_rows_are_sorted_by_damage_and_unmeasured_ones_say_why(ran: tuple[Job, list[Run]]) -> None:
    found = rows(*ran)
    assert [row.prompt for row in found] == ["=bad", "same", "mild", "short", "late"]
    assert [row.reason for row in found] == ["", "", "", "nothing packed", "stopped"]
    shown = table(found)
    assert shown["mean KL"].tolist()[:3] == [0.9, 0.02, 0.01]
    assert shown["same answer"].tolist() == ["differs", "identical", "differs", "", ""]
    assert shown["bytes held"].isna().tolist() == [False, False, False, True, True]
    chart = kl_per_prompt(found)
    assert "highest for prompt 2; 1 of 3 have identical answers" in chart.alt
    assert chart.table["prompt"].tolist() == [2, 4, 1]


def test_exports_of_a_set_hold_every_prompt(ran: tuple[Job, list[Run]]) -> None:
    found = rows(*ran)
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [line["prompt"] for line in lines] == ["'=bad", "same", "mild", "short", "late"]
    assert ", ".join(lines[0]) == (
        "nr, prompt, note, mean KL, same answer, first difference, same top, heads at risk, bytes held, times smaller, "
        "prompt tokens, answer tokens"
    )
    runs = json.loads(to_json(found))
    assert [import_run(json.dumps(run)).comparison.prompt for run in runs] == ["=bad", "same", "mild", "short"]
    report = to_markdown(found)
    assert report.count("## Prompt") == 5
    assert "nothing packed" in report
    assert "commit abc1234" in report
    assert "Nothing was measured" in to_markdown([])
