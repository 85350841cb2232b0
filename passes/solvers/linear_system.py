"""h_t = A h_{t-1} + B u_t,  y_t = C h_t + D u_t  (read after the update):  y = G u,  G(z) = C (I - A/z)^-1 B + D  on the unit circle.

The impulse response of G is  f_0 = D + C B,  f_l = C A^l B.  Its first 2 L terms follow from the first L by one product with A^L.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BATCH = 2**22  # entries of the matrices that one batch of solves holds


@dataclass(frozen=True)
class System:
    """A linear time-invariant recurrence; real, float64. Made by `of`, which checks."""

    a: Tensor  # (n, n)
    b: Tensor  # (n, p)
    c: Tensor  # (q, n)
    d: Tensor  # (q, p)

    @classmethod
    def of(cls, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None) -> System:
        """Any real dtype; no D is zero. ValueError where shapes disagree or a number is not finite."""
        d = b.new_zeros(len(c), b.shape[-1]) if d is None else d
        n, p, q = len(a), b.shape[-1], len(c)
        shapes = [tuple(x.shape) for x in (a, b, c, d)]
        if shapes != [(n, n), (n, p), (q, n), (q, p)]:
            raise ValueError(f"A, B, C, D of shapes {shapes}; they must be (n, n), (n, p), (q, n), (q, p)")
        if any(x.is_complex() or not bool(x.isfinite().all()) for x in (a, b, c, d)):
            raise ValueError("A, B, C and D must be real and finite")
        return cls(*(x.detach().double() for x in (a, b, c, d)))

    def simulate(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sequential oracle: (..., T, p) -> outputs (..., T, q) and the last state (..., n); starts from zero without `state`."""
        u = inputs.double()
        state = u.new_zeros(*u.shape[:-2], len(self.a)) if state is None else state
        driven, outputs = u @ self.b.T, u @ self.d.T
        for t in range(u.shape[-2]):
            state = state @ self.a.T + driven[..., t, :]
            outputs[..., t, :] += state @ self.c.T
        return outputs, state

    def transfer(self, angles: Tensor) -> Tensor:
        """G(e^{i angle}), (k,) -> (k, q, p) complex, by one solve per angle."""
        eye, b, c = torch.eye(len(self.a), dtype=torch.complex128), self.b + 0j, self.c + 0j
        parts = torch.exp(1j * angles.double())[:, None, None].split(max(1, BATCH // max(1, eye.numel())))
        return torch.cat([z * c @ torch.linalg.solve(z * eye - self.a, b) for z in parts]) + self.d

    def radius(self) -> float:
        """The largest |eigenvalue| of A; below 1 the recurrence is stable."""
        return float(torch.linalg.eigvals(self.a).abs().max()) if len(self.a) else 0.0

    def doublings(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(B, A B, ..., A^(L-1) B) as (n, L p), and A^L, for L = 1, 2, 4, ... without end."""
        states, power = self.b, self.a
        while True:
            yield states, power
            states, power = torch.cat([states, power @ states], 1), power @ power

    def impulse(self, states: Tensor) -> Tensor:
        """(n, L p) of `doublings` -> f (q, L, p)."""
        response = (self.c @ states).reshape(len(self.c), -1, self.b.shape[1])
        response[:, 0] += self.d
        return response

    def minus(self, other: System) -> System:
        """The error system G - G', on both states side by side."""
        a, d = torch.block_diag(self.a, other.a), self.d - other.d
        return System(a, torch.cat([self.b, other.b]), torch.cat([self.c, -other.c], 1), d)
