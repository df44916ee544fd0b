"""What a GPU trains with is torch's Muon: the same updates and state, of all matrices of a shape at once."""

import copy

import torch

import muon

SHAPES = [(64, 64), (160, 64), (64, 64), (64, 160), (64, 64), (160, 64)]  # square, tall, wide; in a model's order
SETTINGS = {"weight_decay": 1.0, "adjust_lr_fn": "match_rms_adamw"}  # so much that its order shows


def make(kind: type, values: list[torch.Tensor]) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    weights = [torch.nn.Parameter(value.clone()) for value in values]
    return weights, kind(weights, **SETTINGS)


def give_gradients(weights: list[torch.nn.Parameter], seed: int, without: int | None = None) -> None:
    """Of all sizes, so that a matrix's own size matters; of the last matrix zeros, as of an unused one."""
    generator = torch.Generator().manual_seed(seed)
    for i, weight in enumerate(weights):
        gradient = torch.randn(weight.shape, generator=generator) * 10.0 ** (i - 3) * (i < len(weights) - 1)
        weight.grad = None if i == without else gradient


def test_updates_and_state_are_those_of_torchs_muon_one_by_one():
    """Over steps at several rates, one of them without a gradient for one matrix."""
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in SHAPES]
    (theirs, reference), (ours, batched) = make(torch.optim.Muon, values), make(muon.Muon, values)
    for step, lr in enumerate((0.1, 0.03, 0.01)):
        before = [weight.detach().clone() for weight in theirs]
        for weights, optimizer in ((theirs, reference), (ours, batched)):
            give_gradients(weights, step, without=2 if step == 1 else None)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        for i, (a, b, old) in enumerate(zip(theirs, ours, before)):
            if step == 1 and i == 2:
                assert torch.equal(a, old) and torch.equal(b, old)
            else:  # products in batches may round otherwise, in bfloat16
                assert (a - b).norm() < 0.02 * (a - old).norm()
            torch.testing.assert_close(batched.state[b], reference.state[a])


def test_a_checkpoint_of_the_one_goes_on_in_the_other():
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in SHAPES]
    weights, optimizer = make(muon.Muon, values)
    give_gradients(weights, 0)
    optimizer.step()
    (theirs, reference), (ours, batched) = make(torch.optim.Muon, weights), make(muon.Muon, weights)
    for weights, other in ((theirs, reference), (ours, batched)):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        give_gradients(weights, 1)
        other.step()
    for a, b, old in zip(theirs, ours, optimizer.param_groups[0]["params"]):
        assert (a - b).norm() < 0.02 * (a - old).norm()
    fresh, other = make(torch.optim.Muon, list(optimizer.param_groups[0]["params"]))
    give_gradients(fresh, 1)
    other.step()  # without the momentum: the checkpoint's matters
    assert (fresh[0] - ours[0]).norm() > 0.1 * (ours[0] - optimizer.param_groups[0]["params"][0]).norm()
