"""Text out of a checkpoint: the greedy choice repeated by hand, the distribution drawn from, and what is refused."""

import numpy as np
import pytest
import torch
from conftest import ROOT

import train
from config import Config
from model import GPT, GPTConfig
from prepare_wiki import ENDOFTEXT, VOCAB_SIZE, gpt2_encoding
from sample import generate, next_probabilities


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_dir):
    """A run of a few steps, so that its text is not all one token."""
    out_dir = tmp_path_factory.mktemp("trained")
    train.train(Config(data_dir=str(small_dir), out_dir=str(out_dir), stages=((0, 32, 8, 1.0),), max_steps=8, n_layer=1,
                       n_head=2, n_embd=32, learning_rate=1e-2, warmup_steps=0, eval_tokens=512, device="cpu",
                       dtype="float32", compile=False))  # fmt: skip
    return out_dir


def test_probabilities_are_the_softmax_of_the_largest_logits_without_the_padding():
    logits = torch.randn(2, 50304, generator=torch.Generator().manual_seed(0))
    logits[:, VOCAB_SIZE:] = 100.0
    expected = np.zeros((2, 50304))
    for row, values in zip(expected, logits.double().numpy()[:, :VOCAB_SIZE]):
        largest = np.argsort(values)[-5:]
        weights = np.exp(values[largest] / 0.7)
        row[largest] = weights / weights.sum()
    np.testing.assert_allclose(next_probabilities(logits.clone(), 0.7, 5).numpy(), expected, atol=1e-6)
    assert (next_probabilities(logits.clone(), 1.0, 0) > 0).sum() == 2 * VOCAB_SIZE
    greedy = next_probabilities(logits.clone(), 0.0, 5)
    assert greedy.argmax(-1).tolist() == logits[:, :VOCAB_SIZE].argmax(-1).tolist() and (greedy.sum(-1) == 1).all()


def test_tokens_are_drawn_with_the_probabilities_of_the_model():
    """The first token of many samples, against the softmax by hand: a chi-square test with 8 degrees of freedom."""
    model = GPT(GPTConfig(1, 2, 32), 16)
    model.init_weights(0)
    model.embed.weight.data *= 5  # so that the distribution is far from even
    with torch.no_grad():
        largest = model(torch.tensor([[464]]))[0, -1, :VOCAB_SIZE].double().topk(9)
    assert ENDOFTEXT not in largest.indices  # it would end the text
    weights = torch.softmax(largest.values, 0).numpy()
    generator = torch.Generator().manual_seed(1)
    drawn = [generate(model, [464], 1, 1.0, 9, generator) for _ in range(400)]
    counts = np.array([sum(tokens == [token] for tokens in drawn) for token in largest.indices.tolist()])
    assert counts.sum() == 400 and weights.min() > 0.01
    assert ((counts - 400 * weights) ** 2 / (400 * weights)).sum() < 26.1  # the 0.999 quantile


def test_greedy_text_is_the_argmax_step_by_step(trained, run_program):
    done = run_program("sample.py", f"--out_dir={trained}", "--prompt=The history of", "--temperature=0",
                       "--max_new_tokens=12", "--device=cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    state = torch.load(trained / "best.pt", weights_only=True)
    model = GPT(GPTConfig(1, 2, 32), 64)
    model.load_state_dict(state["model"])
    encoding = gpt2_encoding()
    tokens = [ENDOFTEXT, *encoding.encode_ordinary("The history of")]
    made = []
    for _ in range(12):
        with torch.no_grad():
            token = model(torch.tensor([tokens + made]))[0, -1, :VOCAB_SIZE].argmax().item()
        if token == ENDOFTEXT:
            break
        made.append(token)
    assert made and done.stdout == "The history of" + encoding.decode(made) + "\n"


def test_the_seed_decides_and_the_longest_window_ends_the_text(trained, run_program):
    def text(seed: int) -> str:
        done = run_program("sample.py", f"--out_dir={trained}", "--prompt=A", f"--seed={seed}", "--temperature=2")
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert text(1) == text(1) != text(2)
    model = GPT(GPTConfig(1, 2, 32), 32)
    model.init_weights(0)
    assert len(generate(model, [ENDOFTEXT, 1], 200, 1.0, 0, torch.Generator().manual_seed(0))) <= 30


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--out_dir=nowhere"], "best.pt"),
        (["--prompt=" + "word " * 40], "prompt"),
        (["--temperature=-1"], "temperature"),
        (["--max_new_tokens=many"], "max_new_tokens"),
        (["--device=cuda:9"], "cuda:9"),
        (["--promt=x"], "promt"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(trained, run_program, arguments, word):
    done = run_program("sample.py", f"--out_dir={trained}", *arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and word in done.stderr


def test_the_readme_s_files_exist():
    readme = (ROOT / "README.md").read_text()
    named = [line.split("`")[1] for line in readme.splitlines() if line.startswith("| `")]
    assert len(named) >= 7 and all((ROOT / name).exists() for name in named)
