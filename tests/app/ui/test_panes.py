import html

from hypothesis import given
from hypothesis import strategies as st

from app.ui.panes import escape


def shown(text: str) -> str:
    return html.unescape(escape(text)).replace("\u200b", "")


@given(st.text(alphabet="ab12 \n\\`*_{}[]()<>#+-=~|$:&!^@./", max_size=40))
def test_escaped_text_reads_the_same_and_holds_no_mark(text: str) -> None:
    assert shown(text) == text
    assert not set(escape(text).replace("&#", "").replace(";", "")) & set("\\`*_{}[]()<>#+-=~|$:&!^@.")


def test_what_streamlit_replaces_in_plain_text_is_kept_apart() -> None:
    for text in (":tada:", ":material/star:", "->", "<-", ">=", "--", "http://a.b", "www.a.b", "a@b.c"):
        assert "\u200b" in escape(text)
    assert "\u200b" not in escape("turboquant:bits=4,residual_length=16 · 6.1 tokens/s - well: yes")
