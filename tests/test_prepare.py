"""prepare_wiki.py against another tokenizer, another way to lay out shards, and unbroken runs; its failures."""

import bz2
import hashlib
import html
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import packages
import prepare_wiki
from packages import gpt2_encoding

ROOT = Path(prepare_wiki.__file__).parent
ENDOFTEXT = 50256
UNUSUAL = [
    ("Naïve_Café", "Ünïcödé, 東京, 🙂 and \u00a0 a no-break space.\n\n\tTabs  and   spaces \n"),
    ("Special token", "It says <|endoftext|> here, <|endoftext|>and<|endoftext|>."),
    ("Line separators", "one\u2028two\x0bthree\x85four\r\nfive"),
    ("Digits", "1234567890 " * 30 + "don't you'll I'VE"),
    ("עברית", "שלום עולם. العربية تُكتب من اليمين إلى اليسار. \u202eback\u202c"),
    ("中文", "维基百科是一个自由的百科全书。ウィキペディア 위키백과 👩‍👩‍👧‍👦🏳️‍🌈"),
    ("NUL", "a\x00b\x00\x00 c\x1c \x1fd \ufffe\ufeff"),
    ("Newlines", "\n\n  leading\n \n\n and trailing \n\n\n"),
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


def normalise(title: str) -> str:
    return " ".join(unicodedata.normalize("NFC", html.unescape(title)).replace("_", " ").split())


def split_of(title: str, val_fraction: float = 0.05) -> str:
    digest = hashlib.blake2b(normalise(title).encode(), digest_size=8).hexdigest()
    return "val" if int(digest, 16) < val_fraction * 2**64 else "train"


def command(*args, piece_bytes: int | None = None) -> list[str]:
    """Return the program's command line; with piece_bytes, one that cuts a small input into many pieces."""
    program = [str(ROOT / "prepare_wiki.py")]
    if piece_bytes:
        code = "import articles, prepare_wiki, settings\narticles.PIECE_BYTES = {}\nwith settings.user_errors():\n"
        program = ["-c", code.format(piece_bytes) + "    prepare_wiki.main()"]
    return [sys.executable, *program, *map(str, args)]


def execute(words: list[str], env: dict = os.environ, **kwargs) -> subprocess.CompletedProcess:
    env = env | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(words, check=False, capture_output=True, text=True, env=env, timeout=120, **kwargs)


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return execute(command(*args, **kwargs))


def prepare(out: Path, *args, **kwargs) -> dict:
    """Run the program, which must succeed, and return meta.json."""
    done = run(*args, "--out", out, **kwargs)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "meta.json").read_text())


def fails(done: subprocess.CompletedProcess, *messages: str, out: Path | None = None) -> None:
    """Assert that the program said so in one line, and left nothing in `out`."""
    assert done.returncode == 2 and all(message in done.stderr for message in messages), (messages, done.stderr)
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert out is None or not out.exists() or os.listdir(out) == []


def shards(out: Path, split: str) -> list[np.ndarray]:
    return [np.fromfile(path, "<u2") for path in sorted(out.glob(f"{split}_*.bin"))]


def read_articles(out: Path, split: str) -> list[str]:
    """Return "title\\n\\ntext" of each article in the shards, as tiktoken decodes them."""
    tokens = np.concatenate(shards(out, split))
    starts = np.flatnonzero(tokens == ENDOFTEXT)
    assert starts[0] == 0
    return [gpt2_encoding().decode(article[1:].tolist()) for article in np.split(tokens, starts)[1:]]


def read_all(out: Path) -> list[str]:
    return sorted(read_articles(out, "train") + read_articles(out, "val"))


def joined(articles: list[tuple[str, str]]) -> list[str]:
    return sorted(map("\n\n".join, articles))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(out: Path, *args, **kwargs) -> subprocess.Popen:
    """Start the program where Ctrl-C reaches it: a shell's "&" would have it ignored."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OUT": str(out)}
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*args, "--out", out, **kwargs), env=env, preexec_fn=listen, **pipes)


def members(out: Path) -> list[int]:
    """Return the processes that `start` started, and their children, which have its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has just ended
            found += [int(path.parent.name)] * (f"OUT={out}\0".encode() in path.read_bytes())
    return found


def all_end(out: Path) -> bool:
    deadline = time.monotonic() + 10
    while members(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not members(out)


def wait_for(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    while not list(folder.rglob(pattern)):
        assert process.poll() is None, process.communicate()


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


def vocabulary_file(name: str) -> str:
    """Return vocab.bpe or encoder.json from tiktoken's cache."""
    gpt2_encoding()
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = Path(cache or packages.tempfile.gettempdir() + "/data-gym-cache")
    return (cache / hashlib.sha1((packages.GPT2_URL + name).encode()).hexdigest()).read_text()


# --------------------------------------------------------------------------------------------------------------------
# What shards hold


def test_shards_hold_what_another_tokenizer_says(tmp_path):
    """Compare with Hugging Face's byte-level BPE on the same vocabulary, and a second writing of the format."""
    tokenizers = pytest.importorskip("tokenizers")
    merges = [tuple(line.split()) for line in vocabulary_file("vocab.bpe").splitlines()[1:]]
    written = json.loads(vocabulary_file("encoder.json"))  # a character for each byte of a token
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=written, merges=merges))
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    articles = make_articles(200)
    meta = prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", articles), "--val_fraction", 0.2)
    lengths = np.load(tmp_path / "out" / "token_bytes.npy")
    assert lengths.dtype == np.uint16 and lengths.shape == (50257,) and lengths[ENDOFTEXT] == 0
    assert all(lengths[i] == len(token) for token, i in written.items() if i != ENDOFTEXT)
    for split in ("train", "val"):
        kept = [f"{title}\n\n{text}" for title, text in articles if split_of(title, 0.2) == split]
        expected = [token for article in kept for token in [50256, *other.encode(article).ids]]
        (shard,) = shards(tmp_path / "out", split)
        assert shard.tolist() == expected and read_articles(tmp_path / "out", split) == kept
        sizes = {"articles": len(kept), "tokens": len(expected), "bytes": sum(len(a.encode()) for a in kept)}
        assert meta["splits"][split] == sizes and lengths[shard].sum() == sizes["bytes"]
    assert (meta["token_type"], meta["byte_order"]) == ("uint16", "little-endian")
    assert meta["tokenizer"] == {"name": "gpt2", "vocab_size": 50257, "endoftext": 50256}
    assert meta["source"] == [{"file": "in.jsonl", "bytes": (tmp_path / "in.jsonl").stat().st_size}]
    assert meta["options"] == {"val_fraction": 0.2, "min_tokens": 0, "max_articles": None, "seed": 0,
                               "shard_tokens": 100_000_000}


def test_shards_are_filled_in_order_without_cutting_an_article(tmp_path):
    articles, limit = make_articles(100), 2000
    meta = prepare(tmp_path, write_jsonl(tmp_path / "in.jsonl", articles), "--shard_tokens", limit, piece_bytes=20_000)
    for split in ("train", "val"):
        lengths = [1 + len(gpt2_encoding().encode_ordinary(f"{title}\n\n{text}"))
                   for title, text in articles if split_of(title) == split]
        layout = [[]]
        for length in lengths:
            if layout[-1] and sum(layout[-1]) + length > limit:
                layout.append([])
            layout[-1].append(length)
        ends = [np.flatnonzero(np.append(s, ENDOFTEXT) == ENDOFTEXT) for s in shards(tmp_path, split)]
        assert [np.diff(in_one).tolist() for in_one in ends] == layout
    assert any(len(shard) > limit for shard in shards(tmp_path, "train"))  # an article that long
    files = sorted(tmp_path.glob("*.bin"))
    assert [(shard["file"], 2 * shard["tokens"], shard["sha256"]) for shard in meta["shards"]] == [
        (file.name, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files
    ]


def test_workers_do_not_change_a_byte(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(1000))
    options = [source, "--shard_tokens", 100_000]
    prepare(tmp_path / "one", *options, "--workers", 1)  # in one piece
    prepare(tmp_path / "three", *options, "--workers", 3, piece_bytes=20_000)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_split_depends_on_the_title_alone(tmp_path):
    articles = make_articles(4000, words=5)
    prepare(tmp_path / "a", write_jsonl(tmp_path / "a.jsonl", articles))
    other = [(unicodedata.normalize("NFD", f" {title.replace(' ', '_')}  "), text + "!") for title, text in articles]
    others = write_jsonl(tmp_path / "wiki_00", make_articles(50, seed=1))
    prepare(tmp_path / "b", others, write_jsonl(tmp_path / "b.jsonl", other[::-1]), "--workers", 1)

    def titles(out: Path, split: str) -> set[str]:
        return {normalise(article.split("\n\n")[0]) for article in read_articles(out, split)}

    for split in ("train", "val"):
        assert titles(tmp_path / "a", split) == titles(tmp_path / "b", split)
        assert titles(tmp_path / "a", split) == {normalise(t) for t, _ in articles if split_of(t) == split}
    assert abs(len(titles(tmp_path / "a", "val")) - 200) < 4 * (4000 * 0.05 * 0.95) ** 0.5  # four standard deviations


def test_max_articles_draws_the_smallest_hashes(tmp_path):
    articles = make_articles(300, words=20)
    forward = write_jsonl(tmp_path / "forward.jsonl", articles)
    backward = write_jsonl(tmp_path / "backward.jsonl", articles[::-1])
    sizes = {title: len(gpt2_encoding().encode_ordinary(f"{title}\n\n{text}")) for title, text in articles}
    passing = [title for title, _ in articles if sizes[title] >= 40]

    def rank(title: str) -> bytes:
        return hashlib.blake2b(normalise(title).encode(), digest_size=8, key=b"seed 3").digest()

    expected = set(sorted(passing, key=rank)[:100])
    options = ["--min_tokens", 40, "--max_articles", 100, "--seed", 3]
    for source in (forward, backward):
        meta = prepare(tmp_path / source.stem, source, *options)
        kept = [article.split("\n\n")[0] for article in read_all(tmp_path / source.stem)]
        assert set(kept) == expected and len(kept) == 100
        assert meta["left_out"] == {"too short": len(articles) - len(passing), "not drawn": len(passing) - 100}
    prepare(tmp_path / "other", forward, "--max_articles", 100, "--seed", 4)
    assert len(read_all(tmp_path / "other")) == 100
    assert contents(tmp_path / "other")["train_00000.bin"] != contents(tmp_path / "forward")["train_00000.bin"]


LETTERS = ["abc", " ", "\n", "\t", "'s", "12", "é", "東京", "🙂", "שָׁ", "\u200f", "\0", "\u2028", "<|endoftext|>"]
LETTERS += ["<|", "&amp;", "_", '"', "\\", "\ufeff", "\x1c", "\u00a0", "\U0010ffff"]


@pytest.mark.parametrize("seed", range(8))
def test_fuzz(tmp_path, seed):
    """Prepare random records in random files, under random options."""
    rng = random.Random(seed)

    def make_text(most: int) -> str:
        return "".join(rng.choices(LETTERS, weights=[rng.random() for _ in LETTERS], k=rng.randint(0, most)))

    given = []
    for _ in range(400):
        title = make_text(4)
        given.append(rng.choice(given) if given and rng.random() < 0.1 else (title, make_text(60)))
    readable = [(title, text) for title, text in given if title.strip()]
    min_tokens, max_articles = rng.choice([0, 20]), rng.choice([None, 100])
    options = ["--val_fraction", 0.3, "--max_skipped", 1, "--min_tokens", min_tokens, "--workers", rng.randint(1, 3),
               "--shard_tokens", rng.choice([200, 5000])] + (["--max_articles", max_articles] if max_articles else [])
    sources, per_file = [], rng.choice([57, 400])
    for first in range(0, len(given), per_file):
        sources.append(write_jsonl(tmp_path / f"{first}.jsonl", given[first : first + per_file]))
    meta = prepare(tmp_path / "out", *sources, *options, piece_bytes=rng.choice([300, 10_000]))

    # An article whose title is spelled differently is the same; each is kept once.
    unique = {}
    for title, text in readable:
        if text.strip():
            unique.setdefault((normalise(title), text), (title, text))
    encode = gpt2_encoding().encode_ordinary
    fitting = [article for article in unique.values() if len(encode("\n\n".join(article))) >= min_tokens]
    kept = {split: read_articles(tmp_path / "out", split) for split in ("train", "val")}
    everything = kept["train"] + kept["val"]
    assert not Counter(everything) - Counter(map("\n\n".join, fitting))
    assert len(everything) == min(len(fitting), max_articles or len(fitting)) > 20
    assert meta["skipped"].get("without a title and a text", 0) == len(given) - len(readable)
    lost = sum(meta["left_out"].values()) + sum(meta["skipped"].values())
    assert lost + len(everything) == meta["records"] == len(given)
    for split in kept:
        expected = [token for article in kept[split] for token in [ENDOFTEXT, *encode(article)]]
        assert np.concatenate(shards(tmp_path / "out", split)).tolist() == expected
    assert run("--verify", tmp_path / "out").returncode == 0


def test_sample(tmp_path):
    """Prepare the real thing: 105 long articles out of a dump and 10,033 leads, 46 of the former among the latter."""
    pytest.importorskip("wikiextractor")
    meta = prepare(tmp_path, "--sample")
    files = [packages.CACHE / source["file"] for source in meta["source"]]
    articles = read_all(tmp_path)
    leads = {f"{title}\n\n{lead['extract']}" for title, lead in json.loads(files[1].read_text()).items()}
    assert len(articles) == 105 + 10_033 and leads <= set(articles)
    titles = [{article.split("\n\n")[0] for article in read_articles(tmp_path, split)} for split in ("train", "val")]
    assert not titles[0] & titles[1] and len(titles[0] | titles[1]) == 105 + 10_033 - 46
    with bz2.open(files[0], "rt") as xml:
        in_dump = {line.split(">")[1].split("<")[0] for line in xml if line.startswith("    <title>")}
    long = set(articles) - leads
    assert {article.split("\n\n")[0] for article in long} <= in_dump
    assert not any("&amp;" in article or "[[" in article or "'''" in article for article in long)


# --------------------------------------------------------------------------------------------------------------------
# A finished dataset


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4 * (how == "flip")
    path.write_bytes(content[:-2] if how == "cut" else content)


def change_meta(out: Path, change) -> None:
    meta = json.loads((out / "meta.json").read_text())
    change(meta)
    (out / "meta.json").write_text(json.dumps(meta))


def change_shard(out: Path) -> None:
    """Change a shard together with its checksum."""
    shard = np.fromfile(out / "val_00000.bin", "<u2")
    shard[5] = ENDOFTEXT
    shard.tofile(out / "val_00000.bin")
    sha256 = hashlib.sha256(shard.tobytes()).hexdigest()
    change_meta(out, lambda meta: [s.update(sha256=sha256) for s in meta["shards"] if s["file"] == "val_00000.bin"])


VERIFY = {  # what happens to the dataset, and what --verify says
    "a flipped bit": (lambda out: damage(out / "train_00000.bin", "flip"), "train_00000.bin"),
    "a cut shard": (lambda out: damage(out / "val_00000.bin", "cut"), "val_00000.bin"),
    "a lost shard": (lambda out: (out / "train_00001.bin").unlink(), "train_00001.bin"),
    "token_bytes.npy cut": (lambda out: damage(out / "token_bytes.npy", "cut"), "token_bytes.npy"),
    "token_bytes.npy flipped": (lambda out: damage(out / "token_bytes.npy", "flip"), "token_bytes.npy"),
    "token_bytes.npy lost": (lambda out: (out / "token_bytes.npy").unlink(), "token_bytes.npy"),
    "a wrong count": (lambda out: change_meta(out, lambda m: m["splits"]["val"].update(bytes=7)), "its splits have"),
    "a changed article": (change_shard, "its splits have"),
    "a lost key": (lambda out: change_meta(out, lambda meta: meta["shards"][0].pop("sha256")), "train_00000.bin"),
    "no meta.json": (lambda out: (out / "meta.json").unlink(), "is not a dataset"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    prepare(folder / "out", write_jsonl(folder / "in.jsonl", make_articles(200)), "--shard_tokens", 20_000)
    assert run("--verify", folder / "out").returncode == 0
    return folder / "out"


@pytest.mark.parametrize("case", VERIFY)
def test_verify_finds(sound, tmp_path, case):
    harm, message = VERIFY[case]
    out = shutil.copytree(sound, tmp_path / "out")
    harm(out)
    fails(run("--verify", out), message)


def test_a_dataset_is_reused_or_refused_but_never_lost(tmp_path):
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(100)), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    prepare(out, source)
    before = contents(out)
    assert set(before) == {"notes.txt", "meta.json", "token_bytes.npy", "train_00000.bin", "val_00000.bin"}
    again = run(source, "--out", out)
    assert again.returncode == 0 and "already" in again.stdout
    fails(run(source, "--out", out, "--val_fraction", 0.1), "other inputs or options")
    with source.open("a") as file:
        file.write('{"title": "A", "text": "b"}\n')
    fails(run(source, "--out", out), "other inputs or options")
    assert contents(out) == before


# --------------------------------------------------------------------------------------------------------------------
# Killed, full, forbidden


def a_dump(path: Path, pages: int, words: int) -> Path:
    text = "All work and no play makes [[Jack]] a dull boy. " * (words // 10)
    return write_dump(path, [page(f"Page {i}", text, number=i) for i in range(pages)])


def test_killed_at_any_moment_it_leaves_nothing_that_counts(tmp_path):
    """SIGKILL it six times. No process is left over, there is no dataset, and the next run makes the same bytes."""
    pytest.importorskip("wikiextractor")
    sources = write_jsonl(tmp_path / "in.jsonl", make_articles(500)), a_dump(tmp_path / "in.xml.bz2", 150, 300)
    options = [*sources, "--shard_tokens", 20_000]
    started = time.monotonic()
    prepare(tmp_path / "unbroken", *options, piece_bytes=10_000)
    unbroken_s = time.monotonic() - started
    rng, out, kills = random.Random(1), tmp_path / "out", 0
    while kills < 6:
        process = start(out, *options, "--workers", rng.randint(1, 3), piece_bytes=10_000)
        time.sleep(rng.uniform(0.2, 1) * unbroken_s)
        kills += process.poll() is None
        process.kill()
        process.communicate()
        assert all_end(out)
        if (out / "meta.json").exists():
            assert contents(out).items() >= contents(tmp_path / "unbroken").items()
            shutil.rmtree(out)
    prepare(out, *options, piece_bytes=10_000)
    assert contents(out) == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_killed_while_it_moves_files(tmp_path, monkeypatch, moves):
    """There is no dataset until the last move, and the next run makes the same bytes."""
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(100)), tmp_path / "out"
    replace, before = os.replace, iter(range(moves))
    monkeypatch.setattr(os, "replace", lambda *paths: os._exit(9) if next(before, None) is None else replace(*paths))
    monkeypatch.setattr(sys, "argv", ["prepare_wiki.py", str(source), "--out", str(out)])
    if (child := os.fork()) == 0:
        prepare_wiki.main()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(out.glob("*.*"))) == moves + 1 and not (out / "meta.json").exists()
    prepare(out, source)
    prepare(tmp_path / "unbroken", source)
    assert contents(out) == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("how", ["its worker is killed", "it is killed", "Ctrl-C"])
def test_ended_early_it_leaves_no_process(tmp_path, how):
    """wikiextractor by itself would outlive a parent that was killed, and wait forever."""
    pytest.importorskip("wikiextractor")
    out, dump = tmp_path / "out", a_dump(tmp_path / "in.xml.bz2", 1500, 3000)
    process = start(out, dump, "--workers", 1, piece_bytes=200_000)
    wait_for(out, "1.tokens", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(members(out)) >= 5  # itself, a worker, a shell, and two or more of wikiextractor
    os.kill(int(children[0]) if how == "its worker is killed" else process.pid,
            signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
    error = process.communicate()[1]
    assert all_end(out) and (how == "it is killed" or os.listdir(out) == [])
    assert process.returncode == {"its worker is killed": 2, "it is killed": -9, "Ctrl-C": 130}[how]
    assert error == "" if process.returncode != 2 else "was killed" in error and error.count("\n") == 1


def test_two_at_once_do_not_mix(tmp_path):
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(2000)), tmp_path / "out"
    first = start(out, source, "--workers", 1, piece_bytes=20_000)
    wait_for(out, "*.tokens", first)
    first.send_signal(signal.SIGSTOP)
    fails(run(source, "--out", out, piece_bytes=20_000), "another prepare_wiki.py is at work")
    first.send_signal(signal.SIGCONT)
    assert first.communicate()[1] == "" and run("--verify", out).returncode == 0


@pytest.mark.parametrize("limit, piece_bytes", [(30_000, 300_000), (300_000, 20_000)], ids=["pieces", "shards"])
def test_a_file_that_may_not_grow(tmp_path, limit, piece_bytes):
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(2000)), tmp_path / "out"
    words = command(source, "--out", out, piece_bytes=piece_bytes)
    limited = execute(words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    fails(limited, "File too large", out=out)
    assert execute(words).returncode == 0 and run("--verify", out).returncode == 0


def test_a_directory_that_cannot_be_written(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(10))
    for out in (source / "out", source, Path("/proc/out")):
        fails(run(source, "--out", out), "cannot make")


def test_tokenizing_takes_no_torch():  # its 150 MiB would be in every process
    code = "import sys, prepare_wiki; sys.exit('torch' in sys.modules)"
    assert execute([sys.executable, "-c", code]).returncode == 0
