"""Define what every other part stands on: errors, the command line, files, and the arithmetic around the network."""

from __future__ import annotations
