"""What articles may come in, and what real text does to a program that expects it to be clean."""

import bz2
import gzip
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_prepare import (
    NEEDS_PROC,
    are_gone,
    contents,
    descendants,
    gpt2_encoding,
    make_articles,
    page,
    prepare,
    read_articles,
    run,
    shards,
    start,
    wait_for,
    write_dump,
    write_jsonl,
)

import articles
from errors import UserError


def write_parquet(path: Path, rows: list[tuple], **kwargs) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    titles, texts = (list(column) for column in zip(*rows))
    ids = [str(i) for i in range(len(rows))]
    table = {"id": ids, "url": [f"https://en.wikipedia.org/wiki/{i}" for i in ids], "title": titles, "text": texts}
    parquet.write_table(pyarrow.table(table), path, **kwargs)
    return path


def read_all(out: Path) -> list[str]:
    return sorted(read_articles(out, "train") + read_articles(out, "val"))


# --------------------------------------------------------------------------------------------------------------------
# Kinds of files


def test_every_kind_gives_the_same_shards(tmp_path):
    given = sorted((title, text) for title, text in make_articles(300) if "/" not in title)
    plain = write_jsonl(tmp_path / "in.jsonl", given)
    sources = {"plain": plain, "mark": tmp_path / "mark.jsonl", "gz": tmp_path / "in.jsonl.gz",
               "bz2": tmp_path / "in.jsonl.bz2", "txt": tmp_path / "texts", "wiki": tmp_path / "wiki_00",
               "parquet": write_parquet(tmp_path / "in.parquet", given, row_group_size=7),
               "one group": write_parquet(tmp_path / "one.parquet", given, compression="zstd")}
    sources["mark"].write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n\r\n"))
    sources["gz"].write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes()))
    sources["bz2"].write_bytes(bz2.compress(plain.read_bytes()[:9999]) + bz2.compress(plain.read_bytes()[9999:]))
    sources["wiki"].write_bytes(plain.read_bytes())
    sources["txt"].mkdir()
    for title, text in given:
        (sources["txt"] / f"{title}.txt").write_bytes(text.encode())
    sources["txt"] = sources["txt"] / "*.txt"  # a glob, which gives them in the order of their names
    for name, source in sources.items():
        prepare(tmp_path / name / "out", source, piece_bytes=5_000)
    assert read_all(tmp_path / "plain" / "out") == sorted(f"{title}\n\n{text}" for title, text in given)
    for name in sources:
        for file in ("train_00000.bin", "val_00000.bin"):
            assert (tmp_path / name / "out" / file).read_bytes() == (tmp_path / "plain" / "out" / file).read_bytes()


def test_directories_and_globs(tmp_path):
    given = make_articles(60)
    folder = tmp_path / "articles" / "AA"
    folder.mkdir(parents=True)
    write_jsonl(folder / "wiki_00", given[:20])
    write_jsonl(folder / "more.jsonl", given[20:40])
    write_jsonl(tmp_path / "x1.jsonl", given[40:50])
    write_jsonl(tmp_path / "x2.jsonl", given[50:])
    (folder / "README.md").write_text("Not an article.")
    mixed = [tmp_path / "articles", tmp_path / "x?.jsonl", tmp_path / "x1.jsonl", folder / "wiki_00"]
    meta = prepare(tmp_path / "out", *mixed)
    assert read_all(tmp_path / "out") == sorted(f"{title}\n\n{text}" for title, text in given)
    assert [source["file"] for source in meta["source"]] == ["more.jsonl", "wiki_00", "x1.jsonl", "x2.jsonl"]
    assert meta["left_out"] == {} and meta["records"] == len(given)  # what is named twice is read once
    for nothing in (tmp_path / "y*.jsonl", tmp_path / "y.jsonl", tmp_path / "out" / "empty"):
        (tmp_path / "out" / "empty").mkdir(exist_ok=True)
        done = run(nothing, "--out", tmp_path / "other")
        assert done.returncode == 2 and str(nothing) in done.stderr


def test_dump(tmp_path):
    pytest.importorskip("wikiextractor")
    pages = [page(f"Page {i}", f"'''Page {i}''' is [[a link|linked]]{{{{gone|x}}}} &amp; plain.", number=i)
             for i in range(10, 110)]
    pages += [
        page("A&amp;B &quot;C&quot;", "At &amp;lt; 5&amp;nbsp;&amp;pound;&lt;ref&gt;x&lt;/ref&gt; &amp; up"),
        page("Talk:Page 10", "Not an article.", namespace=1, number=2),
        page("Old name", "#REDIRECT [[Page 10]]", number=3, redirect='    <redirect title="Page 10" />\n'),
        page("Only a list", "* one\n* two", number=4),
    ]
    packed = write_dump(tmp_path / "small.xml.bz2", pages)
    plain = tmp_path / "plain.xml"
    plain.write_bytes(bz2.decompress(packed.read_bytes()))
    for number, dump in enumerate([packed, plain]):
        done = run(dump, "--out", tmp_path / f"{number}")
        assert done.returncode == 0 and "left out: 1 without text" in done.stdout, done.stderr
        expected = [f"Page {i}\n\nPage {i} is linked & plain." for i in range(10, 110)]
        expected.append('A&B "C"\n\nAt < 5\u00a0£ & up')
        assert read_all(tmp_path / f"{number}") == sorted(expected)
    # The same in two steps: wikiextractor into files, as its users have them.
    flags = ["--json", "--html-safe", "", "--no-templates", "--quiet", "-o", tmp_path / "extracted"]
    subprocess.run([sys.executable, "-m", "wikiextractor.WikiExtractor", *flags, packed], check=True)
    prepare(tmp_path / "two", tmp_path / "extracted")
    assert read_all(tmp_path / "two") == sorted(expected)


@pytest.mark.parametrize("module, file", [("wikiextractor", "a.xml.bz2"), ("pyarrow", "a.parquet")])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, module, file):
    (tmp_path / file).touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {module}=="):
        next(articles.pieces([tmp_path / file]))


# --------------------------------------------------------------------------------------------------------------------
# Damaged files: an error that names the file, and nothing published

GOOD = '{"title": "A", "text": "b"}\n'


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def encoded(path: Path, encoding: str) -> Path:
    path.write_text("".join(json.dumps(dict(zip(("title", "text"), article)), ensure_ascii=False) + "\n"
                            for article in make_articles(200)), encoding, errors="ignore")
    return path


def packed_jsonl(path: Path, compress) -> Path:
    path.write_bytes(compress(write_jsonl(path.with_suffix(""), make_articles(2000)).read_bytes()))
    return path


def flipped(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


DAMAGED = {  # how to make it in a folder, and what the message says besides the file's name
    "bz2 cut off": (lambda d: cut(packed_jsonl(d / "a.jsonl.bz2", bz2.compress)), "damaged"),
    "gz cut off": (lambda d: cut(packed_jsonl(d / "a.jsonl.gz", gzip.compress)), "damaged"),
    "bz2 flipped": (lambda d: flipped(packed_jsonl(d / "a.jsonl.bz2", bz2.compress)), "damaged"),
    "gz flipped": (lambda d: flipped(packed_jsonl(d / "a.jsonl.gz", gzip.compress)), "damaged"),
    "no bz2 at all": (lambda d: write_jsonl(d / "a.jsonl.bz2", make_articles(9)), "damaged"),
    "Parquet cut off": (lambda d: cut(write_parquet(d / "a.parquet", make_articles(500))), "damaged"),
    "no Parquet": (lambda d: write_jsonl(d / "a.parquet", make_articles(9)), "damaged"),
    "UTF-16 JSON lines": (lambda d: encoded(d / "a.jsonl", "utf-16"), "not UTF-8"),
    "Latin-1 JSON lines": (lambda d: encoded(d / "a.jsonl", "latin-1"), "not UTF-8"),
    "UTF-16 text": (lambda d: text(d / "a.txt", "Some text".encode("utf-16")), "not UTF-8"),
    "Latin-1 text": (lambda d: text(d / "a.txt", "Café".encode("latin-1")), "not UTF-8"),
    "title not UTF-8": (lambda d: text(d / os.fsdecode(b"caf\xe9.txt"), b"text"), "not UTF-8"),
    "an endless line": (lambda d: endless(d / "a.jsonl"), "a line of 268,435,456 bytes or more"),
}


def endless(path: Path) -> Path:
    """A GB of zeros that takes no room."""
    with path.open("wb") as file:
        file.write(GOOD.encode())
        file.truncate(1 << 30)
    return path


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, case):
    make, message = DAMAGED[case]
    good = write_jsonl(tmp_path / "good.jsonl", make_articles(100))
    bad = make(tmp_path)
    done = run(good, bad, "--out", tmp_path / "out", "--workers", 2)
    named = str(bad).encode(errors="backslashreplace").decode()
    assert done.returncode == 2 and message in done.stderr and named in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert set(os.listdir(tmp_path / "out")) <= {"prepare_wiki.unfinished"}


def test_parquet_of_other_layouts(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for columns, has in (({"title": ["a"], "body": ["b"]}, "body of string"), ({"title": ["a"], "text": [1]}, "int64"),
                         ({"title": ["a"], "text": [["b"]]}, "text of list<")):
        parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        done = run(tmp_path / "a.parquet", "--out", tmp_path / "out")
        assert done.returncode == 2 and "expected a column 'text' of strings" in done.stderr and has in done.stderr
    given = make_articles(50)
    titles, texts = (pyarrow.array(column) for column in zip(*given))
    for number, kind in enumerate((pyarrow.large_string(), pyarrow.string_view(), None)):
        columns = [column.cast(kind) if kind else column.dictionary_encode() for column in (titles, texts)]
        parquet.write_table(pyarrow.table(columns, ["title", "text"]), tmp_path / "a.parquet")
        prepare(tmp_path / f"{number}", tmp_path / "a.parquet", "--val_fraction", 0.2)
        assert read_all(tmp_path / f"{number}") == sorted(map("\n\n".join, given))


def test_what_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_articles(1))
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if path and Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root, who runs some of these tests, may look everywhere
    with pytest.raises(UserError, match="closed: Permission denied"):
        articles.find_files([str(tmp_path)])
    with pytest.raises(UserError, match="File name too long"):
        articles.find_files(["x" * 300])


def test_blank_lines_are_no_records(tmp_path):
    lines = [json.dumps(dict(zip(("title", "text"), article))) for article in make_articles(500)]
    source = tmp_path / "in.jsonl"
    source.write_text("\n\n\n\n".join([*lines, "oops", "oops"]))
    done = run(source, "--out", tmp_path / "out")
    assert done.returncode == 2 and f"2 of {len(lines) + 2} records" in done.stderr, done.stderr
    assert f"{source}:{4 * len(lines) + 1}: not JSON" in done.stderr
    assert prepare(tmp_path / "out", source, "--max_skipped", 1, piece_bytes=900)["records"] == len(lines) + 2


def test_damaged_dumps(tmp_path):
    """wikiextractor would wait for ever on the first of these, and call the others a success."""
    pytest.importorskip("wikiextractor")
    good = write_jsonl(tmp_path / "good.jsonl", make_articles(100))
    pages = [page(f"P {i}", random.Random(i).randbytes(900).hex(), number=i) for i in range(2000)]
    whole = write_dump(tmp_path / "whole.xml.bz2", pages)
    xml = bz2.decompress(whole.read_bytes())
    dumps = {
        "cut.xml.bz2": (whole.read_bytes()[:-5000], "Compressed file ended before"),
        "cut.xml": (xml[:-5000], "cut off"),
        "empty.xml.bz2": (write_dump(tmp_path / "none", []).read_bytes(), "no article in it"),
        "nosite.xml": (xml[: xml.index(b"  <siteinfo")] + xml[xml.index(b"  <page") :], "none without <siteinfo>"),
    }
    for name, (content, message) in dumps.items():
        (tmp_path / name).write_bytes(content)
        done = run(good, tmp_path / name, "--out", tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr and name in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and os.listdir(tmp_path / "out") == ["prepare_wiki.unfinished"]


def processes_of_wikiextractor(process: subprocess.Popen) -> list[int]:
    """Its main one, the one that puts pages in order, and the others, once they are there."""
    found = []
    while len(found) < 3:
        assert process.poll() is None
        found = [pid for pid in descendants(process.pid) if b"WikiExtractor" in read_command(pid)]
    return found


def read_command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # it has ended


@NEEDS_PROC
@pytest.mark.parametrize("victim", ["main", "reducer", "worker", "us"])
def test_wikiextractor_killed(tmp_path, victim):
    """One of its processes killed, as for want of memory, is said in a line; and it ends when we are killed."""
    pytest.importorskip("wikiextractor")
    sentence = "All work and no play makes [[Jack]] a dull boy. " * 300
    dump = write_dump(tmp_path / "big.xml.bz2", [page(f"P {i}", sentence, number=i) for i in range(1500)])
    process = start(dump, "--out", tmp_path / "out", "--workers", 1)
    processes = dict(zip(["main", "reducer", "worker"], processes_of_wikiextractor(process)), us=process.pid)
    family = descendants(process.pid)
    os.kill(processes[victim], signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    assert are_gone(family) and not (tmp_path / "out" / "meta.json").exists()
    if victim != "us":
        assert process.returncode == 2 and "wikiextractor failed" in error and error.count("\n") == 1, error


# --------------------------------------------------------------------------------------------------------------------
# Records that cannot be read, and articles that are odd

UNREADABLE = {  # a line, and why it is skipped
    b"{'title': 1}": "not JSON",
    b'{"title": "B", "text": "c': "not JSON",
    b"[" * 100_000: "not JSON",
    b'["title", "text"]': "without a title and a text",
    b"7": "without a title and a text",
    b'{"title": "B"}': "without a title and a text",
    b'{"title": " ", "text": "c"}': "without a title and a text",
    b'{"title": "B", "text": ["c"]}': "without a title and a text",
    b'{"title": "B", "text": null}': "without a title and a text",
    b'{"title": "B", "text": "\xff"}': "not UTF-8",
    b'{"title": "B", "text": "\xed\xa0\x80"}': "not UTF-8",
    b'{"title": "B", "text": "\\ud800"}': "with half a surrogate pair",
}


def test_unreadable_records_are_skipped_and_counted(tmp_path):
    given = make_articles(20_000, words=2)
    lines = write_jsonl(tmp_path / "good.jsonl", given).read_bytes().splitlines()
    bad_lines = {}
    for number, line in enumerate(UNREADABLE):
        lines.insert(number * 1500, line)
        bad_lines[number * 1500 + 1] = UNREADABLE[line]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    meta = prepare(tmp_path / "out", tmp_path / "in.jsonl", piece_bytes=20_000)
    prepare(tmp_path / "good", tmp_path / "good.jsonl")
    for name in ("train_00000.bin", "val_00000.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "good" / name).read_bytes()
    reasons = list(UNREADABLE.values())
    assert meta["skipped"] == {reason: reasons.count(reason) for reason in reasons}
    expected = [f"{tmp_path}/in.jsonl:{line}: {reason}" for line, reason in bad_lines.items()]
    assert meta["first_skipped"] == expected[:5]


def test_more_than_a_thousandth_skipped_is_an_error(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(1990))
    with source.open("a") as file:
        file.write("not JSON\n" * 3)
    count = len(make_articles(1990)) + 3
    done = run(source, "--out", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out" / "meta.json").exists()
    assert f"3 of {count:,} records" in done.stderr and f"{source}:{count - 2}: not JSON" in done.stderr
    done = run(source, "--out", tmp_path / "out", "--max_skipped", 0.002)
    assert done.returncode == 0 and f"skipped: 3 not JSON, of {count:,} records" in done.stdout, done.stderr


def test_unreadable_rows_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [*make_articles(100), ("B", None), (None, "c"), (" ", "c")]
    offsets = pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0")
    broken = pyarrow.StringArray.from_buffers(1, offsets, pyarrow.py_buffer(b"\xff\xff"))
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"title": ["D"], "text": broken}), tmp_path / "b.parquet")
    sources = [write_parquet(tmp_path / "a.parquet", rows), tmp_path / "b.parquet"]
    meta = prepare(tmp_path / "out", *sources, "--max_skipped", 1)
    assert meta["skipped"] == {"without a title and a text": 3, "not UTF-8": 1}
    assert meta["first_skipped"][2:] == [f"{sources[0]}:{len(rows)}: without a title and a text",
                                         f"{sources[1]}:1: not UTF-8"]
    assert read_all(tmp_path / "out") == sorted("\n\n".join(article) for article in make_articles(100))


GIANTS = {
    "no space": "x" * 20_000_000,
    "no space, not Latin": "維基百科" * 5_000_000,
    "spaces": "word" + " " * 5_000_000 + "word",
    "only spaces": " " * 5_000_000 + ".",
    "newlines": "a" + "\n" * 5_000_000,
    "emoji": "👩‍👩‍👧‍👦" * 300_000,
}


@pytest.mark.parametrize("case", GIANTS)
def test_giant_articles(tmp_path, case):
    """tiktoken by itself fails on a million spaces, and takes a GB for 20 million letters."""
    source = write_jsonl(tmp_path / "in.jsonl", [("Giant", GIANTS[case]), *make_articles(100)])
    meta = prepare(tmp_path / "out", source, "--workers", 2)
    kept = read_all(tmp_path / "out")
    assert f"Giant\n\n{GIANTS[case]}" in kept and len(kept) == 101 + len(make_articles(0))
    assert sum(split["articles"] for split in meta["splits"].values()) == len(kept)


def test_the_special_token_in_an_article_is_plain_text(tmp_path):
    given = [(f"<|endoftext|> {i}", f"<|endoftext|>{i}<|endoftext|>\n<|endoftext|>") for i in range(100)]
    prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", given))
    assert read_all(tmp_path / "out") == sorted("\n\n".join(article) for article in given)
    assert sum((shard == 50256).sum() for split in ("train", "val") for shard in shards(tmp_path / "out", split)) == 100
    expected = gpt2_encoding().encode("\n\n".join(given[0]), disallowed_special=())
    assert 50256 not in expected


# --------------------------------------------------------------------------------------------------------------------
# Mistakes

WRONG = {  # name and content of the file, arguments, what the message says
    "no article": ("in.jsonl", "", [], "in.jsonl: no article in it"),
    "nothing but blank lines": ("in.jsonl", "\n\n", [], "in.jsonl: no article in it"),
    "only empty articles": ("in.jsonl", '{"title": "A", "text": " "}\n', [], "no article falls into train"),
    "nothing readable": ("in.jsonl", "oops\n", [], "in.jsonl: no article in it"),
    "no such file": ("other.jsonl", GOOD, [], "in.jsonl: no such file"),
    "unknown kind": ("in.csv", GOOD, [], "in.csv: of no known kind"),
    "nothing for val": ("in.jsonl", GOOD, ["--val_fraction", 0.00001], "no article falls into val"),
    "nothing for train": ("in.jsonl", GOOD, ["--val_fraction", 0.99999], "no article falls into train"),
    "all too short": ("in.jsonl", GOOD, ["--min_tokens", 99], "no article falls into train"),
    "bad fraction": ("in.jsonl", GOOD, ["--val_fraction", 1], "--val_fraction"),
    "bad share": ("in.jsonl", GOOD, ["--max_skipped", 2], "--max_skipped"),
    "bad number": ("in.jsonl", GOOD, ["--workers", "many"], "--workers"),
    "no articles asked for": ("in.jsonl", GOOD, ["--max_articles", 0], "--max_articles"),
    "unknown option": ("in.jsonl", GOOD, ["--shards", 3], "--shards"),
    "two inputs": ("in.jsonl", GOOD, ["--sample"], "either INPUT files or --sample"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(tmp_path, case):
    name, content, args, message = WRONG[case]
    (tmp_path / name).write_text(content)
    path = tmp_path / (name if case == "unknown kind" else "in.jsonl")
    done = run(path, "--out", tmp_path / "out", *args)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert (tmp_path / name).read_text() == content
    assert not list((tmp_path / "out").glob("*.*"))[1:] and not (tmp_path / "out" / "meta.json").exists()


def test_what_else_is_in_out_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    good, bad = write_jsonl(tmp_path / "good.jsonl", make_articles(300)), text(tmp_path / "bad.jsonl", b"oops\n")
    assert run(good, bad, "--out", tmp_path / "out").returncode == 2
    prepare(tmp_path / "out", good)
    assert set(contents(tmp_path / "out")) == {"notes.txt", "meta.json", "token_bytes.npy", "train_00000.bin",
                                               "val_00000.bin"}
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_file_that_changes_meanwhile(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(2000))
    process = start(source, "--out", tmp_path / "out", "--workers", 1, piece_bytes=20_000)
    wait_for(tmp_path / "out", "*.npz", process)
    process.send_signal(signal.SIGSTOP)
    subprocess.run(["touch", source], check=True)
    process.send_signal(signal.SIGCONT)
    assert "changed while it was read" in process.communicate()[1] and process.returncode == 2
