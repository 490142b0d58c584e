"""Initialize a network: the authors' initial weights, and word vectors from a file."""

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


def initialize_as_authors(model: DRN) -> None:
    """Initialize the weights as the authors do: Kaiming-uniform (a = 1) backbone and pyramid, Glorot-uniform language.

    Biases of language layers are 0.

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
    """Set the rows of the embedding to word vectors. Words without a vector are not changed.

    Args:
        model: the network; row 0 of its embedding, padding, stays zero.
        path: a torch file of one (ids, embed_dim) matrix (the authors' `glove_weights`), or a GloVe text file.
        words: word to id.

    Returns:
        The number of words that have a vector.

    Raises:
        CheckpointError: the file is neither, its vectors do not fit the embedding, or a value is impossible.
    """
    path = Path(path)
    table = model.query_encoder.embedding.weight
    rows = _matrix(path) if _is_torch_file(path) else glove_vectors(path, words, table.shape[1])
    if isinstance(rows, np.ndarray):
        if rows.shape != tuple(table.shape):
            raise CheckpointError(
                f"{path}: expected a matrix of {tuple(table.shape)}, got {rows.shape}. Use the file of this word "
                "table.",
                code="word_vector_shape_mismatch",
            )
        for index in np.flatnonzero(~(np.abs(rows) <= MAX_MAGNITUDE).all(axis=1))[:1]:
            check_vector(rows[index], f"{path}, row {index} of the word vectors")
        # A single row of zeros is a word without a vector.
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
    count = sum(1 for identity in rows if identity > 0)
    log.info("%s: vectors for %d of %d words.", path.name, count, len(words))
    return count


def _is_torch_file(path: Path) -> bool:
    """Return whether a file begins as a zip archive or as a pickle of protocol 2; text begins with neither."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise CheckpointError(
            f"--glove {path} cannot be read: {error.strerror}. Check the file.", code="unreadable_file"
        ) from error
    return head.startswith((b"PK\x03\x04", b"\x80\x02"))


def _matrix(path: Path) -> np.ndarray:
    rows = torch_reader.load(path)
    if not isinstance(rows, np.ndarray) or rows.ndim != 2:
        raise CheckpointError(
            f"{path}: expected one matrix of word vectors, got a {type(rows).__name__}. Pass one, or GloVe text.",
            code="invalid_word_vectors",
        )
    return rows
