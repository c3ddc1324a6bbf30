#!/usr/bin/env bash
# Make the records of one GPU: bash tests/gpu/records.sh PART FOLDER, with PART one of
#   check     the kernels against the reference, compiled (tests of kernels and graphs)
#   kernels   one layer's attention, scores and encoding, against torch's
#   model     decode steps of whole shapes with random weights, batches of 1 to 32
#   context   the longest context in 16 GB of GPU memory (needs bitsandbytes)
#   quality   KL of the built-in model on the kernels; attention and needles at 16K to 128K tokens
# Records are appended to FOLDER/*.jsonl. PYTHON names another interpreter than .venv's; REPEATS the timed rounds.
set -euo pipefail
cd "$(dirname "$0")/../.."
part=$1 out=$2
python=${PYTHON:-.venv/bin/python} repeats=${REPEATS:-20}
mkdir -p "$out"
bench() { "$python" -m turboquant bench "$@"; }
case $part in
check)
    "$python" -m pytest -q -o addopts= -o filterwarnings=default --import-mode=importlib \
        tests/unit/kernels/test_triton.py tests/unit/hf_attention/test_steps.py
    ;;
kernels)
    to=$out/bench-attention.jsonl
    bench attention --context 8192 --context 32768 --context 131072 --bits 4 3 2 --repeats "$repeats" --output "$to"
    bench attention --batch 8 --context 32768 --bits 4 3 2 --repeats "$repeats" --output "$to"
    bench attention --batch 8 --context 32768 --method turboquant:key_bits=4,value_bits=2 --repeats "$repeats" \
        --output "$to"
    bench attention --context 32768 --query-tokens 2048 --bits 4 2 --repeats 8 --output "$to"
    bench attention --shape qwen2.5-3b --shape phi-2 --shape smollm2-135m --batch 8 --context 32768 --bits 4 3 2 \
        --repeats "$repeats" --output "$to"
    bench scores --context 32768 --context 131072 --batch 1 --batch 8 --bits 4 3 2 --repeats "$repeats" \
        --output "$out/bench-scores.jsonl"
    bench encode --bits 4 3 2 --repeats "$repeats" --output "$out/bench-encode.jsonl"
    ;;
model)
    # All sides of a case one after another: stock generate() with DynamicCache, with transformers' compiled StaticCache,
    # and with packed tokens.
    generate() {
        bench model "$@" --run static --steps 128 --method full --output "$out/bench-model.jsonl"
        bench model "$@" --run generate --steps 128 --output "$out/bench-model.jsonl" \
            --method full turboquant:bits=4 turboquant:bits=3 turboquant:bits=2
    }
    for context in 8192 32768 131072; do
        generate --model mistral-7b --weights bf16 --context "$context"
    done
    for batch in 8 32; do
        generate --model mistral-7b --weights bf16 --batch "$batch" --context 4096
    done
    generate --model smollm2-135m --weights bf16 --context 640
    generate --model mistral-7b --weights 4bit --context 8192  # needs bitsandbytes
    for batch in 1 2 4 8 16 32; do
        bench model --model mistral-7b --weights bf16 --batch "$batch" --context 4096 --steps "$repeats" \
            --output "$out/bench-model.jsonl"
    done
    ;;
context)
    bench model --model mistral-7b --weights 4bit --context 32768 --steps 24 --output "$out/bench-model.jsonl"
    bench memory --model mistral-7b --weights 4bit --output "$out/bench-memory.jsonl"
    ;;
quality)
    "$python" -m turboquant perplexity --weights bf16 --bits 4 3 2 --method turboquant turboquant-paper \
        --text persuasion factbook sqlite --context 1536 --prefill 1024 --output "$out/gpu-perplexity.jsonl"
    long=$(mktemp -d)/smollm2-stretched
    "$python" -m tests.gpu.stretch "$long"
    "$python" -m turboquant evaluate --model "$long" --weights bf16 --contexts 16384 32768 131072 --bits 4 2 \
        --queries 32 --chunk-tokens 2048 --output "$out/gpu-evaluate.json" --records "$out/gpu-evaluate.jsonl"
    "$python" -m turboquant needle --model "$long" --weights bf16 --contexts 16384 32768 131072 --depths 0.5 \
        --repetitions 1 --bits 4 --max-new-tokens 8 --output "$out/gpu-needle.jsonl"
    ;;
*)
    sed -n '2,8p' "$0" >&2
    exit 2
    ;;
esac
