"""JSON files that hold one list: told from JSONL, and written out as one row per line.

In: a path or URL, perhaps compressed. Out: a JSONL file. Memory is that of one element.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from orchestrator.data.lines import first_character
from orchestrator.data.streams import CHUNK_BYTES, open_decompressed
from orchestrator.errors import DataError

# An unclosed quote makes the rest of the file one element: this ends the wait for its end.
MAX_ELEMENT_CHARS = 256 << 20
# An error this near to what has been read so far may only mean that the rest is yet to come.
LONGEST_TOKEN = len('"\\ud83d\\ude00"')

WHITE_SPACE = re.compile("[ \t\r\n\ufeff]*")

_decode_json = json.JSONDecoder().raw_decode


def is_json_list(file: str) -> bool:
    with open_decompressed(file) as stream:
        return first_character(stream) == b"["


def write_list_as_lines(file: str, temporary: Path) -> None:
    """Elements stay as they are written, also those that are no rows: they are found by reading.

    Raises:
        DataError: with file and line, where the file is not one JSON list.
    """
    with open_decompressed(file) as stream, temporary.open("wb", CHUNK_BYTES) as lines:
        for element in _elements(_Text(stream, file)):
            # Only white space between tokens has line ends: JSON has none within strings.
            line = element.replace("\n", " ").replace("\r", " ")
            lines.write(line.encode("utf-8", "surrogateescape") + b"\n")


class _Text:
    """The file's text from the present position on, as far as it has been read."""

    def __init__(self, stream: IO[bytes], file: str) -> None:
        self._stream = stream
        self._file = file
        # What is not UTF-8 goes through unharmed, for its row to be found bad by reading.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._position = 0
        self._line = 1

    def next_character(self) -> str:
        """The next one that is not white space, without passing it; empty at the file's end."""
        while True:
            match = WHITE_SPACE.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more():
                return ""

    def skip(self, expected: str) -> bool:
        """Pass this character if it is the next one."""
        found = self.next_character() == expected
        self._position += found
        return found

    def element(self) -> str:
        self.next_character()
        while True:
            try:
                _, end = _decode_json(self._text, self._position)
            except (ValueError, RecursionError) as error:
                if not self._may_be_cut(error) or not self._read_more():
                    raise self._problem(error) from error
                continue
            # Of a number at the end, more digits may come.
            if end < len(self._text) or not self._read_more():
                element = self._text[self._position : end]
                self._position = end
                return element

    def fail(self, message: str) -> DataError:
        return self._problem(json.JSONDecodeError(message, self._text, self._position))

    def _may_be_cut(self, error: Exception) -> bool:
        return isinstance(error, json.JSONDecodeError) and (
            error.msg.startswith("Unterminated string")
            or error.pos >= len(self._text.rstrip()) - LONGEST_TOKEN
        )

    def _read_more(self) -> bool:
        if len(self._text) - self._position > MAX_ELEMENT_CHARS:
            raise self.fail(f"an element is longer than {MAX_ELEMENT_CHARS} characters")
        # Twice as much each time: a long element is decoded again only a few times.
        chunk = self._stream.read(max(CHUNK_BYTES, len(self._text) - self._position))
        more = self._decoder.decode(chunk, final=not chunk)
        if chunk:
            self._line += self._text.count("\n", 0, self._position)
            self._text = self._text[self._position :]
            self._position = 0
        self._text += more
        return bool(chunk)

    def _problem(self, error: Exception) -> DataError:
        line, reason = self._line, str(error)
        if isinstance(error, json.JSONDecodeError):
            line, reason = line + error.lineno - 1, f"{error.msg}, column {error.colno}"
        return DataError(
            f"{self._file}:{line}: the file must be one JSON list of objects, but it is not valid "
            f"JSON ({reason}): correct it, or write one object per line"
        )


def _elements(text: _Text) -> Iterator[str]:
    assert text.skip("[")
    if not text.skip("]"):
        yield text.element()
        while not text.skip("]"):
            if not text.skip(","):
                raise text.fail("Expecting ',' delimiter")
            yield text.element()
    if text.next_character():
        raise text.fail("Extra data")
