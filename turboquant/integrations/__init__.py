"""Other people's tools over compressed caches; each module needs the extra of its name."""

import sys

from turboquant.run.threads import settle_threads


def lm_eval() -> None:
    """Run lm-evaluation-harness with the model class `turboquant`: the console script `turboquant-lm-eval`."""
    settle_threads()
    try:
        from turboquant.integrations.lm_eval import main
    except ModuleNotFoundError as error:
        if error.name not in ("lm_eval", "accelerate"):
            raise
        sys.exit(f"turboquant-lm-eval needs the package {error.name}: pip install 'turboquant-lab[lm-eval]'")
    sys.exit(main())
