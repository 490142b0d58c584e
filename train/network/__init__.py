"""Define DRN in torch: the network, its losses, its initialization, and the C3D network behind clip features."""

from __future__ import annotations
