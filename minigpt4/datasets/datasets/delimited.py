"""Records of CSV and TSV, with their lines, so that no quotation mark takes a word or a row with it.

The first row names the columns and tells the delimiter: that of the file's ending, or, where it has none, the one of
comma, semicolon, tab and bar that it has most of; Excel's `sep=;` before it tells it, too. If blanks follow all its
delimiters, blanks after a delimiter are not part of a field.

Between commas or semicolons a field that begins with a quotation mark ends with one, those inside doubled (RFC 4180);
in others quotation marks are text. A row that takes in a line like a row is bad, as is one with a quotation mark after
blanks. Between tabs or bars, where most files quote nothing, quotation marks are those of a writer (pandas, csv,
spreadsheets) if every one in the file can be, else text; a file with signs of both is refused.
"""

import re
from collections.abc import Iterator

from minigpt4.processors.images import SUFFIXES

DELIMITERS = ",;\t|"
SELDOM_QUOTED = "\t|"
QUOTE = '"'
FILE = re.compile(rf"\S+://\S+|.+({'|'.join(map(re.escape, SUFFIXES))})", re.IGNORECASE)
"""What the column of the images holds."""


class _Stray(ValueError):
    """A quotation mark that no writer of quoted fields would put there."""


def read_rows(text: str, delimiter: str) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Line and record of each row that is not blank; in place of a record what is wrong with its row.

    Args:
        delimiter: of the file's ending.

    Raises:
        ValueError: the names of the columns or a quotation mark is wrong; the text says in which line.
    """
    told = re.match("[\r\n]*sep=(.)(?=[\r\n])", text, re.IGNORECASE)
    if told:
        text, delimiter = text[: told.start(1) - len("sep=")] + text[told.end() :], told[1]
    head = re.sub(r'"[^"]*"', "", re.split("[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0])
    if delimiter not in head:
        delimiter = max((other for other in DELIMITERS if other in head), key=head.count, default=delimiter)
    table = _Table(text, delimiter, skips_blanks=all(part[:1] == " " for part in head.split(delimiter)[1:]))
    rows = ((line, row) for line, row in table.rows() if len(row) > 1 or row[0].strip())
    line, row = next(rows, (1, []))
    if isinstance(row, str):
        raise ValueError(f"line {line}: {row}")
    names = [name.strip() for name in row]
    if not any(names):
        raise ValueError("the first line must name the fields")
    if "\0" in "".join(names):
        raise ValueError(f"line {line}: the names hold NUL, as of UTF-16 without its mark; save the file as UTF-8")
    twice = next((name for number, name in enumerate(names) if name and name in names[:number]), None)
    if twice is not None:
        raise ValueError(f"line {line}: two columns are called {twice!r}; give each a name of its own")
    nameless = [number for number, name in enumerate(names) if not name and number]
    for line, row in rows:
        record: dict[str, str] | str = table.fault(row, len(names), nameless, line)
        if not record:
            record = dict(zip(names, row, strict=True))
            record.pop("", None)
        yield line, record


class _Table:
    """A text as rows of fields."""

    def __init__(self, text: str, delimiter: str, skips_blanks: bool) -> None:
        self.text, self.delimiter, self.skips_blanks = text, delimiter, skips_blanks
        self.line_break = "\n" if "\n" in text else "\r"
        line_end = r"\r?\n" if "\n" in text else r"\r"
        self.line_end = re.compile(line_end)
        self.field_end = re.compile(rf"{re.escape(delimiter)}|{line_end}|\Z")

    def rows(self) -> Iterator[tuple[int, list[str] | str]]:
        """Line, counted from 1, and fields of each row, or what is wrong with it; ValueError for quotation marks that
        cannot be."""
        if QUOTE not in self.text:
            return self._plain()
        if self.delimiter not in SELDOM_QUOTED:
            return self._quoted()
        try:
            taken = next((numbered for numbered in self._quoted() if self._may_hold_rows(numbered[1])), None)
        except _Stray as error:
            quoted = self._first_quoted()
            if quoted is None:
                return self._plain()
            raise ValueError(
                f"{error}; or is it text? line {quoted} is quoted as programs do it: quote every such field, or none"
            ) from error
        if taken is None or self._first_quoted() is not None:
            return self._quoted()
        line, row = taken
        if self._row_inside(row) is not None:
            return self._plain()
        raise ValueError(
            f"line {line}: a quotation mark here may be closed by one in a later line, or both are text; write the "
            "field in one line, or, if it is quoted, the names of the columns in quotation marks, too"
        )

    def fault(self, row: list[str] | str, width: int, nameless: list[int], line: int) -> str:
        """What is wrong with a row under so many names, some columns without one; "" if nothing is."""
        if isinstance(row, str):
            return row
        if len(row) != width:
            return f"it has {len(row)} fields, not {width} as the first line names; is it quoted as it should be?"
        for number in nameless:
            if row[number].strip():
                return f"column {number + 1} holds {row[number]!r:.40} and has no name; is a quotation mark missing?"
        inside = self._row_inside(row) if self.line_break in "".join(row) else None
        if inside is not None:
            return f"a field takes in line {line + inside}, which looks like a row; is a quotation mark missing?"
        return ""

    def _plain(self) -> Iterator[tuple[int, list[str]]]:
        for number, line in enumerate(self.line_end.split(self.text), start=1):
            yield number, self._split(line)

    def _split(self, line: str) -> list[str]:
        first, *others = line.split(self.delimiter)
        return [first, *(field.lstrip(" ") for field in others)] if self.skips_blanks else [first, *others]

    def _quoted(self) -> Iterator[tuple[int, list[str] | str]]:
        at, line = 0, 1
        while at < len(self.text):
            end = self.text.find(self.line_break, at)
            row = self.text[at:] if end < 0 else self.text[at:end]
            if QUOTE not in row:
                yield line, self._split(row.removesuffix("\r"))
                at, line = at + len(row) + 1, line + 1
            else:
                row, at, lines = self._quoted_row(at, line)
                yield line, row
                line += lines

    def _quoted_row(self, at: int, line: int) -> tuple[list[str] | str, int, int]:
        """A row with quotation marks, or its fault, where the next one begins, and how many lines it takes."""
        row, fault, lines = [], "", 0
        while True:
            while row and self.skips_blanks and self.text.startswith(" ", at):
                at += 1
            if self.text.startswith(QUOTE, at):
                close = self._closing(at, line + lines)
                field = self.text[at + 1 : close]
                end = self.field_end.match(self.text, close + 1)
                inside = field.count(self.line_break)
                if end is None:
                    rest = self.text[close + 1 : close + 20].splitlines()[0]
                    raise _Stray(
                        f"line {line + lines}: the quotation mark that opens a field is closed before {rest!r}, in "
                        f"line {line + lines + inside}; a field ends there, and quotation marks inside it are doubled"
                    )
                lines += inside
                row.append(field.replace(QUOTE * 2, QUOTE))
            else:
                end = self.field_end.search(self.text, at)
                plain = self.text[at : end.start()]
                if QUOTE in plain and self.delimiter in SELDOM_QUOTED:
                    raise _Stray(
                        f"line {line + lines}: a quotation mark inside {plain!r:.60}, which does not begin with one; "
                        "fields with quotation marks stand in quotation marks, those inside doubled"
                    )
                if plain.lstrip().startswith(QUOTE):
                    fault = f"blanks before the quotation mark of {plain!r:.60}; a quoted field begins with its mark"
                row.append(plain)
            at = end.end()
            if end[0] != self.delimiter:
                return fault or row, at, lines + 1

    def _closing(self, opening: int, line: int) -> int:
        at = self.text.find(QUOTE, opening + 1)
        while self.text.startswith(QUOTE, at + 1) and at >= 0:
            at = self.text.find(QUOTE, at + 2)
        if at < 0:
            raise _Stray(f"line {line}: the quotation mark that opens a field is never closed")
        return at

    def _may_hold_rows(self, row: list[str] | str) -> bool:
        """Whether a field in quotation marks may be rows between two of them."""
        return any(self.delimiter in field and self.line_break in field for field in row)

    def _row_inside(self, row: list[str]) -> int | None:
        """How many lines below the row's first one looks like a row by itself.

        It has as many fields or more, and one like the row's own in a column outside the fields of several lines: an
        image's file if the row names one there, else what differs in digits alone, or any word if all lines have one.
        """
        width = len(row)
        lines = [line.split(self.delimiter) for line in self.line_end.split(self.delimiter.join(row))]
        broken = [column for column, field in enumerate(row) if self.line_break in field]
        own = [column for column, field in enumerate(row) if field and not broken[0] <= column <= broken[-1]]
        own = [column for column in own if FILE.fullmatch(row[column])] or own
        words_tell = self.delimiter not in SELDOM_QUOTED and all(
            len(fields) >= width and not any(field.startswith(" ") for field in fields[1:width]) for fields in lines
        )
        for number, fields in enumerate(lines):
            for column in own:
                before = column < broken[0]
                if len(fields) < width or number == (0 if before else len(lines) - 1):
                    continue
                kind, other = _kind(row[column]), _kind(fields[column if before else column - width])
                if other == kind or (words_tell and kind.isalpha() and other.isalpha()):
                    return number
        return None

    def _first_quoted(self) -> int | None:
        """The first line with a field that is text in no file, only quoted: a name, quotation marks doubled, a line
        break."""
        width, opened = 0, False
        for line, row in self._plain():
            whole = [field[1:-1] for field in row if len(field) > 1 and field[0] == field[-1] == QUOTE]
            doubled = any(QUOTE in field and QUOTE not in field.replace(QUOTE * 2, "") for field in whole)
            if doubled or (whole and not width) or (opened and any(row) and len(row) < width):
                return line
            width = width or (len(row) if row != [""] else 0)
            opened = row[-1].startswith(QUOTE) and row[-1][1:2] != "" and not row[-1].endswith(QUOTE)
        return None


def _kind(field: str) -> str:
    """What the fields of a column share: they name files, are ids with digits, or differ in their digits alone."""
    if FILE.fullmatch(field):
        return "file.0"
    return "0" if re.fullmatch(r"[\w./-]*\d[\w./-]*", field) else re.sub(r"\d+", "0", field)
