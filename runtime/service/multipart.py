"""A multipart body, read as it comes: fields stay in memory, files go to places that were chosen for them."""

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
        path: where it was put.
        name: what the client calls it; no more than a text.
    """

    path: Path
    name: str


@dataclasses.dataclass(frozen=True)
class Form:
    """A form: texts and files by the names of their fields, in the order they came."""

    fields: Mapping[str, list[str]]
    files: Mapping[str, File]


class _Reader:
    """Takes what the parser finds."""

    def __init__(self, location: Callable[[str], Path], spend: Callable[[int], None]) -> None:
        self.fields: dict[str, list[str]] = {}
        self.files: dict[str, File] = {}
        self.whole = False
        self._place = location
        self._spend = spend
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
            raise HttpError(413, f"The form has more than {MAX_FIELDS} parts; send less at once.")
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
            self._spend(end - start)
            self._stream.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > FIELD_BYTES:
            raise HttpError(413, f"The field {self._name[:80]!r} is above {FIELD_BYTES} bytes; send a shorter text.")

    def part_end(self) -> None:
        if self._stream is not None:
            self.close()
            return
        try:
            text = self._text.decode()
        except UnicodeDecodeError:
            raise _unreadable(f"the field {self._name[:80]!r} is no UTF-8") from None
        self.fields.setdefault(self._name, []).append(text)

    def end(self) -> None:
        self.whole = True

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self, client_name: str) -> None:
        if self._name in self.files:
            raise _unreadable(f"the file {self._name[:80]!r} is there twice")
        self.close()
        path = self._place(self._name)
        self.files[self._name] = File(path, client_name)
        self._stream = open(path, "xb")  # noqa: SIM115 - closed at the end of its part, or of the form


async def read_form(
    content_type: str, chunks: AsyncIterator[bytes], location: Callable[[str], Path], spend: Callable[[int], None]
) -> Form:
    """Read a form to its end.

    Args:
        content_type: of the request, with the boundary.
        chunks: the body.
        location: returns where to put the file of a field; Refusal if there should be none of this name.
        spend: called with the size of every part of a file before it is written; Refusal if there is no room.

    Raises:
        Refusal: the form is malformed, or too large.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise _unreadable("its Content-Type names no boundary")
    reader = _Reader(location, spend)
    with contextlib.closing(reader):
        try:
            parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
            async for chunk in chunks:
                parser.write(chunk)
            parser.finalize()
        except FormParserError as error:
            raise _unreadable(str(error)) from error
    if not reader.whole:
        raise _unreadable("it ends before its last boundary")
    return Form(reader.fields, reader.files)


def _unreadable(why: str) -> HttpError:
    return HttpError(
        400,
        f"The form cannot be read: {why.rstrip('.')}; send it as multipart/form-data, as `curl -F` does.",
    )
