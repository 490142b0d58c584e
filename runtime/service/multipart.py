"""Read a multipart form from a stream: text fields into memory, files to paths that the caller chooses.

Starlette's `request.form()` cannot replace it: it stores files in the system's temporary directory without a common
limit, accepts a form that is cut off, and decodes text that is not UTF-8 as Latin-1.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from runtime.service.http_errors import HttpError

MAX_FIELDS = 128
FIELD_BYTES = 8 << 10


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a form.

    Attributes:
        path: path of the stored content.
        name: file name that the client sent; it is not used as a path.
    """

    path: Path
    name: str


@dataclasses.dataclass(frozen=True)
class Form:
    """Texts and files of a form by the names of their fields, in the order of the form."""

    fields: Mapping[str, list[str]]
    files: Mapping[str, File]


class _Reader:
    """Receive the callbacks of python_multipart's parser."""

    def __init__(self, choose_path: Callable[[str], Path], reserve: Callable[[int], None]) -> None:
        self.fields: dict[str, list[str]] = {}
        self.files: dict[str, File] = {}
        self.is_complete = False
        self._choose_path = choose_path
        self._reserve = reserve
        self._parts = 0
        self._header: tuple[bytes, bytes] = (b"", b"")
        self._name = ""
        self._text = b""
        self._stream: Any = None

    def callbacks(self) -> dict[str, Callable[..., None]]:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "end")
        return {f"on_{name}": getattr(self, name) for name in (*names, "headers_finished")}

    def part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_FIELDS:
            raise HttpError(413, f"The form has more than {MAX_FIELDS} parts. Send fewer fields.")
        self._header, self._name, self._text = (b"", b""), "", b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0] + data[start:end], self._header[1])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0], self._header[1] + data[start:end])

    def header_end(self) -> None:
        field, value = self._header
        self._header = (b"", b"")
        if field.lower() == b"content-disposition":
            _, options = parse_options_header(value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            file = options.get(b"filename")
            if file is not None:
                self._open(file.decode("utf-8", "replace"))

    def headers_finished(self) -> None:
        if not self._name:
            raise _unreadable("a part has no name")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if self._stream is not None:
            self._reserve(end - start)
            self._stream.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > FIELD_BYTES:
            raise HttpError(413, f"The field {self._name[:80]!r} exceeds {FIELD_BYTES} bytes. Send a shorter text.")

    def part_end(self) -> None:
        if self._stream is not None:
            self.close()
            return
        try:
            text = self._text.decode()
        except UnicodeDecodeError:
            raise _unreadable(f"the field {self._name[:80]!r} is not UTF-8") from None
        self.fields.setdefault(self._name, []).append(text)

    def end(self) -> None:
        self.is_complete = True

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self, client_name: str) -> None:
        if self._name in self.files:
            raise _unreadable(f"it contains the file {self._name[:80]!r} twice")
        self.close()
        path = self._choose_path(self._name)
        self.files[self._name] = File(path, client_name)
        self._stream = open(path, "xb")  # noqa: SIM115 - closed at the end of its part, or of the form


async def read_form(
    content_type: str, chunks: AsyncIterator[bytes], choose_path: Callable[[str], Path], reserve: Callable[[int], None]
) -> Form:
    """Read a form to its end.

    Args:
        choose_path: returns the path to store the file of a field at; raises HttpError for an unknown field.
        reserve: called with the size of every piece of a file before it is written; raises HttpError if no space is
            left.

    Raises:
        HttpError: the form is malformed (400) or has too many or too large fields (413), or a callback raised it.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise _unreadable("its Content-Type has no boundary")
    reader = _Reader(choose_path, reserve)
    with contextlib.closing(reader):
        try:
            parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
            async for chunk in chunks:
                parser.write(chunk)
            parser.finalize()
        except FormParserError as error:
            raise _unreadable(str(error)) from error
    if not reader.is_complete:
        raise _unreadable("it ends before its last boundary")
    return Form(reader.fields, reader.files)


def _unreadable(reason: str) -> HttpError:
    return HttpError(
        400, f"The form cannot be read: {reason.rstrip('.')}. Send it as multipart/form-data, as `curl -F` does."
    )
