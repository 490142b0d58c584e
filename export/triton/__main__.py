"""Run `python -m export.triton`."""

from export.triton import triton
from runtime.core.cli import command

if __name__ == "__main__":
    command(triton)
