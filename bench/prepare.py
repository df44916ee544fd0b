"""How fast prepare_wiki.py is beside the tokenizer alone, how its time grows with the input, and its memory.

    python bench/prepare.py [--articles 2376 23776] [--rounds 3] [--workers 4] [--dir data/bench_prepare]
    python bench/prepare.py --articles 237758 --rounds 1 --copies 0        a corpus of the plan's size; 11 GB of disk

The articles are paragraphs of the sample's, recombined: lengths log-normal with the plan's mean of 3,870 tokens.
Compared with, in the same run and by turns, on texts in memory: the ceiling, as many processes that do nothing but call
encode_to_numpy; and encode_ordinary_batch with as many threads. For a dump: with wikiextractor, its output thrown
away. Memory is the largest sum of the processes' PSS (each page counted once), seen every 0.2 s.
"""

import argparse
import bz2
import json
import multiprocessing
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from curriculum import format_table  # noqa: E402
from packages import gpt2_encoding, sample_files  # noqa: E402

MEAN_TOKENS = 3870  # of an article of the plan's corpus
SIGMA = 1.0  # of the logarithm of an article's length (chosen)
IN_MEMORY = 10_000  # articles that the tokenizer alone is timed on


# --------------------------------------------------------------------------------------------------------------------
# The input


def make_articles(count: int) -> Iterator[tuple[str, str]]:
    out = ROOT / "data" / "sample"
    make_sample = [sys.executable, "prepare_wiki.py", "--sample", "--out", out]
    subprocess.run(make_sample, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    encoding, rng = gpt2_encoding(), random.Random(0)
    shard = np.fromfile(out / "train_00000.bin", "<u2")
    texts = encoding.decode(shard.tolist()).split("<|endoftext|>")
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n") if len(paragraph) > 100]
    sizes = [len(ids) for ids in encoding.encode_ordinary_batch(paragraphs)]
    mu = np.log(MEAN_TOKENS) - SIGMA**2 / 2
    for number in range(count):
        missing, text = rng.lognormvariate(mu, SIGMA) - np.mean(sizes) / 2, []
        while missing > 0 or not text:
            i = rng.randrange(len(paragraphs))
            text.append(paragraphs[i])
            missing -= sizes[i]
        yield f"Article {number}", "\n\n".join(text)


def write_input(path: Path, articles: Iterator[tuple[str, str]]) -> Path:
    """JSON lines, or Parquet in row groups of 1,000 as on the hub; kept for the next run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    if path.exists():
        return path
    if path.suffix == ".jsonl":
        with temporary.open("w") as file:
            for title, text in articles:
                file.write(json.dumps({"id": "1", "url": "", "title": title, "text": text}, ensure_ascii=False) + "\n")
    else:
        import pyarrow.parquet

        schema = pyarrow.schema([(name, pyarrow.string()) for name in ("id", "url", "title", "text")])
        with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
            rows = []
            for title, text in articles:
                rows.append({"id": "1", "url": "", "title": title, "text": text})
                if len(rows) == 1000:
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                    rows = []
            if rows:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    return temporary.rename(path)


def write_dump(path: Path, copies: int) -> Path:
    """The sample's dump so many times over, under other titles."""
    xml = bz2.decompress(sample_files()[0].read_bytes()).decode()
    head, pages = xml[: xml.index("  <page>")], xml[xml.index("  <page>") : xml.rindex("</mediawiki>")]
    renamed = (re.sub(r"<title>(.*)</title>", rf"<title>\1 {copy}</title>", pages) for copy in range(copies))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bz2.compress((head + "".join(renamed) + "</mediawiki>\n").encode()))
    return path


# --------------------------------------------------------------------------------------------------------------------
# What is timed


def encode_blocks(blocks: list[list[str]], counter, total) -> None:
    encoding, tokens = gpt2_encoding(), 0
    while True:
        with counter.get_lock():
            number = counter.value
            counter.value += 1
        if number >= len(blocks):
            break
        tokens += sum(len(encoding.encode_to_numpy(text, disallowed_special=())) for text in blocks[number])
    with total.get_lock():
        total.value += tokens


def ceiling(texts: list[str], workers: int) -> float:
    """tokens/s of processes that only tokenize; each takes the next 50 texts when it is done with its last."""
    blocks = [texts[i : i + 50] for i in range(0, len(texts), 50)]
    fork = multiprocessing.get_context("fork")
    counter, total = fork.Value("q", 0), fork.Value("q", 0)
    processes = [fork.Process(target=encode_blocks, args=(blocks, counter, total)) for _ in range(workers)]
    started = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return total.value / (time.perf_counter() - started)


def batch(texts: list[str], workers: int) -> float:
    """tokens/s of encode_ordinary_batch with so many threads."""
    encoding, tokens = gpt2_encoding(), 0
    started = time.perf_counter()
    for i in range(0, len(texts), 1000):
        tokens += sum(map(len, encoding.encode_ordinary_batch(texts[i : i + 1000], num_threads=workers)))
    return tokens / (time.perf_counter() - started)


def memory_of(pid: int) -> int:
    """Bytes of a process and all below it, a page that they share counted once."""
    try:
        children = [child for task in Path(f"/proc/{pid}/task").iterdir()
                    for child in (task / "children").read_text().split()]
        own = int(re.search(r"^Pss: *(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1]) * 1024
    except (OSError, TypeError):
        return 0  # it has ended
    return own + sum(map(memory_of, map(int, children)))


def run(command: list) -> tuple[float, int]:
    """Wall time in seconds and peak memory in bytes of a command."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            pass
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        raise RuntimeError(f"{command} failed")
    return seconds, peak


def prepare(source: Path, workers: int) -> tuple[float, int, dict]:
    """Seconds, peak memory and meta.json of preparing an input from nothing."""
    out = source.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    options = ["--out", out.resolve(), "--workers", workers]
    seconds, peak = run([sys.executable, "prepare_wiki.py", source.resolve(), *options])
    meta = json.loads((out / "meta.json").read_text())
    shutil.rmtree(out)
    return seconds, peak, meta


def spread(values: list[float], form: str) -> str:
    """Median, and from least to most."""
    low, middle, high = (format(f(values), form) for f in (min, statistics.median, max))
    return middle if len(values) == 1 else f"{middle} ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--articles", type=int, nargs="+", default=[2_376, 23_776], help="sizes of the input")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--dir", type=Path, default=ROOT / "data" / "bench_prepare", help="where the inputs are kept")
    parser.add_argument("--copies", type=int, default=20, help="of the sample's dump (20; 0 for no dump)")
    args = parser.parse_args()

    texts = [f"{title}\n\n{text}" for title, text in make_articles(IN_MEMORY)]
    print(f"{args.workers} processes on {os.cpu_count()} cores")
    header = ["input", "articles", "tokens", "seconds", "tokens/s", "MB/s", "peak MiB", "of the ceiling", "of batch"]
    rows = []
    for count in args.articles:
        for suffix in (".jsonl", ".parquet"):
            source = write_input(args.dir / f"{count}{suffix}", make_articles(count))
            seconds, peaks, of_ceiling, of_batch = [], [], [], []
            for _ in range(args.rounds):
                before, by_batch = ceiling(texts, args.workers), batch(texts, args.workers)
                taken, peak, meta = prepare(source, args.workers)
                best = (before + ceiling(texts, args.workers)) / 2  # a machine's speed drifts: before and after
                totals = {key: sum(split[key] for split in meta["splits"].values()) for key in meta["splits"]["train"]}
                seconds.append(taken)
                peaks.append(peak / 2**20)
                of_ceiling.append(totals["tokens"] / taken / best)
                of_batch.append(totals["tokens"] / taken / by_batch)
            middle = statistics.median(seconds)
            rows.append([source.name, f"{totals['articles']:,}", f"{totals['tokens']:,}", spread(seconds, ".1f"),
                         f"{totals['tokens'] / middle:,.0f}", f"{totals['bytes'] / middle / 1e6:.0f}",
                         f"{max(peaks):,.0f}", spread(of_ceiling, ".0%"), spread(of_batch, ".2f")])
            print("  ".join(rows[-1]), flush=True)
    print("\n" + format_table(header, rows))

    if args.copies:
        dump = write_dump(args.dir / "dump.xml.bz2", args.copies)
        flags = ["--json", "-o", "-", "--html-safe", "", "--no-templates", "--quiet"]
        alone, ours, peaks = [], [], []
        for _ in range(args.rounds):
            alone.append(run([sys.executable, "-m", "wikiextractor.WikiExtractor", *flags, dump.resolve()])[0])
            taken, peak, meta = prepare(dump, args.workers)
            ours.append(taken)
            peaks.append(peak / 2**20)
        tokens = sum(split["tokens"] for split in meta["splits"].values())
        ratios = [a / b for a, b in zip(alone, ours)]
        print(f"\nA dump of {dump.stat().st_size / 1e6:.0f} MB, {tokens:,} tokens: {spread(ours, '.1f')} s, peak "
              f"{max(peaks):,.0f} MiB; wikiextractor alone {spread(alone, '.1f')} s; ratio {spread(ratios, '.0%')}")


if __name__ == "__main__":
    main()
