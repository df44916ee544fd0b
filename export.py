"""A trained model as a directory that transformers opens offline: Qwen3ForCausalLM with GPT-2's tokenizer.

    python export.py out/run --to hf/run

model.safetensors, config.json    out_dir/best.pt in float32; what model.py computes is what Qwen3ForCausalLM computes
tokenizer.json, vocab.json, ...   GPT-2's vocabulary, with <|endoftext|> put before a text, as before every article
generation_config.json            how sample.py samples
README.md                         the model card: curriculum, data, validation, licence of the text

The directory gets its name once all of it is on the disk and transformers has computed our logits from it.
"""

import json
import os
import tempfile
from pathlib import Path

import torch
from tiktoken.load import read_file_cached

from checkpoint import load_model
from curriculum import Curriculum, format_table, short
from dataset import ENDOFTEXT, VOCAB_SIZE, read_meta
from errors import CommandLine, UserError, user_errors
from model import GPT
from packages import GPT2_URL, gpt2_encoding
from sample import TEMPERATURE, TOP_K
from validate import eval_table

QWEN3_NAMES = {"embed.": "embed_tokens.", "blocks.": "layers.", ".attn.": ".self_attn.",
               ".attn_norm.": ".input_layernorm.", ".mlp_norm.": ".post_attention_layernorm."}  # fmt: skip

CARD = Path(__file__).with_name("model_card.md")  # with {names} to fill in


def write_model(folder: Path, model: GPT) -> None:
    """The weights, what they are the weights of, and how to sample."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = model.config
    qwen3 = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_hidden,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_head,
        head_dim=config.head_dim, max_position_embeddings=model.max_seq_len, rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base}, tie_word_embeddings=True,
        bos_token_id=ENDOFTEXT, eos_token_id=ENDOFTEXT))  # fmt: skip
    weights = model.state_dict()
    for ours, theirs in QWEN3_NAMES.items():
        weights = {name.replace(ours, theirs): weight for name, weight in weights.items()}
    qwen3.model.load_state_dict(weights)  # the head is the embedding
    qwen3.generation_config = GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=TOP_K, bos_token_id=ENDOFTEXT, eos_token_id=ENDOFTEXT,
        pad_token_id=ENDOFTEXT, suppress_tokens=list(range(VOCAB_SIZE, config.vocab_size)))  # fmt: skip
    qwen3.save_pretrained(folder)


def write_tokenizer(folder: Path, max_seq_len: int) -> None:
    """GPT-2's two files, by the names that transformers has for them, and what it makes of them."""
    from transformers import GPT2Tokenizer

    gpt2_encoding()  # after this tiktoken has the files, checked
    files = [folder / "vocab.json", folder / "merges.txt"]
    for path, original in zip(files, ("encoder.json", "vocab.bpe")):
        path.write_bytes(read_file_cached(GPT2_URL + original))
    # split_special_tokens: "<|endoftext|>" in a text is plain characters, as in the shards. Padded on the left, a batch
    # of prompts is gone on from where each ends.
    GPT2Tokenizer(*map(str, files), add_bos_token=True, split_special_tokens=True, padding_side="left",
                  pad_token="<|endoftext|>", model_max_length=max_seq_len).save_pretrained(folder)  # fmt: skip


def model_card(name: str, model: GPT, state: dict, out_dir: Path) -> str:
    """Raises UserError if the run's log does not hold the evaluation that best.pt is the model of."""
    config, step, log = state["config"], state["step"], out_dir / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if os.path.exists(log) else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may still be in the writing
    evaluations = [record for record in records if record["event"] == "eval" and record["step"] <= step]
    if not evaluations or evaluations[-1]["step"] != step:
        raise UserError(f"{log} holds no evaluation after step {step:,}, which {out_dir}/best.pt is the model of")
    curriculum = Curriculum(config["stages"], max(1, step))
    rows = [[f"{s.start:,}", f"{s.seq_len:,}", f"{s.batch_size}", f"{config['learning_rate'] * s.lr_scale:.2g}"]
            for s in curriculum.stages]  # fmt: skip
    data = config["data_dir"]
    if os.path.exists(Path(data) / "meta.json"):
        meta = read_meta(Path(data))
        train, val = (f"{s['articles']:,} articles ({short(s['tokens'])} tokens)" for s in meta["splits"].values())
        data = f"{train} to train on and {val} held out, from: {', '.join(source['file'] for source in meta['source'])}"
    return CARD.read_text().format(
        name=name, parameters=short(model.config.n_params), step=step, tokens=short(curriculum.tokens_before(step)),
        max_seq_len=model.max_seq_len, vocab=VOCAB_SIZE, last=model.config.vocab_size - 1, data=data,
        stages=format_table(["from step", "length", "batch", "learning rate"], rows),
        last_len=config["stages"][-1][1], evaluations=eval_table(evaluations))  # fmt: skip


@torch.no_grad()
def largest_difference(folder: Path, model: GPT) -> float:
    """Between our logits of a longest window and those of transformers, which knows nothing but the directory."""
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(VOCAB_SIZE, (1, model.max_seq_len), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(tokens), AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    difference = (theirs - ours).abs().max().item()
    assert difference < 1e-2 * ours.abs().max(), f"transformers' logits differ by {difference}"  # rounding: 1e-4 of it
    return difference


def main() -> None:
    parser = CommandLine(description="out_dir/best.pt as a directory that transformers opens.")
    parser.add_argument("out_dir", type=Path, help="of the training run")
    parser.add_argument("--to", type=Path, required=True, help="the directory to make")
    args = parser.parse_args()
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise UserError("an export takes transformers and safetensors: pip install transformers safetensors") from error
    logging.disable_progress_bar()
    model, state = load_model(args.out_dir / "best.pt")
    card = model_card(args.to.name, model, state, args.out_dir)
    try:
        if args.to.exists():
            raise UserError(f"{args.to} exists: remove it or give another --to")
        args.to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{args.to.name}.unfinished.", dir=args.to.parent) as unfinished:
            folder = Path(unfinished) / "export"
            folder.mkdir()
            write_model(folder, model)
            write_tokenizer(folder, model.max_seq_len)
            (folder / "README.md").write_text(card)
            difference = largest_difference(folder, model)
            for path in folder.iterdir():
                path.chmod((folder / "README.md").stat().st_mode)  # safetensors lets nobody else read the weights
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            folder.rename(args.to)
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):  # safetensors' and tokenizers' word for it
            raise
        raise UserError(f"cannot write {args.to}: {getattr(error, 'strerror', None) or error}") from error
    print(f"{args.to}: the logits of transformers differ from ours by at most {difference:.1e}")


if __name__ == "__main__":
    with user_errors():
        main()
