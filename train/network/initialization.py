"""Initialize a network: the authors' initialization, and GloVe vectors for its words."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from runtime.core.errors import CheckpointError
from runtime.core.io import torch_reader
from train.network.glove import MAX_MAGNITUDE, check_vector, glove_vectors
from train.network.model import DRN

log = logging.getLogger("drn")


def initialise_as_authors(model: DRN) -> None:
    """Kaiming-uniform (a = 1) convolutions outside the head, Glorot-uniform language layers with zero biases.

    Source: FPN.py, backbone.py and language modules in the authors' code.
    """
    for part in (model.backbone_net, model.fpn):
        for module in part.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_uniform_(module.weight, a=1)
    for name, parameter in model.query_encoder.named_parameters():
        if name.startswith("embedding"):
            continue
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)


def load_glove(model: DRN, path: str | os.PathLike[str], words: Mapping[str, int]) -> int:
    """Set the embedding from word vectors, and return how many words got one; the others keep what they had.

    Args:
        model: whose embedding is set; row 0, padding, stays zero.
        path: a torch file of one matrix with a row for every id (the authors' `glove_weights`), or the usual text
            file of GloVe: a word and its vector a line.
        words: word to id.

    Raises:
        CheckpointError: the file is neither, its vectors do not fit the embedding, or they hold values that can be
            none of word vectors.
    """
    path = Path(path)
    table = model.query_encoder.embedding.weight
    rows = _matrix(path) if _is_torch_file(path) else glove_vectors(path, words, table.shape[1])
    if isinstance(rows, np.ndarray):
        if rows.shape != tuple(table.shape):
            raise CheckpointError(
                f"{path} holds vectors of shape {rows.shape} and the embedding is {tuple(table.shape)}; "
                "use the file made for this word table.",
                code="word_vector_shape_mismatch",
            )
        for index in np.flatnonzero(~(np.abs(rows) <= MAX_MAGNITUDE).all(axis=1))[:1]:
            check_vector(rows[index], f"{path}: row {index} of the word vectors")
        # Single rows of zeros are words without a vector.
        if not rows.any():
            raise CheckpointError(
                f"{path}: all {len(rows)} word vectors are zero. Use another file of word vectors.",
                code="word_vector_zero",
            )
        rows = dict(enumerate(rows))
    with torch.no_grad():
        for identity, vector in rows.items():
            table[identity] = torch.from_numpy(np.asarray(vector, np.float32))
        table[0] = 0
    result = sum(1 for identity in rows if identity > 0)
    log.info("%s: vectors for %d of %d words.", path.name, result, len(words))
    return result


def _is_torch_file(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise CheckpointError(
            f"The word vectors {path} cannot be read: {error.strerror}; check --glove.", code="unreadable_file"
        ) from error
    # A zip archive, or a pickle of protocol 2: text begins with neither.
    return head.startswith((b"PK\x03\x04", b"\x80\x02"))


def _matrix(path: Path) -> np.ndarray:
    rows = torch_reader.load(path)
    if not isinstance(rows, np.ndarray) or rows.ndim != 2:
        raise CheckpointError(
            f"{path} should hold one matrix of word vectors, and holds a {type(rows).__name__}.",
            code="invalid_word_vectors",
        )
    return rows
