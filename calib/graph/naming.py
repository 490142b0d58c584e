"""Map between DRN's module names and the names of nodes in an exported graph."""

from __future__ import annotations

import re

# DRN's module names to the names of the modules in the exported graph that contain them.
ALIASES = {
    "fcos.head.cls_tower": "fcos.head.towers",
    "fcos.head.bbox_tower": "fcos.head.towers",
    "fcos.head.cls_logits": "fcos.head.predictions",
    "fcos.head.bbox_pred": "fcos.head.predictions",
    "fcos.head.iou_scores.3": "fcos.head.iou_scores.1",
    "query_encoder.W1": "query_encoder.W2",
}


def drn_modules(node: str) -> tuple[str, ...]:
    """Return the DRN modules (`prop_fc`, `fcos.head.cls_tower`, ...) that the node of this name computes."""
    module = node.rpartition("/")[0]
    for merged in ("fcos.head.towers", "fcos.head.predictions"):
        if module.startswith(merged):
            return tuple(name for name, target in ALIASES.items() if target == merged)
    if module.startswith("query_encoder.W2"):
        return "query_encoder.W2", "query_encoder.W1"
    # Deeper names are parts of one module, such as the two directions of the LSTM.
    match = re.match(
        r"query_encoder\.\w+|backbone_net\.layers\.\d|fpn\.\w+\.\d|fcos\.head(\.\w+)?|qInput\.\d|\w+", module
    )
    return (match[0],) if match else ()
