"""Several processes, as torchrun starts them: the run is the one that a single process would have made."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_same_run, count_lines, read_log

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Batches that two or three processes do not divide, and one window for all of them.
TABLE = ((0, 16, 8, 1.0), (5, 32, 7, 0.5), (10, 64, 1, 0.25))


@pytest.fixture
def arguments(config_file):
    """train.py on TABLE for 15 steps. With the tests' harsh learning rate rounding grows, on one process too."""
    return ["train.py", config_file, f"--stages={TABLE}", "--max_steps=15", "--learning_rate=1e-3", "--resume=True",
            "--checkpoint_interval=4"]  # fmt: skip


def torchrun(count: int, *arguments: object) -> list[str]:
    return [*TORCHRUN, "--standalone", f"--nproc_per_node={count}", *map(str, arguments)]


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def wait_for_lines(out_dir, count: int) -> None:
    end = time.monotonic() + 100
    while count_lines(out_dir) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_and_three_processes_make_the_run_of_one(tmp_path, arguments):
    records = {}
    for count in (1, 2, 3):
        out_dir = tmp_path / str(count)
        done = run(torchrun(count, *arguments, f"--out_dir={out_dir}"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("last len") == 1  # process 0 alone prints
        records[count] = read_log(out_dir)
    for count in (2, 3):
        assert len(records[count]) == len(records[1])
        for ours, one in zip(records[count], records[1]):
            assert (ours["event"], ours["step"], ours["seq_len"]) == (one["event"], one["step"], one["seq_len"])
            for key in {"loss", "val_loss", "val_bpb", "train_loss", "last_len_loss"} & one.keys():
                assert ours[key] == pytest.approx(one[key], abs=1e-4)


def test_a_run_stopped_on_two_processes_by_one_s_signal_goes_on_on_three_and_on_one(tmp_path, arguments):
    out_dir = tmp_path / "moved"
    arguments += [f"--out_dir={out_dir}", "--max_steps=1000", "--eval_interval=1000"]
    process = subprocess.Popen(torchrun(2, *arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)  # fmt: skip
    wait_for_lines(out_dir, 20)
    os.kill(workers(process.pid)[-1], signal.SIGTERM)  # the last one, which writes nothing
    output, _ = process.communicate(timeout=60)
    step = torch.load(out_dir / "last.pt", weights_only=True)["step"]
    assert f"stopped by SIGTERM after step {step}" in output and 15 < step < 1000
    assert read_log(out_dir)[-1]["step"] == step
    for count in (3, 1):
        done = run(torchrun(count, *arguments, f"--max_steps={step + count}"))
        assert done.returncode == 0 and f"going on from step {step}" in done.stdout, done.stderr
        step += count
    steps = [record["step"] for record in read_log(out_dir) if record["event"] == "train"]
    assert steps == list(range(1, step + 1))


def workers(agent: int) -> list[int]:
    """The processes that a torchrun started, in the order of their ranks."""
    listed = run(["ps", "-o", "pid=,args=", "--ppid", str(agent)]).stdout.splitlines()
    return sorted(int(line.split()[0]) for line in listed if "train.py" in line)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_ranks(count: int, arguments: list, **env: dict) -> list[subprocess.Popen]:
    """The processes themselves, without torchrun, which hides their exit statuses."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [subprocess.Popen([sys.executable, *map(str, arguments[rank])], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env=os.environ | shared | {"RANK": str(rank)})
            for rank in range(count)]  # fmt: skip


@pytest.mark.parametrize("mistaken", [(0, 1), (1,)], ids=["all", "one"])
def test_a_mistake_is_said_once_and_ends_all_with_status_2(arguments, mistaken):
    per_rank = [[*arguments, "--n_head=5"] if rank in mistaken else arguments for rank in range(2)]
    processes = start_ranks(2, per_rank)
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    (line,) = "".join(said).splitlines()
    assert "n_head" in line


def test_help_is_no_error(arguments):
    processes = start_ranks(2, [["train.py", "--help"]] * 2)
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and "--stages=()" in said[0][0]
    assert said[0][1] == said[1][1] == said[1][0] == ""


def test_a_damaged_checkpoint_is_said_once_and_all_go_on_from_the_one_before(tmp_path, arguments):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    for out_dir in (whole, damaged):
        assert run(torchrun(2, *arguments, f"--out_dir={out_dir}")).returncode == 0
    data = bytearray((damaged / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "last.pt").write_bytes(data)
    done = run(torchrun(2, *arguments, f"--out_dir={damaged}"))
    assert done.returncode == 0 and done.stderr.count("last.pt is damaged") == 1
    assert "going on from step 12" in done.stdout
    assert_same_run(damaged, whole)  # two processes repeat two processes, bit for bit


def test_the_workers_of_one_machine_are_killed_and_the_run_goes_on(tmp_path, arguments):
    """Two torchrun agents that meet on loopback stand for two machines."""
    arguments += ["--max_steps=40"]  # so that the kill comes long before the end
    assert run(torchrun(2, *arguments, f"--out_dir={tmp_path / 'whole'}")).returncode == 0
    out_dir, endpoint = tmp_path / "killed", f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    command = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_backend=c10d", endpoint,
               "--rdzv_id=run", *map(str, arguments), f"--out_dir={out_dir}"]  # fmt: skip
    # As many threads as torchrun gives two processes on one machine: the same bits take the same number.
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environment) for _ in range(2)]  # fmt: skip
    wait_for_lines(out_dir, 9)
    (worker,) = workers(agents[1].pid)
    os.kill(worker, signal.SIGKILL)
    outputs = [agent.communicate(timeout=150) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert re.search(r"going on from step \d+", "".join(stdout for stdout, _ in outputs))
    assert_same_run(out_dir, tmp_path / "whole")


FAILS_ALONE = """
import os, sys, time, train, torch.distributed as dist
step, rank = train.train_step, int(os.environ["RANK"])
def fail(*arguments):
    if rank == 1 and fail.steps == 3:
        raise ValueError("of one alone")
    fail.steps += 1
    return step(*arguments)
fail.steps = 0
train.train_step = fail
dist.destroy_process_group = lambda: time.sleep(1000)  # as NCCL's, which waits for the others
from config import load_config
from errors import user_errors
from parallel import join_processes
with user_errors(), join_processes() as team:
    train.train(load_config(sys.argv[1:]), team)
"""


def test_an_error_of_one_process_is_shown_and_ends_all(arguments, tmp_path):
    processes = start_ranks(2, [["-c", FAILS_ALONE, *arguments[1:], f"--out_dir={tmp_path}"]] * 2)
    try:
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == 1 and "ValueError: of one alone" in said[1]
    assert processes[0].returncode == 1 and "Traceback" in said[0]  # the connection is closed


def test_restarts_that_may_hang_are_refused(arguments):
    command = torchrun(2, *arguments)
    command.insert(len(TORCHRUN), "--max_restarts=1")
    done = run(command)
    assert done.returncode == 1 and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in done.stderr
