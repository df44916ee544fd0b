"""Text from a trained model.

    python sample.py --out_dir=out/demo --prompt="The history of" [--samples=3] [--temperature=0.8] [--key=value ...]
    python sample.py --out_dir=out/demo --prompt_file=- < beginning.txt

    prompt -> tokens -> extend: the prompt at once, then a token at a time -> draw -> characters, once they are whole

The model is out_dir/best.pt. The prompt begins an article: its title, a blank line, its text; without one the model
begins its own. A text ends with its article, after max_new_tokens, or at the longest window that was trained on.
"""

import codecs
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tiktoken import Encoding
from torch import Tensor

from checkpoint import load_model
from dataset import ENDOFTEXT, VOCAB_SIZE
from errors import CommandLine, UserError, user_errors
from model import GPT, Cache
from packages import gpt2_encoding
from parallel import memory_errors
from train import pick_device, pick_dtype

TEMPERATURE, TOP_K = 0.8, 200  # unless asked otherwise; chosen


def hold_in(dtype: torch.dtype, model: GPT) -> torch.autocast:
    """Converts the matrices once, and returns the autocast to compute under: that would convert them for each token."""
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data = weight.data.to(dtype)
    return torch.autocast(model.embed.weight.device.type, dtype, enabled=dtype != torch.float32)


def next_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens and their weights, both (B, K), likeliest first, from logits (B, V); ids that pad V are left out.

    The top_k largest (0 for all), and of these the fewest whose probabilities sum to top_p (nucleus sampling, Holtzman
    et al. 2020); the others weigh nothing, and the weights then sum to less than one.
    """
    values, tokens = logits[:, :VOCAB_SIZE].double().topk(min(top_k, VOCAB_SIZE) or VOCAB_SIZE)
    weights = torch.softmax(values / temperature, dim=-1)
    if top_p < 1:
        weights[weights.cumsum(-1) - weights >= top_p] = 0
    return tokens, weights


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """The next tokens (B,), on the CPU; at temperature 0 the likeliest."""
    if temperature == 0:
        return logits[:, :VOCAB_SIZE].argmax(-1).cpu()
    tokens, weights = next_probabilities(logits, temperature, top_k, top_p)
    return tokens.cpu().gather(-1, torch.multinomial(weights.cpu(), 1, generator=generator)).squeeze(-1)


def generate(model: GPT, prompt: list[int], n: int, samples: int, choose: Callable[[Tensor], Tensor]) -> Iterator[list]:
    """Up to n times the next token of each of the samples, which choose takes from logits (B, V).

    A sample that has come to ENDOFTEXT stays there. Stops when all have, or when the longest trained window is full.
    """
    cache = Cache(model.config, samples, model.max_seq_len, model.embed.weight.device)
    tokens, ended = torch.tensor([prompt] * samples), torch.zeros(samples, dtype=torch.bool)
    for _ in range(min(n, model.max_seq_len - len(prompt))):
        chosen = choose(model.extend(cache, tokens.to(cache.keys.device))).masked_fill(ended, ENDOFTEXT)
        yield chosen.tolist()
        tokens, ended = chosen[:, None], chosen == ENDOFTEXT
        if ended.all():
            break


class InOrder:
    """Several texts that are made together, in the order to show them.

    The first is shown as it is made; each other one once those before it have ended, and from then on as it is made.
    Bytes that are part of a character wait for the rest of it.
    """

    def __init__(self, beginnings: list[str], encoding: Encoding):
        self.waiting, self.current, self.encoding = beginnings, 0, encoding
        self.decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in beginnings]

    def add(self, tokens: list[int]) -> str:
        """Takes the next token of each text, ENDOFTEXT where it has ended, and gives what is to be shown now."""
        for i, token in enumerate(tokens):
            content = b"" if token == ENDOFTEXT else self.encoding.decode_single_token_bytes(token)
            self.waiting[i] += self.decoders[i].decode(content, final=token == ENDOFTEXT)
        ready = ""
        while self.current < len(tokens):
            ready, self.waiting[self.current] = ready + self.waiting[self.current], ""
            if tokens[self.current] != ENDOFTEXT:
                break
            self.current += 1
        return ready


def read_prompt(prompt: str, file: str | None) -> str:
    """The prompt, or what the file (- for standard input) holds, without the newline that ends its last line."""
    try:
        if file is None:
            return prompt.encode().decode()  # fails where the command line was not UTF-8
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode().removesuffix("\n")
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read the prompt: {error}") from error


def main() -> None:
    parser = CommandLine(description="Text from out_dir/best.pt.")
    parser.add_argument("--out_dir", type=Path, default="out/run", help="of the training run")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="how the article begins")
    prompt.add_argument("--prompt_file", help="a file that holds the prompt; - for standard input")
    parser.add_argument("--samples", type=int, default=1, help="how many texts, made together and shown in order")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="0 always takes the likeliest")
    parser.add_argument("--top_k", type=int, default=TOP_K, help="draw from so many of the likeliest tokens; 0 for all")
    parser.add_argument("--top_p", type=float, default=1.0, help="and from the likeliest that sum to this probability")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16 or float32; auto takes what is fast here")
    args = parser.parse_args()
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or args.top_k < 0:
        raise UserError("--temperature and --top_k must not be negative, --top_p must be above 0 and at most 1")
    if args.max_new_tokens < 1 or args.samples < 1 or not 0 <= args.seed < 2**63:
        raise UserError("--max_new_tokens and --samples must be at least 1, --seed from 0 to below 2**63")
    text, encoding, device = read_prompt(args.prompt, args.prompt_file), gpt2_encoding(), pick_device(args.device)
    model, dtype = load_model(args.out_dir / "best.pt")[0], pick_dtype(args.dtype, device)
    tokens = [ENDOFTEXT, *encoding.encode_ordinary(text)]
    room = model.max_seq_len - len(tokens)
    if room < 1:
        raise UserError(f"the prompt has {len(tokens)} tokens; the model was trained on windows of {model.max_seq_len}")
    how = args.temperature, args.top_k, args.top_p, torch.Generator().manual_seed(args.seed)
    texts = InOrder(["", *[f"\n\n--- {number} ---\n\n{text}" for number in range(2, args.samples + 1)]], encoding)
    print(text, end="", flush=True)
    with memory_errors("fewer --samples take less"), hold_in(dtype, model.to(device)):
        for chosen in generate(model, tokens, args.max_new_tokens, args.samples, lambda logits: draw(logits, *how)):
            print(texts.add(chosen), end="", flush=True)
    print(texts.add([ENDOFTEXT] * args.samples))
    if room < args.max_new_tokens and any(token != ENDOFTEXT for token in chosen):
        print(f"stopped at {model.max_seq_len:,} tokens: the model was trained on windows no longer", file=sys.stderr)


if __name__ == "__main__":
    with user_errors():
        main()
