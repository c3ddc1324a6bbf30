"""A task of lm-evaluation-harness, scored through a compressed cache.

    pip install '.[lm-eval]'
    .venv/bin/python examples/lm_evaluation.py

The task is written here, so nothing is downloaded: a ship's number stands in the middle of a log, and two answers are
to choose from. The harness's own class for Hugging Face models would read the log in one call and never from the cache;
how this one differs is in docs/lm-eval.md. (A script called lm_eval.py would be imported in place of the harness.)
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

if importlib.util.find_spec("lm_eval") is None:
    sys.exit("This example needs the extra lm-eval: pip install '.[lm-eval]'")

import lm_eval
from lm_eval.tasks import TaskManager

import turboquant.integrations.lm_eval  # noqa: F401 (makes the model class known)

TASK = """
task: ships
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/ships.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{log}}\\nQuestion: What is the number of the ship?\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
"""
weather = "The keeper wrote the weather into the book and lit the lamp before the ships came in. " * 9

with tempfile.TemporaryDirectory() as folder:
    questions = [
        {"log": f"{weather}The ship has the number {n}. {weather}", "choices": [str(n), str(n + 11)], "answer": 0}
        for n in (417, 582, 236)
    ]
    Path(folder, "ships.json").write_text("\n".join(map(json.dumps, questions)))
    Path(folder, "ships.yaml").write_text(TASK.replace("FOLDER", folder))
    for method in ("turboquant:bits=4", "turboquant-paper:bits=2"):
        results = lm_eval.simple_evaluate(
            model="turboquant",
            model_args={"pretrained": "smollm2-135m", "method": method},
            tasks=["ships"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
        )
        use = results["config"]["cache_use"]["ships"]
        print(f"{method}: accuracy {results['results']['ships']['acc,none']:.2f},", end=" ")
        print(f"{use['requests_on_packed']} of {use['requests']} requests read packed tokens")
