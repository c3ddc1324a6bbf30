"""The entry point: `streamlit run` serves the router in `app/main.py` and loads the default model meanwhile.

The router lives one folder down because Streamlit would otherwise serve the files in `pages/` on its own and a first
visit by a deep link would miss the sidebar.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import streamlit as st
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.compare import view as result  # noqa: F401  (imports the charts before the first visitor needs them)
from app.engine import logs, shutdown
from app.engine.journal import exposition
from app.tab import state
from turboquant import __version__


@asynccontextmanager
async def lifespan(_: st.App) -> AsyncIterator[dict[str, object]]:
    """Start the engine, which loads the default model on its own thread; stop it before the web server stops."""
    config = state.config()
    logs.set_up(config)
    logs.event("server_started", version=__version__, model=config.default_model, queue=config.max_queue)
    engine = state.engine()
    with shutdown.graceful(engine, config.stop_s):
        yield {}
        engine.close()
        logs.event("server_stopped")


def metrics(_: Request) -> Response:
    """What the engine and the process do, for Prometheus."""
    text, media_type = exposition(state.engine().journal)
    return Response(text, media_type=media_type)


routes = [Route("/metrics", metrics)] if state.config().metrics else []
app = st.App("app/main.py", lifespan=lifespan, routes=routes)
