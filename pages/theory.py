"""Theory: six short figures that teach the algorithm, measured live on random vectors."""

import streamlit as st

from app.theory import view as theory
from app.ui import page

page.header(
    "How the codes work",
    "A language model keeps vectors of numbers for every token it has read; TurboQuant stores each number in a few "
    "bits instead of 16. These six figures show how. They are measured on this machine, with random vectors, as you "
    "change the settings at the bottom of the window: dimensions of a vector, bits a coordinate, vectors for each "
    "seed, first seed. Grey lines are theory.",
)
setting = theory.controls()
page.copy_link()

st.header("1. A random rotation spreads a spiky vector", anchor="rotation")
st.markdown(
    "In real models a few channels of a vector are far larger than the rest, and one grid of levels cannot serve "
    "both. TurboQuant multiplies every vector by one fixed random rotation, which mixes all channels. Lengths and "
    "inner products stay what they were, and the rotation can be undone after rounding."
)
theory.rotation(setting)

st.header("2. Then every coordinate follows one known law", anchor="density")
st.markdown(
    "A randomly rotated vector points anywhere with equal chance, so each coordinate has the same density whatever "
    "the vector was (Lemma 1 of the paper). In many dimensions that density is nearly a Gaussian, in few it is not. "
    "Because it is known beforehand, nothing has to be learnt from data."
)
theory.coordinates(setting)

st.header("3. A codebook made for that law", anchor="codebook")
st.markdown(
    "With b bits there are 2^b levels, placed so that the expected squared error is smallest (Lloyd and Max): close "
    "together where coordinates are common, far apart where they are rare. A coordinate is stored as the number of "
    "its nearest level; the dotted boundaries lie half-way between levels."
)
theory.codebook(setting)

st.header("4. How much is lost, and how much must be", anchor="distortion")
st.markdown(
    "The measured loss stands between two lines from the paper: what its code never exceeds (Theorem 1) and what no "
    "code of any kind can beat (Theorem 3). It must also agree with the exact expectation for this codebook, or the "
    "program is wrong. Bars are one standard error."
)
theory.distortion(setting)

st.header("5. Rounded keys look shorter; QJL mends that", anchor="bias")
st.markdown(
    "Attention needs inner products of queries with keys. A code of least error pulls vectors towards zero, so "
    "inner products come out too small, all by the same share. QJL gives one of the bits to the signs of a random "
    "projection of the error, which removes this bias; storing another length for the vector (EDEN) removes it "
    "without that bit."
)
theory.inner_products(setting)

st.header("6. What QJL costs", anchor="price")
st.markdown(
    "The signs are right on average but noisy, and the bit they take is missing from the code. A softmax hardly "
    "minds scores that all shrink alike, which only makes it a little less sure; noise can lift a wrong key to the "
    "first place. That is why the recommended recipe uses no QJL; the Methods page shows the paper's recipe, which "
    "has it, beside ours on a real model."
)
theory.price(setting)

st.header("The recorded validation", anchor="validation")
st.markdown(
    "The same measurements with more vectors, held against exact theory and the paper's theorems at every number of "
    "bits (`turboquant theory`). A check passes if the measured value lies within four standard errors of its theory "
    "and those are small enough to tell."
)
theory.recorded()
