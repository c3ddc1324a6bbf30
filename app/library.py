"""The model library takes seconds to import, and threads that import it at the same time find it half made."""

from threading import Lock

_importing = Lock()


def import_library() -> None:
    """Import what loads and measures models, or wait until another thread has."""
    with _importing:
        import turboquant.experiments
        import turboquant.models
        import turboquant.tasks  # noqa: F401
