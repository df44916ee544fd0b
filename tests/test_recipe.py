"""bench/recipe.py and bench/report.py: what is held out, nanoGPT's model, equal budgets, and the report's numbers."""

import argparse
import json
import math
import random

import numpy as np
import pytest
import torch

from bench import recipe, report
from bench.gpt2 import GPT2
from config import curriculum9
from curriculum import Curriculum
from model import GPTConfig

SMALL = argparse.Namespace(steps=4, tokens=2048, seeds=2, folds=3, long=2049, windows=2, few=1, n_layer=1, n_embd=32,
                           dtype="float32", device="cpu", eager=True)  # fmt: skip


def articles_in(tokens: np.ndarray) -> list[tuple]:
    """Split by hand, token by token."""
    articles = []
    for token in tokens.tolist():
        if token == 50256:
            articles.append([])
        articles[-1].append(token)
    return [tuple(article) for article in articles]


def test_what_is_held_out_is_not_trained_on(sample_dir):
    """Folds part the long articles; a fold's titles are not among the training articles, and nothing else is lost."""
    shards = [np.fromfile(sample_dir / "train_00000.bin", "<u2")]
    everything = articles_in(shards[0])
    longs = {article for article in everything if len(article) >= 2049}
    seen = []
    for fold in range(5):
        train, held_out = recipe.fold_of(shards, fold, 5, 2049)
        held_out = [tuple(article.tolist()) for article in held_out]
        kept = articles_in(train.shards[0])
        titles = {article[: article.index(198)] for article in held_out}
        assert kept == [article for article in everything if article[: article.index(198)] not in titles]
        assert not set(kept) & set(held_out) and set(held_out) <= longs
        windows, owners = recipe.tiles([np.array(article) for article in held_out])
        for window, owner in zip(windows.tolist(), owners):
            assert window.count(50256) == (window[0] == 50256)  # inside one article
            article = held_out[owner]
            assert tuple(window) in [article[i : i + 2049] for i in range(0, len(article) - 2048, 2048)]
        seen += held_out
    assert sorted(seen) == sorted(longs)


def test_gpt2_is_transformers_gpt2():
    """Logits against GPT2LMHeadModel with its biases at zero and the same weights."""
    transformers = pytest.importorskip("transformers")
    ours = GPT2(GPTConfig(2, 2, 32, vocab_size=96), 24)
    ours.init_weights(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=96, n_positions=24, activation_function="gelu", resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0))  # fmt: skip
    names = {"embed": "wte", "positions": "wpe", "norm": "ln_f"}
    names |= {f"blocks.{i}.{a}": f"h.{i}.{b}" for i in range(2) for a, b in (
        ("ln_1", "ln_1"), ("ln_2", "ln_2"), ("c_attn", "attn.c_attn"), ("attn_proj", "attn.c_proj"),
        ("c_fc", "mlp.c_fc"), ("mlp_proj", "mlp.c_proj"))}  # fmt: skip
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.zero_()  # the biases stay so
        for name, weight in ours.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            name = name.removesuffix(".weight")
            is_linear = name not in ("embed", "positions") and weight.ndim == 2
            theirs.transformer.get_submodule(names[name]).weight.copy_(weight.T if is_linear else weight)
        tokens = torch.randint(96, (3, 24), generator=torch.Generator().manual_seed(0))
        difference = ours(tokens) - theirs(tokens).logits
    assert difference.abs().max() < 1e-5 < ours(tokens).std() / 100


def test_gpt2_starts_as_nanogpt_does():
    """0.02 everywhere, but less by sqrt(2 * n_layer) where a block adds to the residual; and no other weights."""
    model = GPT2(GPTConfig(8, 4, 256), 64)
    model.init_weights(0)
    for name, weight in model.named_parameters():
        expected = 0.02 / 4 if name.endswith("_proj.weight") else 0.02
        assert weight.std().item() == pytest.approx(expected, rel=0.02) if weight.ndim == 2 else (weight == 1).all()
    assert sum(weight.numel() for weight in model.parameters()) == 8 * (12 * 256**2 + 2 * 256) + (50304 + 65) * 256


def nanogpt_lr(step: int) -> float:
    """As nanoGPT's train.py has it, for 40 steps of which 4 are warmup (there of 5 steps to the peak)."""
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * (max(step, 4) - 4) / (40 - 4))) * (1e-3 - 1e-4)


def table_lr(step: int) -> float:
    """The factor of the row of curriculum9 that the middle of this step falls into, by its share of the tokens."""
    tokens = [(end[0] - row[0]) * row[1] * row[2]
              for row, end in zip(curriculum9.stages, [*curriculum9.stages[1:], [100_000]])]  # fmt: skip
    return 1e-3 * curriculum9.stages[np.searchsorted(np.cumsum(tokens), sum(tokens) * (step + 0.5) / 40)][3]


@pytest.mark.parametrize("variant, expected", [
    (recipe.NANOGPT | {"lengths": 2048}, nanogpt_lr),
    ({"lengths": 2048}, lambda step: 1e-3 * min(1, (40 - step) / 36)),
    ({"lengths": 2048, "decay": "constant"}, lambda step: 1e-3),
    ({"lengths": 2048, "decay": "cooled"}, lambda step: table_lr(step) * min(1, (40 - step) / 7)),
    ({"lengths": 2048, "decay": "table"}, table_lr),
    ({"lengths": "doubling", "decay": "constant", "at_change": "warm"},
     lambda step: 1e-3 * min(1, (step % 10 + 1) / 10 if step >= 10 else 1)),
], ids=["nanoGPT", "linear", "constant", "cooled", "table", "warm"])  # fmt: skip
def test_learning_rates_are_what_the_variants_say(variant, expected, sample_dir, monkeypatch):
    lrs = []
    monkeypatch.setattr(recipe, "train_step", lambda *arguments: lrs.append(arguments[4]) or (1.0, 1.0))
    monkeypatch.setattr(recipe, "POINTS", 1)
    args = argparse.Namespace(**vars(SMALL) | {"steps": 40}, data_dir=str(sample_dir))
    recipe.train_run(recipe.settings(variant, 1e-3, 0, args), args)
    assert lrs == pytest.approx([min(1, (step + 1) / 4) * expected(step) for step in range(40)])


def test_moments_are_forgotten_at_each_change_of_length_if_told_so(sample_dir, monkeypatch):
    known = []

    def train_step(loss_of, model, optimizers, windows, lr, config):
        known.append([len(optimizer.state) for optimizer in optimizers])
        for optimizer in optimizers:
            optimizer.state[len(known)] = "a moment"
        return 1.0, 1.0

    monkeypatch.setattr(recipe, "train_step", train_step)
    args = argparse.Namespace(**vars(SMALL) | {"steps": 8}, data_dir=str(sample_dir))
    for at_change, expected in (("", range(8)), ("reset", [0, 1] * 4)):
        known.clear()
        recipe.train_run(recipe.settings({"lengths": "doubling", "at_change": at_change}, 1e-3, 0, args), args)
        assert known == [[n, n] for n in expected]


def test_nanogpts_optimizer_decays_what_has_two_dimensions():
    model = GPT2(GPTConfig(2, 2, 32), 24)
    names = {weight: name for name, weight in model.named_parameters()}
    optimizer = recipe.nanogpt_optimizer(model, 0.95)
    decays = {names[weight]: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert set(decays) == set(names.values()) and {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {name for name, decay in decays.items() if decay == 0} == {
        "norm.weight", *(f"blocks.{i}.ln_{j}.weight" for i in (0, 1) for j in (1, 2))}  # fmt: skip
    assert set(decays.values()) == {0, 0.1}


def test_every_variant_has_the_same_budget():
    """To half a step of two windows at most, of what its share of the tokens is."""
    for tokens, steps in ((2048, 300), (16384, 1000)):
        for variants in recipe.EXPERIMENTS.values():
            for variant in variants.values():
                run = recipe.BASE | variant
                budget = run["share"] * steps * tokens
                stages, max_steps = recipe.stages_of(recipe.lengths(run["lengths"]), tokens, budget)
                trained = Curriculum(stages, max_steps).tokens_before(max_steps)
                assert abs(trained - budget) <= tokens * 0.75, (variant, trained)
                assert {row[1] for row in stages} == {row[1] for row in recipe.lengths(run["lengths"])}


def test_flops_are_the_models_own():
    """Of our model as model.py counts them; of nanoGPT's by PaLM's appendix, by hand."""
    config = GPTConfig(3, 2, 64)
    assert recipe.flops_per_token(recipe.GPT2(config, 64), 128) == (
        6 * (3 * 12 * 64**2 + 50304 * 64) + 12 * 3 * 64 * 128)  # fmt: skip
    learned = recipe.LearnedPositions(config, 64)
    assert recipe.flops_per_token(learned, 128) == config.flops_per_token(128)


@pytest.mark.parametrize("kind", [recipe.GPT2, recipe.LearnedPositions])
def test_learned_positions_take_part_in_logits_loss_and_score_alike(kind):
    model = kind(GPTConfig(1, 2, 32, vocab_size=300), 16)
    model.init_weights(0)
    windows = torch.randint(300, (2, 13), generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten(),
                                                 reduction="sum")  # fmt: skip
    loss = model.loss(windows)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert model.score(windows)[0].sum().item() == pytest.approx(expected.item(), rel=1e-6)
    assert (model.positions.weight.grad[:12].norm(dim=1) > 0).all()
    assert (model.positions.weight.grad[12:] == 0).all()


def test_losses_of_cut_windows():
    """Each target once, with the tokens of its own cut before it and no others, also where a length does not divide."""
    windows = np.random.default_rng(0).integers(50, size=(3, recipe.LAST_LEN + 1))

    def score_of(batch):  # a "loss" that tells what was seen: the sum of all tokens so far, and the target's
        return torch.cumsum(batch[:, :-1], 1) + 1000 * batch[:, 1:], None

    config = recipe.Config(micro_batch_tokens=4096)
    for seq_len in (64, 768, 2048):
        found = recipe.token_losses(score_of, windows, seq_len, torch.device("cpu"), config)
        for row, target in ((0, 0), (1, 767), (1, 768), (2, 1999), (2, 2047)):
            first = target // seq_len * seq_len
            assert found[row, target] == windows[row, first : target + 1].sum() + 1000 * windows[row, target + 1]


def test_a_finished_run_is_not_repeated(sample_dir, tmp_path, monkeypatch):
    """The grid with seed 0, the other seed at the lower validation loss; again: nothing; one file gone: that one."""
    made = []

    def train_run(run, args):
        made.append((run["lr"], run["seed"]))
        return {"run": run, "loss": 1.0, "val_loss": abs(run["lr"] - 0.2)}

    monkeypatch.setattr(recipe, "train_run", train_run)
    monkeypatch.setattr(recipe, "EXPERIMENTS", {"one": {"a": {"lrs": (0.1, 0.2, 0.4)}, "b": {"lrs": (0.2,)}}})
    monkeypatch.setattr("sys.argv", ["recipe.py", "one", f"--results={tmp_path}", "--seeds=3"])
    recipe.main()
    assert made == [(0.1, 0), (0.2, 0), (0.4, 0), (0.2, 1), (0.2, 2)]  # b's are a's
    recipe.main()
    assert len(made) == 5
    next(tmp_path.glob("*_0.4_0_*.json")).unlink()
    recipe.main()
    assert made[5:] == [(0.4, 0)] and not list(tmp_path.glob("*.tmp"))


def test_a_run_from_the_articles_to_the_report(sample_dir, tmp_path, monkeypatch):
    """A real run, tiny: its record is complete, and the report takes it and says what is missing."""
    args = argparse.Namespace(**vars(SMALL), data_dir=str(sample_dir), results=str(tmp_path), pictures=str(tmp_path))
    grown = {"lengths": "doubling", "watch": True, "lrs": (1e-2,)}
    variants = {"grown": grown, "other": recipe.NANOGPT | {"lrs": (1e-3,)}}
    monkeypatch.setitem(recipe.EXPERIMENTS, "changes", variants)
    monkeypatch.setattr(recipe, "POINTS", 2)
    run = next(recipe.runs(variants["grown"], args))
    result = recipe.train_run(run, args)
    assert [point["step"] for point in result["points"]] == [0, 2, 4]
    assert result["points"][0]["loss"] == pytest.approx(math.log(50304), abs=0.1)
    assert result["points"][-1]["loss"] < result["points"][0]["loss"]
    price = GPTConfig(1, 1, 32).flops_per_token
    # Muon's: five rounds; in each X X', of m * m * n multiplications, its square, and that times X. H is 64.
    muon = 2 * 5 * sum(2 * m * m * n + m**3 for m, n in [(32, 32)] * 4 + [(32, 64)] * 3)
    assert [point["tokens"] for point in result["points"]] == [0, 4096, 8192]
    assert result["points"][-1]["flops"] == sum(2048 * price(seq_len) + muon for seq_len in (256, 512, 1024, 2048))
    assert [(c["step"], c["from"], c["to"], len(c["after"])) for c in result["changes"]] == [
        (1, 256, 512, 1), (2, 512, 1024, 1), (3, 1024, 2048, 2)]  # fmt: skip
    assert sum(n for _, n, _ in result["articles"]) == 2 * 2048 and len(result["articles"]) == 2
    over_positions = sum((b - a) * loss for a, b, loss in result["positions"]) / 2048
    assert result["loss"] == pytest.approx(report.held_out({0: result})[0]) == pytest.approx(over_positions)

    recipe.result_path(run, args).write_text(json.dumps(result))
    text = report.section("changes", args)
    assert "Not done yet: grown (0.01 seed 1); other (0.001 seed 0;" in text
    assert f"{result['loss']:.3f} to {result['loss']:.3f}" in text and "256 to 512" in text
    assert (tmp_path / "recipe_changes.png").stat().st_size > 10_000
    assert "Not done yet" in report.section("sizes", args)


def test_short_windows_are_scored_as_such(sample_dir, tmp_path):
    """The same run scored at 2,048 and at 256: what the first says of its own length, the second says of everything."""
    args = argparse.Namespace(**vars(SMALL) | {"steps": 1}, data_dir=str(sample_dir), results=str(tmp_path))
    at_2048, at_256 = (recipe.train_run(recipe.settings({"lengths": 256, **more}, 1e-2, 0, args), args)
                       for more in ({}, {"score_len": 256}))  # fmt: skip
    assert at_2048["own_len"] == at_256["own_len"] == 256
    assert at_2048["own_loss"] == at_256["own_loss"] == at_256["loss"] != at_2048["loss"]
    assert at_256["points"][-1]["loss"] != at_2048["points"][-1]["loss"]
    assert [(a, b) for a, b, _ in at_256["positions"]] == [(0, 64), (64, 128), (128, 256)]
    over_positions = sum((b - a) * loss for a, b, loss in at_256["positions"]) / 256
    assert at_256["loss"] == pytest.approx(over_positions)


def test_a_cut_window_is_scored_as_one_of_that_length(sample_dir, tmp_path, monkeypatch):
    """What a run says of a cut to its own length is what it says of that length; the table has the differences."""
    args = argparse.Namespace(**vars(SMALL) | {"steps": 1}, data_dir=str(sample_dir), results=str(tmp_path))
    variant = recipe.CONTEXT | {"lengths": 256, "cuts": (64, 256)}
    run = recipe.settings(variant, 4e-3, 0, args)
    result = recipe.train_run(run, args)
    (_, shorter), (_, own) = result["cuts"]
    assert report.article_mean([row[1:] for row in own])[0] == pytest.approx(result["own_loss"])
    assert [row[:2] for row in shorter] == [row[:2] for row in result["articles"]]
    recipe.result_path(run, args).write_text(json.dumps(result))
    monkeypatch.setitem(recipe.EXPERIMENTS, "context", {"one": variant})
    cost = np.average([row[2] for row in shorter], weights=[row[1] for row in shorter]) - result["loss"]
    assert f" {cost:+.3f} ± " in report.section("context", argparse.Namespace(**vars(args), pictures=str(tmp_path)))
    assert (tmp_path / "recipe_context.png").stat().st_size > 10_000


def result_of(loss, spent: dict[str, list[float]], articles: list[tuple[int, float]]) -> dict:
    """A result whose loss after so many tokens is loss(tokens)."""
    points = [dict(zip(spent, values)) | {"loss": loss(values[0])} for values in zip(*spent.values())]
    return {"points": points, "articles": [(i, *article) for i, article in enumerate(articles)]}


def test_the_reports_numbers():
    """Interpolation against a straight line, where any point is known; errors against a long way of computing them."""
    tokens = [0, 100, 300, 1000]
    spent = {"tokens": tokens, "flops": [7 * n for n in tokens]}
    a = result_of(lambda n: 10 - n / 250, spent, [(100, 5.0), (300, 6.0)])
    for n in (0, 50, 777, 1000):
        assert report.loss_at(a, "tokens", n) == pytest.approx(10 - n / 250)
        assert report.loss_at(a, "flops", 7 * n) == pytest.approx(10 - n / 250)
        assert report.spent_to_reach(a, "flops", 10 - n / 250) == pytest.approx(7 * n)
    assert math.isnan(report.loss_at(a, "tokens", 1001)) and report.spent_to_reach(a, "tokens", 5.9) == math.inf
    bumpy = a | {"points": [{"tokens": n, "loss": loss} for n, loss in ((0, 9), (1, 5), (2, 8), (3, 4))]}
    assert report.spent_to_reach(bumpy, "tokens", 7) == pytest.approx(0.5)  # the first time

    # The standard error of a mean of equal articles is the usual one; unequal ones against resampling the articles.
    chance = random.Random(0)
    equal = [(100, chance.gauss(4, 1)) for _ in range(20)]
    mean, error = report.article_mean(equal)
    assert mean == pytest.approx(np.mean([x for _, x in equal]))
    assert error == pytest.approx(np.std([x for _, x in equal], ddof=1) / 20**0.5)
    unequal = [(chance.randint(1, 9) * 2048, chance.gauss(4, 1)) for _ in range(60)]
    draws = [report.article_mean(chance.choices(unequal, k=60))[0] for _ in range(4000)]
    assert report.article_mean(unequal)[1] == pytest.approx(np.std(draws), rel=0.06)

    here, there = a | {"device": "CPU"}, a | {"device": "GPU"}
    assert report.shared({0: here, 1: here, 2: here}, {2: there, 1: here}, "seconds") == [1]
    assert report.shared({0: here, 1: here, 2: here}, {2: there, 1: here}, "tokens") == [1, 2]

    b = a | {"articles": [(0, 100, 5.5), (1, 300, 6.1)]}
    delta, _, per_seed = report.difference({0: b, 1: b}, {0: a})
    assert per_seed == [pytest.approx((0.5 * 100 + 0.1 * 300) / 400)] and delta == pytest.approx(per_seed[0])


def test_the_reports_fits():
    """The vertex of a parabola in log(lr), none at an edge; a spike, its size and the step at which it is gone."""
    lrs = [1e-3, 4e-3, 2e-3, 8e-3]  # in any order
    losses = [3 + 0.2 * (math.log(lr) - math.log(3e-3)) ** 2 for lr in lrs]
    assert report.vertex(lrs, losses) == pytest.approx(3e-3)
    assert math.isnan(report.vertex([1e-3, 2e-3, 4e-3], [3, 2, 1]))
    change = {"loss_before": 5.0, "after": [[0, 5.2], [1, 5.5], [2, 5.1], [4, 4.9], [8, 5.05]]}
    assert report.spike(change) == (pytest.approx(0.5), 4)
    assert report.spike(change | {"loss_before": 4.0})[1] == math.inf
    assert report.spike(change | {"loss_before": 5.25}) == (pytest.approx(0.25), 2)  # it is below at first
