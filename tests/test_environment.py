"""Failures around a program: consoles that cannot be written, a missing compiler, and limits of the machine."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from children import run_train
from conftest import ROOT

import prepare_wiki
from data import open_dataset
from model import GPT, GPTConfig, on_machine
from settings import UserError

LINES = "import settings, sys\nwith settings.user_errors():\n    for i in range(9999):\n        print('Kyōto', i)\n"
LINES += "    print('Kyōto', file=sys.stderr)\n    print('ended', file=open(sys.argv[1], 'w'))"


@pytest.mark.parametrize("console", ["closed pipe", "full disk", "latin-1", "closed"])
def test_a_console_that_cannot_be_written_ends_no_program(console, tmp_path):
    reading, writing = os.pipe()
    if console == "closed pipe":
        os.close(reading)
    if console == "full disk":
        writing = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-c", LINES, tmp_path / "ended"]
    if console == "closed":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    stdout, env = subprocess.PIPE if console == "latin-1" else writing, os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"" if console == "closed" else b"Ky\\u014dto\n")
    assert (tmp_path / "ended").read_text() == "ended\n"
    assert console != "latin-1" or done.stdout.startswith(b"Ky\\u014dto 0\nKy\\u014dto 1\n")


def test_a_run_whose_console_breaks_continues_to_its_end(tmp_path):
    done = run_train(tmp_path, fault="r, w = os.pipe(); os.close(r); os.dup2(w, 1)")
    assert done.returncode == 0 and '"event": "final"' in (tmp_path / "log.jsonl").read_text()


@torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True})
def test_without_a_compiler_a_cpu_trains_uncompiled_after_one_line(capsys):
    torch._dynamo.reset()
    model, windows = GPT(GPTConfig(1, 2, 32), 16), torch.arange(34).view(2, 17)
    model.init_weights(1)
    expected = model.loss(windows).item()
    assert on_machine(model, "cpu", "float32", compile=True).loss(windows).item() == pytest.approx(expected, rel=1e-6)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torch.compile fails here: ") and "no-such-compiler" in line


def test_workers_are_as_many_as_usable_cores_and_import_no_torch(monkeypatch):  # torch takes 150 MiB in each
    code = "import prepare_wiki, sys; print(prepare_wiki.usable_cores(), 'torch' in sys.modules)"
    one = {min(os.sched_getaffinity(0))}
    limit = lambda: os.sched_setaffinity(0, one)  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, preexec_fn=limit)
    assert done.stdout == b"1 False\n"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    monkeypatch.setattr(prepare_wiki.Path, "read_text", lambda path, **_: "350000 100000\n")  # a container's limit: 3.5
    assert prepare_wiki.usable_cores() == 3


def refuse(*args, **kwargs):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_limit_is_named_and_not_called_damage(monkeypatch, small_dir, tmp_path):
    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(UserError, match="Too many open files") as raised:
        open_dataset(small_dir)
    assert "damaged" not in str(raised.value)
    monkeypatch.setattr(prepare_wiki, "ProcessPoolExecutor", refuse)
    with pytest.raises(UserError, match="processes: Too many open files .*/dev/shm"):
        list(prepare_wiki.tokenize([], tmp_path, 0, 2))
