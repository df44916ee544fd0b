"""The step against formulas and torch's own autograd; the loop by the log and checkpoints that it writes."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from children import VOCAB_SIZE, run_train
from conftest import FEW, SMALL, assert_same_run, read_log, release_logs
from torch.utils._python_dispatch import TorchDispatchMode

import train
from checkpoint import load_checkpoint
from graph import GradientGraph, gradient_function
from model import GPT, GPTConfig
from optim import make_optimizers
from parallel import Team
from settings import Config
from train import train_step

WINDOWS = np.random.default_rng(0).integers(VOCAB_SIZE, size=(7, 65))


def small_step(scaler=None, sgd=False, **keys):
    """Return a model, its optimizers, and a function that makes a step on WINDOWS at the learning rate 0.5."""
    config, model = Config(**SMALL | keys, stages=FEW), GPT(GPTConfig(1, 2, 32, vocab_size=VOCAB_SIZE), 64)
    model.init_weights(0)
    model.dtype = getattr(torch, config.dtype)
    optimizers = [torch.optim.SGD(model.parameters())] if sgd else make_optimizers(model, config)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return model, optimizers, lambda: train_step(model, optimizers, scaler, WINDOWS, 0.5, config, Team())


def gradients_of_step(grad_clip=0.0, **keys) -> tuple:
    """Return the model before a step, and the step's loss, norm and gradients, which are twice what SGD subtracts."""
    model, _, step = small_step(sgd=True, grad_clip=grad_clip, **keys)
    old = copy.deepcopy(model)
    loss, norm = step()
    return old, loss, norm, [(a - b).detach() / 0.5 for a, b in zip(old.parameters(), model.parameters())]


def test_micro_batches_of_unequal_size_give_the_gradient_of_the_whole_batch():
    model, loss, norm, grads = gradients_of_step(micro_batch_tokens=200)  # 3, 2 and 2 windows
    windows = torch.from_numpy(WINDOWS)
    whole = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    expected = torch.autograd.grad(whole, model.parameters())
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    assert norm == pytest.approx(math.sqrt(sum(grad.double().square().sum() for grad in expected)), rel=1e-5)
    *_, same_norm, clipped = gradients_of_step(grad_clip=norm / 4)
    assert same_norm == pytest.approx(norm)  # the norm before clipping
    for ours, quarter, grad in zip(grads, clipped, expected, strict=True):
        torch.testing.assert_close(ours, grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(4 * quarter, grad, rtol=1e-3, atol=4e-6)


def frozen(model, optimizers) -> str:
    state = [model.state_dict(), [optimizer.state_dict()["state"] for optimizer in optimizers]]
    return repr(torch.utils._pytree.tree_map(lambda x: x.numpy().tobytes(), state))


def test_float16s_gradients_are_those_of_float32_and_an_overflow_halves_the_scale():
    *_, singles = gradients_of_step()
    *_, halves = gradients_of_step(dtype="float16", scaler=torch.amp.GradScaler("cpu"))
    for half, single in zip(halves, singles, strict=True):
        assert (half - single).norm() < 0.02 * single.norm()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    model, optimizers, step = small_step(scaler, dtype="float16")
    before = frozen(model, optimizers)
    loss, norm = step()
    assert math.isfinite(loss) and not math.isfinite(norm) and scaler.get_scale() == 2.0**39
    assert frozen(model, optimizers) == before


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_without_a_finite_loss_and_gradient_changes_neither_weights_nor_moments(optimizer):
    model, optimizers, step = small_step(optimizer=optimizer)
    step()
    before, loss_of = frozen(model, optimizers), model.loss
    model.loss = lambda windows: loss_of(windows) * math.inf
    assert not math.isfinite(step()[0]) and frozen(model, optimizers) == before
    model.loss = lambda windows: loss_of(windows) + torch.sqrt(model.norm.weight.sum() * 0)
    loss, norm = step()
    assert math.isfinite(loss) and not math.isfinite(norm) and frozen(model, optimizers) == before
    model.loss = loss_of
    step()
    assert frozen(model, optimizers) != before and {g["lr"] for o in optimizers for g in o.param_groups} == {0.5}


class CPUGraph(TorchDispatchMode):
    """A CUDA graph for CPUs: it records each operation with its tensors, and replays them on the same memory."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, result in self.operations:
                again = function(*args, **kwargs)
                for old, new in zip(*map(torch.utils._pytree.tree_leaves, (result, again)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_steps_by_graph_are_the_plain_steps_to_the_bit(dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CPUGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    runs = []
    for use_graph in (False, True):
        model = GPT(GPTConfig(2, 2, 32, vocab_size=500), 32)
        model.init_weights(0)
        model.dtype = getattr(torch, dtype)
        graph = GradientGraph(model)
        if use_graph:
            monkeypatch.setattr(train, "gradient_function", lambda *_, graph=graph: graph)
        config, scaler = Config(**SMALL), torch.GradScaler("cpu", 16.0, growth_interval=1, enabled=dtype == "float16")
        optimizers, random, results = make_optimizers(model, config), np.random.default_rng(1), []
        for batch_size, seq_len in [(4, 16)] * 4 + [(2, 32)] * 3 + [(4, 16)] * 3:
            windows = random.integers(500, size=(batch_size, seq_len + 1))
            results.append(train_step(model, optimizers, scaler, windows, 0.01, config, Team()))
        runs.append([*results, *(weight.tolist() for weight in model.parameters())])
    assert runs[0] == runs[1] and graph.graph.operations
    monkeypatch.setattr(GPT, "device", torch.device("cuda"))  # only a step of one micro-batch may use a graph
    assert [gradient_function(model, parts) == model.add_gradients for parts in (0, 1, 2)] == [True, False, True]


def test_every_step_trains_on_random_windows_of_the_training_shard(small_dir, tmp_path, monkeypatch):
    seen, shard = [], np.fromfile(small_dir / "train_00000.bin", "<u2").tolist()
    monkeypatch.setattr(train, "train_step", lambda *args: seen.append(args[3].tolist()) or (1.0, 2.0))
    keys = SMALL | {"stages": FEW, "max_steps": 30, "seed": 3, "eval_tokens": 64, "data_dir": str(small_dir)}
    assert train.train(Config(**keys, out_dir=str(tmp_path / "run")), Team()) == 0
    release_logs()
    for step, windows in enumerate(seen):
        T, B = next(row[1:3] for row in reversed(FEW) if row[0] <= step)
        starts = np.random.default_rng((3, step)).integers(len(shard) - T, size=B)
        assert windows == [shard[i : i + T + 1] for i in starts]
    logged = [(r["loss"], r["grad_norm"]) for r in read_log(tmp_path / "run") if r["event"] == "train"]
    assert logged == [(1.0, 2.0)] * len(seen) and len(seen) == 30


def test_the_log_and_the_checkpoints_of_a_whole_run(tmp_path):
    table = ((0, 16, 8, 1.0), (10, 32, 4, 0.5), (20, 64, 3, 0.25), (90, 32, 1, 1.0))
    fault = "import time; ticks = itertools.count(); time.perf_counter = lambda: next(ticks);"  # a step takes 1 s
    fault += "before(evaluate, 'evaluate', lambda *_: next(ticks));"  # and an evaluation, which no record counts
    fault += "before(model.GPT, 'init_weights', lambda _, seed: print('from seed', seed))"
    done = run_train(tmp_path, fault, stages=table, log_interval=4, plan_ppl=((8, 99.0),), seed=3)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("from seed 3\n")
    records = read_log(tmp_path)
    trained, evaluated = range(4, 29, 4), [0, 8, 10, 16, 20, 24, 30]  # every 8 steps, after each stage, at the end
    moments = [(step, "train") for step in trained] + [(step, "zeval") for step in evaluated] + [(30, "zfinal")]
    assert [(record["step"], record["event"]) for record in records] == [(n, e.strip("z")) for n, e in sorted(moments)]
    train, evals, final = [[r for r in records if r["event"] == event] for event in ("train", "eval", "final")]
    val = {"event", "step", "stage", "seq_len", "time_s", "val_loss", "val_ppl", "val_accuracy", "val_bpb"}
    assert set(train[0]) == {"event", "step", "stage", "seq_len", "batch_size", "lr", "loss", "grad_norm", "tokens",
                             "tokens_per_s", "mfu", "time_s"}  # fmt: skip
    assert set(evals[0]) == val | {"train_loss", "gap", "last_len_loss", "plan_ppl", "is_best", "bad_evals"}
    assert set(final[0]) == val and evals[-1]["val_loss"] < evals[0]["val_loss"] - 1  # the run learns
    assert [(r["stage"], r["seq_len"]) for r in evals] == [(1, 16)] * 3 + [(2, 32)] * 2 + [(3, 64)] * 2
    assert [table[r["stage"] - 1][1:3] for r in train] == [(r["seq_len"], r["batch_size"]) for r in train]
    assert [r["stage"] for r in train] == [1, 1, 2, 2, 2, 3, 3] and all(r["mfu"] is None for r in train)
    assert [r["tokens"] for r in train] == [512, 1024, 1536, 2048, 2560, 3328, 4096]
    assert [r["lr"] for r in train] == [0.01] * 2 + [0.005] * 3 + [0.0025] * 2
    assert [r["plan_ppl"] for r in evals] == [None] + [pytest.approx(99.0)] * 6
    assert [r["time_s"] for r in records] == [r["step"] for r in records]
    assert [r["tokens_per_s"] for r in train] == [512 / 4] * 5 + [768 / 4] * 2
    saved = {name: load_checkpoint(tmp_path / name) for name in ("last.pt", "prev.pt", "best.pt")}
    assert [state["step"] for state in saved.values()] == [30, 27, 30] and "optimizers" not in saved["best.pt"]
    config = Config(**saved["last.pt"]["config"])
    assert (config.seed, config.stages, config.micro_batch_tokens) == (3, table, 3 * 64)  # capped at the largest batch


def test_a_run_resumed_with_dtype_auto_keeps_its_type_and_another_is_announced(tmp_path):
    said, fast = [], "import model; model.fast_dtype = lambda *_: 'bfloat16'"
    for max_steps, dtype in [(2, "float32"), (3, "float16"), (4, "auto"), (5, "float32"), (6, "auto")]:
        done = run_train(tmp_path, fault=fast, max_steps=max_steps, dtype=dtype, eval_tokens=64)
        said.append("in float32; --dtype=float16 would continue exactly" in done.stdout)
        kept = load_checkpoint(tmp_path / "last.pt")["config"]["dtype"]
        assert kept == ("float16" if max_steps in (3, 4) else "float32") and f" on cpu in {kept}\n" in done.stdout
    assert said == [False, False, False, True, False]


def test_a_resumed_run_prints_its_learning_rate_before_and_after(tmp_path):
    run_train(tmp_path, max_steps=8, cooldown_steps=4)
    done = run_train(tmp_path, max_steps=16, cooldown_steps=4)
    assert "resuming from step 8 of" in done.stdout and "at learning rate 0.01, after 0.0025\n" in done.stdout


def test_a_float16_run_finds_its_scale_and_resumes_with_it(tmp_path):
    large = "import torch; scaler = torch.amp.GradScaler;"
    large += "torch.amp.GradScaler = lambda *args, **keys: scaler(*args, **keys, init_scale=2.0**26);"
    keys = {"dtype": "float16", "eval_tokens": 64, "eval_interval": 99, "max_steps": 12}
    for name, fault, status in [("whole", "", 0), ("part", "signal_in_step(8, SIGTERM)", 128 + 15), ("part", "", 0)]:
        assert run_train(tmp_path / name, large + fault, **keys).returncode == status
    assert_same_run(tmp_path / "part", tmp_path / "whole")
    skips = sum(record["event"] == "skip" for record in read_log(tmp_path / "whole"))
    assert 1 <= skips < 8 and load_checkpoint(tmp_path / "part" / "last.pt")["scaler"]["scale"] == 2.0 ** (26 - skips)


def test_skipped_steps_are_logged_and_nine_do_not_end_a_run(tmp_path):
    done = run_train(tmp_path, fault="poison(4, 4); poison(14, 22); poison(30, 30)")
    records = [(r["step"], r["event"]) for r in read_log(tmp_path) if r["event"] in ("train", "skip")]
    assert records == [(n, "skip" if n in (4, *range(14, 23), 30) else "train") for n in range(1, 31)]
    assert done.returncode == 0 and done.stdout.count("is skipped: loss nan") == 11
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 30  # the weights that `final` scored


def test_ten_consecutive_skipped_steps_end_the_run_with_one_line_and_its_last_checkpoint(tmp_path):
    """Checkpoints would be due after steps 9, 12, 15 and 16, but none is saved during skipped steps."""
    done = run_train(tmp_path / "nan", fault="poison(8, 99)")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: 10 skipped steps in a row, at step 17 and rate ")
    assert [load_checkpoint(tmp_path / "nan" / name)["step"] for name in ("prev.pt", "last.pt")] == [3, 6]
    done = run_train(tmp_path / "large", learning_rate=9e18)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "rate 4.5e+18" in line
    weights = load_checkpoint(tmp_path / "large" / "last.pt")["model"].values()
    assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize("stages, losses, bad_evals, best", [
    ((3, 32), [5.0, 4.0, 4.1, 4.2, 9.0, 8.9, 8.8, 8.7, 8.6], [0, 0, 1, 2, 0, 0, 0, 0, 0], 8),  # one best per length
    ((3, 32), [6.0, 5.0, 5.5, 5.6, 6.0, 6.1, 6.0, 5.9, 9.9], [0, 0, 1, 2, 0, 1, 2, 0, 1], 7),  # plateaus that end
    ((2, 16), [5.0, 4.0, 4.5, 4.5, 4.5, 1.0], [0, 0, 1, 2, 3], 1),  # stages of one length count as one
    ((3, 32), [5.0, 5.0, 5.1, 5.0, 1.0], [0, 1, 2, 3], 0)])  # fmt: skip
def test_early_stopping_ends_a_run_of_made_up_losses(stages, losses, bad_evals, best, tmp_path):
    """Evaluate after every step s, which gives losses[s], and stop at the third evaluation without a new best."""
    keys = {"stages": ((0, 16, 2, 1.0), (*stages, 2, 1.0)), "max_steps": 8, "eval_interval": 1, "patience": 2}
    for _ in range(2):  # the second start finds a finished run
        done = run_train(tmp_path, f"make_up_losses({losses})", **keys)
        assert done.returncode == 0 and ("stopped early" in done.stdout) == (len(bad_evals) < 9)
        *evals, final = [record for record in read_log(tmp_path) if record["event"] != "train"]
        assert [(r["val_loss"], r["bad_evals"]) for r in evals] == list(zip(losses, bad_evals))
        assert load_checkpoint(tmp_path / "best.pt")["step"] == best and final["stage"] == evals[-1]["stage"]
