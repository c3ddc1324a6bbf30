"""What docs/pipeline.md tells to type works in a stock transformers pipeline, and packs."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "pipeline.md").read_text()


def test_a_pipeline_answers_through_the_compressed_cache(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    variables: dict = {}
    exec(compile(code, "docs/pipeline.md", "exec"), variables)
    packed = re.findall(r"^(\d+) tokens packed$", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(packed) == 2
    assert all(int(count) >= 32 for count in packed)
    assert variables["answer"][0]["generated_text"][-1]["role"] == "assistant"
