"""`python -m turboquant`."""

from turboquant.cli import main

if __name__ == "__main__":
    main()
