"""export.py: transformers opens the folder offline and agrees with the model's logits and the shards' tokens."""

import hashlib
import json
import resource
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from conftest import call_program, read_log, run_program
from test_sample import train_run, wild_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM, pipeline

import export
from data import ENDOFTEXT, VOCAB_SIZE, open_dataset
from model import GPTConfig
from packages import gpt2_encoding

STAGES = ((0, 64, 4, 1.0), (8, 256, 1, 0.5), (11, 512, 1, 0.25), (99, 512, 1, 1.0))  # the last is never reached


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, small_dir):
    folder = tmp_path_factory.mktemp("exported")
    data_dir = shutil.copytree(small_dir, folder / "data")
    meta = json.loads((data_dir / "meta.json").read_text()) | {"source": [{"file": "articles.jsonl"}]}
    (data_dir / "meta.json").write_text(json.dumps(meta))
    return train_run(folder, data_dir=str(data_dir), stages=STAGES, max_steps=12, n_layer=2, eval_tokens=4096)


@pytest.fixture(scope="module")
def hf_dir(run_dir):
    to = run_dir.parent / "hf" / "tiny"
    done = call_program("export.py", run_dir, "--to", to)
    assert (done.returncode, done.stderr) == (0, "") and float(done.stdout.split()[-1]) < 1e-4
    return to


@pytest.fixture(scope="module", autouse=True)
def no_network():
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
        yield
    assert asked == []


@torch.no_grad()
def test_logits_are_equal_at_every_length(tmp_path):
    model = wild_model(GPTConfig(3, 2, 64, vocab_size=1000), 2048)
    export.write_model(tmp_path, model)
    qwen3 = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(qwen3) is Qwen3ForCausalLM and qwen3.dtype == torch.float32
    assert qwen3.config.max_position_embeddings == 2048
    tokens = torch.randint(1000, (1, 2048), generator=torch.Generator().manual_seed(1))
    for seq_len in (1, 2, 63, 64, 100, 257, 1000, 2048):
        logits, theirs = model(tokens[:, :seq_len]), qwen3(tokens[:, :seq_len]).logits
        assert (logits - theirs).abs().max() < 1e-5 * logits.abs().max()


def test_transformers_never_generates_an_id_that_pads_the_vocabulary(tmp_path):
    """The padding's ids are by far the likeliest here."""
    model = wild_model(GPTConfig(3, 2, 64), 64)
    model.embed.weight.data[VOCAB_SIZE:] *= 50
    export.write_model(tmp_path, model)
    qwen3, prompt = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([[ENDOFTEXT, 464]] * 20)
    assert (qwen3(prompt).logits[:, -1].argmax(-1) >= VOCAB_SIZE).all()
    for how in ({}, {"do_sample": False}):
        made = qwen3.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, **how)
        assert made.max() < VOCAB_SIZE


STRANGE = ["", " ", "a  b   c", "\n\n\r\n\t x", "don't DON'T we'll", "\u00a0\u2003\u3000x", "x\u0000y\ufeff",
           "\uff11\uff12½Ⅷ", "👩‍🚀🏳️‍🌈𝔘", "e\u0301\u200b", "<|endoftext|>", "a <|endoftext|><|endoftext|> b",
           "<|im_start|>", "\ud7ff\ue000", "ฉันรักภาษาไทย हिन्दी", "x" * 3000]  # fmt: skip


def test_texts_are_tokenized_as_in_the_shards_and_decoded_back(hf_dir, sample_dir):
    """Try all the sample's articles, strange texts, and random ones. Special tokens in a text are plain characters."""
    tokenizer, encoding = AutoTokenizer.from_pretrained(hf_dir), gpt2_encoding()
    assert tokenizer.model_max_length == 512 and len(tokenizer) == VOCAB_SIZE
    shards = [np.fromfile(sample_dir / f"{split}_00000.bin", "<u2") for split in ("train", "val")]
    articles = [part.tolist() for shard in shards for part in np.split(shard, np.flatnonzero(shard == ENDOFTEXT)[1:])]
    assert len(articles) > 10_000
    characters, rng = [*range(0xD800), *range(0xE000, 0x11000)], np.random.default_rng(0)
    strange = STRANGE + ["".join(map(chr, rng.choice(characters, 50))) for _ in range(300)]
    texts = [encoding.decode(tokens[1:], errors="strict") for tokens in articles] + strange
    articles += [[ENDOFTEXT, *encoding.encode_ordinary(text)] for text in strange]
    assert tokenizer(texts).input_ids == articles
    assert tokenizer(texts[-300:], add_special_tokens=False).input_ids == [tokens[1:] for tokens in articles[-300:]]
    assert tokenizer.batch_decode(articles[-1000:], skip_special_tokens=True) == texts[-1000:]
    assert tokenizer("<|endoftext|>", split_special_tokens=False, add_special_tokens=False).input_ids == [ENDOFTEXT]


CHK_TXT = (  # from llama.cpp's convert_hf_to_gguf_update.py (MIT licence), in the sdist of llama-cpp-python 0.3.36
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫\ufe0f (multiple emojis concatenated) "
    "✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, "
    "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)


def test_llama_cpp_knows_the_tokenizer_of_its_export(run_dir, monkeypatch):
    """llama.cpp's converter knows GPT-2's tokenizer by a hash of CHK_TXT's tokens. It reads add_bos_token, too."""
    folder = run_dir.parent / "llama"
    monkeypatch.setenv("HOME", str(folder.parent))
    done = call_program("export.py", f"~/{run_dir.name}", "--to=~/llama", "--llama_cpp")
    assert (done.returncode, done.stderr) == (0, "") and float(done.stdout.split()[-1]) < 1e-4
    found = hashlib.sha256(str(AutoTokenizer.from_pretrained(folder).encode(CHK_TXT)).encode()).hexdigest()
    assert found == "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454"  # "gpt-2" in the converter
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"] is True
    assert "before a text in llama.cpp, but not in transformers." in (folder / "README.md").read_text(encoding="utf-8")


def test_a_pipeline_continues_as_sample_does(run_dir, hf_dir):
    """Both take the likeliest token. The pipeline gets both prompts in one batch, which pads the shorter one."""
    prompts = ["The history of", "A much longer prompt than the other one, which says"]
    how = f"--out_dir={run_dir}", "--temperature=0", "--max_new_tokens=40", "--dtype=float32"
    made = [call_program("sample.py", f"--prompt={prompt}", *how).stdout for prompt in prompts]
    generator = pipeline("text-generation", str(hf_dir))
    theirs = generator(prompts, do_sample=False, max_new_tokens=40, batch_size=2)
    assert made == [text["generated_text"] + "\n" for (text,) in theirs]
    config = generator.model.generation_config
    assert (config.do_sample, config.temperature, config.top_k, config.eos_token_id) == (True, 0.8, 200, ENDOFTEXT)


def test_the_card_shows_curriculum_data_validation_and_licence(hf_dir, run_dir, small_dir):
    card = (hf_dir / "README.md").read_text()
    last = [record for record in read_log(run_dir) if record["event"] == "eval"][-1]
    lines = [" ".join(line.split()) for line in card.splitlines()]
    assert ["0 64 4 0.01", "8 256 1 0.005", "11 512 1 0.0025"] == [line for line in lines if line[:1].isdigit()][:3]
    assert any(line.startswith(f"12 3 512 {last['val_loss']:.3f} {last['val_ppl']:,.1f} ") for line in lines)
    held_out = json.loads((small_dir / "meta.json").read_text())["splits"]["val"]["tokens"]
    assert f"({held_out:,} tokens) held out, from: articles.jsonl" in card and "CC BY-SA" in card
    assert "on 3,328 tokens, 12 steps" in card  # 8 * 256 + 3 * 256 + 512


def test_a_failed_export_is_one_line_and_status_2(run_dir, tmp_path, monkeypatch):
    other, to = tmp_path / "other", tmp_path / "hf"
    other.mkdir()
    shutil.copy(run_dir / "best.pt", other)
    (other / "log.jsonl").write_text((run_dir / "log.jsonl").read_text().partition("\n")[0] + "\n")
    limit_files = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = {"cannot export": run_program("export.py", run_dir, "--to", tmp_path / "full", preexec_fn=limit_files)}
    before = sorted(tmp_path.rglob("*"))
    for message, arguments in {
        "--to": [run_dir], "best.pt: No such file": [tmp_path, "--to", to],
        "lacks the evaluation after step 12": [other, "--to", to], "File exists": [run_dir, "--to", other],
        "Not a directory": [run_dir, "--to", other / "log.jsonl" / "hf"],
    }.items():  # fmt: skip
        done[message] = call_program("export.py", *arguments)
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    done["pip install transformers safetensors"] = call_program("export.py", run_dir, "--to", to)
    assert sorted(tmp_path.rglob("*")) == before
    for message, process in done.items():
        assert (process.returncode, process.stdout, process.stderr.count("\n")) == (2, "", 1), process.stderr
        assert message in process.stderr


def test_an_export_whose_logits_differ_is_an_error(run_dir, tmp_path, monkeypatch):
    swapped = {"gate_proj": "other", "up_proj": "gate_proj", "other": "up_proj"}
    monkeypatch.setattr(export, "QWEN3_NAMES", export.QWEN3_NAMES | swapped)
    monkeypatch.setattr(export, "read_log", lambda at: [*read_log(at), {"event": "eval", "step": 13}])  # after best.pt
    monkeypatch.setattr(export, "open_dataset", lambda _: open_dataset("nowhere"))  # the model card does without it
    monkeypatch.setattr(sys, "argv", ["export.py", str(run_dir), "--to", str(tmp_path / "hf")])
    with pytest.raises(AssertionError, match="logits differ"):
        export.main()
