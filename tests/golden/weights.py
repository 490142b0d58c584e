"""Recipe weights and features: numpy only, no peer code, no torch RNG.

The goldens do not ship weights: every tensor of a state dict is a function of
(seed, key name, shape), drawn from numpy's legacy RandomState, whose stream is
frozen by numpy's compatibility policy.  Anyone can so rebuild the very state
dict that a golden was made with from golden/state_dict_*.json.

The values are far from any initialisation: peaked attention, negative batch
norm scales, running statistics that are not 0/1, per-level box scales that
differ, class logits on both sides of the 0.05 threshold.
"""

import hashlib
import json
import zlib
from collections import OrderedDict

import numpy as np


def _rs(seed, name):
    return np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))


def _fan_in(shape):
    return int(np.prod(shape[1:]))


# gain on 1/sqrt(fan_in) for a weight, and standard deviation of its bias
GAINS = OrderedDict(
    [
        ("query_encoder.embedding", (0.9, 0)),  # plain std, not fan-in scaled
        ("query_encoder.biLSTM", (1.6, 0.3)),
        ("query_encoder.W3", (2.0, 0.2)),
        ("query_encoder.W2", (2.5, 0.4)),
        ("query_encoder.W1", (10.0, 0.3)),
        ("qInput", (2.2, 0.6)),
        ("prop_fc", (1.1, 0.3)),
        ("position_transform", (1.5, 0.4)),
        ("backbone_net", (1.2, 0)),
        ("fpn.inner_blocks", (1.3, 0)),
        ("fpn.layer_blocks", (1.3, 0)),
        ("fcos.head.cls_tower", (1.3, 0.2)),
        ("fcos.head.bbox_tower", (1.3, 0.2)),
        ("fcos.head.cls_logits", (2.0, 0)),
        ("fcos.head.bbox_pred", (0.9, 0)),
        ("fcos.head.mix_fc", (1.3, 0.2)),
        ("fcos.head.iou_scores", (1.6, 0.2)),
    ]
)
CLS_BIAS = -2.0
BOX_BIAS = 1.3


def make_tensor(name, shape, dtype, seed, zero_pad_row=True, cls_bias=None):
    rs = _rs(seed, name)
    shape = tuple(shape)
    if name.endswith("num_batches_tracked"):
        return np.asarray(1000 + rs.randint(1000), dtype=np.int64)
    if name.endswith("running_mean"):
        v = rs.standard_normal(shape) * 0.3
    elif name.endswith("running_var"):
        v = rs.uniform(0.4, 2.0, shape)
    elif name.endswith(".scale"):
        level = int(name.split(".")[-2])
        v = np.full(shape, (0.8, 1.15, 1.45)[level % 3]) + rs.uniform(-0.05, 0.05, shape)
    elif name == "fcos.head.cls_logits.bias":
        v = np.full(shape, CLS_BIAS if cls_bias is None else cls_bias)
    elif name == "fcos.head.bbox_pred.bias":
        v = BOX_BIAS + rs.standard_normal(shape) * 0.2
    else:
        gain, bias_std = next(g for k, g in GAINS.items() if name.startswith(k))
        is_norm = len(shape) == 1 and name.endswith(".weight")
        norm_bias = (
            len(shape) == 1
            and name.endswith(".bias")
            and (bias_std == 0 or "_tower.1" in name or "mix_fc.1" in name or "iou_scores.1" in name)
        )
        if is_norm:
            v = rs.uniform(0.5, 1.5, shape)
            v = np.where(rs.uniform(size=shape) < 0.1, -v, v)
        elif norm_bias:
            v = rs.standard_normal(shape) * 0.3
        elif len(shape) == 1:
            v = rs.standard_normal(shape) * bias_std
        elif name.startswith("query_encoder.embedding"):
            v = rs.standard_normal(shape) * gain
            if zero_pad_row:
                v[0] = 0
        else:
            v = rs.standard_normal(shape) * (gain / np.sqrt(_fan_in(shape)))
    return np.ascontiguousarray(v.astype(np.dtype(dtype)))


def make_state(shapes, seed, zero_pad_row=True, cls_bias=None):
    """shapes: list of [name, shape, dtype] in state-dict order."""
    return OrderedDict((n, make_tensor(n, s, d, seed, zero_pad_row, cls_bias)) for n, s, d in shapes)


def load_shapes(path):
    with open(path) as f:
        return json.load(f)["state_dict"]


def digest(state):
    """One sha256 over names, shapes and bytes, to know it is the same state."""
    h = hashlib.sha256()
    for n, v in state.items():
        v = np.asarray(v)
        h.update(f"{n}|{tuple(v.shape)}|{v.dtype}|".encode())
        h.update(np.ascontiguousarray(v).tobytes())
    return h.hexdigest()


def c3d_rows(num_frames, window=16, overlap=0.5):
    """Rows of a real feature file: one window of 16 frames every 8."""
    step = int(window * (1 - overlap))
    return max(1, (num_frames - window) // step + 1)


def make_feature(vid_name, rows, dim, seed=0):
    """C3D-like: non-negative, sparse, smooth in time; float32 [rows, dim].

    Values are rounded to multiples of 1/64 so that they are exact in half
    precision too and stored arrays compress.
    """
    rs = _rs(seed, f"feature:{vid_name}:{rows}:{dim}")
    knots = rows // 6 + 2
    base = rs.standard_normal((knots, dim))
    at = np.linspace(0, knots - 1, rows)
    low = np.minimum(at.astype(int), knots - 2)
    w = (at - low)[:, None]
    smooth = base[low] * (1 - w) + base[low + 1] * w
    v = smooth + 0.4 * rs.standard_normal((rows, dim)) - 0.55
    v = np.clip(v, 0, None) * 1.6
    return (np.round(v * 64) / 64).astype(np.float32)
