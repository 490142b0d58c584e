"""What can go wrong, split by who can put it right."""

from __future__ import annotations


class GroundingError(Exception):
    """Something the reader can put right: commands show the sentence without a traceback and exit with 2."""


class ShapeError(GroundingError):
    """An array or a request does not fit the model."""


class FeatureError(GroundingError):
    """Clip features that cannot be read or used."""


class MissingFeatures(FeatureError):
    """A video of which there are no features at all, where those of others may be."""


class FootageError(GroundingError):
    """A video file that cannot be decoded, or not as far as was asked."""


class AnnotationError(GroundingError):
    """A data set whose annotation files are missing, malformed or contradict each other."""


class QueryError(GroundingError):
    """A sentence that cannot be asked."""


class ModelFileError(GroundingError):
    """A file that is not a model of ours, or is one that cannot be used here."""


class CheckpointError(ModelFileError):
    """A torch checkpoint that cannot be read, or does not hold the network it should."""


class DeviceError(GroundingError):
    """A device or library was asked for and is not there."""


class DeviceMemoryError(DeviceError):
    """A batch does not fit the memory of its device; a smaller one may."""


class ServerError(GroundingError):
    """A server that cannot be reached, or does not do what it was asked."""


class OutputError(GroundingError):
    """A result could not be written."""


class PromiseBroken(Exception):
    """The command ran, and what it checked does not hold (parity, precision, recall): exit code 1."""


def one_line(error: BaseException) -> str:
    """Return what a library says of an error for use within a sentence: one line, and no full stop at its end."""
    return " ".join(str(error).split()).rstrip(".")
