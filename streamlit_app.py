"""The entry point: `streamlit run` serves the router in `app/main.py` and loads the default model meanwhile.

The router lives one folder down because Streamlit would otherwise serve the files in `pages/` on its own and a first
visit by a deep link would miss the sidebar.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import streamlit as st

from app import state
from app.components import result  # noqa: F401  (imports the charts before the first visitor needs them)


@asynccontextmanager
async def lifespan(_: st.App) -> AsyncIterator[dict[str, object]]:
    """Start the engine, which loads the default model on its own thread."""
    state.engine()
    yield {}


state.config()
app = st.App("app/main.py", lifespan=lifespan)
