"""Measure prepare_wiki.py on JSON lines, Parquet and a dump: seconds, tokens/s and memory.

    python bench/prepare.py [--copies 4 40] [--forms jsonl parquet dump] [--rounds 3] [--workers 4]
    python bench/prepare.py --copies 2000 --forms jsonl parquet --rounds 1      the plan's size; takes 9 GB in TMPDIR

The input is copies of the sample's long articles, or of its dump, with a title for each copy. Every round makes a row.
The last column is the speed as a share of the tokenizer's alone: encode_ordinary_batch on texts in memory, with one
thread per worker, timed just before. Memory is the peak of the processes' summed PSS, which counts a shared page once.
PSS is read every 0.2 s on Linux; elsewhere it is 0.
"""

import bz2
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from articles import need  # noqa: E402
from curriculum import format_table  # noqa: E402
from packages import gpt2_encoding, sample_files  # noqa: E402
from settings import user_errors  # noqa: E402

FORMS = {"jsonl": "articles.jsonl", "parquet": "articles.parquet", "dump": "articles.xml.bz2"}


def long_articles() -> list[dict]:
    """Return the sample's articles of about 1,000 tokens and more."""
    subprocess.run([sys.executable, "prepare_wiki.py", "--sample"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    tokens = np.fromfile(ROOT / "data" / "sample" / "train_00000.bin", "<u2").tolist()
    parts = (text.partition("\n\n") for text in gpt2_encoding().decode(tokens).split("<|endoftext|>"))
    return [{"title": title, "text": text} for title, _, text in parts if len(text) > 4_000]


def write_input(path: Path, articles: list[dict], copies: int) -> None:
    """Write `copies` of the articles, or of the sample's dump, in the form of the file's name."""
    if path.name == FORMS["dump"]:
        xml = bz2.decompress(sample_files()[0].read_bytes()).decode()
        start, end = xml.index("  <page>"), xml.rindex("</mediawiki>")
        with bz2.open(path, "wt") as file:
            file.write(xml[:start])
            for copy in range(copies):
                file.write(re.sub(r"<title>(.*)</title>", rf"<title>\1 {copy}</title>", xml[start:end]))
            file.write(xml[end:])
        return
    renamed = ([row | {"title": f"{row['title']} {copy}"} for row in articles] for copy in range(copies))
    if path.name == FORMS["jsonl"]:
        with path.open("w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for rows in renamed for row in rows)
    else:
        import pyarrow.parquet

        schema = pyarrow.schema([("title", pyarrow.string()), ("text", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for rows in renamed:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def memory_of(pid: int) -> int:
    """Return the PSS in bytes of a process and of all its descendants."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        own = re.search(r"^Pss: *(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    except OSError:
        return 0  # the process has ended
    return (int(own[1]) * 1024 if own else 0) + sum(map(memory_of, children))


def prepare(source: Path, out: Path, workers: int) -> tuple[float, int, dict[str, int]]:
    """Prepare an input; return the seconds, the peak memory in bytes, and the numbers of articles and tokens."""
    command = [sys.executable, "prepare_wiki.py", str(source), "--out", str(out), "--workers", str(workers)]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.2)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(process.returncode)  # prepare_wiki.py has printed why
    splits = json.loads((out / "meta.json").read_text())["splits"].values()
    return seconds, peak, {key: sum(split[key] for split in splits) for key in ("articles", "tokens")}


def main() -> None:
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, nargs="+", default=[4, 40], help="copies to make, 0.5M tokens each")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if "parquet" in args.forms:
        need("pyarrow", "pyarrow==26.0.1")
    articles, encoding, rows = long_articles(), gpt2_encoding(), []
    texts = [row["text"] for row in articles] * 4
    for form, copies in itertools.product(args.forms, args.copies):
        with tempfile.TemporaryDirectory() as name:
            source = Path(name).resolve() / FORMS[form]
            write_input(source, articles, copies)
            for number in range(args.rounds):
                started = time.perf_counter()
                alone = sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=args.workers)))
                alone /= time.perf_counter() - started
                seconds, peak, counts = prepare(source, source.with_name(f"out{number}"), args.workers)
                speed = counts["tokens"] / seconds
                rows.append([form, f"{counts['articles']:,}", f"{counts['tokens']:,}", f"{seconds:.1f}",
                             f"{speed:,.0f}", f"{peak / 2**20:,.0f}", f"{speed / alone:.0%}"])  # fmt: skip
    print(f"{args.workers} workers on {os.cpu_count()} cores\n")
    print(format_table(["form", "articles", "tokens", "seconds", "tokens/s", "peak MiB", "of the tokenizer"], rows))


if __name__ == "__main__":
    with user_errors():
        main()
