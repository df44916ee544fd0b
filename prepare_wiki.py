"""Wikipedia articles in, a dataset of GPT-2 tokens out.

    python prepare_wiki.py INPUT... --out data/wiki    dumps, JSON lines, Parquet, .txt: see articles.py
    python prepare_wiki.py --sample                    real text that comes with Python packages
    python prepare_wiki.py --verify data/wiki          recompute every checksum and count

The way of an article:

    input file  -- articles.pieces -->  pieces of some 8 MB of text, in whatever order they are done:
        a piece -- tokenize_piece, in a process per core -->  its articles' tokens, and a row of ARTICLE for each
    all rows    -- choose: which to keep?  -- lay_out: in which shard? -->  parts of pieces for each shard
    each shard  -- write_shard -->  OUT/train_00000.bin, ...; and last of all OUT/meta.json

Pieces stay in OUT/prepare_wiki.unfinished until the dataset stands, so a run that was killed goes on from those that
were finished. In a shard an article is <|endoftext|>, then the tokens of its title, a blank line and its text. What
is written does not depend on the number of workers, and an article's split on nothing but its title.
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
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from articles import Piece, find_files, group, identity, kind_of, pieces
from dataset import ENDOFTEXT, SPLITS, VOCAB_SIZE, read_meta, verify
from errors import CommandLine, UserError, user_errors
from packages import SAMPLE, gpt2_encoding, sample_files, token_lengths, write_atomically

# --------------------------------------------------------------------------------------------------------------------
# A piece's tokens

# A row for each article of a piece: 128 bits of its title and text, what its title decides, its sizes. <|endoftext|>
# is among its tokens but not among its bytes.
ARTICLE = np.dtype([("digest", "<u8", 2), ("title", "<u8"), ("rank", "<u8"), ("tokens", "<u4"), ("bytes", "<u4")])

MAX_CHARACTERS = 1 << 18
PART = re.compile(rf"(?s).{{1,{MAX_CHARACTERS}}}(?<=\S)(?=[ \n])")


def in_parts(text: str) -> Iterator[str]:
    """A long text in parts with the tokens of the whole: a word of GPT-2's pattern never goes on from a character that
    is no space to one that is. (A single word or gap longer than a part is cut anywhere: its tokens may differ, not its
    text.) tiktoken's pattern fails on a million spaces, and its merges take 50 bytes for each of a word's.
    """
    start = 0
    while len(text) - start > MAX_CHARACTERS:
        found = PART.match(text, start)
        stop = found.end() if found else start + MAX_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def normalise(title: str) -> str:
    """One spelling for all the ways a title is written: "AT&amp;T_Mobility " is "AT&T Mobility"."""
    return " ".join(html.unescape(title).replace("_", " ").split())


def hash64(text: str, salt: str = "") -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=salt.encode()).digest(), "big")


def is_val(titles: np.ndarray, val_fraction: float) -> np.ndarray:
    """Which articles are held out, by the hashes of their titles."""
    return titles < np.uint64(math.ceil(val_fraction * 2**64))


def tokenize_piece(piece: Piece, target: str, seed: int) -> None:
    """Writes TARGET.bin, the tokens of the piece's articles as they will stand in shards, and TARGET.tmp, a .npz of
    `articles` (an ARTICLE each) and `report`, JSON: lines and records read, articles without text, records skipped by
    reason, line (from 1) and reason of the first of those. In an article "<|endoftext|>" is plain characters.
    """
    encoding = gpt2_encoding()
    start = np.array([ENDOFTEXT], "<u2")
    rows, number, blank, empty, skipped, first = [], 0, 0, 0, Counter(), []
    with open(f"{target}.bin", "wb") as file:
        for number, record in enumerate(piece(), 1):
            if record is None:
                blank += 1
                continue
            if isinstance(record, str):
                skipped[record] += 1
                if len(first) < 5:
                    first.append((number, record))
                continue
            title, text = record
            if not text.strip():  # wikiextractor drops lists: of "List of anthropologists" nothing stays
                empty += 1
                continue
            head = f"{title}\n\n"
            tokens = [encoding.encode_to_numpy(part, disallowed_special=()) for part in in_parts(head + text)]
            count = file.write(np.concatenate([start, *tokens], dtype="<u2", casting="unsafe").data) // 2
            title, body = normalise(title), text.encode()
            digest = hashlib.blake2b(f"{title}\n\n".encode() + body, digest_size=16).digest()
            halves = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
            rows.append((halves, hash64(title), hash64(title, f"seed {seed}"), count, len(head.encode()) + len(body)))
    report = {"lines": number, "records": number - blank, "empty": empty, "skipped": skipped, "first": first}
    with open(f"{target}.tmp", "wb") as file:
        np.savez(file, articles=np.array(rows, ARTICLE), report=json.dumps(report))


def end_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent does, be it by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()


def sync(path: Path) -> None:
    """What was written to a file, or which files stand in a directory, outlives a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tokenize(groups: list[list[Path]], work: Path, seed: int, workers: int) -> tuple[list[tuple], bool]:
    """Tokenizes whatever piece is not finished in `work`. Returns for each group its first file and the paths of its
    pieces less .bin and .npz, in order; and whether any was finished before.

    A piece's name says which part of which file it is, with the file's size and time, and the seed.
    """
    gpt2_encoding()
    inputs = [identity(files) for files in groups]
    names = [hashlib.blake2b(repr((ARTICLE, seed, given)).encode(), digest_size=12).hexdigest() for given in inputs]
    finished = Counter(path.name.partition("_")[0] for path in work.glob("*.npz"))
    if finished := sum(finished[name] for name in names):
        print(f"going on: {finished:,} pieces of the articles were finished", flush=True)
    tqdm.monitor_interval = 0  # no thread of its own before the fork
    all_targets, running = [], {}
    fork = multiprocessing.get_context("fork")
    with (
        tqdm(unit=" tokens", unit_scale=True, disable=None) as progress,
        ProcessPoolExecutor(workers, mp_context=fork, initializer=end_with_parent) as pool,
    ):
        pool.submit(os.getpid)  # forks all workers now: they share the vocabulary, and no thread runs yet

        def finish(at_most: int) -> None:
            """Wait until no more than so many pieces are being worked on."""
            while len(running) > at_most:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    target = running.pop(future)
                    future.result()
                    sync(f"{target}.bin")
                    sync(f"{target}.tmp")
                    progress.update(os.path.getsize(f"{target}.bin") // 2)
                    os.replace(f"{target}.tmp", f"{target}.npz")

        try:
            for files, name in zip(groups, names):
                count = work / f"{name}.count"  # of its pieces: stands when they have all been handed out
                targets = [f"{work}/{name}_{i:06d}" for i in range(int(count.read_text()) if count.exists() else 0)]
                if not targets or not all(os.path.exists(f"{target}.npz") for target in targets):
                    targets = []
                    for number, piece in enumerate(pieces(files)):
                        targets.append(f"{work}/{name}_{number:06d}")
                        if not os.path.exists(f"{targets[-1]}.npz"):
                            running[pool.submit(tokenize_piece, piece, targets[-1], seed)] = targets[-1]
                            finish(workers + 2)
                    write_atomically(count, str(len(targets)).encode())
                all_targets.append((files[0], targets))
            finish(0)
            for files, given in zip(groups, inputs):
                if identity(files) != given:
                    raise UserError(f"{files[0]} changed while it was read")
        except BrokenProcessPool as error:
            raise UserError("a tokenizing process was killed (for want of memory?); run again to go on") from error
        finally:
            pool.shutdown(cancel_futures=True)
    return all_targets, finished > 0


# --------------------------------------------------------------------------------------------------------------------
# From pieces to shards


def load_column(targets: list[str], name: str) -> np.ndarray:
    """A field of ARTICLE over all pieces."""
    return np.concatenate([np.load(f"{target}.npz")["articles"][name] for target in targets])


def choose(targets: list[str], min_tokens: int, max_articles: int | None) -> tuple[np.ndarray, Counter]:
    """Which articles to keep, a bool for each, and how many are left out for which reason."""
    high, low = load_column(targets, "digest").T
    keep = np.ones(len(high), bool)
    order = np.lexsort((low, high))  # stable, so that of equal ones the first stays
    before, after = order[:-1], order[1:]
    keep[after[(high[before] == high[after]) & (low[before] == low[after])]] = False
    left_out = Counter({"given twice": len(keep) - int(keep.sum())})
    short = keep & (load_column(targets, "tokens") - 1 < min_tokens)
    keep &= ~short
    left_out["too short"] = int(short.sum())
    if max_articles is not None:
        kept = np.flatnonzero(keep)
        by_rank = np.lexsort((high[kept], load_column(targets, "rank")[kept]))
        keep[kept[by_rank[max_articles:]]] = False
        left_out["not drawn"] = max(0, len(kept) - max_articles)
    return keep, left_out


def lay_out(mine: np.ndarray, tokens: np.ndarray, piece: np.ndarray, shard_tokens: int) -> list[np.ndarray]:
    """The parts of pieces that make up each shard of a split: a row (piece, its first byte, where it ends) for each.

    mine (N,) says which articles are in the split, tokens (N,) their sizes, piece (N,) where they are. A shard has at
    most shard_tokens tokens; but no article is cut, and a longer one has a shard to itself.
    """
    ends = np.cumsum(tokens, dtype=np.int64)
    origin = (ends - tokens)[np.searchsorted(piece, piece)]  # where each article's piece begins
    begins, ends = 2 * (ends - tokens - origin), 2 * (ends - origin)  # of each article, in bytes of its piece
    mine = np.flatnonzero(mine)
    filled = np.cumsum(tokens[mine], dtype=np.int64)
    shards, start = [], 0
    while start < len(mine):
        room = filled[start] - tokens[mine[start]] + min(shard_tokens, 1 << 62)
        stop = max(start + 1, int(np.searchsorted(filled, room, "right")))
        articles = mine[start:stop]
        goes_on = (np.diff(articles) == 1) & (np.diff(piece[articles]) == 0)  # whether to the next in one part
        first, last = articles[np.append(True, ~goes_on)], articles[np.append(~goes_on, True)]
        shards.append(np.stack([piece[first], begins[first], ends[last]], axis=1))
        start = stop
    return shards


def write_shard(path: Path, parts: np.ndarray, targets: list[str]) -> str:
    """Little-endian uint16 tokens and nothing else. Returns the sha256."""
    sha256 = hashlib.sha256()
    with path.open("wb") as shard:
        for piece, start, stop in parts.tolist():
            with open(f"{targets[piece]}.bin", "rb") as tokens:
                tokens.seek(start)
                while start < stop:
                    block = tokens.read(min(stop - start, 1 << 24))
                    if not block:
                        raise UserError(f"{targets[piece]}.bin is cut off: remove {path.parent} and run again")
                    shard.write(block)
                    sha256.update(block)
                    start += len(block)
        shard.flush()
        os.fsync(shard.fileno())
    return sha256.hexdigest()


def lock(work: Path) -> None:
    """Makes `work` and keeps other runs out of it until this process and its workers have ended. Raises UserError if
    one is in it for more than 5 s: so long may the workers of a killed run take to end."""
    for _ in range(50):
        work.mkdir(parents=True, exist_ok=True)
        with suppress(BlockingIOError, FileNotFoundError):
            file = os.open(work / "lock", os.O_CREAT | os.O_RDWR)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), os.stat(work / "lock")):  # a run that ends well removes it
                return
        time.sleep(0.1)
    raise UserError(f"another prepare_wiki.py is at work in {work}")


def prepare(files: list[Path], out: Path, source: list[dict], options: dict, max_skipped: float, workers: int) -> tuple:
    """Makes the dataset `out`. Returns its meta.json, which is written last, and the tokens of all articles read, or
    None if a part was done before. If that fails, what is finished stays in `out`/prepare_wiki.unfinished."""
    work = out / "prepare_wiki.unfinished"
    lock(work)
    if (out / "meta.json").exists():
        raise UserError(f"another prepare_wiki.py has just made {out}")
    by_file, went_on = tokenize(group(files), work, options["seed"], workers)

    left_out, skipped, n_records, first = Counter(), Counter(), 0, []
    for path, targets in by_file:
        lines, records, empty, any_article, first_here = 0, 0, 0, False, []
        for target in targets:
            report = json.loads(str(np.load(f"{target}.npz")["report"]))
            first_here += [f"{path}:{lines + number}: {reason}" for number, reason in report["first"]]
            lines += report["lines"]
            records += report["records"]
            empty += report["empty"]
            skipped.update(report["skipped"])
            any_article |= os.path.getsize(f"{target}.bin") > 0
        # Not what it was taken for, unless --max_skipped=1 says that none of its records need be an article.
        if not any_article and not empty and (not records or max_skipped < 1):
            hints = first_here + ["wikiextractor finds none without <siteinfo>"] * (".xml" in path.name)
            raise UserError(f"{path}: no article in it" + "".join(f" ({hint})" for hint in hints[:1]))
        left_out["without text"] += empty
        n_records += records
        first += first_here[:5]
    if skipped.total() > max_skipped * n_records:
        raise UserError(f"{skipped.total():,} of {n_records:,} records cannot be read, the first at {first[0]}; "
                        "--max_skipped=1 leaves out however many there are")

    targets = [target for _, names in by_file for target in names]
    keep, more = choose(targets, options["min_tokens"], options["max_articles"])
    in_val = is_val(load_column(targets, "title"), options["val_fraction"])
    tokens, n_bytes = load_column(targets, "tokens"), load_column(targets, "bytes")
    sizes = [len(np.load(f"{target}.npz")["articles"]) for target in targets]
    piece = np.repeat(np.arange(len(targets), dtype=np.int32), sizes)
    splits, shards, parts = {}, [], []
    for split, mine in zip(SPLITS, (keep & ~in_val, keep & in_val)):
        if not mine.any() and (split == "train" or options["val_fraction"] > 0):
            raise UserError(f"no article falls into {split}: give more, or another --val_fraction")
        splits[split] = {"articles": int(mine.sum()), "tokens": int(tokens[mine].sum(dtype=np.int64)),
                         "bytes": int(n_bytes[mine].sum(dtype=np.int64))}
        for number, layout in enumerate(lay_out(mine, tokens, piece, options["shard_tokens"])):
            size = int((layout[:, 2] - layout[:, 1]).sum()) // 2
            shards.append({"file": f"{split}_{number:05d}.bin", "split": split, "tokens": size})
            parts.append(layout)
    for left in ("train_[0-9]*.bin", "val_[0-9]*.bin", "meta.json.*.tmp"):  # by a run that was killed from here on
        for stale in out.glob(left):
            stale.unlink()
    with ThreadPoolExecutor(workers) as pool:  # hashing, reading and writing leave Python's lock to each other
        hashes = pool.map(lambda shard, layout: write_shard(out / shard["file"], layout, targets), shards, parts)
        for shard, sha256 in zip(shards, hashes):
            shard["sha256"] = sha256
    np.save(out / "token_bytes.npy", token_lengths())
    sync(out / "token_bytes.npy")
    sync(out)
    meta = {
        "tokenizer": {"name": "gpt2", "vocab_size": VOCAB_SIZE},
        "splits": splits,
        "shards": shards,
        "source": source,
        "options": options,
        "records": n_records,
        "left_out": {reason: count for reason, count in (left_out + more).items() if count},
        "skipped": dict(skipped),
        "first_skipped": first[:5],
    }
    write_atomically(out / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())
    sync(out)
    shutil.rmtree(work, ignore_errors=True)
    return meta, None if went_on else int(tokens.sum(dtype=np.int64))


def print_summary(meta: dict, tokens: int | None, seconds: float) -> None:
    """tokens were read in so many seconds; None where a part was done before, which tells nothing of the speed."""
    for split, totals in meta["splits"].items():
        each = totals["tokens"] / max(1, totals["articles"])
        print(f"{split}: {totals['articles']:,} articles, {totals['tokens']:,} tokens, {each:,.0f} each")
    if meta["left_out"]:
        print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in meta["left_out"].items()))
    if meta["skipped"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in meta["skipped"].items())
        print(f"skipped: {reasons}, of {meta['records']:,} records; the first: {'; '.join(meta['first_skipped'])}")
    if tokens:
        print(f"{tokens:,} tokens tokenized, {tokens / seconds:,.0f} tokens/s")


def sources(files: list[Path]) -> list[dict]:
    """What meta.json says of the inputs: each file, but of .txt how many there are in a directory."""
    texts: dict[str, dict] = {}
    others = []
    for path in files:
        size = path.stat().st_size
        if kind_of(path) == "*.txt":
            entry = texts.setdefault(str(path.parent), {"file": f"{path.parent.name}/*.txt", "files": 0, "bytes": 0})
            entry["files"] += 1
            entry["bytes"] += size
        else:
            others.append({"file": path.name, "bytes": size})
    return others + list(texts.values())


def main() -> None:
    parser = CommandLine(description="Wikipedia articles in, a dataset of GPT-2 tokens out. What a killed run has "
                         "finished is kept: the same command goes on.")
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="*", help="files, directories or globs of dumps (.xml, .xml.bz2), JSON lines "
        "(.jsonl, .jsonl.gz, .jsonl.bz2), .parquet with a title and a text, and .txt, an article each")
    add("--sample", action="store_true", help="prepare real text that comes with packages")
    add("--verify", metavar="DIR", type=Path, help="recompute every checksum and count of a dataset, and no more")
    add("--out", type=Path, help="directory to write (with --sample: data/sample)")
    add("--val_fraction", type=float, default=0.05, help="of the titles, held out (0.05)")
    add("--min_tokens", type=int, default=0, help="leave out articles that have fewer of their own (0)")
    add("--max_articles", type=int, help="of those that pass, keep so many, drawn by a hash of seed and title: the "
        "same ones in whatever order they come. It means tokenizing all of the input once (all)")
    add("--seed", type=int, default=0, help="of --max_articles (0)")
    add("--max_skipped", type=float, default=0.001, help="share of records that may be unreadable (0.001)")
    add("--shard_tokens", type=int, default=100_000_000, help="a file's most (100_000_000)")
    add("--workers", type=int, default=os.cpu_count(), help="tokenizing processes (cores)")
    args = parser.parse_args()
    if bool(args.inputs) + args.sample + bool(args.verify) != 1:
        raise UserError("give either INPUT files or --sample or --verify DIR")
    if args.verify:
        try:
            return verify(args.verify, token_lengths())
        except (OSError, LookupError, TypeError) as error:
            raise UserError(f"{args.verify} is damaged: {error!r}") from error
    if not args.sample and not args.out:
        raise UserError("--out is missing: the directory to write, such as --out data/wiki")
    if not (0 <= args.val_fraction < 1 and 0 <= args.max_skipped <= 1):
        raise UserError("--val_fraction is from 0 to below 1, --max_skipped from 0 to 1")
    if min(args.shard_tokens, args.workers, 1 if args.max_articles is None else args.max_articles) < 1:
        raise UserError("--shard_tokens, --workers and --max_articles are at least 1")
    if not 0 <= args.seed < 2**63:
        raise UserError("--seed is from 0 to below 2**63")

    started = time.perf_counter()
    out = args.out or Path("data/sample")
    keys = ("val_fraction", "min_tokens", "max_articles", "seed", "shard_tokens")
    options = {key: getattr(args, key) for key in keys}
    if args.sample:
        source = [{"file": Path(member).name, "package": package, "sha256": sha256}
                  for sha256, (package, member) in SAMPLE.items()]
    else:
        files = find_files(args.inputs)
        source = sources(files)
    try:
        stands = (out / "meta.json").exists()
        if stands:
            meta = read_meta(out)
            if (meta["source"], meta["options"]) != (source, options):
                raise UserError(f"{out} holds a dataset of other inputs or options: remove it or give another --out")
            shutil.rmtree(out / "prepare_wiki.unfinished", ignore_errors=True)  # of a run that was killed just then
        else:
            files = sample_files() if args.sample else files
            meta, tokens = prepare(files, out, source, options, args.max_skipped, args.workers)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.filename or ''} {error.strerror}") from error
    except MemoryError as error:
        raise UserError("out of memory: fewer --workers take less; run again to go on") from error
    if stands:
        print(f"{out} holds this dataset already: the same options and, by names and sizes, inputs")
    else:
        print_summary(meta, tokens, time.perf_counter() - started)


if __name__ == "__main__":
    with user_errors():
        main()
