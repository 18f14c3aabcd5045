"""cpbench: memory profiling and benchmarking of context-parallel training methods.

Importing this package imports neither torch nor pandas; see `cpbench.cli` for the command line.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
