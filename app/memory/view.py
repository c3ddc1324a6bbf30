"""The Memory page's widgets and blocks: which model, how long, how many bits, which GPU, and what comes of it."""

from dataclasses import fields

import streamlit as st

from app.memory import charts
from app.memory import request as sizing
from app.memory.presets import presets
from app.memory.request import OTHER, OWN, Choices, Measured, Plan
from app.tab import state
from app.tab.requests import RequestError, recipes
from app.tab.verdict import human_bytes
from app.ui import definitions, figures, page
from app.ui.panes import escape
from turboquant.sizing import MAX_CONFIG_BYTES

_DEFAULT = Choices()
_TEXT, _FILE = "memory_config", "memory_file"


def _bits(words: str, name: str, help: str) -> None:
    st.segmented_control(
        words, sizing.BITS, default=4, required=True, key=f"mem_{name}", bind="query-params", help=help, width="stretch"
    )


def controls() -> Choices:
    """Draw the settings and return what they say, unchecked."""
    models = [*presets(), OWN]
    gpu = st.session_state.get("mem_gpu", st.query_params.get("mem_gpu"))
    with st.container(border=True):
        left, middle, right = st.columns(3, gap="medium")
        with left:
            st.selectbox(
                "Model",
                models,
                index=models.index(_DEFAULT.model),
                key="mem_model",
                bind="query-params",
            )
            st.selectbox(
                "Method",
                recipes(),
                key="mem_method",
                bind="query-params",
                help="How keys and values are stored; the table below says what each name means. Window, sinks and "
                "groups are the method's defaults.",
            )
        with middle:
            st.select_slider(
                "Context (tokens a row)",
                list(sizing.CONTEXTS),
                value=_DEFAULT.context,
                key="mem_context",
                bind="query-params",
                help="Prompt and answer together; K is 1,024 tokens.",
            )
            _bits("Bits of keys", "keys", "Bits of a key's code; scales and means come on top.")
        with right:
            st.selectbox(
                "GPU memory",
                list(sizing.GPUS),
                index=list(sizing.GPUS).index(_DEFAULT.gpu),
                key="mem_gpu",
                bind="query-params",
                help="Counted as so many GiB (2^30 bytes); drivers and error correction keep a little. A10G, L4 and "
                "RTX 3090 have 24 GB as well, A100 also comes with 80 GB, MI300X has 192 GB.",
            )
            _bits("Bits of values", "values", "Bits of a value's code; scales come on top.")
        _more(str(gpu))
    return _said()


def _more(gpu: str) -> None:
    row = st.container(horizontal=True, vertical_alignment="bottom")
    row.number_input(
        "Batch (rows)", 1, sizing.MAX_BATCH, _DEFAULT.batch, key="mem_batch", bind="query-params", width=130
    )
    row.segmented_control(
        "Bits of weights",
        sizing.WEIGHT_BITS,
        default=_DEFAULT.weights,
        required=True,
        key="mem_weights",
        bind="query-params",
        help="Parameters times bits; scales of quantized weights are not counted. With 32-bit weights an uncompressed "
        "cache takes 4 bytes a value as well.",
    )
    row.number_input(
        "Kept free (GiB)",
        0.0,
        sizing.MAX_GB,
        _DEFAULT.reserve,
        0.5,
        key="mem_reserve",
        bind="query-params",
        width=150,
        help="For activations and the CUDA context, which are not estimated. Long prompts and large batches need more.",
    )
    if gpu == OTHER:
        row.number_input(
            "GPU memory (GiB)", 1.0, sizing.MAX_GB, _DEFAULT.gb, 1.0, key="mem_gb", bind="query-params", width=160
        )
    row.toggle("Count room to grow", key="mem_growing", bind="query-params", help=definitions.ROOM_TO_GROW)


def _said() -> Choices:
    """What the widgets say; one that is not drawn keeps its default."""
    found = {
        field.name: st.session_state[f"mem_{field.name}"]
        for field in fields(Choices)
        if st.session_state.get(f"mem_{field.name}") is not None
    }
    return Choices(**found)


def own_config() -> str | bytes:
    """Draw the box for a pasted or uploaded config.json; an uploaded file counts before pasted text."""
    left, right = st.columns([3, 2], gap="medium")
    pasted = left.text_area(
        "config.json of your model",
        height=180,
        max_chars=MAX_CONFIG_BYTES,
        key=_TEXT,
        persist_state="session",
        placeholder='{"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, ...}',
        help="Paste the whole file from the model's repository. It is read here and kept nowhere.",
    )
    uploaded = right.file_uploader("or the file itself (up to 1 MB)", type="json", key=_FILE, max_upload_size=1)
    right.caption("A config of your own is not part of the link: who opens it has to paste the file again.")
    return uploaded.getvalue() if uploaded is not None else (pasted or "")


def plan(choices: Choices) -> Plan | None:
    """The plan of these choices, or a sentence on the page about what is missing or wrong."""
    own: str | bytes = own_config() if choices.model == OWN else b""
    if choices.model == OWN and not own.strip():
        page.empty("Paste a config.json, or upload one; nothing has to be downloaded to read it.")
        return None
    try:
        with st.spinner("Making the model without weights to ask its cache ..."):
            return sizing.make_plan(choices, own)
    except RequestError as error:
        st.warning(escape(str(error)), icon=":material/error:")
        return None


def about(made: Plan) -> None:
    """Which layers keep what, and what was assumed."""
    shape = made.shape
    st.markdown(f"**{escape(made.title)}.** {escape(sizing.kinds_text(shape))}")
    for note in shape.notes:
        st.caption(escape(note))
    if made.refusal is not None:
        st.info(escape(made.refusal), title="No compressed figures", icon=":material/block:")
    if made.room_bytes <= 0:
        st.warning(
            f"The weights ({human_bytes(made.weight_bytes)}) and what is kept free do not fit in this GPU's memory: "
            "choose fewer bits of weights, or a larger GPU.",
            icon=":material/memory_alt:",
        )
    limit = shape.max_positions
    if limit is not None and made.tokens > limit:
        st.caption(f"{made.tokens:,} tokens are more than the {limit:,} positions this model has.")


def figures_row(made: Plan) -> None:
    """The four figures that answer most questions."""
    method = made.method if made.refusal is None else made.full
    full, chosen = made.held(made.full), made.held(method)
    longest, rows = [made.longest(m) for m in (made.full, method)], [made.rows(m) for m in (made.full, method)]
    cards = (
        ("KV cache", human_bytes(chosen.bytes), f"full: {human_bytes(full.bytes)}", definitions.KV_ESTIMATE),
        (
            "Longest context",
            sizing.tokens_text(longest[1]),
            f"full: {sizing.tokens_text(longest[0])}",
            definitions.LONGEST,
        ),
        ("Largest batch", f"{rows[1]:,}", f"full: {rows[0]:,}", definitions.LARGEST_BATCH),
        (
            "Weights",
            human_bytes(made.weight_bytes),
            f"{made.shape.parameters / 1e9:.2f} billion parameters",
            definitions.WEIGHTS,
        ),
    )
    with st.container(horizontal=True):
        for label, value, beside, help in cards:
            st.metric(
                label, value, beside, delta_color="off", delta_arrow="off", help=help, border=True, width="stretch"
            )


def show_charts(made: Plan, measured: list[Measured]) -> None:
    """Bytes against context, and what the cache is made of."""
    figures.show(
        "KV bytes against context",
        charts.growth(made, measured),
        "mem_growth",
        help=definitions.GROWTH,
        tag="estimated",
    )
    if any(point.dtype == "float32" for point in measured):
        st.caption(
            "Runs recorded in float32 before December 2026 hold 4 bytes for every value that is not packed; the lines "
            "count 2, as caches of today do. An uncompressed cache holds 4 with 32-bit weights."
        )
    figures.show(
        f"Parts of the cache at {made.tokens:,} tokens",
        charts.by_part(made),
        "mem_parts",
        help=definitions.CACHE_PARTS,
        tag="estimated",
    )


def methods(made: Plan) -> None:
    """Every method at the chosen bits, as a table to sort."""
    st.markdown("**Methods at these bits**", help=definitions.METHODS_TABLE)
    page.tag("estimated")
    table = charts.methods_table(made)
    st.dataframe(
        table,
        hide_index=True,
        alt="Every method at the chosen bits: bytes of the cache, bits a value, longest context and largest batch.",
        column_config={
            table.columns[2]: st.column_config.NumberColumn(format="%.3f"),
            "bits a value": st.column_config.NumberColumn(format="%.2f"),
            "longest context": st.column_config.NumberColumn(format="localized", help="Empty where nothing limits it."),
            "largest batch": st.column_config.NumberColumn(format="localized"),
            "times smaller than full": st.column_config.NumberColumn(format="%.2f"),
        },
    )

    if made.refusal is None:
        for reason in filter(None, (made.refused(method) for method in sizing.alike(made))):
            st.caption(escape(reason))


def formula(made: Plan) -> None:
    """The sum behind the figures, with its numbers."""
    st.markdown("**How it is counted**")
    st.markdown(
        "A full cache keeps one key and one value for every token, layer and KV head, at 2 bytes a number. A "
        "compressed one keeps codes in their place, scales and means beside them, and a few tokens exact."
    )
    st.latex(r"2 \cdot L \cdot H \cdot (d_K + d_V) \cdot T \cdot B")
    st.caption(
        "L layers, H KV heads, d numbers a key or value, T tokens a row, B rows: bytes of a full cache at 16 bits."
    )
    st.code("\n".join(sizing.sums(made)), language=None, wrap_lines=True)
    st.caption(escape(made.source))


def measured(made: Plan) -> list[Measured]:
    """What this tab's runs and the recorded ones held, where their model has the plan's shape."""
    return sizing.measured_points(made, state.all_runs().values())


def export(made: Plan) -> None:
    """Where the figures come from, link and files."""
    with st.container(horizontal=True, vertical_alignment="center"):
        page.tag("estimated", "no model was run")
        page.copy_link()
        page.downloads(
            f"memory-{made.shape.model_type}" if made.title == "Your model" else "memory",
            [
                page.File("Methods as CSV", ".csv", "text/csv", lambda: charts.methods_table(made).to_csv(index=False)),
                page.File(
                    "Contexts as CSV",
                    "-contexts.csv",
                    "text/csv",
                    lambda: charts.growth(made, []).table.to_csv(index=False),
                ),
            ],
        )
