"""A GPU computes what a CPU does, and a run on it resumes, samples, exports and joins torchrun's group.

Skipped without a GPU. A GPU sums in no fixed order, so runs repeat only up to rounding.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FEW, ROOT, SMALL, assert_same_losses, run_program

import export
import sample
from checkpoint import load_checkpoint, load_model, read_log
from data import VOCAB_SIZE
from model import GPT, GPTConfig, on_machine
from parallel import Team
from settings import load_config
from train import train, train_step

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def steps_of_all_stages(device: str, dtype: str, compile: bool, tokens: int, times: int) -> list[tuple]:
    """Make one step of each stage of curriculum9 `times` times with a small model; return each loss with its gradients.
    The second time records a CUDA graph, and the third replays it."""
    config = load_config([f"{ROOT}/config/curriculum9.py", "--grad_clip=0", f"--micro_batch_tokens={tokens}"])
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=128), 2048)
    model.init_weights(0)
    on_machine(model, device, dtype, compile)
    torch.set_float32_matmul_precision("highest")  # on_machine's "high" rounds factors to 10 bits
    scaler, optimizer = torch.amp.GradScaler(device, enabled=dtype == "float16"), torch.optim.SGD(model.parameters())
    losses, grads = [], []
    optimizer.register_step_pre_hook(lambda *_: grads.append([weight.grad.cpu() for weight in model.parameters()]))
    for step, seq_len, batch_size, _ in config.stages:
        windows = np.random.default_rng(step).integers(VOCAB_SIZE, size=(batch_size, seq_len + 1))
        for _ in range(times):
            losses.append(train_step(model, [optimizer], scaler, windows, 0.0, config, Team())[0])
    assert times == 1 or model.graph.graph
    model.graph = None  # free its memory for the next case
    return list(zip(losses, grads, strict=True))


@pytest.fixture(scope="module")
def cpu_steps() -> list[tuple]:
    return steps_of_all_stages("cpu", "float32", compile=False, tokens=2_048, times=1)


@pytest.mark.parametrize("use_graph, static_shapes", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype, compile, limit", [
    ("float32", False, 1e-4), ("bfloat16", True, 1e-1), ("float16", False, 1e-2), ("float16", True, 1e-2)])  # fmt: skip
def test_a_step_of_every_stage_equals_the_cpus(use_graph, static_shapes, dtype, compile, limit, cpu_steps, monkeypatch):
    """model.USE_STATIC_SHAPES may become True once its cases here pass on a GPU."""
    torch.compiler.reset()  # else a case would run what an earlier one compiled
    monkeypatch.setattr("graph.USE_CUDA_GRAPH", use_graph)
    monkeypatch.setattr("model.USE_STATIC_SHAPES", static_shapes)
    times, tokens = (3, 16_384) if use_graph else (1, 12_288)
    steps = steps_of_all_stages(DEVICE, dtype, compile, tokens, times)
    expected = [step for step in cpu_steps for _ in range(times)]
    for (loss, grads), (cpu_loss, cpu_grads) in zip(steps, expected, strict=True):
        assert loss == pytest.approx(cpu_loss, rel=limit / 20)
        for grad, cpu_grad in zip(grads, cpu_grads, strict=True):
            assert (grad - cpu_grad).norm() < limit * cpu_grad.norm()


@pytest.fixture(scope="module")
def unbroken(sample_dir, tmp_path_factory) -> Path:
    """Return the out_dir of a small float32 run on the GPU. The run's config is gpu.py in out_dir."""
    folder = tmp_path_factory.mktemp("unbroken")
    keys = SMALL | {"device": DEVICE, "dtype": "float32", "data_dir": str(sample_dir), "stages": FEW, "max_steps": 30}
    keys |= {"eval_tokens": 256, "eval_interval": 8, "checkpoint_interval": 3, "resume": True}
    (folder / "gpu.py").write_text("".join(f"{key} = {value!r}\n" for key, value in keys.items()))
    assert train(load_config([str(folder / "gpu.py"), f"--out_dir={folder}"]), Team()) == 0
    first, *_, last = read_log(folder)
    assert first["val_loss"] > 10.8 and last["val_loss"] < 10.7  # the run learns
    return folder


LOSSES = {"loss", "val_loss", "train_loss", "last_len_loss"}
KILLED = """
import os, signal, sys, settings, parallel, train
learning_rate = train.learning_rate
train.learning_rate = lambda *at: os.kill(os.getpid(), signal.SIGKILL) if at[-1] == 17 else learning_rate(*at)
train.train(settings.load_config(sys.argv[1:]), parallel.Team())
"""
OF_TWO = """
import sys, torch.distributed, parallel, settings, train
sum_gradients = parallel.Team.sum_gradients
def through_the_group(team, model, loss):  # a group of this process alone
    team.count = 2
    loss = sum_gradients(team, model, loss)
    team.count = 1
    return loss
parallel.Team.sum_gradients = through_the_group
with parallel.join_team("no advice") as team:
    train.train(settings.load_config(sys.argv[1:]), team)
    print("group:", torch.distributed.get_backend_config())
"""


def test_a_run_killed_by_sigkill_resumes_to_the_same_losses(unbroken, tmp_path):
    arguments = [str(unbroken / "gpu.py"), f"--out_dir={tmp_path}"]
    assert run_program("-c", KILLED, *arguments).returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 16 and train(load_config(arguments), Team()) == 0
    assert_same_losses(tmp_path, unbroken, LOSSES, 1e-3)


def test_out_of_memory_is_one_line_and_status_2(unbroken, tmp_path):
    little = "import torch\ntorch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.mem_get_info()[1])\n"
    (tmp_path / "little.py").write_text((unbroken / "gpu.py").read_text() + little)
    large = [f"--out_dir={tmp_path / 'run'}", "--stages=((0, 64, 256, 1.0),)", "--micro_batch_tokens=16_384"]
    done = run_program("train.py", tmp_path / "little.py", *large)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "out of memory" in line and "micro_batch_tokens" in line


def test_a_sample_drawn_on_the_gpu_equals_the_cpus_and_an_export_opens(unbroken, tmp_path, monkeypatch, capsys):
    texts = []
    for device in ("cpu", DEVICE):
        model = on_machine(load_model(unbroken / "best.pt")[0], device, "float32", compile=False)
        torch.set_float32_matmul_precision("highest")
        texts.append(list(sample.generate(model, [50256, 464], 3, 40, seed=1, temperature=0.8, top_k=200, top_p=0.95)))
    assert texts[0] == texts[1] and len(texts[0]) > 10
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={unbroken}", "--prompt=The history of"])
    sample.main()
    assert capsys.readouterr().out.startswith("The history of")
    monkeypatch.setattr(sys, "argv", ["export.py", str(unbroken), f"--to={tmp_path / 'hf'}"])
    export.main()  # fails unless transformers computes the same logits from the folder
    assert float(capsys.readouterr().out.split()[-1]) < 1e-3


def test_torchrun_of_one_process_joins_an_nccl_group(unbroken, tmp_path):
    (tmp_path / "of_two.py").write_text(OF_TWO)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", tmp_path / "of_two.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    done = run_program(*torchrun, unbroken / "gpu.py", f"--out_dir={tmp_path / 'run'}", env=env)
    assert done.returncode == 0 and "cuda:nccl" in done.stdout, done.stderr
    assert_same_losses(tmp_path / "run", unbroken, LOSSES, 1e-3)
