"""Fuzz one target with atheris for a bounded time; ends with status 0 if nothing was found.

    python -m tests.fuzz.coverage_guided method --seconds 60

libFuzzer keeps what reaches new code and goes on from there. What breaks a target is printed and left in a file beside
the corpus, whose path is printed too.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import atheris


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    given = parser.parse_args()
    with atheris.instrument_imports(include=["app", "turboquant", "json"], exclude=["turboquant.kernels"]):
        from tests.fuzz import targets
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{given.target}-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(targets.seeds(given.target)):
        targets.TARGETS[given.target](seed)  # what is imported at first use is there before the clock starts
        (corpus / str(number)).write_bytes(seed)
    quoted = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in targets.words(given.target))
    (folder / "words").write_text("".join(f'"{word}"\n' for word in quoted))
    options = {
        "max_total_time": given.seconds,
        "max_len": 65_536,
        "timeout": 30,
        "rss_limit_mb": 6000,
        "dict": folder / "words",
        "artifact_prefix": f"{folder}/",
        "print_final_stats": 1,
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], targets.TARGETS[given.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
