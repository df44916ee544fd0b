"""The loop: what it writes can be repeated by another program, and a run that was killed ends as one that was not."""

import dataclasses
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FEW, ROOT, SMALL, as_qwen3, assert_same_run, count_lines, read_log

import train
from checkpoint import load_checkpoint
from config import Config
from curriculum import Curriculum
from model import GPT, GPTConfig
from parallel import parts
from validate import Best

# Nine stages of a step each. As many windows as each has tokens, more tokens than 4,096, single windows: torch likes to
# compile anew for each of these.
SHAPES = ((64, 64), (128, 32), (256, 16), (512, 16), (768, 5), (1024, 4), (1536, 1), (2048, 1), (2048, 2))
NINE = tuple((i, *shape, 1.0) for i, shape in enumerate(SHAPES))


@pytest.mark.parametrize("capabilities, fast", [({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True}, "float32"),
                                                ({"neon": True}, "float32")])  # fmt: skip
def test_bfloat16_is_chosen_on_a_cpu_that_is_fast_at_it(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    assert train.pick_dtype("auto", cpu) == getattr(torch, fast)
    assert train.pick_dtype("bfloat16", cpu) == torch.bfloat16


def test_a_run_through_all_nine_stages_compiles_six_graphs_and_logs_what_design_says(tmp_path, sample_dir):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    keys = SMALL | {"compile": True, "dtype": "bfloat16", "eval_tokens": 16_384, "micro_batch_tokens": 8_192}
    keys["n_layer"] = 3
    config = Config(**keys, data_dir=str(sample_dir), out_dir=str(tmp_path), stages=NINE, max_steps=9)
    try:
        assert train.train(config) == 0
        # A block and the last norm, for training and for scoring; the loss and the score: whatever the lengths, the
        # batches and the layers.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6
    finally:
        torch._dynamo.reset()
    records = read_log(tmp_path)
    steps = [r for r in records if r["event"] == "train"]
    evals = [r for r in records if r["event"] == "eval"]
    assert [(r["step"], r["seq_len"], r["batch_size"]) for r in steps] == [(i + 1, *s) for i, s in enumerate(SHAPES)]
    assert [r["tokens"] for r in steps] == np.cumsum([length * batch for length, batch in SHAPES]).tolist()
    assert set(steps[0]) == {"event", "step", "stage", "seq_len", "batch_size", "lr", "loss", "grad_norm", "tokens",
                             "tokens_per_s", "mfu", "time_s"}  # fmt: skip
    # Before the first step, and after each stage at its own length.
    assert [(r["step"], r["seq_len"]) for r in evals] == [(0, 64)] + [(i + 1, s[0]) for i, s in enumerate(SHAPES)]
    assert set(evals[0]) == {"event", "step", "stage", "seq_len", "val_loss", "val_ppl", "val_accuracy", "val_bpb",
                             "train_loss", "gap", "last_len_loss", "plan_ppl", "is_best", "bad_evals",
                             "time_s"}  # fmt: skip
    assert all(r["val_ppl"] == pytest.approx(math.exp(r["val_loss"])) for r in evals)
    assert abs(evals[0]["val_loss"] - math.log(50304)) < 0.1 and evals[-1]["train_loss"] < 10.3
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 9
    assert torch.load(tmp_path / "prev.pt", weights_only=True)["step"] == 8
    assert "optimizers" not in torch.load(tmp_path / "best.pt", weights_only=True)


def test_another_program_repeats_the_reported_evaluation(tmp_path, small_dir):
    """The last evaluation of a run, from best.pt and the shards alone, by transformers and the rules in design.md."""
    table = ((0, 64, 16, 1.0), (8, 256, 8, 1.0))
    config = Config(**SMALL, data_dir=str(small_dir), out_dir=str(tmp_path), stages=table, max_steps=12)
    train.train(config)
    record = read_log(tmp_path)[-1]
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    assert record["is_best"] and state["step"] == record["step"] == 12
    qwen3 = as_qwen3(state)

    def losses(split: str, seq_len: int, n: int | None):
        """Losses and hits of n of the windows that tile the split (all, if n is None), and the targets' bytes."""
        (path,) = small_dir.glob(f"{split}_*.bin")
        shard = np.memmap(path, np.uint16)
        W = (len(shard) - 1) // seq_len
        n = n or W
        token_bytes = np.load(small_dir / "token_bytes.npy")
        loss = hits = n_bytes = 0
        for j in range(n):
            start = math.floor(j * W / n) * seq_len
            tokens = torch.tensor(shard[start : start + seq_len + 1].astype(np.int64))
            with torch.no_grad():
                logits = qwen3(tokens[None, :-1]).logits[0].double()
            loss += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
            hits += (logits.argmax(-1) == tokens[1:]).sum().item()
            n_bytes += int(token_bytes[tokens[1:]].sum())
        return loss / n / seq_len, hits / n / seq_len, loss / math.log(2) / n_bytes, n

    val_loss, accuracy, bpb, n = losses("val", 256, None)  # the last evaluation scores all held-out articles
    assert record["val_loss"] == pytest.approx(val_loss, abs=2e-5)
    assert record["val_accuracy"] == pytest.approx(accuracy, abs=2e-4)
    assert record["val_bpb"] == pytest.approx(bpb, abs=1e-5)
    assert record["train_loss"] == pytest.approx(losses("train", 256, n // 4)[0], abs=2e-5)
    assert record["last_len_loss"] == pytest.approx(losses("val", 256, 2_048 // 256 // 4)[0], abs=2e-5)


def test_parts_of_unequal_size_give_the_gradient_of_the_whole_batch():
    config = Config(**SMALL | {"grad_clip": 0.0, "micro_batch_tokens": 200}, stages=FEW, optimizer="adamw")
    model = GPT(GPTConfig(1, 2, 32), 64)
    model.init_weights(0)
    windows = np.random.default_rng(0).integers(50257, size=(7, 65))
    assert [len(part) for part in parts(windows, 64, 200)] == [3, 2, 2]
    whole = model.loss(torch.from_numpy(windows)) / (7 * 64)
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(whole, model.parameters())))

    class Recorder:
        """An optimizer that keeps the gradients it is given."""

        param_groups = ()

        def step(self):
            self.grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}

        def zero_grad(self):
            model.zero_grad()

    recorder = Recorder()
    loss, norm = train.train_step(model.loss, model, [recorder], windows, 0.0, config)
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    assert norm == pytest.approx(math.sqrt(sum(g.double().square().sum() for g in expected.values())), rel=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(recorder.grads[name], grad, rtol=1e-4, atol=1e-7)


def test_adamw_updates_by_its_formula_with_decay_for_matrices_only():
    config = Config(**SMALL | {"grad_clip": 0.5, "weight_decay": 0.3}, stages=FEW, optimizer="adamw")
    model = GPT(GPTConfig(1, 2, 32), 64)
    model.init_weights(0)
    before = {name: weight.detach().double() for name, weight in model.named_parameters()}
    windows = np.random.default_rng(0).integers(50257, size=(2, 65))
    grads = torch.autograd.grad(model.loss(torch.from_numpy(windows)) / 128, model.parameters())
    norm = math.sqrt(sum(g.double().square().sum() for g in grads))
    assert norm > 0.5
    train.train_step(model.loss, model, train.make_optimizers(model, config), windows, 0.01, config)
    for (name, weight), grad in zip(model.named_parameters(), grads):
        grad = grad.double() * 0.5 / norm
        decayed = before[name] * (1 - 0.01 * (0.3 if weight.ndim == 2 else 0.0))
        expected = decayed - 0.01 * grad / (grad.abs() + 1e-8)  # the first step: both moments are unbiased
        big = grad.abs() > 1e-6  # where float32 and epsilon do not decide
        torch.testing.assert_close(weight.double()[big], expected[big], rtol=1e-4, atol=1e-5)


def test_muon_takes_the_matrices_of_the_blocks_and_makes_their_updates_orthogonal():
    config = Config(**SMALL | {"weight_decay": 0.0}, stages=FEW, optimizer="muon")
    model = GPT(GPTConfig(2, 2, 64), 64)
    model.init_weights(0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizers = train.make_optimizers(model, config)
    windows = np.random.default_rng(0).integers(50257, size=(4, 65))
    train.train_step(model.loss, model, optimizers, windows, 0.01, config)
    taken = {id(p) for group in optimizers[1].param_groups for p in group["params"]}
    for name, weight in model.named_parameters():
        is_matrix = name.startswith("blocks") and weight.ndim == 2
        assert (id(weight) in taken) == is_matrix
        if is_matrix:
            update = (before[name] - weight.detach()) / (0.01 * 0.2 * math.sqrt(max(weight.shape)))
            singular = torch.linalg.svdvals(update)
            assert singular.max() < 1.3 and singular.median() > 0.6  # Newton-Schulz leaves them around 1


@pytest.mark.parametrize(
    "losses, bests, bad",
    [
        ([(64, 5.0), (64, 4.0), (128, 4.5), (128, 4.4)], [1, 1, 1, 1], [0, 0, 0, 0]),  # the spike at a stage change
        ([(64, 5.0), (64, 5.1), (64, 5.0), (64, 4.9)], [1, 0, 0, 1], [0, 1, 2, 0]),  # a plateau that ends
        ([(64, 5.0)] + [(64, 5.0)] * 12, [1] + [0] * 12, list(range(13))),  # a true plateau
        ([(64, 5.0), (64, 5.5), (128, 6.0), (64, 5.2)], [1, 0, 1, 1], [0, 1, 0, 0]),  # every change starts anew
        ([(64, 5.0), (64, math.nan), (64, 4.0)], [1, 0, 1], [0, 1, 0]),
    ],
)
def test_early_stopping_counts_evaluations_without_a_new_best_of_their_length(losses, bests, bad):
    best, seen = Best(), []
    for seq_len, loss in losses:
        best = best.after(seq_len, loss)
        seen.append((int(best.bad_evals == 0), best.bad_evals))
    assert seen == list(zip(bests, bad))


def test_a_plateau_stops_the_run_and_the_table_says_so(run_program, config_file):
    """With a learning rate of nearly nothing no evaluation improves, once rounding is all that changes."""
    result = run_program("train.py", config_file, "--stages=[(0,16,2,1.0)]", "--max_steps=400", "--learning_rate=1e-12",
                         "--eval_interval=1", "--eval_tokens=64", "--patience=2", "--weight_decay=0")  # fmt: skip
    assert result.returncode == 0, result.stderr
    evals = [r for r in read_log(config_file.parent / "run") if r["event"] == "eval"]
    assert evals[-1]["bad_evals"] == 3 and all(r["bad_evals"] < 3 for r in evals[:-1]) and evals[-1]["step"] < 400
    assert "stopped early" in result.stdout


@pytest.mark.parametrize("optimizer, compile", [("adamw", False), ("muon", True)])
def test_a_run_killed_at_random_and_resumed_ends_bit_for_bit_like_one_that_was_not(
    tmp_path, config_file, run_program, optimizer, compile
):
    arguments = ["train.py", config_file, "--resume=True", f"--optimizer={optimizer}", f"--compile={compile}"]
    assert run_program(*arguments, f"--out_dir={tmp_path / 'unbroken'}").returncode == 0
    killed = tmp_path / "killed"
    chance, kills = random.Random(optimizer), 0
    command = [sys.executable, *map(str, arguments), f"--out_dir={killed}"]
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = count_lines(killed)
        while process.poll() is None:  # until it has done something new and for a random while; the last to its end
            if kills < 5 and count_lines(killed) > lines + 5:
                time.sleep(chance.uniform(0, 0.15))
                process.kill()
            time.sleep(0.005)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert_same_run(killed, tmp_path / "unbroken")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_finishes_the_step_writes_the_checkpoint_and_the_rest_is_as_if_nothing_had_been(
    tmp_path, config_file, run_program, number
):
    assert run_program("train.py", config_file, f"--out_dir={tmp_path / 'unbroken'}").returncode == 0
    stopped = tmp_path / "stopped"
    arguments = ["train.py", config_file, f"--out_dir={stopped}", "--checkpoint_interval=1000", "--resume=True"]
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while count_lines(stopped) < 4:
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    last_step = max(r["step"] for r in read_log(stopped))
    assert torch.load(stopped / "last.pt", weights_only=True)["step"] == last_step < 30
    assert f"after step {last_step}" in output
    assert run_program(*arguments).returncode == 0
    assert_same_run(stopped, tmp_path / "unbroken")


def test_a_finished_run_that_is_started_again_stays_as_it_is(config_file, run_program):
    out_dir = config_file.parent / "run"
    assert run_program("train.py", config_file).returncode == 0
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    result = run_program("train.py", config_file, "--resume=True")
    assert result.returncode == 0 and "val loss" in result.stdout
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before


def test_a_run_made_longer_goes_on_as_if_it_had_been_longer_from_the_start(tmp_path, config_file, run_program):
    assert run_program("train.py", config_file, f"--out_dir={tmp_path / 'long'}").returncode == 0
    short = tmp_path / "short"
    assert run_program("train.py", config_file, f"--out_dir={short}", "--max_steps=10").returncode == 0
    assert run_program("train.py", config_file, f"--out_dir={short}", "--resume=True").returncode == 0
    assert_same_run(short, tmp_path / "long")


def test_a_run_made_longer_keeps_an_evaluation_where_it_ended(tmp_path, small_dir):
    """At a step that is no stage's end and no multiple of the interval, where best.pt is the model of it."""
    keys = SMALL | {"data_dir": str(small_dir), "out_dir": str(tmp_path), "stages": FEW[:1], "eval_interval": 4}
    train.train(Config(**keys, max_steps=9))
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 9
    train.train(Config(**keys | {"eval_interval": 100}, max_steps=11, resume=True))
    evals = {r["step"]: r["is_best"] for r in read_log(tmp_path) if r["event"] == "eval"}
    assert list(evals) == [0, 4, 8, 9, 11] and evals[9]
    steps = [r["step"] for r in read_log(tmp_path) if r["event"] == "train"]
    assert steps == list(range(1, 12))


@pytest.mark.parametrize("gpu, peak", [("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA A100-SXM4-80GB", 312e12),
                                       ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA H100 80GB HBM3", 989.4e12),
                                       ("NVIDIA H200", 989.4e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
                                       ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
                                       ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA RTX A1000", None),
                                       ("NVIDIA GH200 480GB", None), ("NVIDIA H100 PCIe", None)])  # fmt: skip
def test_a_peak_is_known_of_the_very_card(gpu, peak):
    assert train.peak_flops(gpu) == peak


def test_a_run_that_goes_on_in_another_type_than_it_began_with_says_so(config_file, monkeypatch, capsys):
    """'auto' is bfloat16 on one machine and float32 on the next: what it was is in the checkpoint."""
    keys = {}
    exec(config_file.read_text(), keys)
    keys = {key: value for key, value in keys.items() if key in Config.__dataclass_fields__} | {"dtype": "auto"}
    said = []
    for amx, max_steps in [(True, 6), (True, 7), (False, 8), (False, 9)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})  # noqa: B023
        assert train.train(Config(**keys | {"max_steps": max_steps, "resume": True})) == 0
        said += [line for line in capsys.readouterr().out.splitlines() if "from here on" in line]
        saved = load_checkpoint(Path(keys["out_dir"]) / "last.pt")
        assert saved["config"]["dtype"] == ("bfloat16" if amx else "float32")
    assert said == ["from here on in float32, where it was bfloat16: --dtype=bfloat16 goes on exactly"]


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_used(config_file, run_program):
    out_dir = config_file.parent / "run"
    assert run_program("train.py", config_file).returncode == 0
    damaged = bytearray((out_dir / "last.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (out_dir / "last.pt").write_bytes(damaged)
    result = run_program("train.py", config_file, "--resume=True")
    assert result.returncode == 0 and "last.pt is damaged" in result.stderr
    assert "going on from step 27" in result.stdout


def test_a_used_out_dir_and_a_checkpoint_of_another_model_are_refused_and_left_alone(config_file, run_program):
    out_dir = config_file.parent / "run"
    assert run_program("train.py", config_file, "--max_steps=2").returncode == 0
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    for arguments, word in [([], "holds a run"), (["--resume=True", "--n_embd=64"], "n_embd was 32 and is 64")]:
        result = run_program("train.py", config_file, *arguments)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and word in result.stderr
        assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before


def test_the_configuration_that_a_checkpoint_remembers_is_the_run_s(config_file, run_program):
    assert run_program("train.py", config_file, "--max_steps=2", "--seed=7").returncode == 0
    state = torch.load(config_file.parent / "run" / "last.pt", weights_only=True)
    assert state["config"]["seed"] == 7 and tuple(state["config"]["stages"]) == FEW
    assert set(state["config"]) == {field.name for field in dataclasses.fields(Config)}
    assert Curriculum(state["config"]["stages"], 18).last_len == 64
