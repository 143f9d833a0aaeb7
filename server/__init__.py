"""adapterd: one frozen transformer backbone, thousands of hot-swappable adapters, one forward pass."""

__version__ = "0.1.0"
