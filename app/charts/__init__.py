"""Charts: a comparison in, a plotly figure with its table and its one-sentence summary out. No Streamlit here."""
