"""x_t = lambda x_{t-1} + b u_t,  y_t = D u_t + sum over modes of weight Re(c x_t):  a diagonal recurrence, each conjugate pair stored once.

Real form: the state is (Re x of every mode, Im x of the pairs); its product with lambda is  keep h + cross h[partner].
Chunked form, L steps at once (u and y flattened over time and port):
    y = T u + O h,   h' = lambda^L h + M u,    T_{ji} = f_{j-i},   O_j = C lambda^{j+1},   M_i = lambda^{L-1-i} B.
Leading dimensions are channels, each a system of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewriter.passes.solvers.linear_system import System


def powers(values: Tensor, length: int) -> Tensor:
    """(..., m) -> (..., m, length): 1, lambda, lambda^2, ... (Vandermonde)."""
    repeated = values[..., None].expand(*values.shape, max(length - 1, 0))
    return torch.cat([torch.ones_like(values)[..., None], repeated], -1)[..., :length].cumprod(-1)


@dataclass(frozen=True)
class Modes:
    """The first `reals` modes are real (weight 1), the others stand for themselves and their conjugates (weight 2)."""

    eigenvalues: Tensor  # (..., m) complex
    b: Tensor  # (..., m, p) complex
    c: Tensor  # (..., q, m) complex
    d: Tensor  # (..., q, p) real
    reals: int

    @property
    def order(self) -> int:
        """n: the real numbers in the state."""
        return 2 * self.eigenvalues.shape[-1] - self.reals

    @property
    def weight(self) -> Tensor:
        """(m,) 1 or 2."""
        weight = torch.full(self.eigenvalues.shape[-1:], 2.0, dtype=self.d.dtype)
        weight[: self.reals] = 1
        return weight

    def balanced(self) -> Modes:
        """The same system with |b| = |c| in every mode: no overflow where the dtype is short."""
        ratio = (torch.linalg.vector_norm(self.c, dim=-2) / torch.linalg.vector_norm(self.b, dim=-1)).sqrt()
        ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        return replace(self, b=self.b * ratio[..., None], c=self.c / ratio[..., None, :])

    def noise(self) -> Tensor:
        """(...,) what rounding every state at every step adds to the output, over the unit roundoff; white input of unit variance.

        sqrt(sum weight |c|^2 |b|^2 / (1 - |lambda|^2)^2): a mode holds |b|^2 / (1 - |lambda|^2), and what it loses rings as long.
        """
        strength = self.c.abs().square().sum(-2) * self.b.abs().square().sum(-1) / (1 - self.eigenvalues.abs().square()).square()
        return (self.weight * strength).sum(-1).sqrt()

    def radius(self) -> float:
        """The largest |lambda|."""
        return float(self.eigenvalues.detach().abs().max()) if self.eigenvalues.numel() else 0.0

    def tail(self, length: int) -> float:
        """At least the sum of |f_l|_2 over l >= length; no leading dimensions."""
        size = self.eigenvalues.abs()
        strength = self.weight * torch.linalg.vector_norm(self.c, dim=0) * torch.linalg.vector_norm(self.b, dim=1)
        return float((strength * size**length / (1 - size)).sum())

    def response(self, length: int) -> Tensor:
        """The impulse response f: (..., length, q, p)."""
        driven = self._rows((powers(self.eigenvalues, length)[..., None] * self.b[..., None, :]).flatten(-2))  # (..., n, length p)
        response: Tensor = (self._columns(self.c) @ driven).unflatten(-1, (length, -1)).transpose(-3, -2).contiguous()
        response[..., 0, :, :] += self.d
        return response

    def stored(self, dtype: torch.dtype) -> Modes:
        """The same numbers rounded to a real dtype; they stay complex128."""
        pairs = (torch.view_as_real(x).to(dtype).double() for x in (self.eigenvalues, self.b, self.c))
        eigenvalues, b, c = (torch.view_as_complex(x) for x in pairs)
        return Modes(eigenvalues, b, c, self.d.to(dtype).double(), self.reals)

    def real(self, dtype: torch.dtype) -> RealModes:
        """As it is stored and run."""
        keep, cross = self._rates(self.eigenvalues)
        b, c = self._rows(self.b), self._columns(self.c)
        return RealModes(keep.to(dtype), cross.to(dtype), b.to(dtype), c.to(dtype), self.d.to(dtype), self._partner())

    def chunked(self, length: int, dtype: torch.dtype) -> Chunked:
        """The matrices of L = length steps."""
        (q, p), lead = self.d.shape[-2:], self.d.shape[:-2]
        raised = powers(self.eigenvalues, length + 1)  # (..., m, L + 1)
        lag = torch.arange(length)[:, None] - torch.arange(length)
        toeplitz = self.response(length)[..., lag.clamp_min(0), :, :] * (lag >= 0)[:, :, None, None]  # (..., L, L, q, p)
        observe = self.c[..., None, :, :] * raised[..., 1:].transpose(-1, -2)[..., :, None, :]  # (..., L, q, m)
        control = raised[..., :length].flip(-1)[..., None] * self.b[..., None, :]  # (..., m, L, p)
        keep, cross = self._rates(raised[..., length])
        return Chunked(
            toeplitz.transpose(-3, -2).reshape(*lead, length * q, length * p).to(dtype),
            self._columns(observe.flatten(-3, -2)).to(dtype),
            self._rows(control.flatten(-2)).to(dtype),
            keep.to(dtype),
            cross.to(dtype),
            self._partner(),
        )

    def _rows(self, x: Tensor) -> Tensor:
        """(..., m, k) complex -> (..., n, k) in the layout of the real state."""
        return torch.cat([x.real, x.imag[..., self.reals :, :]], -2)

    def _columns(self, x: Tensor) -> Tensor:
        """(..., k, m) complex -> (..., k, n): what reads the real state."""
        x = x * self.weight
        return torch.cat([x.real, -x.imag[..., self.reals :]], -1)

    def _rates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., m) -> keep, cross (..., n)."""
        re, im = x.real, x.imag[..., self.reals :]
        return torch.cat([re, re[..., self.reals :]], -1), torch.cat([torch.zeros_like(re[..., : self.reals]), -im, im], -1)

    def _partner(self) -> Tensor:
        """(n,) the place of the other half of each pair."""
        m, r = self.eigenvalues.shape[-1], self.reals
        return torch.cat([torch.arange(r), torch.arange(m, self.order), torch.arange(r, m)])


@dataclass(frozen=True)
class RealModes:
    """h' = keep h + cross h[partner] + B u,  y = C h' + D u."""

    keep: Tensor  # (..., n)
    cross: Tensor  # (..., n)
    b: Tensor  # (..., n, p)
    c: Tensor  # (..., q, n)
    d: Tensor  # (..., q, p)
    partner: Tensor  # (n,) int64

    def simulate(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step after the other in the dtype of the fields: (..., T, p) -> outputs (..., T, q), last state (..., n)."""
        u = inputs.to(self.keep.dtype)
        driven, outputs = u @ self.b.mT, u @ self.d.mT
        state = torch.zeros_like(driven[..., 0, :]) if state is None else state
        for t in range(u.shape[-2]):
            state = self.keep * state + self.cross * state[..., self.partner] + driven[..., t, :]
            outputs[..., t, :] += (self.c @ state[..., None])[..., 0]
        return outputs, state

    def system(self) -> System:
        """The same recurrence with its transition written out; no leading dimensions."""
        eye = torch.eye(len(self.keep), dtype=self.keep.dtype)
        return System.of(torch.diag(self.keep) + self.cross[:, None] * eye[self.partner], self.b, self.c, self.d)


@dataclass(frozen=True)
class Chunked:
    """y = toeplitz u + observe h,  h' = keep h + cross h[partner] + control u  over L steps."""

    toeplitz: Tensor  # (..., L q, L p)
    observe: Tensor  # (..., L q, n)
    control: Tensor  # (..., n, L p)
    keep: Tensor  # (..., n)
    cross: Tensor  # (..., n)
    partner: Tensor  # (n,) int64
