"""Text from a trained model.

    python sample.py --out_dir=out/demo --prompt="The history of" [--max_new_tokens=200] [--temperature=0.8] ...

The model is out_dir/best.pt. The prompt begins an article, as in training; without one the model begins its own.
"""

from pathlib import Path

import torch

from checkpoint import load_checkpoint
from config import CommandLine, UserError, user_errors
from model import GPT, GPTConfig
from prepare_wiki import ENDOFTEXT, VOCAB_SIZE, gpt2_encoding
from train import pick_device


def load_model(path: Path, device: torch.device) -> tuple[GPT, dict]:
    """The model of a checkpoint, and the configuration it was trained with. Raises UserError if there is none."""
    if not path.exists():
        raise UserError(f"{path} does not exist: train a model first, or give its --out_dir")
    state = load_checkpoint(path)
    config = state["config"]
    max_len = max(seq_len for _, seq_len, _, _ in config["stages"])
    model = GPT(GPTConfig(config["n_layer"], config["n_head"], config["n_embd"]), max_len)
    model.load_state_dict(state["model"])
    return model.to(device).eval(), config


def next_probabilities(logits: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """Probabilities (B, V) of the next token from logits (B, V): of the top_k largest (0 for all), no padding ids.

    Temperature 0 leaves the largest alone.
    """
    logits = logits.float()
    logits[:, VOCAB_SIZE:] = -torch.inf  # ids that pad the vocabulary stand for nothing
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    if top_k:
        smallest = logits.topk(min(top_k, VOCAB_SIZE)).values[:, -1:]
        logits[logits < smallest] = -torch.inf
    return torch.softmax(logits / temperature, dim=-1)


@torch.no_grad()
def generate(
    model: GPT, tokens: list[int], n: int, temperature: float, top_k: int, generator: torch.Generator
) -> list[int]:
    """Up to n tokens that follow `tokens`: fewer where the article ends or the longest trained window is full."""
    device = model.embed.weight.device
    made = []
    while len(made) < n and len(tokens) + len(made) < model.max_seq_len:
        logits = model(torch.tensor([tokens + made], device=device))[:, -1]
        probabilities = next_probabilities(logits, temperature, top_k).cpu()
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == ENDOFTEXT:
            break
        made.append(token)
    return made


def main() -> None:
    parser = CommandLine(description="Text from out_dir/best.pt.")
    parser.add_argument("--out_dir", default="out/run", help="of the training run")
    parser.add_argument("--prompt", default="", help="how the article begins")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1 prefers what is likely; 0 is greedy")
    parser.add_argument("--top_k", type=int, default=200, help="draw from so many of the likeliest tokens; 0 for all")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.temperature < 0 or args.top_k < 0 or args.max_new_tokens < 1:
        raise UserError("--temperature and --top_k must not be negative, --max_new_tokens at least 1")
    model, _ = load_model(Path(args.out_dir) / "best.pt", pick_device(args.device))
    encoding = gpt2_encoding()
    prompt = [ENDOFTEXT, *encoding.encode_ordinary(args.prompt)]
    if len(prompt) >= model.max_seq_len:
        raise UserError(f"the prompt has {len(prompt)} tokens; the model was trained on windows of {model.max_seq_len}")
    generator = torch.Generator().manual_seed(args.seed)
    made = generate(model, prompt, args.max_new_tokens, args.temperature, args.top_k, generator)
    print(args.prompt + encoding.decode(made))


if __name__ == "__main__":
    with user_errors():
        main()
