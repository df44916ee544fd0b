"""Inputs of prepare_wiki.py: all formats give the same shards, and what cannot be read is counted or refused."""

import bz2
import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_prepare import cut, fails, flip, holds, make_articles, page, prepare, run, write_dump, write_jsonl

import articles
import prepare_wiki
from settings import UserError


def write_parquet(path: Path, rows: list[tuple], kind: str = "string", **kwargs) -> Path:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    titles, texts = (pyarrow.array(column).cast(kind) for column in zip(*rows))
    parquet.write_table(pyarrow.table({"id": titles, "title": titles, "text": texts}), path, **kwargs)
    return path


def text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_every_kind_gives_the_same_shards(tmp_path):
    given = sorted(make_articles(100))
    plain = write_jsonl(tmp_path / "in.jsonl", given)
    lines, mark = plain.read_bytes(), b"\xef\xbb\xbf"
    (tmp_path / "texts").mkdir()
    for title, body in given:
        text(tmp_path / "texts" / f"{title}.txt", mark + body.replace("\n", "\r\n").encode())
    sources = [
        text(tmp_path / "mark.jsonl", mark + lines.replace(b"\n", b"\r\n\r\n")),
        text(tmp_path / "cr.jsonl", lines.replace(b"\\n", b"\\r")),
        text(tmp_path / "in.jsonl.gz", gzip.compress(mark + lines)),
        text(tmp_path / "in.jsonl.bz2", bz2.compress(lines[:9999]) + bz2.compress(lines[9999:])),
        text(tmp_path / "wiki_00", lines), tmp_path / "texts" / "*.txt",
        write_parquet(tmp_path / "groups.parquet", given, row_group_size=7),
        write_parquet(tmp_path / "large.parquet", given, "large_string", compression="zstd")]  # fmt: skip
    prepare(tmp_path / "plain", plain)
    holds(tmp_path / "plain", given)
    for number, source in enumerate(sources):
        prepare(tmp_path / f"{number}", source, piece_bytes=5_000)
        for file in ("train_00000.bin", "val_00000.bin"):
            assert (tmp_path / f"{number}" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_directories_and_globs(tmp_path):
    """A file is read once, however often it is named."""
    given, names = make_articles(60), ["articles/AA/more.JSONL", "articles/AA/wiki_00", "x1.jsonl", "x2.jsonl"]
    (tmp_path / "articles" / "AA").mkdir(parents=True)
    for first, name in enumerate(names):
        write_jsonl(tmp_path / name, given[first::4])
    _ = [text(tmp_path / "articles" / name, b"Not an article.") for name in ("README.md", "summaries_2024.json")]
    (tmp_path / "articles" / "AA").rename(tmp_path / "elsewhere")
    (tmp_path / "articles" / "AA").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "articles")  # a cycle
    meta = prepare(tmp_path / "out", *(tmp_path / name for name in ("articles", "**/x?.jsonl", names[2], names[1])))
    assert [source["file"] for source in meta["source"]] == [Path(name).name for name in names]
    assert meta["left_out"] == {}
    holds(tmp_path / "out", given)


def test_dump(tmp_path):
    pytest.importorskip("wikiextractor")
    pages = [page(f"Page {i}", f"'''Page {i}''' is [[a link|linked]]{{{{gone|x}}}} &amp; plain.") for i in range(100)]
    pages += [
        page("A&amp;B &quot;C&quot;", "At &amp;lt; 5&amp;nbsp;&amp;pound;&lt;ref&gt;x&lt;/ref&gt; &amp; up"),
        page("Talk:Page 10", "Not an article.", namespace=1), page("Only a list", "* one\n* two"),
        page("Old name", "#REDIRECT [[Page 10]]", redirect='<redirect title="Page 10" />\n')]  # fmt: skip
    packed = write_dump(tmp_path / "small.xml.bz2", pages)
    plain = text(tmp_path / "plain.xml", bz2.decompress(packed.read_bytes()))
    # A user may also run wikiextractor and pass its output
    flags = ["--json", "--html-safe", "", "--no-templates", "--quiet", "-o", tmp_path / "extracted"]
    subprocess.run([sys.executable, "-m", "wikiextractor.WikiExtractor", *flags, packed], check=True)
    expected = [(f"Page {i}", f"Page {i} is linked & plain.") for i in range(100)]
    expected.append(('A&B "C"', "At < 5\u00a0£ & up"))
    for source in (packed, plain, tmp_path / "extracted"):
        out = tmp_path / f"out of {source.name}"
        assert prepare(out, source)["left_out"] == {"without text": 1}
        holds(out, expected)


@pytest.mark.parametrize("module, file", [("wikiextractor", "a.xml.bz2"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named(monkeypatch, module, file):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {module}=="):
        next(articles.pieces([Path(file)]))


GOOD = b'{"title": "A", "text": "b"}\n'
LINES = "".join(json.dumps({"title": title, "text": body}) + "\n" for title, body in make_articles(500)).encode()


def dump(folder: Path, count: int) -> bytes:
    pages = [page(f"P {i}", random.Random(i).randbytes(900).hex()) for i in range(count)]
    return write_dump(folder / "whole", pages).read_bytes()


def numbers(folder: Path) -> bytes:
    return write_parquet(folder / "b", [(1, 2)], "int64").read_bytes()


NOTHING = "without a title and a text"
WRONG = {  # file name, content or a function of the folder that makes it, words of the message, arguments
    "bz2 cut off": ("a.jsonl.bz2", cut(bz2.compress(LINES)), "cannot read"),
    "bz2 flipped": ("a.jsonl.bz2", flip(bz2.compress(LINES)), "cannot read"),
    "not Parquet": ("a.parquet", GOOD, "cannot read"), "unknown kind": ("a.csv", GOOD, "of no known kind"),
    "Parquet of numbers": ("a.parquet", numbers, f"a.parquet, row 1 of group 0: {NOTHING}"),
    "no title": ("a.parquet", lambda at: numbers(at).replace(b"title", b"topic"), "'text', found id, topic, text"),
    "Latin-1 JSON lines": ("a.jsonl", GOOD + GOOD.replace(b"A", b"\xe9"), "a.jsonl:2: not UTF-8"),
    "Latin-1 text": ("a.txt", "Café".encode("latin-1"), "1 of 1 records are unreadable (see --max_skipped)"),
    "title not UTF-8": (os.fsdecode(b"caf\xe9.txt"), b"text", "not UTF-8"),
    "an endless line": ("a.jsonl", lambda at: GOOD + bytes(1 << 28), "a line of 268,435,456 bytes or more"),
    "dump cut off": ("a.xml.bz2", lambda at: cut(dump(at, 2000)), "cut off"), "cut XML": ("a.xml", GOOD, "cut off"),
    "dump flipped": ("a.xml.bz2", lambda at: flip(dump(at, 1)), "wikiextractor failed"),
    "empty dump": ("a.xml.bz2", lambda at: dump(at, 0), "no article in it"),
    "nothing": ("a.jsonl", b"", "no article in it"), "none readable": ("a.jsonl", b"\n\noops\n", "a.jsonl:3: not JSON"),
    "more than a thousandth unreadable": ("a.jsonl", LINES + b"oops\n", "1 of 507 records"),
    "no such file": ("a.jsonl", GOOD, "b.jsonl: there is no file", "b.jsonl"), "no name": ("a", GOOD, "is no file", ""),
    "a dead link": ("a.jsonl", lambda at: (at / "dead.jsonl").symlink_to("nowhere") or GOOD, "dead.jsonl", "."),
    "only empty articles": ("a.jsonl", b'{"title": "A", "text": " "}\n', "no article falls into train"),
    "nothing for val": ("a.jsonl", GOOD, "no article falls into val", "--val_fraction", 0.00001),
    "bad fraction": ("a.jsonl", GOOD, "--val_fraction", "--val_fraction", 1),
    "two inputs": ("a.jsonl", GOOD, "give either INPUT files", "--sample"),
    "output in a file": ("a.jsonl", GOOD, "cannot make", "--out", "a.jsonl/out")}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, case):
    name, content, message, *args = WRONG[case]
    path = text(tmp_path / name, content if isinstance(content, bytes) else content(tmp_path))
    named = "" if "no article falls" in message or args else str(path).encode(errors="backslashreplace").decode()
    monkeypatch.chdir(tmp_path)
    fails(run("--out", "out", path, *args), message, named, out=tmp_path / "out")


UNREADABLE = {  # a line, and why it is skipped
    b"{'title': 1}": "not JSON", b'{"title": "B", "text": "c': "not JSON", b"[" * 100_000: "not JSON",
    b'["title", "text"]': NOTHING, b'{"title": "B"}': NOTHING,
    b'{"title": " ", "text": "c"}': NOTHING, b'{"title": "B", "text": ["c"]}': NOTHING,
    b'{"title": "B", "text": "\xff"}': "not UTF-8", b'{"title": "B", "text": "\\ud800"}': "not UTF-8"}  # fmt: skip


def test_unreadable_records_are_skipped_and_counted(tmp_path):
    given, reasons = make_articles(20_000, words=2), [NOTHING] * 3 + list(UNREADABLE.values())
    lines = write_jsonl(tmp_path / "good.jsonl", given).read_bytes().splitlines()
    for number, line in enumerate(UNREADABLE):
        lines[number * 1500 : number * 1500] = [line, b""]
    rows = write_parquet(tmp_path / "a.parquet", [("C", "d"), ("B", None), (None, "c"), (" ", "c")], row_group_size=2)
    meta = prepare(tmp_path / "out", rows, text(tmp_path / "in.jsonl", b"\n".join(lines)), piece_bytes=20_000)
    holds(tmp_path / "out", [*given, ("C", "d")])
    assert meta["skipped"] == Counter(reasons) and meta["records"] == len(given) + 1 + len(reasons)
    places = ["a.parquet, row 2 of group 0", *(f"a.parquet, row {i} of group 1" for i in (1, 2))]
    places += [f"in.jsonl:{i * 1500 + 1}" for i in range(2)]
    assert meta["first_skipped"] == [f"{tmp_path}/{place}: {reason}" for place, reason in zip(places, reasons)]


def test_giant_articles(tmp_path):
    """Why MAX_RUN exists: tiktoken fails on a gap of a million characters and needs 1 GB for a word of 20 million."""
    most = prepare_wiki.MAX_RUN
    given = [("word", "x" * most), ("gap", "a" + "\n" * most + "b"), ("emoji", "👩‍👩‍👧‍👦" * (most // 7))]
    given += [("words", "word " * 3_000_000), *make_articles(100)]
    beyond = [("word", "x" * (most + 1)), ("not Latin", "維基百科" * most), ("gap", "a" + " " * (most + 1) + "b")]
    beyond += [("only a gap", " " * 5_000_000 + ".")]
    source = write_jsonl(tmp_path / "in.jsonl", given + beyond)
    meta = prepare(tmp_path / "out", source, "--workers", 2, "--max_skipped", 1)
    holds(tmp_path / "out", given)
    assert meta["skipped"] == {"with a word or gap of over 500,000 characters": len(beyond)}
