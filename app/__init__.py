"""The web app: engine, runs, charts and Streamlit components around the `turboquant` library."""

from turboquant.run.threads import settle_threads

settle_threads()  # before a module of the app imports PyTorch
