"""sample.py against transformers and the model's full forward pass; what it prints; and a user's mistakes."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, call_program

import sample
from checkpoint import load_model
from data import ENDOFTEXT, VOCAB_SIZE
from model import GPT, GPTConfig
from packages import gpt2_encoding
from sample import Cache, decode, extend, generate, next_probabilities

GREEDY = {"seed": 0, "temperature": 0.0, "top_k": 0, "top_p": 1.0}


def train_run(folder: Path, **keys: object) -> Path:
    """Train a tiny model with train.py and return its out_dir."""
    keys = SMALL | {"out_dir": str(folder / "run")} | keys
    (folder / "tiny.py").write_text("".join(f"{key} = {value!r}\n" for key, value in keys.items()))
    assert call_program("train.py", folder / "tiny.py").returncode == 0
    return folder / "run"


def wild_model(config: GPTConfig, max_seq_len: int) -> GPT:
    """Return a model with weights unlike any initial ones: attention is uneven, and texts do not repeat one token."""
    torch.manual_seed(0)
    model = GPT(config, max_seq_len).requires_grad_(False)
    for weight in model.parameters():
        torch.nn.init.uniform_(weight, 0.5, 2) if weight.ndim == 1 else torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_dir):
    """Return a run that ends before its table's last stage. Its steps are few, so its text is not all one token."""
    stages = ((0, 32, 8, 1.0), (4, 48, 8, 1.0), (8, 64, 8, 1.0))
    return train_run(tmp_path_factory.mktemp("trained"), data_dir=str(small_dir), stages=stages, max_steps=8)


@pytest.fixture
def run_sample(trained):
    return lambda *arguments: call_program("sample.py", f"--out_dir={trained}", "--max_new_tokens=20", *arguments)


@pytest.mark.parametrize("prompt", [1, 2, 37, 100])
def test_logits_with_the_cache_are_those_of_the_whole_forward(prompt):
    """Feed a batch its prompts at once and then one token at a time, up to the last position."""
    config = GPTConfig(3, 4, 64, vocab_size=257)
    model = wild_model(config, 100)
    tokens = torch.randint(257, (3, 100), generator=torch.Generator().manual_seed(prompt))
    cache = Cache(config, 3, 100, torch.device("cpu"))
    logits = [extend(model, cache, tokens[:, :prompt])]
    logits += [extend(model, cache, tokens[:, i : i + 1]) for i in range(prompt, 100)]
    torch.testing.assert_close(torch.stack(logits, 1), model(tokens)[:, prompt - 1 :], rtol=1e-4, atol=1e-4)


def test_in_bfloat16_the_matrices_alone_are_rounded_and_the_logits_stay_near(monkeypatch):
    """Compare the model as sample.py uses it with the same model in float32."""
    config, used = GPTConfig(3, 4, 64), []
    monkeypatch.setattr(sample, "load_model", lambda path: (wild_model(config, 60), {}))
    monkeypatch.setattr(sample, "generate", lambda model, *_: used.append(model) or iter([]))
    for arguments in (["--device=cpu"], ["--device=cpu", "--dtype=bfloat16"]):
        monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
        sample.main()
    default, model = used
    assert {weight.dtype for weight in default.parameters()} == {torch.float32}  # whatever is fast here
    tokens = torch.randint(VOCAB_SIZE, (2, 60), generator=torch.Generator().manual_seed(0))
    cache = Cache(config, 2, 60, torch.device("cpu"))
    extend(model, cache, tokens[:, :30])
    for i in range(30, 60):
        logits = extend(model, cache, tokens[:, i : i + 1])
    assert {(weight.ndim, weight.dtype) for weight in model.parameters()} == {(1, torch.float32), (2, torch.bfloat16)}
    exact = wild_model(config, 60)(tokens)[:, -1]
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("temperature", [0, 1e-310, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 60_000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2, 1e-9])
def test_probabilities_are_those_of_transformers_without_the_padding(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = 4 * torch.randn(2, 50304, generator=torch.Generator().manual_seed(0))
    logits[:, VOCAB_SIZE:] = 100.0
    expected = logits[:, :VOCAB_SIZE].double()
    warpers = [TemperatureLogitsWarper(max(temperature, 1e-6))]  # 1e-6 leaves only the likeliest token
    warpers += [TopKLogitsWarper(min(top_k, VOCAB_SIZE))] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        expected = warper(None, expected)
    tokens, weights = next_probabilities(logits, temperature, top_k, top_p)
    assert (weights.diff() <= 0).all()
    made = torch.zeros(logits.shape, dtype=torch.double).scatter(1, tokens, weights / weights.sum(1, True)).numpy()
    np.testing.assert_allclose(made[:, :VOCAB_SIZE], torch.softmax(expected, -1).numpy(), rtol=1e-9, atol=1e-15)
    assert (made[:, VOCAB_SIZE:] == 0).all()


def test_tokens_are_drawn_with_the_probabilities_of_the_model():
    """Compare the first token of 2,000 samples with a softmax by hand, by chi-square with 8 degrees of freedom."""
    model = GPT(GPTConfig(1, 2, 32), 16).requires_grad_(False)
    model.init_weights(0)
    model.embed.weight.data *= 5  # so that the distribution is far from even
    largest = model(torch.tensor([[464]]))[0, -1, :VOCAB_SIZE].double().topk(9)
    weights, how = torch.softmax(largest.values / 0.8, 0).numpy(), {"temperature": 0.8, "top_k": 9, "top_p": 1.0}
    drawn = [token for seed in range(8) for token in next(generate(model, [464], 250, 1, seed=seed, **how))]
    counts = np.array([drawn.count(token) for token in largest.indices.tolist()])
    assert counts.sum() == 2000 and weights.min() > 0.005
    assert ((counts - 2000 * weights) ** 2 / (2000 * weights)).sum() < 26.1  # the 0.999 quantile


def test_a_text_that_has_ended_stays_ended_while_others_continue(monkeypatch):
    script = iter([[1, 2, 3], [ENDOFTEXT, 4, 5], [6, 7, ENDOFTEXT], [8, ENDOFTEXT, 9], [10, 11, 12]])
    model = wild_model(GPTConfig(1, 2, 32), 64)
    monkeypatch.setattr(sample, "extend", lambda *_: F.one_hot(torch.tensor(next(script)), 50304).float())
    E = ENDOFTEXT
    assert list(generate(model, [E], 3, 50, **GREEDY)) == [[1, 2, 3], [E, 4, 5], [E, 7, E], [E, E, E]]


def test_no_character_is_shown_before_it_is_whole():
    """Compare the text after each token with all bytes so far. Some tokens end inside a character."""
    encoding = gpt2_encoding()
    for text in ("naïve 👩‍🚀 Ωmega", "短い𝔘nicode", "", "🏳️‍🌈 end"):
        tokens = encoding.encode_ordinary(text)
        pieces = list(decode([*tokens, ENDOFTEXT, 7], encoding))
        for i in range(len(tokens)):  # "ignore" drops an unfinished character
            assert "".join(pieces[: i + 1]) == encoding.decode_bytes(tokens[: i + 1]).decode(errors="ignore")
        assert "".join(pieces) == text
    assert list(decode(encoding.encode_ordinary("🏳")[:1], encoding)) == ["", "\ufffd"]  # half a character


def test_a_single_text_is_written_out_as_it_is_made(trained, monkeypatch):
    """All earlier text has left the program's buffers before the next token is drawn."""
    encoding, screen = gpt2_encoding(), io.BytesIO()

    def slowly(*_):
        for written, word in (("", " and"), (" and", " so"), (" and so", " on")):
            assert screen.getvalue().decode() == "It goes" + written
            yield encoding.encode_ordinary(word)
    monkeypatch.setattr(sample, "generate", slowly)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen))
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={trained}", "--prompt=It goes"])
    sample.main()
    sys.stdout.flush()
    assert screen.getvalue().decode() == "It goes and so on\n"


def test_the_seed_decides_wherever_the_prompt_comes_from(run_sample, monkeypatch, tmp_path):
    """Three texts; the prompt from the command line, a file, and standard input."""
    prompt, file = "Ångström\n\nis", tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbf" + prompt.replace("\n", "\r\n").encode() + b"\r\n")  # as Windows writes it
    monkeypatch.setattr(sys, "stdin", file.open())
    sources = (f"--prompt={prompt}", 1), (f"--prompt_file={file}", 1), ("--prompt_file=-", 1), (f"--prompt={prompt}", 2)
    first, from_file, from_stdin, other_seed = (run_sample("--samples=3", "--temperature=2", source,
                                                           f"--seed={seed}").stdout for source, seed in sources)
    assert first == from_file == from_stdin != other_seed
    texts = re.split("\n\n--- [23] ---\n\n", first)
    assert all(text.startswith(prompt) for text in texts) and len(set(texts)) == 3
    best = [run_sample("--temperature=9", flag).stdout for flag in ("--top_k=1", "--top_p=1e-9", "--temperature=0")]
    assert best[0] == best[1] == best[2] != run_sample("--temperature=9").stdout


def test_the_longest_trained_window_ends_the_text(trained, run_sample, tmp_path):
    """Only the stages that the run has reached count, not the whole table."""
    model, checkpoint = load_model(trained / "best.pt")
    assert (model.max_seq_len, checkpoint["step"]) == (48, 8)
    torch.save(checkpoint | {"step": 0}, tmp_path / "best.pt")
    assert load_model(tmp_path / "best.pt")[0].max_seq_len == 32
    assert len(list(generate(model, [464] * 22, 1, 200, **GREEDY))) == 26
    prompt = "--prompt=word" + " word" * 20  # 22 tokens, counting the <|endoftext|> before an article
    assert run_sample(prompt, "--max_new_tokens=26").stderr == ""
    assert "texts stop at 48 tokens" in run_sample(prompt, "--max_new_tokens=27").stderr


MISTAKES = """--temperature=-1 --temperature=nan --top_p=0 --samples=0 --seed=-1 --max_new_tokens=many --device=cuda:9
--dtype=int8 --promt=x --prompt_file=nowhere.txt --prompt_file=data/sample/val_00000.bin --out_dir=nowhere"""


@pytest.mark.parametrize("mistake", [*MISTAKES.split(), "--prompt=" + "word " * 50, f"--samples={10**13}"])
def test_a_mistake_is_one_line_and_status_2(run_sample, monkeypatch, mistake):
    monkeypatch.chdir(ROOT)
    done, word = run_sample(mistake), mistake.partition("=")[0].removeprefix("--").removesuffix("_file")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert {"out_dir": "nowhere/best.pt"}.get(word, word) in done.stderr
