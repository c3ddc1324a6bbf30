"""Downloading through the real hub client, from a small server of our own that speaks the hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import turboquant
from tests.support.system import enlarge, file_system
from turboquant.models.load import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIENT = """
import json, sys
from turboquant.models.load import ModelError, load_model
for name in sys.argv[1:]:
    seen = []
    try:
        loaded = load_model(name, device="cpu", progress=lambda fraction, text: seen.append(text))
        print(json.dumps([loaded.spec.revision, loaded.weights, [text for text in seen if text.startswith("Downl")]]))
    except ModelError as error:
        print(json.dumps(str(error)))
"""


class Hub(BaseHTTPRequestHandler):
    """Serves `root/<organisation>/<name>`; `org/gated` refuses its files as a gated repository does."""

    root: Path
    served: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        folder = self.root.joinpath(*parts[2:4] if is_api else parts[:2])
        self.served.append(self.path)
        if not folder.is_dir():
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif is_api:
            files = [
                {"path": f.name, "type": "file", "size": f.stat().st_size, "oid": f.name} for f in folder.iterdir()
            ]
            info = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": f["path"]} for f in files]}
            self.reply(200, json.dumps(files if "tree" in parts else info).encode(), {})
        elif folder.name == "gated":
            self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        elif (folder / parts[-1]).is_file():
            data = (folder / parts[-1]).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.reply(200, data if body else b"", {**headers, "Content-Length": str(len(data))})
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hub")
    model = root / "org" / "tiny"
    tiny_model("llama").save_pretrained(model)
    words = {"<unk>": 0, "</s>": 2}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(model)
    (model / "consolidated.safetensors").write_bytes(b"the same weights once more, never wanted")
    for name in ("gated", "pickled", "files-GGUF"):
        (root / "org" / name).mkdir()
        (root / "org" / name / "config.json").write_text((model / "config.json").read_text())
    (root / "org" / "gated" / "model.safetensors").write_bytes(b"secret")
    (root / "org" / "files-GGUF" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    (root / "org" / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    Hub.root, Hub.served = root, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def load(endpoint: str, home: Path, *names: str, **settings: str) -> list[object]:
    """Load models in a process of its own (the hub client reads its environment when it is imported)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "TURBOQUANT_CACHE": str(home)}
    environment |= settings
    environment["PYTHONPATH"] = str(Path(turboquant.__path__[0]).parent)
    command = [sys.executable, "-c", CLIENT, *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_downloads_once_and_only_what_is_needed(endpoint: str, tmp_path: Path) -> None:
    first: Any = load(endpoint, tmp_path, "org/tiny")[0]
    assert first[:2] == [COMMIT, "fp32"]
    assert first[2]
    assert not any("consolidated" in path for path in Hub.served)
    Hub.served.clear()
    assert load(endpoint, tmp_path, "org/tiny")[0] == [COMMIT, "fp32", []]
    assert not any("org/tiny" in path for path in Hub.served)


def test_each_refusal_is_one_sentence(endpoint: str, tmp_path: Path) -> None:
    names = ("org/gated", "org/pickled", "org/nothing", "org/files-GGUF")
    gated, pickled, missing, files = load(endpoint, tmp_path, *names)
    assert str(gated).startswith("org/gated needs a licence: accept it on its model page")
    assert "never loaded" in str(pickled)
    assert "check the name, or set HF_TOKEN" in str(missing)
    assert "download one of them (model-Q4_K_M.gguf, for example) and give its path" in str(files)


@pytest.mark.nightly
def test_a_full_disk_for_the_hubs_files(endpoint: str, tmp_path: Path) -> None:
    """The sentence names the folder that can be changed; with room the next load works."""
    with file_system(tmp_path / "home", "200k") as home:
        assert load(endpoint, home, "org/tiny", PYTHONWARNINGS="ignore:Not enough free disk space") == [
            "Cannot store org/tiny (No space left on device): free some disk space or set HF_HOME to another folder."
        ]
        enlarge(home, "64m")
        loaded: Any = load(endpoint, home, "org/tiny")[0]
        assert loaded[:2] == [COMMIT, "fp32"]
