"""The web app: engine, runs, charts and Streamlit components around the `turboquant` library."""
