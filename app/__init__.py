"""The web app: engine, runs, charts and Streamlit components around the `turboquant` library."""

from turboquant.run.threads import sleep_while_waiting

sleep_while_waiting()  # before a module of the app imports PyTorch
