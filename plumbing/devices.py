"""What a device can do and holds: precision, copies, random state."""

import torch

# cuDNN's attention, which PyTorch 2.11 prefers on an H100, can give NaN gradients where there is a mask
# and all logits of a query are below -89 (PyTorch's issue 196678); the other implementations do not.
torch.backends.cuda.enable_cudnn_sdp(False)


def device_of(model):
    return next(model.parameters()).device


def choose_device(name):
    """The torch.device; ValueError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind, there in available.items() if there]
    if name not in ("auto", *available):
        raise ValueError(f"--device {name}: this PyTorch ({torch.__version__}) finds no such device; "
                         f"available: {', '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def describe(device):
    """What train.py prints of it."""
    card = f"{torch.cuda.get_device_name()}, " if device.type == "cuda" else ""
    with mixed_precision(device):
        precision = "bfloat16 autocast" if torch.is_autocast_enabled(device.type) else "float32"
    return f"{card}{precision} in the FT stage"


def to_device(batch, device):
    """The dict of tensors on the device; a GPU copies while the program goes on."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    pinned = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in pinned.items()}


def all_to_device(batches, model):
    """These batches on the model's device, in a list."""
    return [to_device(batch, device_of(model)) for batch in batches]


def batch_of(split, indices, device):
    """(batch, labels (n,)) of split.batch(indices), on the device.

    A GPU looks for its fastest kernels for every new shape: its batches are as long as a multiple of 8.
    """
    batch, labels = split.batch(indices, 8 if device.type == "cuda" else 1)
    batch = to_device(batch | {"labels": labels}, device)
    return batch, batch.pop("labels")


def mixed_precision(device):
    """bfloat16 matrix products, around float32 weights, on CUDA cards that have them; else float32."""
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=supported)


def random_state(device):
    """The state of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    for kind in state.keys() - {"cpu"}:
        getattr(torch, kind).set_rng_state(state[kind])
