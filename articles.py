"""Read articles from files of several kinds, each cut into pieces that processes can read in parallel.

    *.xml, *.xml.bz2, *.xml-p1p41242.bz2        a MediaWiki dump, read by wikiextractor
    *.jsonl, *.jsonl.gz, *.jsonl.bz2, wiki_00   a JSON object with a "title" and a "text" on each line
    *.parquet                                   columns "title" and "text", as in wikimedia/wikipedia
    *.txt                                       one article, whose title is the file's name

A piece is a function that any process can call. It yields the place and the record of each line, row or file in its
part of the input. A record is (title, text), or the reason why there is no article.
"""

import bz2
import glob
import gzip
import html
import importlib.util
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from subprocess import PIPE, Popen

from settings import UserError

PIECE_BYTES = 1 << 22  # of text in a piece (a guess): handing a piece over is cheap, and it takes little memory
MAX_LINE = 1 << 28  # bytes (a guess); a file with a longer line is not JSON lines and must not fill memory

Record = tuple[str, str] | str
Piece = Callable[[], Iterator[tuple[str, Record]]]


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and by its container's quota."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split())
        cores = max(1, min(cores, quota // period))
    return cores


def as_record(title: object, text: object) -> Record:
    """Return (title, text) with LF line endings, or the reason why they are not an article."""
    if not (isinstance(title, str) and isinstance(text, str) and title.strip()):
        return "without a title and a text"
    return title, text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what a reader raises into a UserError that names the file."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def parse_line(line: bytes, title_in_xml: bool) -> Record:
    try:
        record = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
        title, text = record["title"], record["text"]
        title.encode(), text.encode()  # JSON can say "\ud800", half a character
        title = html.unescape(title) if title_in_xml else title
    except UnicodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    except (LookupError, TypeError, AttributeError):
        title = text = None
    return as_record(title, text)


def parse_lines(lines: list[bytes], path: Path, first: int, title_in_xml: bool) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(lines, first):
        if line.strip():
            yield f"{path}:{number}", parse_line(line, title_in_xml)


def read_lines(path: Path) -> Iterator[bytes]:
    open_file = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix.lower(), open)
    with naming(path), open_file(path, "rb") as file:
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise UserError(f"{path}: a line of {MAX_LINE:,} bytes or more: not JSON lines")
            yield line


def line_pieces(path: Path, lines: Iterable[bytes] | None = None, title_in_xml: bool = False) -> Iterator[Piece]:
    """Yield the pieces of a file, or of lines that another reader makes. A piece carries its lines."""
    block, size, first = [], 0, 1
    for number, line in enumerate(lines or read_lines(path), 1):
        block.append(line)
        size += len(line)
        if size >= PIECE_BYTES:
            yield partial(parse_lines, block, path, first, title_in_xml)
            block, size, first = [], 0, number + 1
    if block:
        yield partial(parse_lines, block, path, first, title_in_xml)


def summaries_pieces(path: Path) -> Iterator[Piece]:
    """Yield the pieces of the sample's lead sections: {title: {"extract": text, ...}, ...}."""
    leads = json.loads(path.read_bytes()).items()
    return line_pieces(path, (json.dumps({"title": title, "text": lead["extract"]}).encode() for title, lead in leads))


def need(module: str, requirement: str) -> None:
    """Raise UserError with the command that installs a module, if it is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"this kind of input needs {module}: pip install {requirement}")


def open_parquet(path: Path):
    """Return a pyarrow.parquet.ParquetFile that reads in small parts. Raises UserError if it lacks titles or texts."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    if not {"title", "text"} <= set(file.schema_arrow.names):
        raise UserError(f"{path}: expected columns 'title' and 'text', found {', '.join(file.schema_arrow.names)}")
    return file


def read_rows(path: Path, group: int) -> Iterator[tuple[str, Record]]:
    with naming(path):
        batches = open_parquet(path).iter_batches(100, [group], ["title", "text"], use_threads=False)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number} of group {group}", as_record(row["title"], row["text"])


def parquet_pieces(path: Path) -> list[Piece]:
    need("pyarrow", "pyarrow==26.0.1")
    with naming(path):
        return [partial(read_rows, path, group) for group in range(open_parquet(path).num_row_groups)]


def read_texts(paths: list[Path]) -> Iterator[tuple[str, Record]]:
    for path in paths:
        with naming(path):
            content = path.read_bytes()
        try:
            path.stem.encode()  # a file's name need not be UTF-8
            record = as_record(path.stem, content.decode("utf-8-sig"))
        except UnicodeError:
            record = "not UTF-8"
        yield str(path), record


# --------------------------------------------------------------------------------------------------------------------
# Dumps

# wikiextractor would outlive this program and wait forever. So a shell in its process group waits for the end of a
# pipe, which only this program holds open, and then kills the group.
DIE_WITH_US = 'exec 3<&0; (read end <&3; kill -KILL 0) >/dev/null 2>&1 & exec "$@" 3<&- </dev/null'


def is_cut_off(path: Path) -> bool:
    """Return whether a dump is cut off: wikiextractor would hang on cut bzip2, and not notice cut XML."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 100))
        end = file.read()
    if path.suffix.lower() != ".bz2":
        return b"</mediawiki>" not in end
    # bzip2 ends with 48 bits that mark the end, 32 of a checksum, and up to 7 that fill the last byte.
    return all((int.from_bytes(end) >> (32 + fill)) % (1 << 48) != 0x177245385090 for fill in range(8))


def dump_pieces(path: Path) -> Iterator[Piece]:
    """Yield the pieces of a MediaWiki dump. wikiextractor is AGPL, so it is run as a program and never imported.

    --html-safe '' leaves "&" in texts unescaped; titles stay as in XML. Without --no-templates, wikiextractor reads a
    dump twice, and a text depends on the templates in the same file. wikiextractor drops titles that begin with
    "Template". It can hang, for instance when one of its processes is killed.
    """
    need("wikiextractor", "wikiextractor==3.1.0")
    if is_cut_off(path):
        raise UserError(f"{path} is cut off")
    flags = ["--json", "--html-safe", "", "--no-templates", "--quiet", "-o", "-", str(path.resolve())]
    flags += ["--processes", str(usable_cores())]
    command = ["sh", "-c", DIE_WITH_US, "sh", sys.executable, "-m", "wikiextractor.WikiExtractor", *flags]
    messages = tempfile.TemporaryFile()
    with Popen(command, stdin=PIPE, stdout=PIPE, stderr=messages, start_new_session=True) as extractor:
        yield from line_pieces(path, extractor.stdout, title_in_xml=True)
        extractor.wait()
    messages.seek(0)
    said = messages.read().decode(errors="replace").strip()
    # wikiextractor may lose a process, and so articles, and still exit with status 0.
    if extractor.returncode != 0 or "Traceback" in said or "incomplete" in said:
        raise UserError(f"{path}: wikiextractor failed: {said[-300:]}")


# --------------------------------------------------------------------------------------------------------------------
# Any input

KINDS = {  # the function that cuts a file into pieces, by the file's name
    "*.jsonl": line_pieces,
    "*.jsonl.gz": line_pieces,
    "*.jsonl.bz2": line_pieces,
    "wiki_[0-9][0-9]": partial(line_pieces, title_in_xml=True),  # wikiextractor's own files
    "*.parquet": parquet_pieces,
    "*.txt": None,  # `pieces` puts many in one piece
    "*.xml": dump_pieces,
    "*.xml*.bz2": dump_pieces,
    "summaries_en-us.json": summaries_pieces,
}


def kind_of(path: Path) -> str | None:
    """Return the pattern in KINDS that a file's name matches."""
    return next((pattern for pattern in KINDS if fnmatch(path.name.lower(), pattern)), None)


def refuse(error: OSError) -> None:
    raise error


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the files of articles in a folder and its subfolders. Links are followed, each real folder once."""
    seen = set()
    for path, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(path)
        subfolders[:] = [] if real in seen else sorted(subfolders)
        if real not in seen:
            yield from (file for name in names if kind_of(file := Path(path, name)))
        seen.add(real)


def find_files(inputs: list[str]) -> list[Path]:
    """Return the files that the inputs name, each once, in order. Those of a directory or a glob are sorted."""
    found = {}
    for given in map(os.path.expanduser, inputs):
        path = Path(given)
        paths = [path] if path.exists() else [Path(match) for match in glob.glob(given, recursive=True)]
        paths = [file for path in paths for file in (files_in(path) if path.is_dir() else [path])]
        if not (given and paths):
            raise UserError(f"{given}: there is no file of articles")
        found |= {file.resolve(): file for file in sorted(paths)}
    for path in found.values():
        if kind_of(path) is None:
            raise UserError(f"{path}: of no known kind; known are .jsonl (.gz, .bz2), .parquet, .txt, .xml (.bz2)")
    return list(found.values())


def pieces(files: list[Path]) -> Iterator[Piece]:
    """Yield all pieces of all files, in order. Raises UserError for an empty or damaged file, as does a piece."""
    for kind, group in groupby(files, kind_of):
        if kind == "*.txt":
            while texts := list(islice(group, 100)):  # one small file would be too small a piece
                yield partial(read_texts, texts)
        for path in group:
            piece = None
            for piece in KINDS[kind](path):
                yield piece
            if piece is None:
                raise UserError(f"{path}: no article in it")
