"""Session: a conversation of several turns, held in the full cache and in a compressed one at once."""

import streamlit as st

from app.session import view as chat
from app.tab import state
from app.ui import page

page.header(
    "A conversation in two caches",
    "A chat model remembers what was said in its KV cache. Here every message of yours is answered twice: by the model "
    "with its full cache and by the same model with a compressed one. Both caches live on from turn to turn, so you "
    "see how much memory each takes and whether the compressed one drifts.",
)
talk, job = chat.current(), chat.turn_job()
live = job if job is not None and job.live else None
# Parts that a live turn does not show are replaced by nothing, so that none of them stays behind, greyed out.
top = st.container() if talk.turns or live is None else st.empty()
with top:
    if talk.turns:
        chat.settings(talk)
    elif live is None:
        chat.openings()
chat.history(talk)
ending = st.container() if live is None else st.empty()
slot = st.container()
if live is None:
    with ending:
        chat.ending(talk)
if talk.turns:
    if live is None:
        with slot:
            chat.forks(talk)
    chat.figures_of(talk)
st.chat_input(
    "An answer is being written" if live else "Your message to both sides",
    key="chat_message",
    max_chars=state.config().max_prompt_chars,
    on_submit=chat.send_typed,
    disabled=live is not None,
)
if live is not None:
    with slot:
        chat.stream(live)
    st.rerun()
