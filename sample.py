"""Write text with a trained model.

    python sample.py --out_dir=out/demo --prompt="The history of" [--samples=3] [--temperature=0.8] [--key=value ...]
    python sample.py --out_dir=out/demo --prompt_file=- < beginning.txt

    prompt -> tokens -> generate: extend, next_probabilities and a draw for each token -> decode

The model is out_dir/best.pt. The prompt begins an article: its title, a blank line, its text. A text ends with its
article, after max_new_tokens, or at the longest window that the model was trained on. One text appears as it is made;
several are made together and appear at the end.
"""

import codecs
import math
import os
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tiktoken import Encoding
from torch import Tensor

from checkpoint import load_model
from data import ENDOFTEXT, VOCAB_SIZE
from model import GPT, GPTConfig, on_machine
from packages import gpt2_encoding
from settings import ONE_OF, UserError, user_errors

TEMPERATURE, TOP_K = 0.8, 200  # defaults, also of an export; not tuned


class Cache:
    """Every layer's keys and values of the `length` tokens seen so far. float32 is faster on a CPU for one query."""

    def __init__(self, config: GPTConfig, batch_size: int, max_seq_len: int, device: torch.device):
        shape = (config.n_layer, batch_size, config.n_head, max_seq_len, config.head_dim)
        self.keys, self.values = torch.empty(shape, device=device), torch.empty(shape, device=device)
        self.length = 0


@torch.no_grad()
def extend(model: GPT, cache: Cache, tokens: Tensor) -> Tensor:
    """Append tokens (B, T) to those in the cache and return logits (B, V) of the token after them."""
    start, end = cache.length, cache.length + tokens.shape[1]
    assert start in (0, end - 1) and end <= cache.keys.shape[3]  # several later tokens would see each other's future
    with model.autocast():
        x = model.embed(tokens).to(model.stream)
        for block, keys, values in zip(model.blocks, cache.keys, cache.values):
            x = block(x, model.cos[start:end], model.sin[start:end], (keys[:, :, :end], values[:, :, :end]))
        cache.length = end
        return F.linear(model.norm(x[:, -1]), model.embed.weight)


def next_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the tokens that may follow and their weights, both (B, K), likeliest first, from logits (B, V).

    K is top_k (0 for all), or 1 at temperature 0. Of these, the fewest whose probabilities sum to top_p keep a
    weight; the others get 0 (nucleus sampling, Holtzman et al. 2020). Ids that pad the vocabulary are left out.
    """
    if temperature == 0:
        temperature, top_k = 1.0, 1
    values, tokens = logits[:, :VOCAB_SIZE].double().topk(min(top_k, VOCAB_SIZE) or VOCAB_SIZE)
    weights = torch.softmax((values - values[:, :1]) / temperature, dim=-1)  # at most 0: no temperature gives nan
    if top_p < 1:
        weights[weights.cumsum(-1) - weights >= top_p] = 0
    return tokens, weights


def generate(
    model: GPT, prompt: list[int], samples: int, n: int, seed: int, temperature: float, top_k: int, top_p: float
) -> Iterator[list[int]]:
    """Yield each sample's next token, up to n times or until all have ended. An ended sample repeats ENDOFTEXT."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: what a seed draws does not depend on the device
    cache = Cache(model.config, samples, model.max_seq_len, model.device)
    last, ended = torch.tensor([prompt] * samples), torch.zeros(samples, 1, dtype=torch.bool)
    for _ in range(min(n, model.max_seq_len - len(prompt))):
        tokens, weights = next_probabilities(extend(model, cache, last.to(model.device)), temperature, top_k, top_p)
        drawn = torch.multinomial(weights.cpu(), 1, generator=generator)
        last = tokens.cpu().gather(-1, drawn).masked_fill(ended, ENDOFTEXT)
        yield last.flatten().tolist()
        ended = last == ENDOFTEXT
        if ended.all():
            break


def decode(tokens: Iterable[int], encoding: Encoding) -> Iterator[str]:
    """Yield the text of each token up to ENDOFTEXT. A character split over tokens comes with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token == ENDOFTEXT:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def read_prompt(prompt: str, file: str | None) -> str:
    """Return the prompt, or the text of the file (- for standard input) without the newline at its end."""
    try:
        if file is None:
            return prompt.encode().decode()  # fails where the command line was not UTF-8
        text = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    except (OSError, UnicodeError, AttributeError) as error:
        raise UserError(f"cannot read the prompt: {error}") from error


def main() -> None:
    parser = ArgumentParser(usage=SUPPRESS, description="Write text with the model in out_dir/best.pt.")
    parser.add_argument("--out_dir", type=os.path.expanduser, default="out/run", help="of the training run")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="how the article begins")
    prompt.add_argument("--prompt_file", type=os.path.expanduser, help="a file with the prompt; - for standard input")
    parser.add_argument("--samples", type=int, default=1, help="number of texts, made together")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=TOP_K, help="draw from the top_k likeliest tokens; 0 for all")
    parser.add_argument("--top_p", type=float, default=1.0, help="and from the fewest that sum to this probability")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=ONE_OF["dtype"], help="bfloat16 may suit many --samples")
    args = parser.parse_args()
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or args.top_k < 0:
        raise UserError("--temperature and --top_k must not be negative, --top_p must be above 0 and at most 1")
    if args.max_new_tokens < 1 or args.samples < 1 or not 0 <= args.seed < 2**63:
        raise UserError("--max_new_tokens and --samples must be at least 1, --seed from 0 to below 2**63")
    text, encoding = read_prompt(args.prompt, args.prompt_file), gpt2_encoding()
    model = load_model(Path(args.out_dir) / "best.pt")[0]
    on_machine(model, args.device, args.dtype, compile=False)
    for weight in model.parameters():
        if weight.ndim == 2:  # convert the matrices once: autocast would convert them for each token
            weight.data = weight.data.to(model.dtype)
    tokens, longest = [ENDOFTEXT, *encoding.encode_ordinary(text)], model.max_seq_len
    if len(tokens) >= longest:
        raise UserError(f"the prompt has {len(tokens)} tokens; the model was trained on windows of {longest}")
    if len(tokens) + args.max_new_tokens > longest:
        print(f"texts stop at {longest:,} tokens: the model was trained on windows no longer", file=sys.stderr)
    how = args.samples, args.max_new_tokens, args.seed, args.temperature, args.top_k, args.top_p
    steps = generate(model, tokens, *how)
    made = [(token for (token,) in steps)] if args.samples == 1 else zip(*steps)
    for number, tokens in enumerate(made, 1):
        print(f"\n--- {number} ---\n\n{text}" if number > 1 else text, end="", flush=True)
        for piece in decode(tokens, encoding):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    with user_errors("fewer --samples take less"):
        main()
