"""Several processes make the same run as a single one, and end together. The slow tests use torchrun."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from children import Child, folder, run_train, write_learnable
from conftest import ROOT, assert_same_losses, assert_same_run, read_log

from bench.exactness import log_of
from checkpoint import load_checkpoint

# Batches that do not divide evenly among two or three processes, the last of them a single window
KEYS = {"stages": ((0, 16, 8, 1.0), (5, 32, 7, 0.5), (10, 64, 1, 0.25)), "max_steps": 15, "checkpoint_interval": 4}
KEYS |= {"learning_rate": 1e-3, "dtype": "float32"}
LOSSES = {"seq_len", "loss", "grad_norm", "val_loss", "val_accuracy", "val_bpb", "train_loss", "last_len_loss"}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_ranks(count: int, *arguments: object, rank_1: tuple = (), fault: str = "", **env: str) -> list:
    """Run train.py as `count` ranks. Only rank 1 gets the arguments rank_1 and the fault."""
    env |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = [folder() / "config.py", *(f"--{key}={value}" for key, value in KEYS.items()), *arguments]
    children = [Child("train.py", *arguments, *(rank_1 if rank == 1 else ()), fault=fault if rank == 1 else "",
                      **env, RANK=str(rank)) for rank in range(count)]  # fmt: skip
    return [child.wait() for child in children]


def test_two_and_three_processes_make_the_run_of_one(tmp_path):
    assert run_train(tmp_path / "1", **KEYS).returncode == 0
    for count in (2, 3):
        own = (f"--data_dir={shutil.copytree(folder() / 'data', tmp_path / f'copy{count}')}",)  # rank 1's own copy
        first, *others = run_ranks(count, f"--out_dir={tmp_path / str(count)}", rank_1=own)
        assert first.returncode == 0 and first.stdout.count("last len") == 1, first.stderr
        assert all((other.returncode, other.stdout, other.stderr) == (0, "", "") for other in others)
        assert_same_losses(tmp_path / str(count), tmp_path / "1", LOSSES, 1e-4)


def test_a_stop_signal_to_one_process_stops_all_and_another_number_may_resume(tmp_path):
    whole, out_dir = tmp_path / "whole", tmp_path / "moved"
    assert run_train(whole, **KEYS).returncode == 0
    stopped = run_ranks(2, f"--out_dir={out_dir}", fault="signal(SIGHUP, SIG_IGN); signal_in_step(6, SIGHUP)")
    assert [done.returncode - 128 for done in stopped] == [signal.SIGTERM, signal.SIGHUP]
    assert "stopped by SIGTERM after step 7" in stopped[0].stdout and read_log(out_dir)[-1]["step"] == 7
    stopped = run_ranks(3, f"--out_dir={out_dir}", fault="signal_in_evaluation(10, SIGINT)")
    assert [done.returncode - 128 for done in stopped] == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]
    assert load_checkpoint(out_dir / "last.pt")["step"] == read_log(out_dir)[-1]["step"] == 10
    assert run_train(out_dir, **KEYS).returncode == 0
    assert_same_losses(out_dir, whole, LOSSES, 1e-4)


NCCL = "import torch.distributed as d; error = d.DistBackendError('NCCL\\nfailed');"
NCCL += "before(curriculum, 'learning_rate', lambda *a: a[2] == 6 and (_ for _ in ()).throw(error))"


@pytest.mark.parametrize("fault", ["signal_in_step(6, SIGKILL)", "signal_in_step(6, 'a bug')", NCCL])
def test_a_process_that_dies_ends_the_other_with_one_line(fault, tmp_path):
    first, second = run_ranks(2, f"--out_dir={tmp_path}", fault=fault)
    assert first.returncode == 1 and first.stderr == "error: another process of this run has ended\n"
    assert second.returncode and ("Traceback" in second.stderr) == ("bug" in fault)
    assert second.stderr.endswith(r"has ended, or DistBackendError('NCCL\nfailed')" + "\n") == (fault == NCCL)
    first, second = run_ranks(2, f"--out_dir={tmp_path}")
    assert first.returncode == second.returncode == 0 and "resuming from step 5" in first.stdout


def test_a_mistake_of_one_process_is_printed_by_it(tmp_path):
    """First rank 1 alone has an invalid key. Then it reads another checkpoint, key or text, and both say so."""
    first, second = run_ranks(2, f"--out_dir={tmp_path / 'run'}", rank_1=("--n_head=5",))
    assert (first.returncode, second.returncode) == (1, 2) and first.stderr.count("\n") == 1
    assert second.stderr.startswith("error: ") and second.stderr.count("n_head") == second.stderr.count("\n") == 1
    assert run_train(tmp_path / "run", **KEYS | {"max_steps": 5}).returncode == 0
    write_learnable(tmp_path / "text", seed=1)
    for own in (f"--out_dir={tmp_path / 'other'}", "--seed=7", f"--data_dir={tmp_path / 'text'}"):
        for done in run_ranks(2, f"--out_dir={tmp_path / 'run'}", rank_1=(own,)):
            assert done.returncode == 2 and "do they all see the same" in done.stderr


def test_restarts_that_may_hang_are_refused_and_help_is_no_error():
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "1"}
    (done,) = run_ranks(1, **env)
    assert done.returncode == 2 and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in done.stderr
    first, second = run_ranks(2, "--help")
    assert "--stages=()" in first.stdout and first.stderr == second.stderr == second.stdout == ""
    assert first.returncode == second.returncode == 0


def start_torchrun(own: list[str], **keys: object) -> subprocess.Popen:
    """Start train.py by torchrun with its arguments `own`, these keys changed, and the real vocabulary."""
    keys = KEYS | {"eval_tokens": 128} | keys
    ours = ["train.py", str(folder() / "config.py"), *(f"--{key}={value}" for key, value in keys.items())]
    command = [sys.executable, "-m", "torch.distributed.run", *own, *ours]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # the same number of threads for every world size
    env |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if "--max_restarts=3" in own else {}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_torchrun_passes_on_a_signal_and_prints_a_mistake_once(tmp_path):
    two, out_dir = ["--standalone", "--nproc_per_node=2"], tmp_path / "run"
    process = start_torchrun(two, n_head=5)
    assert process.communicate(timeout=100)[1].count("error: n_embd=32 is not an even multiple of n_head=5") == 1
    process = start_torchrun(two, max_steps=999, out_dir=out_dir)
    while len(log_of(out_dir)) < 20 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    step = load_checkpoint(out_dir / "last.pt")["step"]
    assert f"stopped by SIGTERM after step {step}" in output and read_log(out_dir)[-1]["step"] == step
    process = start_torchrun(two, max_steps=step + 3, out_dir=out_dir)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and f"resuming from step {step}" in output, errors
    steps = [record["step"] for record in read_log(out_dir) if record["event"] == "train"]
    assert steps == list(range(1, step + 4))


@pytest.mark.slow
def test_the_workers_of_one_machine_are_killed_and_the_run_continues(tmp_path):
    """Two torchrun agents that meet on loopback stand for two machines."""
    process = start_torchrun(["--standalone", "--nproc_per_node=2"], out_dir=tmp_path / "whole")
    assert process.wait(timeout=100) == 0
    own = ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_backend=c10d", "--rdzv_id=run"]
    own += [f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    agents = [start_torchrun(own, out_dir=tmp_path / "killed") for _ in range(2)]
    while len(log_of(tmp_path / "killed")) < 9 and agents[1].poll() is None:
        time.sleep(0.01)
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agents[1].pid)], capture_output=True, text=True)
    os.kill(int(listed.stdout.split()[0]), signal.SIGKILL)
    outputs = [agent.communicate(timeout=150) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "resuming from step" in "".join(stdout for stdout, _ in outputs)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
