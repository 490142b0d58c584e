"""Define DRN in torch: the network, its losses, and its initialization."""

from __future__ import annotations
