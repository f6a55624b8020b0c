"""Models whose gradients the test chooses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Given(nn.Module):
    """Parameters whose gradients are the inputs: forward(g).backward() adds g to every .grad."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            start = torch.randint(-8, 9, shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(start))

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        parameters = dict(self.named_parameters())
        return torch.stack([(parameters[name] * g).sum().float() for name, g in gradients.items()]).sum()


def integers(shapes: Mapping[str, tuple[int, ...]], seed: int, size: int = 8) -> dict[str, Tensor]:
    """Returns small integer gradients: sums of them, halved a few times, are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(-size, size + 1, shape, generator=generator).float() for name, shape in shapes.items()}


def normals(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Returns normally distributed gradients."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
