"""What mkdocs is told beyond mkdocs.yml: pages outside docs/, the API reference, formulas."""

from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import turboquant

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ("*.md", "docs/*.md", "*/README.md", "examples/*.py", "assets/**/*.png", "assets/*.svg")
API = """# API reference

What `import turboquant` offers; [the library](library.md) shows it at work. `METHODS` has every method by its name,
your own ones once their files have been imported; `MODELS` has the models that have a name.

"""


def formula(source: str, *_: Any, **__: Any) -> str:
    """A block of LaTeX as MathML, which browsers show by themselves."""
    return convert(source, display="block")


def on_config(config: MkDocsConfig) -> None:
    """Let blocks of `math`, which GitHub shows as formulas, be formulas here too."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Give every page its path in the repository, so that one link is right here and on GitHub."""
    for file in list(files):
        if file.src_dir == config.docs_dir:  # those of the theme stay
            files.remove(file)
    for path in sorted(path for pattern in PUBLISHED for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    names = "\n\n".join(f"::: turboquant.{name}" for name in turboquant.__all__)
    files.append(File.generated(config, "docs/api.md", content=API + names))
