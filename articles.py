"""Where articles come from: files of several kinds, each cut into pieces that processes can read side by side.

    *.xml, *.xml.bz2, *.xml-p1p41242.bz2        a MediaWiki dump, read by wikiextractor
    *.jsonl, *.jsonl.gz, *.jsonl.bz2, wiki_00   a JSON object with a "title" and a "text" on each line
    *.parquet                                   columns "title" and "text", as in wikimedia/wikipedia
    *.txt                                       one article, whose title is the file's name

A piece is a function: called, in whatever process, it yields a record for each line, row or file of its part of the
input. A record is (title, text), or the reason why there is none, or None for a blank line.
"""

import bz2
import contextlib
import glob
import gzip
import html
import importlib.util
import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from errors import UserError

PIECE_BYTES = 1 << 23  # of text in a piece (chosen): a third of a second of tokenizing, so handing it over costs little
MAX_LINE = 1 << 28  # bytes; what has longer lines is no file of JSON lines, and must not fill the memory

Record = tuple[str, str] | str | None
Piece = Callable[[], Iterator[Record]]

# --------------------------------------------------------------------------------------------------------------------
# JSON lines


def parse_line(line: bytes, title_in_xml: bool = False) -> Record:
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode("utf-8-sig"))  # some editors mark UTF-8 with three bytes at a file's start
        title, text = record["title"], record["text"]
        if not (isinstance(title, str) and isinstance(text, str) and title.strip()):
            return "without a title and a text"
        title.encode(), text.encode()
    except UnicodeDecodeError:
        return "not UTF-8"
    except UnicodeEncodeError:  # JSON can say "\ud800"
        return "with half a surrogate pair"
    except (ValueError, RecursionError):
        return "not JSON"
    except (LookupError, TypeError):
        return "without a title and a text"
    return html.unescape(title) if title_in_xml else title, text


def parse_lines(lines: list[bytes], title_in_xml: bool) -> Iterator[Record]:
    return (parse_line(line, title_in_xml) for line in lines)


def read_line(file, path: Path) -> bytes:
    line = file.readline(MAX_LINE)
    if len(line) == MAX_LINE:
        raise UserError(f"{path}: a line of {MAX_LINE:,} bytes or more: not JSON lines")
    return line


def read_range(path: Path, start: int, stop: int, title_in_xml: bool) -> Iterator[Record]:
    """The records on the lines that begin in these bytes of a file."""
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            read_line(file, path)
        at = file.tell()
        while at < stop and (line := read_line(file, path)):
            at += len(line)
            yield parse_line(line, title_in_xml)


def jsonl_pieces(path: Path, title_in_xml: bool = False) -> Iterator[Piece]:
    size = path.stat().st_size
    for start in range(0, size, PIECE_BYTES):
        yield partial(read_range, path, start, min(start + PIECE_BYTES, size), title_in_xml)


def line_pieces(lines: Iterable[bytes], title_in_xml: bool = False) -> Iterator[Piece]:
    """Pieces of what can only be read from its beginning: they carry their lines with them."""
    block, size = [], 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= PIECE_BYTES:
            yield partial(parse_lines, block, title_in_xml)
            block, size = [], 0
    if block:
        yield partial(parse_lines, block, title_in_xml)


def compressed_pieces(path: Path) -> Iterator[Piece]:
    try:
        with (gzip.open if path.suffix == ".gz" else bz2.open)(path) as file:
            yield from line_pieces(iter(partial(read_line, file, path), b""))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def summaries_pieces(path: Path) -> Iterator[Piece]:
    """The sample's lead sections: {title: {"extract": text, ...}, ...}."""
    leads = json.loads(path.read_bytes()).items()
    return line_pieces(json.dumps({"title": title, "text": lead["extract"]}).encode() for title, lead in leads)


# --------------------------------------------------------------------------------------------------------------------
# Parquet and plain text


def open_parquet(path: Path):
    """A pyarrow.parquet.ParquetFile that reads as it goes, not a whole row group at once."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("reading Parquet takes pyarrow: pip install pyarrow==26.0.1")
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    types = {field.name: field.type for field in file.schema_arrow}
    for name in ("title", "text"):
        kind = types.get(name)
        kind = kind.value_type if kind and pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            columns = ", ".join(f"{field.name} of {field.type}" for field in file.schema_arrow)
            raise UserError(f"{path}: expected a column {name!r} of strings; it has {columns}")
    return file


def read_rows(path: Path, row_groups: list[int]) -> Iterator[Record]:
    import pyarrow

    try:
        for batch in open_parquet(path).iter_batches(100, row_groups, ["title", "text"], use_threads=False):
            titles, texts = (batch[name].cast(pyarrow.large_binary()).to_pylist() for name in ("title", "text"))
            for title, text in zip(titles, texts):
                if text is None or not (title or b"").strip():
                    yield "without a title and a text"
                    continue
                try:
                    record = title.decode(), text.decode()  # Parquet's writers do not all check this
                except UnicodeDecodeError:
                    record = "not UTF-8"
                yield record
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def parquet_pieces(path: Path) -> Iterator[Piece]:
    metadata = open_parquet(path).metadata
    groups, size = [], 0
    for number in range(metadata.num_row_groups):
        groups.append(number)
        size += metadata.row_group(number).total_byte_size
        if size >= PIECE_BYTES or number == metadata.num_row_groups - 1:
            yield partial(read_rows, path, groups)
            groups, size = [], 0


def read_texts(paths: list[Path]) -> Iterator[Record]:
    for path in paths:
        try:
            path.stem.encode()
            yield path.stem, path.read_bytes().decode("utf-8-sig")
        except UnicodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}") from error


# --------------------------------------------------------------------------------------------------------------------
# Dumps

# Runs a command in a process group that dies with us, however we die: a shell in that group waits for the end
# of its input, a pipe whose other end only we hold, and then kills the group.
DIE_WITH_US = 'exec 3<&0; (read line <&3; kill -KILL 0) >/dev/null 2>&1 & exec "$@" 3<&- </dev/null'


def dump_pieces(path: Path) -> Iterator[Piece]:
    """The articles of a MediaWiki dump, through wikiextractor: AGPL, so run as a program and never imported.

    --html-safe '' keeps it from escaping "&"; titles it leaves as in XML, so they are unescaped here.
    --no-templates: else it reads the dump twice, and a text depends on which templates are in the same file.
    An article whose title begins with the name of the dump's template namespace (in English, "Template") it leaves out.
    """
    if importlib.util.find_spec("wikiextractor") is None:
        raise UserError("reading a dump takes wikiextractor: pip install wikiextractor==3.1.0")
    if path.suffix != ".bz2" and b"</mediawiki>" not in last_bytes(path):  # of which it would say nothing
        raise UserError(f"{path} is cut off: it does not end with </mediawiki>")
    flags = ["--json", "-o", "-", "--html-safe", "", "--no-templates", "--quiet"]
    command = [sys.executable, "-m", "wikiextractor.WikiExtractor", *flags, str(path.resolve())]
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    process = subprocess.Popen(["sh", "-c", DIE_WITH_US, "sh", *command], start_new_session=True, **pipes)
    failures: list[str] = []
    watchers = [threading.Thread(target=watch, args=(process, failures), daemon=True)
                for watch in (watch_messages, watch_processes)]
    for watcher in watchers:
        watcher.start()
    try:
        yield from line_pieces(process.stdout, title_in_xml=True)
    finally:
        process.stdin.close()
        process.wait()
        for watcher in watchers:
            watcher.join()
    if failures or process.returncode != 0:
        reason = failures[0] if failures else f"exit status {process.returncode}"
        raise UserError(f"{path}: wikiextractor failed: {reason}")


def last_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 100))
        return file.read()


# When a process of wikiextractor's has died, it waits for ever, or ends well with articles missing. So it is watched in
# two ways, and ended, by closing its input, as soon as something is wrong.


def watch_messages(process: subprocess.Popen, failures: list[str]) -> None:
    """For a traceback (of a truncated dump, say) or what it says itself of missing articles."""
    in_traceback = False
    for line in process.stderr:
        message = line.decode(errors="replace").rstrip()
        if (in_traceback and message and not message[0].isspace()) or "REDUCER_EXIT incomplete" in message:
            failures.append(message)
            process.stdin.close()
        in_traceback = in_traceback or message.startswith("Traceback")


def watch_processes(process: subprocess.Popen, failures: list[str]) -> None:
    """For processes that were killed, which leave no message."""
    while process.poll() is None:
        if killed_child(process.pid):
            failures.append("one of its processes was killed (for want of memory?)")
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    process.stdin.close()


def killed_child(pid: int) -> bool:
    """Whether a signal has ended a child of this process, which has not taken notice (where there is a /proc)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        stats = [Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split() for child in children]
    except OSError:
        return False
    return any(stat[0] == "Z" and int(stat[-1]) & 127 for stat in stats)


# --------------------------------------------------------------------------------------------------------------------
# Any input

KINDS = {  # how a file is read, by its name
    "*.jsonl": jsonl_pieces,
    "wiki_[0-9][0-9]": partial(jsonl_pieces, title_in_xml=True),  # what wikiextractor calls its files
    "*.jsonl.gz": compressed_pieces,
    "*.jsonl.bz2": compressed_pieces,
    "*.parquet": parquet_pieces,
    "*.txt": None,  # many to a piece
    "*.xml": dump_pieces,
    "*.xml*.bz2": dump_pieces,
    "summaries_*.json": summaries_pieces,
}


def kind_of(path: Path) -> str | None:
    """The pattern in KINDS that a file's name matches."""
    return next((pattern for pattern in KINDS if fnmatch(path.name, pattern)), None)


def files_at(given: str) -> list[Path]:
    """The files that an input names, sorted: itself, all of a known kind in a directory, or what a glob matches."""

    def refuse(error: OSError) -> None:  # os.walk would pass over a directory that it cannot read
        raise error

    path = Path(given)
    if path.is_dir():
        found = [Path(parent, name) for parent, _, names in os.walk(path, onerror=refuse) for name in names]
        return sorted(file for file in found if file.is_file() and kind_of(file))
    return [path] if path.exists() else [Path(match) for match in sorted(glob.glob(given, recursive=True))]


def find_files(inputs: list[str]) -> list[Path]:
    """The files that the inputs name, each once. Raises UserError for a name that leads to none, and for a file or
    directory that cannot be read."""
    found = []
    for given in inputs:
        try:
            paths = files_at(given)
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from error
        if not paths:
            raise UserError(f"{given}: no file of articles in it" if Path(given).is_dir() else f"{given}: no such file")
        found += paths
    for path in found:
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            raise UserError(f"{path}: not a file that can be read")
        if kind_of(path) is None:
            raise UserError(f"{path}: of no known kind, which are .jsonl (.gz, .bz2), .parquet, .txt, .xml (.bz2)")
    return list({path.resolve(): path for path in found}.values())


def group(files: list[Path]) -> list[list[Path]]:
    """Files to read one after the other: each alone, but .txt that follow each other some PIECE_BYTES together."""
    groups, size = [], 0
    for path in files:
        is_text = kind_of(path) == "*.txt"
        if not (is_text and groups and kind_of(groups[-1][-1]) == "*.txt" and size < PIECE_BYTES):
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += path.stat().st_size
    return groups


def identity(files: list[Path]) -> tuple:
    """What decides the pieces of a group: its files, as far as their sizes and times tell, and how they are cut."""
    stats = [path.stat() for path in files]
    return PIECE_BYTES, [(str(path.resolve()), s.st_size, s.st_mtime_ns) for path, s in zip(files, stats)]


def pieces(files: list[Path]) -> Iterator[Piece]:
    """The pieces of a group. Raises UserError for a damaged file, and the pieces do too."""
    cut = KINDS[kind_of(files[0])]
    return cut(files[0]) if cut else iter([partial(read_texts, files)])
