"""export.py: what transformers makes of the folder, without a network, against the model and the shards."""

import functools
import json
import math
import os
import resource
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_sample import train_run, wild_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM, pipeline

import export
from data import ENDOFTEXT, VOCAB_SIZE
from model import GPTConfig
from packages import gpt2_encoding
from settings import user_errors

STAGES = ((0, 64, 4, 1.0), (8, 256, 1, 0.5), (11, 2048, 1, 0.25), (99, 2048, 1, 1.0))  # the last is never reached


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, small_dir):
    folder = tmp_path_factory.mktemp("exported")
    data_dir = shutil.copytree(small_dir, folder / "data")
    meta = json.loads((data_dir / "meta.json").read_text()) | {"source": [{"file": "articles.jsonl"}]}
    (data_dir / "meta.json").write_text(json.dumps(meta))
    return train_run(folder, data_dir=str(data_dir), stages=STAGES, max_steps=12, n_layer=2, eval_tokens=4096)


@pytest.fixture(scope="module")
def hf_dir(run_dir):
    """Made by the program; everything in this file happens without a network."""
    to = run_dir.parent / "hf" / "tiny"
    done = run_export(run_dir, to)
    assert (done.returncode, done.stderr) == (0, "") and float(done.stdout.split()[-1]) < 1e-4
    return to


def run_export(run_dir, to, **kwargs) -> subprocess.CompletedProcess:
    words = [sys.executable, "export.py", run_dir, "--to", to]
    return subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True, **kwargs)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    yield
    assert asked == []


@torch.no_grad()
def test_logits_are_equal_at_every_length(tmp_path):
    model = wild_model(GPTConfig(3, 2, 64), 2048)
    export.write_model(tmp_path, model)
    qwen3 = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(qwen3) is Qwen3ForCausalLM and qwen3.dtype == torch.float32
    assert qwen3.config.max_position_embeddings == 2048
    tokens = torch.randint(VOCAB_SIZE, (1, 2048), generator=torch.Generator().manual_seed(1))
    for seq_len in (1, 2, 63, 64, 100, 257, 1000, 2048):
        logits, theirs = model(tokens[:, :seq_len]), qwen3(tokens[:, :seq_len]).logits
        assert (logits - theirs).abs().max() < 1e-5 * logits.abs().max()


@torch.no_grad()
def test_transformers_computes_the_loss_that_was_reported(run_dir, hf_dir):
    """The run's last evaluation, by design.md's rule for windows: all those that tile the held-out shard."""
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    record = [record for record in records if record["event"] == "eval"][-1]
    assert (record["step"], record["seq_len"]) == (12, 2048)
    shard = np.fromfile(run_dir.parent / "data" / "val_00000.bin", "<u2").astype(np.int64)
    qwen3, losses = AutoModelForCausalLM.from_pretrained(hf_dir), []
    for start in range(0, len(shard) - 2048, 2048):
        window = torch.from_numpy(shard[start : start + 2049])[None]
        losses.append(F.cross_entropy(qwen3(window[:, :-1]).logits[0].double(), window[0, 1:]).item())
    assert len(losses) == 2 and record["val_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert record["val_ppl"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_transformers_never_generates_an_id_that_pads_the_vocabulary(tmp_path):
    """Where such ids are by far the likeliest; greedily too."""
    model = wild_model(GPTConfig(3, 2, 64), 64)
    model.embed.weight.data[VOCAB_SIZE:] *= 50
    export.write_model(tmp_path, model)
    qwen3, prompt = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([[ENDOFTEXT, 464]] * 20)
    with torch.no_grad():
        assert (qwen3(prompt).logits[:, -1].argmax(-1) >= VOCAB_SIZE).all()
    for how in ({}, {"do_sample": False}):
        made = qwen3.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, **how)
        assert made.max() < VOCAB_SIZE


def test_articles_have_the_tokens_that_the_shards_hold(hf_dir, sample_dir):
    """Every article of the sample, held out or not, `<|endoftext|>` before it included."""
    tokenizer, encoding = AutoTokenizer.from_pretrained(hf_dir, model_max_length=10**6), gpt2_encoding()
    articles = []
    for path in (sample_dir / "val_00000.bin", sample_dir / "train_00000.bin"):
        shard = np.fromfile(path, "<u2")
        articles += [part.tolist() for part in np.split(shard, np.flatnonzero(shard == ENDOFTEXT)[1:])]
    assert len(articles) > 10_000
    texts = [encoding.decode(tokens[1:], errors="strict") for tokens in articles]
    assert tokenizer(texts).input_ids == articles
    assert tokenizer.batch_decode(articles[:1000], skip_special_tokens=True) == texts[:1000]


STRANGE = ["", " ", "a  b   c", "\n\n\r\n\t x", "don't DON'T we'll", "\u00a0\u2003\u3000x", "x\u0000y\ufeff",
           "\uff11\uff12½Ⅷ", "👩‍🚀🏳️‍🌈𝔘", "e\u0301\u200b", "<|endoftext|>", "a <|endoftext|><|endoftext|> b",
           "<|im_start|>", "\ud7ff\ue000", "ฉันรักภาษาไทย हिन्दी", "x" * 3000]  # fmt: skip


def test_strange_texts_have_the_same_tokens_and_come_back(hf_dir):
    """A special token's characters in a text are plain characters, as when the shards were made."""
    tokenizer, encoding = AutoTokenizer.from_pretrained(hf_dir), gpt2_encoding()
    rng = np.random.default_rng(0)
    soups = ["".join(map(chr, rng.choice([*range(0xD800), *range(0xE000, 0x11000)], 50))) for _ in range(300)]
    for text in STRANGE + soups:
        tokens = encoding.encode_ordinary(text)
        assert tokenizer(text).input_ids == [ENDOFTEXT, *tokens], text
        assert tokenizer(text, add_special_tokens=False).input_ids == tokens
        assert tokenizer.decode(tokens) == text
    assert tokenizer("<|endoftext|>", split_special_tokens=False, add_special_tokens=False).input_ids == [ENDOFTEXT]
    assert tokenizer.model_max_length == 2048 and len(tokenizer) == VOCAB_SIZE


def test_a_pipeline_continues_as_sample_does(run_dir, hf_dir, run_program):
    """Greedily, in a batch of two lengths, for which the shorter prompt is padded."""
    prompts = ["The history of", "A much longer prompt than the other one, which says"]
    made = [run_program("sample.py", f"--out_dir={run_dir}", f"--prompt={prompt}", "--temperature=0",
                        "--max_new_tokens=40", "--dtype=float32").stdout for prompt in prompts]  # fmt: skip
    generator = pipeline("text-generation", str(hf_dir))
    theirs = generator(prompts, do_sample=False, max_new_tokens=40, batch_size=2)
    assert made == [text["generated_text"] + "\n" for (text,) in theirs]
    assert generator.model.generation_config.temperature == 0.8 and generator.model.generation_config.do_sample


def test_the_card_tells_of_curriculum_data_validation_and_licence(hf_dir, run_dir):
    card = (hf_dir / "README.md").read_text()
    lines = [" ".join(line.split()) for line in card.splitlines()]
    assert ["0 64 4 0.01", "8 256 1 0.005", "11 2,048 1 0.0025"] == [line for line in lines if line[:1].isdigit()][:3]
    meta = json.loads((run_dir.parent / "data" / "meta.json").read_text())
    assert f"{meta['splits']['val']['articles']:,} articles (4.2k tokens) held out, from: articles.jsonl" in card
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    last = [record for record in records if record["event"] == "eval"][-1]
    assert any(line.startswith(f"12 3 2,048 {last['val_loss']:.3f} {last['val_ppl']:,.1f} ") for line in lines)
    assert "CC BY-SA" in card and "on 4.9k tokens, 12 steps" in card  # 8 * 256 + 3 * 256 + 2048


def test_mistakes_are_one_line_and_leave_nothing(run_dir, tmp_path, monkeypatch, capsys):
    other, to = tmp_path / "other", tmp_path / "hf"
    other.mkdir()
    shutil.copy(run_dir / "best.pt", other)
    (other / "log.jsonl").write_text((run_dir / "log.jsonl").read_text().partition("\n")[0] + "\n")
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in (
        ([run_dir], "--to"),
        ([tmp_path, "--to", to], "best.pt: No such file"),
        ([other, "--to", to], "lacks the evaluation after step 12"),
        ([run_dir, "--to", other], "exists"),
        ([run_dir, "--to", other / "log.jsonl" / "hf"], "cannot export"),
    ):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit, user_errors():
            export.main()
        done = capsys.readouterr()
        assert (exit.value.code, done.out, done.err.count("\n")) == (2, "", 1) and words in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_one_line(run_dir, tmp_path):
    limit = (100_000, 100_000)  # of a file: less than the weights
    limit_files = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
    done = run_export(run_dir, tmp_path / "hf", preexec_fn=limit_files)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot export" in done.stderr, done.stderr


def test_an_export_whose_logits_differ_is_an_error(run_dir, tmp_path, monkeypatch):
    swapped = {"gate_proj": "other", "up_proj": "gate_proj", "other": "up_proj"}
    monkeypatch.setattr(export, "QWEN3_NAMES", export.QWEN3_NAMES | swapped)
    monkeypatch.setattr(sys, "argv", ["export.py", str(run_dir), "--to", str(tmp_path / "hf")])
    with pytest.raises(AssertionError, match="logits differ"):
        export.main()


def test_a_package_that_is_missing_is_named(run_dir, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError\n")
    done = run_export(run_dir, tmp_path / "hf", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install transformers safetensors" in done.stderr
