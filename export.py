"""Export a trained model as a folder that transformers opens offline: Qwen3ForCausalLM with GPT-2's tokenizer.

    python export.py out/run --to hf/run
    python export.py out/run --to hf/llama --llama_cpp    for llama.cpp, whose converter then makes run.gguf:
    python llama.cpp/convert_hf_to_gguf.py hf/llama --outtype=f32 --outfile=run.gguf

model.safetensors, config.json    out_dir/best.pt in float32, as a Qwen3ForCausalLM, the architecture of model.py
tokenizer.json, vocab.json, ...   GPT-2's vocabulary; a text begins with <|endoftext|>, as every article did in training
generation_config.json            the defaults of sample.py
README.md                         the model card: curriculum, data, validation, licence of the text

At the end transformers opens the folder and computes a window's logits, which must agree with model.py's.
"""

import json
import os
from argparse import SUPPRESS, ArgumentParser
from contextlib import suppress
from pathlib import Path

import torch
from tiktoken.load import read_file_cached

from checkpoint import load_model, read_log
from curriculum import Curriculum, format_table
from data import ENDOFTEXT, VOCAB_SIZE, open_dataset
from evaluate import eval_table
from model import GPT
from packages import GPT2_URL, gpt2_encoding
from sample import TEMPERATURE, TOP_K
from settings import UserError, user_errors

try:
    import transformers
    from safetensors import SafetensorError
except ImportError:
    transformers = None  # main() prints what is missing

CARD = Path(__file__).with_name("model_card.md")  # with {names} to fill in
QWEN3_NAMES = {"embed.": "embed_tokens.", "blocks.": "layers.", ".attn.": ".self_attn."}
QWEN3_NAMES |= {".attn_norm.": ".input_layernorm.", ".mlp_norm.": ".post_attention_layernorm."}


def write_model(folder: Path, model: GPT) -> None:
    """Write the weights, config.json and generation_config.json."""
    config = model.config
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.n_embd, "intermediate_size": config.n_hidden}
    layers = {"num_hidden_layers": config.n_layer, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": True}
    heads = {"num_attention_heads": config.n_head, "num_key_value_heads": config.n_head, "head_dim": config.head_dim}
    positions = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}}
    positions["max_position_embeddings"] = model.max_seq_len
    ends = {"bos_token_id": ENDOFTEXT, "eos_token_id": ENDOFTEXT}
    qwen3 = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **layers, **heads, **positions, **ends))
    weights = model.state_dict()
    for name, qwen3_name in QWEN3_NAMES.items():
        weights = {key.replace(name, qwen3_name): weight for key, weight in weights.items()}
    qwen3.model.load_state_dict(weights)  # the head is the embedding
    padding = list(range(VOCAB_SIZE, config.vocab_size))
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "suppress_tokens": padding}
    qwen3.generation_config = transformers.GenerationConfig(**sampling, **ends, pad_token_id=ENDOFTEXT)
    qwen3.save_pretrained(folder)


def write_tokenizer(folder: Path, max_seq_len: int, llama_cpp: bool = False) -> None:
    """Write GPT-2's two files, under transformers' names for them, and the tokenizer made of them."""
    gpt2_encoding()  # after this, tiktoken's cache has the files, checked
    files = [folder / "vocab.json", folder / "merges.txt"]
    for path, original in zip(files, ("encoder.json", "vocab.bpe")):
        path.write_bytes(read_file_cached(GPT2_URL + original))
    # split_special_tokens: "<|endoftext|>" in a text is plain characters, as in the shards. Prompts of a batch are
    # padded on the left, so that each text continues from the end of its prompt.
    how = {"add_bos_token": True, "split_special_tokens": True, "padding_side": "left", "pad_token": "<|endoftext|>"}
    transformers.GPT2Tokenizer(*map(str, files), **how, model_max_length=max_seq_len).save_pretrained(folder)
    changes = {"tokenizer.json": {"post_processor": None}, "tokenizer_config.json": {"add_bos_token": True}}
    for name, entry in changes.items() if llama_cpp else ():  # llama.cpp hashes tokens without <|endoftext|>
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_bytes()) | entry), encoding="utf-8")


def model_card(name: str, model: GPT, state: dict, out_dir: Path, llama_cpp: bool) -> str:
    """Return model_card.md filled in. Raises UserError if the run's log lacks the evaluation of best.pt."""
    config, step = state["config"], state["step"]
    evaluations = [record for record in read_log(out_dir) if record["event"] == "eval" and record["step"] <= step]
    if not evaluations or evaluations[-1]["step"] != step:
        raise UserError(f"{out_dir}/log.jsonl lacks the evaluation after step {step:,}, at which best.pt was saved")
    curriculum, lr, data = Curriculum(config["stages"], max(1, step)), config["learning_rate"], config["data_dir"]
    rows = [[f"{s.start:,}", f"{s.seq_len:,}", f"{s.batch_size}", f"{lr * s.lr_scale:.2g}"] for s in curriculum.stages]
    with suppress(UserError):  # the dataset is no longer there
        if (dataset := open_dataset(data)).fingerprint == state["fingerprint"]:
            splits = dataset.meta["splits"].values()
            train, val = (f"{split['articles']:,} articles ({split['tokens']:,} tokens)" for split in splits)
            files = ", ".join(source["file"] for source in dataset.meta["source"])
            data = f"{train} to train on and {val} held out, from: {files}"
    values = {"name": name, "model": model, "curriculum": curriculum, "step": step, "data": data}
    values |= {"n_params": f"{model.config.n_params / 1e6:,.1f}M", "tokens": f"{curriculum.tokens_before(step):,}"}
    values["bos"] = " in llama.cpp, but not in transformers" if llama_cpp else ""
    values["stages"] = format_table(["from step", "length", "batch", "learning rate"], rows)
    return CARD.read_text(encoding="utf-8").format(**values, evaluations=eval_table(evaluations), vocab_size=VOCAB_SIZE)


@torch.no_grad()
def largest_difference(folder: Path, model: GPT) -> float:
    """Return how far transformers' logits of a full window, from the folder alone, are from the model's logits."""
    tokens = torch.randint(VOCAB_SIZE, (1, model.max_seq_len), generator=torch.Generator().manual_seed(0))
    logits, qwen3_logits = model(tokens), transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    difference = (qwen3_logits - logits).abs().max().item()
    assert difference < 1e-2 * logits.abs().max(), f"transformers' logits differ by {difference}"
    return difference


def main() -> None:
    parser = ArgumentParser(usage=SUPPRESS, description="Export out_dir/best.pt as a folder that transformers opens.")
    parser.add_argument("out_dir", type=os.path.expanduser, help="of the training run")
    parser.add_argument("--to", type=os.path.expanduser, required=True, help="the folder to make")
    parser.add_argument("--llama_cpp", action="store_true", help="write the tokenizer that llama.cpp's converter knows")
    args = parser.parse_args()
    if transformers is None:
        raise UserError("an export needs transformers and safetensors: pip install transformers safetensors")
    transformers.utils.logging.disable_progress_bar()
    out_dir, folder = Path(args.out_dir), Path(args.to)
    model, state = load_model(out_dir / "best.pt")
    card = model_card(folder.name, model, state, out_dir, args.llama_cpp)
    try:
        folder.mkdir(parents=True)
        write_model(folder, model)
        write_tokenizer(folder, model.max_seq_len, args.llama_cpp)
        (folder / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot export: {error}") from error
    print(f"{folder}: transformers' logits differ by at most {largest_difference(folder, model):.1e}")


if __name__ == "__main__":
    with user_errors():
        main()
