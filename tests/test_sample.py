"""Text out of a checkpoint: the cache against the whole forward, the distribution drawn from against transformers',
greedy text repeated by hand, the order and the characters in which texts are shown, and what is refused."""

import io
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor

import sample
import train
from checkpoint import load_model
from config import Config
from dataset import ENDOFTEXT, VOCAB_SIZE
from errors import user_errors
from model import GPT, Cache, GPTConfig
from packages import gpt2_encoding
from sample import InOrder, draw, generate, hold_in, next_probabilities

RUN = {"n_layer": 1, "n_head": 2, "n_embd": 32, "learning_rate": 1e-2, "warmup_steps": 0, "eval_tokens": 512}
RUN |= {"device": "cpu", "dtype": "float32", "compile": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_dir):
    """A run of a few steps, so that its text is not all one token."""
    out_dir = tmp_path_factory.mktemp("trained")
    train.train(Config(**RUN, data_dir=str(small_dir), out_dir=str(out_dir), stages=((0, 32, 8, 1.0),), max_steps=8))
    return out_dir


def wild_model(config: GPTConfig, max_seq_len: int) -> GPT:
    """Weights that make attention far from uniform and the text no repetition of one token."""
    torch.manual_seed(0)
    model = GPT(config, max_seq_len).eval()
    for weight in model.parameters():
        torch.nn.init.uniform_(weight, 0.5, 2) if weight.ndim == 1 else torch.nn.init.normal_(weight, std=0.3)
    return model


def greedy(logits: Tensor) -> Tensor:
    return draw(logits, 0, 0, 1, torch.Generator())


# --------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("prompt", [1, 2, 37, 100])
def test_logits_with_the_cache_are_those_of_the_whole_forward(prompt):
    """In a batch of different texts, the prompt at once and then a token at a time, to the last position there is."""
    config = GPTConfig(3, 4, 64, vocab_size=257)
    model = wild_model(config, 100)
    tokens = torch.randint(257, (3, 100), generator=torch.Generator().manual_seed(prompt))
    with torch.no_grad():
        whole = model(tokens)
    cache = Cache(config, 3, 100, torch.device("cpu"))
    logits = [model.extend(cache, tokens[:, :prompt])]
    logits += [model.extend(cache, tokens[:, i : i + 1]) for i in range(prompt, 100)]
    assert cache.length == 100
    torch.testing.assert_close(torch.stack(logits, 1), whole[:, prompt - 1 :], rtol=1e-4, atol=1e-4)


def test_in_bfloat16_the_matrices_alone_are_rounded_and_the_logits_stay_near():
    config = GPTConfig(3, 4, 64, vocab_size=257)
    model = wild_model(config, 60)
    tokens = torch.randint(257, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(tokens)[:, -1]
    with hold_in(torch.bfloat16, model):
        cache = Cache(config, 2, 60, torch.device("cpu"))
        model.extend(cache, tokens[:, :30])
        for i in range(30, 60):
            logits = model.extend(cache, tokens[:, i : i + 1])
    assert {(weight.ndim, weight.dtype) for weight in model.parameters()} == {(1, torch.float32), (2, torch.bfloat16)}
    assert logits.dtype == torch.bfloat16 and cache.keys.dtype == model.cos.dtype == torch.float32
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_several_tokens_after_the_first_ones_are_refused():
    config = GPTConfig(1, 2, 32, vocab_size=257)
    model, cache = wild_model(config, 16), Cache(config, 1, 16, torch.device("cpu"))
    model.extend(cache, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(AssertionError):
        model.extend(cache, torch.zeros(1, 2, dtype=torch.long))


def test_greedy_texts_with_and_without_the_cache_are_identical():
    """300 tokens, from prompts of several lengths; without the cache, the whole text goes through model() each time."""
    model = wild_model(GPTConfig(2, 2, 48, vocab_size=500), 400)
    for prompt in ([7], [7, 464, 210, 286], list(range(100, 190))):
        made = [tokens for (tokens,) in generate(model, prompt, 300, 1, greedy)]
        expected = list(prompt)
        while len(expected) < len(prompt) + 300:
            with torch.no_grad():
                expected.append(model(torch.tensor([expected]))[0, -1].argmax().item())
        assert made == expected[len(prompt) :] and len(set(made)) > 10


# --------------------------------------------------------------------------------------------------------------------
# What is drawn


def probabilities(logits: Tensor, *how: float) -> np.ndarray:
    """(B, V), as next_probabilities has it, summing to one."""
    tokens, weights = next_probabilities(logits, *how)
    assert (weights.diff() <= 0).all()
    return torch.zeros(logits.shape, dtype=torch.double).scatter(1, tokens, weights / weights.sum(1, True)).numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 60_000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2, 1e-9])
def test_probabilities_are_those_of_transformers_without_the_padding(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 4 * torch.randn(2, 50304, generator=torch.Generator().manual_seed(0))
    logits[:, VOCAB_SIZE:] = 100.0
    expected = logits[:, :VOCAB_SIZE].double()
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(min(top_k, VOCAB_SIZE))] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        expected = warper(None, expected)
    ours = probabilities(logits, temperature, top_k, top_p)
    np.testing.assert_allclose(ours[:, :VOCAB_SIZE], torch.softmax(expected, -1).numpy(), rtol=1e-9, atol=1e-15)
    assert (ours[:, VOCAB_SIZE:] == 0).all()


def test_nucleus_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    for top_p, kept in ((0.39, [1]), (0.41, [1, 2]), (0.69, [1, 2]), (0.71, [1, 2, 3]), (0.95, [1, 2, 3, 0])):
        tokens, weights = next_probabilities(logits, 1.0, 4, top_p)
        assert tokens[weights > 0].tolist() == kept


def test_tokens_are_drawn_with_the_probabilities_of_the_model():
    """The first token of many samples, against the softmax by hand: a chi-square test with 8 degrees of freedom."""
    model = GPT(GPTConfig(1, 2, 32), 16)
    model.init_weights(0)
    model.embed.weight.data *= 5  # so that the distribution is far from even
    with torch.no_grad():
        largest = model(torch.tensor([[464]]))[0, -1, :VOCAB_SIZE].double().topk(9)
    weights = torch.softmax(largest.values / 0.8, 0).numpy()
    generator = torch.Generator().manual_seed(1)
    (drawn,) = generate(model, [464], 1, 2000, lambda logits: draw(logits, 0.8, 9, 1.0, generator))
    counts = np.array([drawn.count(token) for token in largest.indices.tolist()])
    assert counts.sum() == 2000 and weights.min() > 0.005
    assert ((counts - 2000 * weights) ** 2 / (2000 * weights)).sum() < 26.1  # the 0.999 quantile


def test_ids_that_pad_the_vocabulary_are_never_drawn():
    logits = torch.zeros(500, 50304)
    logits[:, VOCAB_SIZE:] = 50.0
    for temperature, top_k, top_p in ((0, 0, 1.0), (1.0, 0, 1.0), (1.0, 300, 0.9)):
        assert draw(logits.clone(), temperature, top_k, top_p, torch.Generator()).max() < VOCAB_SIZE


def test_a_text_that_has_ended_stays_ended_while_others_go_on():
    script = iter([[1, 2, 3], [ENDOFTEXT, 4, 5], [6, 7, ENDOFTEXT], [8, ENDOFTEXT, 9], [10, 11, 12]])
    made = list(generate(wild_model(GPTConfig(1, 2, 32), 64), [ENDOFTEXT], 50, 3, lambda _: torch.tensor(next(script))))
    E = ENDOFTEXT
    assert made == [[1, 2, 3], [E, 4, 5], [E, 7, E], [E, E, E]]


# --------------------------------------------------------------------------------------------------------------------
# What is shown


def test_each_text_is_shown_in_order_and_no_character_before_it_is_whole():
    """Fed by tokens that cut characters in two, against the bytes that have come by then."""
    encoding = gpt2_encoding()
    texts = ["naïve 👩‍🚀 Ωmega", "短い𝔘nicode", "a", "", "🏳️‍🌈 end"]
    tokens = [encoding.encode_ordinary(text) for text in texts]
    assert any("\ufffd" in encoding.decode([token]) for token in tokens[0])
    shower, shown = InOrder(["<0>", "<1>", "<2>", "<3>", "<4>"], encoding), ""
    for step in range(1 + max(map(len, tokens))):
        shown += shower.add([row[step] if step < len(row) else ENDOFTEXT for row in tokens])
        expected = ""
        for i, row in enumerate(tokens):
            come = encoding.decode_bytes(row[: step + 1])
            expected += f"<{i}>" + come.decode(errors="ignore")  # what it ignores is the beginning of a character
            if step < len(row):
                break
        assert shown == expected
    assert shown == "".join(f"<{i}>{text}" for i, text in enumerate(texts))


def test_a_character_that_never_becomes_whole_is_shown_as_such():
    encoding = gpt2_encoding()
    half = encoding.encode_ordinary("🏳")[:1]
    shower = InOrder([""], encoding)
    assert shower.add(half) == "" and shower.add([ENDOFTEXT]) == "\ufffd"


def test_too_little_memory_for_so_many_samples_is_one_line(trained, monkeypatch, capsys):
    def lack(*size):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(sample, "Cache", lack)
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={trained}", "--samples=9"])
    with pytest.raises(SystemExit) as exit, user_errors():
        sample.main()
    assert exit.value.code == 2 and capsys.readouterr().err == "error: out of memory: fewer --samples take less\n"


def test_text_is_written_out_as_it_is_made(trained, monkeypatch):
    """Before a token is chosen, all text up to it has left the program's buffers."""
    encoding, screen = gpt2_encoding(), io.BytesIO()
    words = [" and", " so", " on"]

    def slowly(*_):
        for i, word in enumerate(words):
            assert screen.getvalue().decode() == "It goes" + "".join(words[:i])
            yield encoding.encode_ordinary(word)

    monkeypatch.setattr(sample, "generate", slowly)
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={trained}", "--prompt=It goes"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen))
    sample.main()
    sys.stdout.flush()
    assert screen.getvalue().decode() == "It goes and so on\n"


# --------------------------------------------------------------------------------------------------------------------
# The program


def test_greedy_text_is_the_argmax_step_by_step(trained, run_program):
    done = run_program("sample.py", f"--out_dir={trained}", "--prompt=The history of", "--temperature=0",
                       "--max_new_tokens=12", "--dtype=float32")  # fmt: skip
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


def test_the_seed_decides_wherever_the_prompt_comes_from(trained, run_program, tmp_path):
    """Three texts at a time; the prompt from the command line, a file, and standard input."""
    (tmp_path / "prompt.txt").write_text("Ångström\n\nis\n")

    def texts(*arguments: str, **kwargs) -> str:
        done = run_program("sample.py", f"--out_dir={trained}", "--samples=3", "--temperature=2", *arguments, **kwargs)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = texts("--prompt=Ångström\n\nis", "--seed=1")
    assert first == texts(f"--prompt_file={tmp_path}/prompt.txt", "--seed=1")
    assert first == texts("--prompt_file=-", "--seed=1", input="Ångström\n\nis\n")
    assert first != texts(f"--prompt_file={tmp_path}/prompt.txt", "--seed=2")
    one, two, three = first.split("\n\n--- ")
    two, three = two.removeprefix("2 ---\n\n"), three.removeprefix("3 ---\n\n")
    assert all(text.startswith("Ångström\n\nis") for text in (one, two, three)) and len({one, two, three}) == 3


def test_the_longest_trained_window_ends_the_text_which_is_said(tmp_path, small_dir, run_program):
    """A checkpoint from before the table's last stage: no text is longer than the windows that it has been trained on,
    whatever the table goes on to, whether that ends at the first further token or later."""
    stages = ((0, 32, 8, 1.0), (4, 48, 8, 1.0), (6, 64, 8, 1.0))
    train.train(Config(**RUN, data_dir=str(small_dir), out_dir=str(tmp_path), stages=stages, max_steps=6))
    model, state = load_model(tmp_path / "best.pt")
    assert (model.max_seq_len, state["step"]) == (48, 6)
    prompt = "word" + " word" * 20  # 22 tokens with the one that begins the article
    arguments = ["sample.py", f"--out_dir={tmp_path}", "--temperature=0", "--dtype=float32"]
    done = run_program(*arguments, f"--prompt={prompt}")
    assert done.returncode == 0 and done.stderr == "stopped at 48 tokens: the model was trained on windows no longer\n"
    assert len(list(generate(model, [ENDOFTEXT] * 22, 200, 1, lambda _: torch.tensor([5])))) == 26
    done = run_program(*arguments, f"--prompt={prompt}", "--max_new_tokens=26")
    assert (done.returncode, done.stderr) == (0, "")  # nothing was cut off
    done = run_program(*arguments, f"--prompt={prompt}" + " word" * 26)
    assert done.returncode == 2 and "has 48 tokens" in done.stderr


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--out_dir=nowhere"], "best.pt"),
        (["--prompt=" + "word " * 40], "prompt"),
        (["--temperature=-1"], "temperature"),
        (["--temperature=nan"], "temperature"),
        (["--top_p=0"], "top_p"),
        (["--samples=0"], "samples"),
        (["--seed=-1"], "seed"),
        (["--prompt_file=nowhere.txt"], "nowhere.txt"),
        (["--prompt_file=data/sample/val_00000.bin"], "prompt"),
        (["--prompt_file=-", "--prompt=x"], "prompt"),
        (["--max_new_tokens=many"], "max_new_tokens"),
        (["--device=cuda:9"], "cuda:9"),
        (["--promt=x"], "promt"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(trained, monkeypatch, capsys, arguments, word):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={trained}", *arguments])
    with pytest.raises(SystemExit) as exit, user_errors():
        sample.main()
    done = capsys.readouterr()
    assert (exit.value.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1 and word in done.err
