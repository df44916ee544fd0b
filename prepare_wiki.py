"""Turn Wikipedia articles into a dataset of GPT-2 tokens.

    python prepare_wiki.py INPUT... --out data/wiki    dumps, JSON lines, Parquet, .txt: see articles.py
    python prepare_wiki.py --sample                    real text that comes with Python packages
    python prepare_wiki.py --verify data/wiki          recompute every checksum and count

The path of an article:

    input files  -- articles.pieces -->  pieces of about 4 MB of text
    each piece   -- tokenize_piece, in a process per core -->  a file of tokens, and a row of ARTICLE for each article
    all rows     -- choose -->  which articles to keep; a hash of the title decides the split
    each split   -- write_shards -->  train_00000.bin, ...

In a shard an article is <|endoftext|>, then the tokens of its title, a blank line and its text. The shards do not
depend on the number of workers. All files are made in a folder inside OUT and moved to OUT at the end, meta.json last:
a killed run leaves no dataset, and the next run starts over.
"""

import fcntl
import hashlib
import html
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import unicodedata
from argparse import SUPPRESS, ArgumentParser
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from articles import Piece, find_files, pieces, usable_cores
from data import ENDOFTEXT, SPLITS, VOCAB_SIZE, open_dataset
from packages import SAMPLE, gpt2_encoding, sample_files, token_lengths
from settings import UserError, user_errors

# A row for each article: its piece, first token, number of tokens, UTF-8 bytes, and three hashes: of title and
# text, of the title, and of title and seed. <|endoftext|> counts as a token but not as bytes.
ARTICLE = np.dtype([(name, np.uint64) for name in ("piece", "start", "tokens", "bytes", "digest", "title", "rank")])
MAX_RUN = 500_000  # characters (a guess): tiktoken fails on gaps of a million, and takes 50 bytes a character in words
NO_TEXT = "without text"  # wikiextractor drops lists: nothing is left of "List of anthropologists"


def hash64(content: bytes, key: bytes = b"") -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest(), "big")


def normalise(title: str) -> str:
    """Return one spelling for all the ways to write a title: "AT&amp;T_Mobility " is "AT&T Mobility"."""
    return " ".join(unicodedata.normalize("NFC", html.unescape(title)).replace("_", " ").split())


def why_not(title: str, text: str) -> str | None:
    """Return the reason to skip an article, or None."""
    if not text.strip():
        return NO_TEXT
    runs = re.finditer(r"\s+|\S+", f"{title}\n\n{text}") if len(title) + len(text) > MAX_RUN else ()
    too_long = any(run.end() - run.start() > MAX_RUN for run in runs)
    return f"with a word or gap of over {MAX_RUN:,} characters" if too_long else None


def tokenize_piece(piece: Piece, number: int, work: Path, seed: int) -> tuple[np.ndarray, Counter, list[str]]:
    """Write the tokens of a piece's articles, as they will be in shards, to the file NUMBER.tokens in `work`.

    Returns a row of ARTICLE for each, the number of skipped records by reason, and the places of the first few. The
    characters "<|endoftext|>" in an article are ordinary text.
    """
    encode = gpt2_encoding().encode_to_numpy
    rows, start, skipped, first = [], 0, Counter(), []
    with (work / f"{number}.tokens").open("wb") as file:
        for place, record in piece():
            reason = record if isinstance(record, str) else why_not(*record)
            if reason:
                skipped[reason] += 1
                first += [f"{place}: {reason}"] * (reason != NO_TEXT and len(first) < 5)
                continue
            title, text = record
            article = f"{title}\n\n{text}"
            tokens = [[ENDOFTEXT], encode(article, disallowed_special=())]
            count = file.write(np.concatenate(tokens, dtype="<u2", casting="unsafe").data) // 2
            body, name = f"\n\n{text}".encode(), normalise(title).encode()
            hashes = hash64(name + body), hash64(name), hash64(name, f"seed {seed}".encode())
            rows.append((number, start, count, len(title.encode()) + len(body), *hashes))
            start += count
    return np.array(rows, ARTICLE), skipped, first


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent ends, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def tokenize(files: list[Path], work: Path, seed: int, workers: int) -> Iterator[tuple]:
    """Tokenize all pieces in parallel. Yield the results of tokenize_piece in the order of the input."""
    gpt2_encoding()  # before the fork: the workers share it
    running = deque()
    try:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_worker)
        pool.submit(os.getpid)  # forks the workers before `pieces` opens a pipe, which they would hold open
    except (OSError, RuntimeError) as error:
        for child in multiprocessing.active_children():  # else they would wait for work at the end
            child.kill()
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot start processes: {why} (they need threads, and room in /dev/shm)") from error
    with pool:
        for number, piece in enumerate(pieces(files)):
            running.append(pool.submit(tokenize_piece, piece, number, work, seed))
            if len(running) > 2 * workers:  # pieces carry text: more of them would fill the memory
                yield running.popleft().result()
        for future in running:
            yield future.result()


# --------------------------------------------------------------------------------------------------------------------
# From tokens to a dataset


def choose(articles: np.ndarray, min_tokens: int, max_articles: int | None) -> tuple[np.ndarray, Counter]:
    """Return the numbers of the articles to keep, in order, and the number left out by reason."""
    first = np.unique(articles["digest"], return_index=True)[1]  # of equal articles
    long = first[articles["tokens"][first] > min_tokens]  # <|endoftext|> does not count
    kept = np.sort(long[np.lexsort((articles["digest"][long], articles["rank"][long]))][:max_articles])
    counts = len(articles) - len(first), len(first) - len(long), len(long) - len(kept)
    return kept, Counter(dict(zip(("given twice", "too short", "not drawn"), counts)))


def write_shards(articles: np.ndarray, split: str, work: Path, shard_tokens: int) -> list[dict]:
    """Copy the tokens of a split's articles to shards: little-endian uint16 and nothing else. Return their list.

    A shard has at most shard_tokens tokens. No article is cut: a longer article has a shard to itself.
    """
    ends = np.cumsum(articles["tokens"], dtype=np.int64)
    shards, first = [], 0
    while first < len(articles):
        most = int(ends[first - 1] if first else 0) + min(shard_tokens, int(ends[-1]))
        stop = max(first + 1, int(np.searchsorted(ends, most, "right")))
        mine, sha256, name = articles[first:stop], hashlib.sha256(), f"{split}_{len(shards):05d}.bin"
        with (work / name).open("wb") as shard:
            for rows in np.split(mine, np.flatnonzero(np.diff(mine["piece"])) + 1):
                with (work / f"{rows['piece'][0]}.tokens").open("rb") as tokens:
                    for start, count in zip(rows["start"].tolist(), rows["tokens"].tolist()):
                        tokens.seek(2 * start)
                        article = tokens.read(2 * count)
                        shard.write(article)
                        sha256.update(article)
        shards.append({"file": name, "split": split, "tokens": int(mine["tokens"].sum()), "sha256": sha256.hexdigest()})
        first = stop
    return shards


def prepare(files: list[Path], work: Path, source: list[dict], options: dict, max_skipped: float, workers: int) -> dict:
    """Make the files of a dataset in the folder `work`. Return its meta.json."""
    done = tokenize(files, work, options["seed"], workers)
    articles, skipped, first = zip(*tqdm(done, unit=" pieces", disable=None))
    articles, skipped, first = np.concatenate(articles), sum(skipped, Counter()), sum(first, [])[:5]
    records, empty = len(articles) + skipped.total(), skipped.pop(NO_TEXT, 0)
    if skipped.total() > max_skipped * records:
        raise UserError(f"{skipped.total():,} of {records:,} records are unreadable (see --max_skipped): {first[0]}")
    kept, left_out = choose(articles, options["min_tokens"], options["max_articles"])
    articles = articles[kept]
    in_val = articles["title"] < np.uint64(math.ceil(options["val_fraction"] * 2**64))
    splits, shards = {}, []
    for split, mine in zip(SPLITS, (articles[~in_val], articles[in_val])):
        if not len(mine) and (split == "train" or options["val_fraction"] > 0):
            raise UserError(f"no article falls into {split}: give more, or change --min_tokens or --val_fraction")
        splits[split] = {"articles": len(mine), "tokens": int(mine["tokens"].sum()), "bytes": int(mine["bytes"].sum())}
        shards += write_shards(mine, split, work, options["shard_tokens"])
    np.save(work / "token_bytes.npy", token_lengths())
    return {
        "token_type": "uint16",
        "byte_order": "little-endian",
        "tokenizer": {"name": "gpt2", "vocab_size": VOCAB_SIZE, "endoftext": ENDOFTEXT},
        "splits": splits,
        "shards": shards,
        "source": source,
        "options": options,
        "records": records,
        "left_out": +(Counter({NO_TEXT: empty}) + left_out),
        "skipped": skipped,
        "first_skipped": first,
    }


def claim(out: Path) -> Path:
    """Make the folder of unfinished files inside OUT, and keep other runs out until this process ends."""
    work = out / "prepare_wiki.unfinished"
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work / "lock", os.O_CREAT | os.O_RDWR)  # never closed: that would unlock it
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another prepare_wiki.py is at work in {out}") from None
    if (out / "meta.json").exists():
        raise UserError(f"another prepare_wiki.py has just made {out}")
    return work


def publish(work: Path, out: Path, meta: dict) -> None:
    """Move the dataset from `work` to OUT, meta.json last."""
    (work / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for file in [*(shard["file"] for shard in meta["shards"]), "token_bytes.npy", "meta.json"]:
        with (work / file).open("rb") as written:
            os.fsync(written.fileno())
        (work / file).replace(out / file)


def verify(out: Path) -> None:
    """Recompute every checksum and count in meta.json. Raises UserError with the first that differs."""
    meta, lengths = open_dataset(out).meta, token_lengths()
    totals = {split: Counter(articles=0, tokens=0, bytes=0) for split in SPLITS}
    for shard in tqdm(meta["shards"], unit="shard", disable=None):
        with (out / shard["file"]).open("rb") as file:
            found = shard | {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "tokens": file.tell() / 2}
            if found != shard:
                raise UserError(f"{out} is damaged; remove and remake it: it has {found}, not {shard}")
            file.seek(0)
            while len(tokens := np.fromfile(file, "<u2", 1 << 22)):
                counts = np.bincount(tokens, minlength=VOCAB_SIZE)
                sizes = {"articles": int(counts[ENDOFTEXT]), "tokens": len(tokens), "bytes": int(counts @ lengths)}
                totals[shard["split"]].update(sizes)
    if totals != meta["splits"]:
        raise UserError(f"{out} is damaged; remove and remake it: its splits have {totals}, not {meta['splits']}")
    if not (out / "token_bytes.npy").read_bytes().endswith(lengths.tobytes()):
        raise UserError(f"{out} is damaged; remove and remake it: token_bytes.npy is not GPT-2's")
    print(f"{out}: {len(meta['shards'])} shards match meta.json in checksums, articles, tokens and bytes")


def main() -> None:
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="*", help="files, directories or globs of the kinds that articles.py lists")
    add("--sample", action="store_true", help="prepare real text that comes with Python packages")
    add("--verify", metavar="DIR", type=os.path.expanduser, help="only recompute a dataset's checksums and counts")
    add("--out", type=os.path.expanduser, help="the directory to write (with --sample: data/sample)")
    add("--val_fraction", type=float, default=0.05, help="share of the titles to hold out (0.05)")
    add("--min_tokens", type=int, default=0, help="leave out articles with fewer tokens (0)")
    add("--max_articles", type=int, help="keep this many articles; seed and titles decide which (all)")
    add("--seed", type=int, default=0, help="for --max_articles (0)")
    add("--max_skipped", type=float, default=0.001, help="share of records that may be unreadable (0.001)")
    add("--shard_tokens", type=int, default=100_000_000, help="most tokens in a file (100_000_000)")
    add("--workers", type=int, default=usable_cores(), help="tokenizing processes (one per core)")
    args = parser.parse_args()
    if bool(args.inputs) + args.sample + bool(args.verify) != 1 or (args.inputs and not args.out):
        raise UserError("give either INPUT files with --out DIR, or --sample, or --verify DIR")
    if not (0 <= args.val_fraction < 1 and 0 <= args.max_skipped <= 1 and 0 <= args.seed < 2**63):
        raise UserError("--val_fraction is from 0 to below 1, --max_skipped from 0 to 1, --seed from 0 to below 2**63")
    if min(args.shard_tokens, args.workers, 1 if args.max_articles is None else args.max_articles) < 1:
        raise UserError("--shard_tokens, --workers and --max_articles are at least 1")
    if args.verify:
        try:
            return verify(Path(args.verify))
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{args.verify} is damaged: {type(error).__name__}: {error}") from error

    out = Path(args.out or "data/sample")
    keys = "val_fraction", "min_tokens", "max_articles", "seed", "shard_tokens"
    options = {key: getattr(args, key) for key in keys}
    try:
        files = find_files(args.inputs)
        source = [{"file": path.name, "bytes": path.stat().st_size} for path in files] or SAMPLE
        if (out / "meta.json").exists():
            try:
                meta = open_dataset(out).meta
            except UserError as error:
                lost = f"; remove {out} first" * isinstance(error.__cause__, FileNotFoundError)
                raise UserError(f"{error}{lost}") from error
            if (meta.get("source"), meta.get("options")) != (source, options):
                raise UserError(f"{out} holds a dataset of other inputs or options: remove it or give another --out")
            return print(f"{out} already holds this dataset: same options, and inputs of the same names and sizes")
        work = claim(out)
        try:
            meta = prepare(files or sample_files(), work, source, options, args.max_skipped, args.workers)
            publish(work, out, meta)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.filename or ''} {error.strerror}") from error
    except BrokenProcessPool as error:
        raise UserError("a tokenizing process was killed; if memory ran out, use fewer --workers") from error
    for split, total in meta["splits"].items():
        print(f"{split}: {total['articles']:,} articles, {total['tokens']:,} tokens")
    for reason, count in (meta["left_out"] | meta["skipped"]).items():
        print(f"left out: {count:,} {reason}")
    for place in meta["first_skipped"]:
        print(f"unreadable: {place}")


if __name__ == "__main__":
    with user_errors(memory_advice="use fewer --workers"):
        main()
