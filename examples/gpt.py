"""A small byte-level GPT in plain PyTorch: nothing in it knows about quantization.

Pre-LayerNorm blocks, learned positions, GELU MLP, `nn.Linear` everywhere, so that matmuls have names such as
`blocks.0.attn.qkv` and `blocks.0.mlp.up`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, T tokens, C width, H heads, V vocabulary
VOCAB = 256  # one token per byte


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    width: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 128  # longest sequence that the model can read
    dropout: float = 0.0
    tied: bool = False  # whether the head shares the embedding's weight

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}; change one of them"
            )


PRESETS = {
    "tiny": GPTConfig(width=64, layers=2, heads=2, context=64),  # 0.1 M parameters, for trying things
    "small": GPTConfig(width=256, layers=4, heads=4, context=128),  # 3.3 M
    "10m": GPTConfig(width=384, layers=6, heads=6, context=256),  # 10.9 M
}


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        q_BHTD, k_BHTD, v_BHTD = (
            self.qkv(x_BTC).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        )
        dropout = self.dropout if self.training else 0.0
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True, dropout_p=dropout)
        return self.proj(y_BHTD.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTC)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attn(self.attn_norm(x_BTC)))
        return x_BTC + self.dropout(self.mlp(self.mlp_norm(x_BTC)))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(VOCAB, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCAB, bias=False)
        self.apply(self._init)
        for name, parameter in self.named_parameters():
            if name.endswith(
                ("attn.proj.weight", "mlp.down.weight")
            ):  # keeps the residual stream's size (GPT-2)
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5)
        if config.tied:
            self.head.weight = self.tokens.weight

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits f[B, T, V]; with targets the mean cross entropy in nats per byte, f32[]."""
        T = tokens_BT.shape[1]
        if T > self.config.context:
            raise ValueError(f"got {T} tokens, but the model's context is {self.config.context}")
        x_BTC = self.tokens(tokens_BT) + self.positions.weight[:T]
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV = self.head(self.norm(x_BTC))
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: bytes,
    length: int,
    *,
    context: int,
    temperature: float = 0.8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> bytes:
    """Sample `length` bytes after `prompt` from the last `context` bytes at a time (a sliding window).

    `model` maps tokens i64[1, context] to logits f[1, context, V]. It is always called with the full window,
    so a compiled model compiles once; what stands after the last byte does not matter to a causal model.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one byte, such as b'\\n'")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(length):
        seen = text[-context:]
        window_1T = torch.tensor([seen + [0] * (context - len(seen))], device=device)
        logits_V = model(window_1T)[0, len(seen) - 1].float().cpu()
        text.append(int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)))
    return bytes(text[len(prompt) :])
