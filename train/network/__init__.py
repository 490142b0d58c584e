"""Define DRN in torch: the network, its losses, and its initialization."""
