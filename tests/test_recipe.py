"""bench/recipe.py: nanoGPT's model and schedule, equal budgets, and a run from training to the tables."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call_program, read_log

import train
from bench import recipe
from bench.breakdown import muon_flops
from config import curriculum9
from curriculum import Curriculum
from model import GPTConfig, on_machine


def run_of(variant: str, steps: int, size: int, lr: float) -> dict:
    keys = {"n_layer": 1, "n_head": 1, "n_embd": 32, "compile": False, "device": "cpu", "dtype": "float32",
            "micro_batch_tokens": 512, "eval_tokens": 2_048, "learning_rate": lr}  # fmt: skip
    return {"variant": variant, "seed": 0, "tokens": steps * size, "batch_tokens": size, "data": "x", "keys": keys}


def test_gpt2_is_transformers_gpt2():
    """Logits, loss and score against GPT2LMHeadModel with its biases at zero and the same weights."""
    transformers, ours = pytest.importorskip("transformers"), recipe.GPT2(GPTConfig(2, 2, 32, vocab_size=96), 24)
    ours.init_weights(0)
    on_machine(ours, "cpu", "float32", compile=False)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=96, n_positions=24, activation_function="gelu", resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0))  # fmt: skip
    names = {"embed": "wte", "positions": "wpe", "norm": "ln_f", "blocks": "h", "c_attn": "attn.c_attn",
             "o_proj": "attn.c_proj", "c_fc": "mlp.c_fc", "down_proj": "mlp.c_proj"}  # fmt: skip
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.zero_()  # the biases stay zero
        for name, weight in ours.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            same = theirs.transformer.get_parameter(".".join(names.get(part, part) for part in name.split(".")))
            is_linear = name.startswith("blocks") and weight.ndim == 2
            same.copy_(weight.T if is_linear else weight)
        windows = torch.randint(96, (3, 25), generator=torch.Generator().manual_seed(0))
        logits = theirs(windows[:, :-1]).logits
        assert (ours(windows[:, :-1]) - logits).abs().max() < 1e-5 < logits.std() / 100
        expected = F.cross_entropy(logits.mT, windows[:, 1:], reduction="none")
        assert ours.loss(windows).item() == pytest.approx(expected.sum().item(), rel=1e-6)
        losses, hits = ours.score(windows)
        assert torch.allclose(losses, expected, atol=1e-5) and (hits == (logits.argmax(-1) == windows[:, 1:])).all()


def test_gpt2_starts_and_decays_as_nanogpt_does():
    """Weights start at std 0.02, over sqrt(2 * n_layer) where a block adds to the residual. Norms do not decay."""
    model = recipe.GPT2(GPTConfig(8, 4, 256), 64)
    model.init_weights(0)
    for name, weight in model.named_parameters():
        expected = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert weight.std().item() == pytest.approx(expected, rel=0.02) if weight.ndim == 2 else (weight == 1).all()
    assert sum(weight.numel() for weight in model.parameters()) == 8 * (12 * 256**2 + 2 * 256) + (50304 + 65) * 256
    (optimizer,) = recipe.nanogpt_optimizers(model, recipe.Config())
    decays = {weight: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert {weight: 0.1 if weight.ndim == 2 else 0.0 for weight in model.parameters()} == decays
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


# Learning rates of 40 steps, 4 of them warmup: nanoGPT's by the formula in its train.py, the others linear
STEP = np.arange(40)
COSINE = np.where(STEP < 4, (STEP + 1) / 5, 0.1 + 0.9 * (1 + np.cos(np.pi * (STEP - 4) / 36)) / 2)
LINEAR = np.minimum(1, np.minimum((STEP + 1) / 4, (40 - STEP) / 36))
# A step's factor is that of the row in which the step's middle falls, by share of all tokens
ENDS = np.cumsum([32.768, 32.768, 65.536, 65.536, 96.768, 114.688, 153.6, 245.76, 819.2])
FACTORS = np.array([row[3] for row in curriculum9.stages])[np.searchsorted(ENDS / ENDS[-1], (STEP + 0.5) / 40)]
TABLE = FACTORS * np.minimum(1, np.minimum((STEP + 1) / 4, (40 - STEP) / 7))


@pytest.mark.parametrize("variant, expected", [
    ("nanogpt", COSINE), ("2048", LINEAR), ("doubling", LINEAR), ("table", TABLE)])  # fmt: skip
def test_learning_rates_are_what_the_variants_say(variant, expected):
    run = run_of(variant, 40, 6_144, 1e-3)  # 6,144 is a multiple of all lengths
    config = recipe.config_of(run, Namespace(data_dir="x", results="x"))
    rate = recipe.nanogpt_rate if variant == "nanogpt" else train.learning_rate
    stage_at = Curriculum(config.stages, config.max_steps).at
    assert [rate(config, stage_at(step), step) for step in STEP] == pytest.approx(1e-3 * expected)
    given = {"warmup_steps": 9, "cooldown_steps": 11, "eval_interval": 7}  # on the command line
    config = recipe.config_of(run | {"seed": 5, "keys": run["keys"] | given}, Namespace(data_dir="x", results="x"))
    assert {key: getattr(config, key) for key in given} == given and config.seed == 5


def test_every_variant_has_the_same_budget():
    """Tokens match the budget to 0.75 of a batch. Stages have all the rows' lengths, then a 2,048 never reached."""
    for batch_tokens, steps in ((2048, 300), (16384, 1000)):
        for variant in recipe.VARIANTS.values():
            stages, max_steps = recipe.stages_of(variant["rows"], batch_tokens, steps * batch_tokens)
            trained = Curriculum(stages, max_steps).tokens_before(max_steps)
            assert abs(trained - steps * batch_tokens) <= batch_tokens * 0.75, (variant, trained)
            assert {row[1] for row in stages[:-1]} == {row[1] for row in variant["rows"]}
            assert stages[-1][:2] == (max_steps, 2048)


def test_results_of_another_text_are_refused(small_dir, tmp_path):
    run = run_of("512", 4, 512, 1e-2) | {"data": small_dir.name, "tokens": 2048.0}
    recipe.result_path(run, Namespace(results=tmp_path)).write_text('{"text": "another"}')
    keys = [f"--{key}={value}" for key, value in run["keys"].items() if key != "learning_rate"]
    keys += ["--tokens=2048", "--batch_tokens=512", "--seeds=1", "--lrs", "1e-2", f"--data_dir={small_dir}"]
    done = call_program("bench/recipe.py", "512", *keys, f"--results={tmp_path}")
    assert done.returncode == 2 and "has results on other text" in done.stderr


def test_a_run_from_training_to_the_tables(small_dir, tmp_path, monkeypatch):
    """Train two variants and score them at 256: recompute losses from the last weights, and costs by hand."""
    rows = {"grown": {"rows": [(0.5, 64, 1.0), (0.5, 256, 1.0)]}, "nanogpt": {"rows": [(1.0, 256, 1.0)]}}
    for name, value in {"VARIANTS": rows, "LAST_LEN": 256, "CUTS": (64,), "WINDOWS": 2, "POINTS": 1}.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe.Team, "watch_signals", lambda team: None)
    for name in ("GPT", "make_optimizers", "learning_rate"):
        monkeypatch.setattr(train, name, getattr(train, name))  # restored at the end
    monkeypatch.chdir(tmp_path)
    args = Namespace(data_dir=str(small_dir), results=str(tmp_path))
    runs = [run_of(name, 4, 256, 1e-2) for name in ("grown", "nanogpt")]  # nanogpt patches train
    for run in runs:
        recipe.train_run(run, args)
    paths = [recipe.result_path(run, args) for run in runs]
    grown, nanogpt = (recipe.read_result(path, None) for path in paths)
    log = [r["last_len_loss"] for r in read_log(tmp_path / "out/recipe" / paths[0].stem) if r["event"] == "eval"]
    assert [(point["tokens"], point["loss"]) for point in grown["points"]] == list(zip([0, 512, 1024], log))
    price, muon = GPTConfig(1, 1, 32).flops_per_token, muon_flops(GPTConfig(1, 1, 32))
    assert [point["flops"] for point in grown["points"]] == [
        0, 512 * price(64) + 2 * muon, 512 * (price(64) + price(256)) + 4 * muon]  # fmt: skip
    model = recipe.GPT2(GPTConfig(1, 1, 32), 256)
    model.load_state_dict(torch.load(tmp_path / "out/recipe" / paths[1].stem / "last.pt", weights_only=True)["model"])
    val = torch.from_numpy(np.fromfile(small_dir / "val_00000.bin", "<u2").astype(np.int64))
    for n in (256, 64):
        with torch.no_grad():  # the first and the ninth of 16 windows
            expected = [np.mean([F.cross_entropy(model(val[None, i : i + n])[0], val[i + 1 : i + n + 1]).item()
                                 for i in range(first, first + 256, n)]) for first in (0, 8 * 256)]  # fmt: skip
        assert nanogpt["losses"][str(n)] == pytest.approx(expected, abs=1e-4)
    rates = {"Muon": {"64": 512 / 3, "256": 512 / 4}, "nanoGPT": {"256": 1.0}, "nanoGPT bf16": {"256": 1024 / 5}}
    groups = recipe.grouped([recipe.read_result(path, rates) for path in reversed(paths)])
    groups["grown", 0.01][1] = groups["grown", 0.01][0] | {"losses": {"256": [9.0, 9.0]}}  # another seed
    recipe.draw(groups, tmp_path / "loss.png")
    text, delta = recipe.tables(groups), np.subtract(grown["losses"]["256"], nanogpt["losses"]["256"])
    at_tokens = grown["points"][2]["loss"] - nanogpt["points"][1]["loss"]
    # nanoGPT takes 5 seconds and grown 7: after 5, grown is half-way between its points at 3 and 7
    at_seconds = (grown["points"][1]["loss"] + grown["points"][2]["loss"]) / 2 - nanogpt["points"][1]["loss"]
    cells = [f"{delta.mean():+.3f} ± {delta.std(ddof=1) / math.sqrt(2):.3f}", f"{at_tokens:+.3f}", f"{at_seconds:+.3f}"]
    row = next(line for line in text.splitlines() if line.split()[:3] == ["grown", "0.01", "2"])
    assert f"  {(np.mean(grown['losses']['256']) + 9) / 2:.3f} ± " in row
    assert "torch.float32" in text and [cells[0] in row, *row.split()[-3::2]] == [True, *cells[1:]]
