"""Two tensor models that a test copies elsewhere, compiles and deletes; needs PyTorch alone."""

from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """Convolutions with a skip, and constants that depend on the image's height and width.

    image (batch, 3, height, 16) -> mask (batch, 5, height, 16), labels (batch, height, 16), score
    (batch, 8).
    """

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        c = channels
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU())
        self.down = nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(2 * c, 2 * c, 3, padding=1), nn.BatchNorm2d(2 * c))
        self.up = nn.ConvTranspose2d(2 * c, c, 2, stride=2)
        self.head = nn.Conv2d(2 * c, 5, 1)

    def forward(self, image: torch.Tensor) -> dict[str, Any]:
        height, width = image.shape[-2:]
        early = self.stem(image)
        x = torch.relu(self.middle(torch.relu(self.down(early))))
        x = self.up(x) * torch.tensor([1 / height, 0.5], device=image.device).sum()
        x = x + torch.arange(width, device=image.device, dtype=torch.float32)
        mask = self.head(torch.cat([early, x], 1))
        return {"mask": mask, "labels": mask.argmax(1), "score": x.mean((2, 3))}


class Reader(nn.Module):
    """Attention over words. ids, mask (batch, 6), int64 and bool -> logits (batch, 6, 11)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(11, 8), nn.Embedding(9, 8)
        self.register_buffer("position_ids", torch.arange(9))
        self.layers = nn.ModuleList(_Layer(8) for _ in range(2))
        self.head = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.positions(self.position_ids[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, mask)
        logits: torch.Tensor = self.head(x)
        return logits


class _Layer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(size, size) for _ in range(4))
        self.up, self.down = nn.Linear(size, 3 * size), nn.Linear(3 * size, size)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = (f(x).unflatten(-1, (-1, 2)).transpose(1, 2) for f in self._projections)
        seen = mask[:, None, None, :]
        attended = nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen)
        x = self.norm1(x + self.output(attended.transpose(1, 2).flatten(2)))
        output: torch.Tensor = self.norm2(x + self.down(torch.relu(self.up(x))))
        return output

    @property
    def _projections(self) -> list[nn.Module]:
        return [self.query, self.key, self.value]
