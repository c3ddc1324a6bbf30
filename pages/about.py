"""About: what the numbers mean, what they do not show, this deployment, licences and credits."""

import streamlit as st

from app.about import view as about
from app.ui import page

page.header(
    "About this app",
    "A language model remembers a text in its KV cache; this app shows what happens to its answers, its memory and "
    "its speed when that cache is compressed. Below: what each number means, what it does not show, and whose work "
    "this is.",
)

st.header("How to read a number", anchor="tags")
st.markdown(
    "A tag says where the numbers beside it come from; the question mark beside a figure's name says what it means."
)
about.tags()

st.header("What each number means", anchor="definitions")
about.definitions()

st.header("What this app does not show", anchor="limits-of-the-numbers")
about.not_shown()

st.header("Keyboard", anchor="keyboard")
about.shortcuts()

left, right = st.columns(2)
with left:
    st.header("This machine", anchor="environment")
    about.surroundings()
with right:
    st.header("Limits of this deployment", anchor="limits")
    about.limits()

st.header("Privacy", anchor="privacy")
about.privacy()

st.header("Credits", anchor="credits")
st.markdown("TurboQuant Lab builds on the work of others. In short, what came from whom:")
about.credits()

st.header("Licences", anchor="licences")
st.markdown("As the installed packages state them.")
about.licences()
