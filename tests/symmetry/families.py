"""Small networks of the families whose symmetries are known, and how many groups each has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn


class Family(NamedTuple):
    """A module's maker, its example inputs, and the sizes of its groups, sorted."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    sizes: list[int]


def images() -> tuple[Tensor, ...]:
    return (torch.randn(3, 2, 8, 8),)


def rows() -> tuple[Tensor, ...]:
    return (torch.randn(5, 6),)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(0, 20, (2, 7)),)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Block(nn.Module):
    def __init__(self, wide: int, wider: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(wide, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider)
        self.c2, self.b2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider)
        self.shortcut = nn.Sequential(nn.Conv2d(wide, wider, 1, bias=False), nn.BatchNorm2d(wider))
        self.same = wide == wider

    def forward(self, x: Tensor) -> Tensor:
        y = self.b2(self.c2(F.relu(self.b1(self.c1(x)), inplace=True)))
        y += x if self.same else self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 6), Block(6, 6))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.blocks(F.relu(self.bn(self.stem(x)))).mean([2, 3]))
        return out


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(2, 5, 3), nn.Linear(5 * 9, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.relu(self.fc(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))))
        return out


class Depthwise(nn.Module):
    """A convolution of each channel alone, one in groups, one that enlarges, normalised in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.c, self.d = nn.Conv2d(6, 12, 3, groups=3), nn.ConvTranspose2d(12, 4, 2, stride=2)
        self.norm, self.out = nn.GroupNorm(3, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.b(F.gelu(self.a(x))))
        out: Tensor = self.out(F.adaptive_avg_pool2d(F.relu(self.d(self.norm(self.c(x)))), 1).flatten(1))
        return out


def rotated(x: Tensor, kind: str) -> Tensor:
    """x [b, h, t, d] turned by its position: halves, neighbours, or complex numbers."""
    t, d = x.shape[-2:]
    angle = torch.arange(t)[:, None] * torch.exp(torch.arange(0, d, 2) * (-math.log(100.0) / d))[None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    if kind == "halves":
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        return x * cos + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * sin
    if kind == "neighbours":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


class Attention(nn.Module):
    """d -> h query heads over k key heads of width w; ``how``: sdpa, gqa, repeat, by hand."""

    def __init__(self, d: int, h: int, k: int, w: int, how: str, rope: str) -> None:
        super().__init__()
        self.h, self.k, self.w, self.how, self.rope = h, k, w, how, rope
        self.q, self.key = nn.Linear(d, h * w), nn.Linear(d, k * w)
        self.v, self.o = nn.Linear(d, k * w), nn.Linear(h * w, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.h, self.w).transpose(1, 2)
        k = self.key(x).view(b, t, self.k, self.w).transpose(1, 2)
        v = self.v(x).view(b, t, self.k, self.w).transpose(1, 2)
        if self.rope:
            q, k = rotated(q, self.rope), rotated(k, self.rope)
        g = self.h // self.k
        if self.how == "repeat":
            k, v = (y[:, :, None].expand(b, self.k, g, t, self.w).reshape(b, self.h, t, self.w) for y in (k, v))
        if self.how == "interleave":
            k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
        if self.how == "by hand":
            mask = torch.full((t, t), -torch.inf).triu(1).to(x.dtype)
            y = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(self.w) + mask, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.how == "gqa")
        out: Tensor = self.o(y.transpose(1, 2).reshape(b, t, -1))
        return out


class Fused(nn.Module):
    """One layer for queries, keys and values; ``how``: chunk, view, torch's own module."""

    def __init__(self, d: int, h: int, how: str) -> None:
        super().__init__()
        self.h, self.how = h, how
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        if self.how == "view":
            q, k, v = self.qkv(x).view(b, t, 3, self.h, d // self.h).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (y.view(b, t, self.h, -1).transpose(1, 2) for y in self.qkv(x).split(d, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(y.transpose(1, 2).reshape(b, t, d))
        return out


class Torchs(nn.Module):
    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(d, h, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class SwiGlu(nn.Module):
    def __init__(self, d: int, wide: int, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.both = nn.Linear(d, 2 * wide)
        else:
            self.gate, self.up = nn.Linear(d, wide), nn.Linear(d, wide)
        self.down = nn.Linear(wide, d)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Experts(nn.Module):
    """Stacked experts [e, ...]; ``how``: dense, mask, one_hot, gather."""

    def __init__(self, d: int, e: int, wide: int, how: str) -> None:
        super().__init__()
        self.how, self.e = how, e
        self.router = nn.Linear(d, e)
        self.up, self.down = nn.Parameter(torch.randn(e, d, wide) / 2), nn.Parameter(torch.randn(e, wide, d) / 2)

    def forward(self, x: Tensor) -> Tensor:
        p = torch.softmax(self.router(x), -1)
        best, which = p.topk(2, -1)
        if self.how == "gather":
            up, down = self.up[which], self.down[which]
            y = torch.einsum("btkdw,btd->btkw", up, x).relu()
            return torch.einsum("btkwd,btkw,btk->btd", down, y, best)
        if self.how == "mask":
            p = torch.zeros_like(p).scatter(-1, which, best)
        elif self.how == "one_hot":
            p = (F.one_hot(which, self.e).to(p.dtype) * best[..., None]).sum(-2)
        if self.how == "bmm":
            flat = x.reshape(1, -1, x.shape[-1]).expand(self.e, -1, -1)
            out = torch.bmm(torch.bmm(flat, self.up).relu(), self.down)
            return (out * p.reshape(-1, self.e).t()[..., None]).sum(0).view(x.shape)
        y = torch.einsum("btd,edw->btew", x, self.up).relu()
        return torch.einsum("btew,ewd,bte->btd", y, self.down, p)


class RmsNorm(nn.Module):
    """Written out, as in most language models."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.weight
            * (x.float() if x.dtype == torch.bfloat16 else x)
            * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        )


class Language(nn.Module):
    """A block between an embedding and a head; with ``tied`` they share one weight."""

    def __init__(
        self, mixer: Callable[[], nn.Module], mlp: Callable[[], nn.Module], norm: str = "layer", tied: bool = False
    ) -> None:
        super().__init__()
        d = 12
        made = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "written": RmsNorm}[norm]
        self.e, self.pos, self.head = nn.Embedding(20, d), nn.Parameter(torch.randn(1, 9, d)), nn.Linear(d, 20, False)
        if tied:
            self.head.weight = self.e.weight
        self.n1, self.n2, self.n3 = made(d), made(d), made(d)
        self.mixer, self.mlp = mixer(), mlp()

    def forward(self, i: Tensor) -> Tensor:
        x = self.e(i) + self.pos[:, : i.shape[1]]
        x = x + self.mixer(self.n1(x))
        x = x + self.mlp(self.n2(x))
        out: Tensor = self.head(self.n3(x))
        return out


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 17), nn.GELU(), nn.Linear(17, 12))


def gated() -> nn.Module:
    return SwiGlu(12, 17)


def attending(h: int = 3, k: int = 3, w: int = 4, how: str = "sdpa", rope: str = "") -> Callable[[], nn.Module]:
    return lambda: Attention(12, h, k, w, how, rope)


def language(mixer: Callable[[], nn.Module], mlp: Callable[[], nn.Module] = plain, **how: object) -> Family:
    return Family(lambda: Language(mixer, mlp, **how), tokens, [])  # type: ignore[arg-type]


FAMILIES = {
    "mlp": Family(Mlp, rows, [7, 9]),
    "resnet": Family(ResNet, images, [4, 4, 6, 6, 6]),
    "conv and flatten": Family(Flat, images, [5, 8]),
    "grouped convolutions": Family(Depthwise, images, [2, 3, 4, 4]),
    "mha": language(attending())._replace(sizes=[3, 4, 4, 12, 17]),
    "mha by hand": language(attending(how="by hand"), norm="rms")._replace(sizes=[3, 4, 4, 12, 17]),
    "gqa": language(attending(6, 2, how="gqa"), gated, norm="rms")._replace(sizes=[2, 3, 4, 4, 12, 17]),
    "gqa repeat": language(attending(6, 2, how="repeat"), gated, norm="written")._replace(sizes=[2, 3, 4, 4, 12, 17]),
    "gqa interleave": language(attending(6, 2, how="interleave"), gated)._replace(sizes=[2, 3, 4, 4, 12, 17]),
    "rope halves": language(attending(rope="halves"))._replace(sizes=[3, 4, 12, 17]),
    "rope neighbours": language(attending(rope="neighbours"))._replace(sizes=[3, 4, 12, 17]),
    "rope complex": language(attending(rope="complex"))._replace(sizes=[3, 4, 12, 17]),
    "rope gqa": language(attending(6, 2, how="repeat", rope="halves"), gated, tied=True)._replace(
        sizes=[2, 3, 4, 12, 17]
    ),
    "tied": language(attending(), tied=True)._replace(sizes=[3, 4, 4, 12, 17]),
    "fused chunk": language(lambda: Fused(12, 3, "chunk"), lambda: SwiGlu(12, 17, True))._replace(sizes=[3, 4, 12, 17]),
    "fused view": language(lambda: Fused(12, 3, "view"))._replace(sizes=[3, 4, 12, 17]),
    "torch's attention": language(lambda: Torchs(12, 3))._replace(sizes=[3, 4, 12, 17]),
    "experts dense": language(attending(), lambda: Experts(12, 5, 8, "dense"))._replace(sizes=[3, 4, 4, 5, 8, 12]),
    "experts mask": language(attending(), lambda: Experts(12, 5, 8, "mask"))._replace(sizes=[3, 4, 4, 5, 8, 12]),
    "experts one_hot": language(attending(), lambda: Experts(12, 5, 8, "one_hot"))._replace(sizes=[3, 4, 4, 5, 8, 12]),
    "experts gather": language(attending(), lambda: Experts(12, 5, 8, "gather"))._replace(sizes=[3, 4, 4, 5, 8, 12]),
    "experts bmm": language(attending(), lambda: Experts(12, 5, 8, "bmm"))._replace(sizes=[3, 4, 4, 5, 8, 12]),
}
