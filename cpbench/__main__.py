"""`python -m cpbench` is the same as the `cpbench` command."""

from cpbench.cli import main

if __name__ == "__main__":
    main()
