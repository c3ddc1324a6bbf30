# The app with its built-in model, which needs no network once built. docs/operator.md says how to run it.
#   docker build -t turboquant .                                           for CPUs
#   docker build -t turboquant:cuda --build-arg TORCH_BACKEND=cu130 .      for NVIDIA GPUs
FROM python:3.11-slim-bookworm

# Which build of PyTorch: cpu, cu126, cu130 ... as `uv pip install --torch-backend` names them; uv knows their indexes.
ARG TORCH_BACKEND=cpu
ARG TORCH=2.13.0

# Triton compiles the launchers of its kernels with the C compiler when they first run.
RUN if [ "$TORCH_BACKEND" != cpu ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi

RUN useradd --create-home --uid 1000 user && install --directory --owner user /home/user/app
USER user
ENV HOME=/home/user \
    PATH=/home/user/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/home/user/.cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    STREAMLIT_SERVER_ADDRESS=0.0.0.0 \
    STREAMLIT_SERVER_PORT=7860 \
    STREAMLIT_SERVER_FILE_WATCHER_TYPE=none
WORKDIR /home/user/app

# The largest layers first; none of them follows from the app's code.
RUN python3 -m venv /home/user/venv \
    && pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --no-cache --compile-bytecode --torch-backend "$TORCH_BACKEND" "torch==$TORCH" \
    && pip uninstall --yes uv

COPY --chown=user requirements.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock

# The built-in model as it is loaded, and the CPU kernels compiled. A folder for the hub's files, so that a volume
# mounted there belongs to the user.
COPY --chown=user turboquant turboquant
RUN mkdir -p "$HF_HOME" && python -c "\
from turboquant.models.embedded import embedded_folder; \
from turboquant.kernels.codes import compile_kernels; \
embedded_folder(lambda fraction, text: print(text)); \
compile_kernels()"

COPY --chown=user . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python -m compileall -q app pages turboquant streamlit_app.py

# What records name as the commit they were measured at.
ARG COMMIT=
ENV TURBOQUANT_COMMIT=$COMMIT

EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/_stcore/health' % os.environ['STREAMLIT_SERVER_PORT'], timeout=4)"]
CMD ["python", "-m", "streamlit", "run", "streamlit_app.py"]
