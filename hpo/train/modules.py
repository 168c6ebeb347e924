"""Parts of a network by name: its head, the modules that a prefix or a pattern names, the network inside a wrapper."""

from __future__ import annotations

from torch import Tensor, nn

HEAD, BODY = "head", "body"  # the last layer, and all that is not in it, whatever a network calls them


class RepeatChannels(nn.Module):
    """A network that shows images of one channel to a network that takes three."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_B1HW: Tensor) -> Tensor:
        """Return the logits (B, L)."""
        logits_BL: Tensor = self.model(images_B1HW.expand(-1, 3, -1, -1))
        return logits_BL


def named_network(model: nn.Module) -> nn.Module:
    """Return the network whose names users know: the one inside `RepeatChannels`, or else the network itself."""
    return model.model if isinstance(model, RepeatChannels) else model


def head_of(network: nn.Module, *, num_classes: int) -> str | None:
    """Return the name of a network's head: its last layer whose weight has a row for each class; None without one."""
    layers = [
        name
        for name, module in network.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.dim() > 1
        and len(weight) == num_classes
    ]
    return layers[-1] if layers else None


def is_inside(name: str, module: str | None) -> bool:
    """Return whether a module, a parameter or a buffer of this name is a module or inside of it."""
    return module is not None and (name == module or name.startswith(f"{module}.") or not module)
