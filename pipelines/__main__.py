"""`python -m pipelines` is `armchair`."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
