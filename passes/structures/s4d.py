"""S4D (Gu, Gupta, Goel and Re 2022, arXiv:2206.11893): a diagonal state space for each channel, as a module that trains.

x' = A x + B u, y = Re(C x) + D u with A = -exp(r) + i w a conjugate pair per mode, made a recurrence by a step exp(s) of each channel. One
layer, four ways to run it, equal up to rounding: "convolution" with the kernel by FFT, "chunked" and "scan" as a linear system with a state
in and out, and the system's `step` for one token.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from rewriter.algebra import BlockDiagonal, Diagonal
from rewriter.passes.solvers.modes import Modes
from rewriter.passes.solvers.s4d import Method, Start, discretize_diagonal, s4d_start
from rewriter.passes.structures.linear_system import ChunkedSystem, LinearSystem, conjugate_pairs
from rewriter.registry import eager_ops
from rewriter.timing import interleave

Mode = Literal["convolution", "chunked", "scan"]
MODES: tuple[Mode, ...] = ("convolution", "chunked", "scan")
STEPS = (1e-3, 1e-1)  # the range that steps are drawn from, log-uniformly
CHUNK = 64


class S4D(nn.Module):
    """(batch, time, channels) -> the same. `states` per channel, even; `start` of A and B: legs, inv, lin or real."""

    b: Tensor

    def __init__(
        self, channels: int, states: int = 64, start: Start = "legs", method: Method = "zoh", mode: Mode = "convolution", seed: int = 0
    ) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        a, b, self.reals = s4d_start(start, states)
        low, high = map(math.log, STEPS)
        self.channels, self.method, self.mode = channels, method, mode
        self.log_step = nn.Parameter(low + (high - low) * torch.rand(channels, 1, generator=rng))
        self.log_decay = nn.Parameter((-a.real).log().float().repeat(channels, 1))
        self.frequency = nn.Parameter(a.imag.float().repeat(channels, 1))
        self.c = nn.Parameter(torch.randn(channels, len(a), 2, generator=rng) * 0.5**0.5)
        self.d = nn.Parameter(torch.randn(channels, generator=rng))
        self.register_buffer("b", torch.view_as_real(b))

    def modes(self) -> Modes:
        """The discrete system of every channel, float64, differentiable."""
        a = torch.complex(-self.log_decay.double().exp(), self.frequency.double())
        eigenvalues, driven = discretize_diagonal(a, torch.view_as_complex(self.b), self.log_step.double().exp(), self.method)
        c = torch.view_as_complex(self.c.double())
        return Modes(eigenvalues, driven[..., None], c[:, None, :], self.d.double()[:, None, None], self.reals)

    def system(self, carried: bool = True) -> LinearSystem:
        """The layer as an operator: what decodes token by token, and what is emitted."""
        real = self.modes().real(self.d.dtype)
        count, n = real.keep.shape
        partner = (real.partner + n * torch.arange(count)[:, None]).flatten()
        move = conjugate_pairs(real.keep.flatten(), real.cross.flatten(), partner)
        entry, readout = (BlockDiagonal(part.mT.contiguous()) for part in (real.b, real.c))
        return LinearSystem(move, entry, readout, Diagonal(self.d), carried=carried)

    def chunked(self, carried: bool = True, length: int = CHUNK) -> ChunkedSystem:
        """The same with the matrices of `length` steps."""
        system, parts = self.system(carried), self.modes().chunked(length, self.d.dtype)
        count, n = parts.keep.shape
        partner = (parts.partner + n * torch.arange(count)[:, None]).flatten()
        leap = conjugate_pairs(parts.keep.flatten(), parts.cross.flatten(), partner)
        toeplitz, observe, control = (BlockDiagonal(part.mT.contiguous()) for part in (parts.toeplitz, parts.observe, parts.control))
        return ChunkedSystem(system, length, leap, toeplitz, observe, control)

    def kernel(self, length: int) -> Tensor:
        """(channels, length): K_l = sum of weight Re(c lambda^l b), D in K_0."""
        return self.modes().response(length)[..., 0, 0].to(self.d.dtype)

    def run(self, u: Tensor, mode: Mode) -> Tensor:
        """In one of the modes, from the zero state."""
        if mode == "convolution":
            length = u.shape[1]
            spectrum = torch.fft.rfft(self.kernel(length), 2 * length) * torch.fft.rfft(u.mT, 2 * length)
            whole: Tensor = torch.fft.irfft(spectrum, 2 * length)
            return whole[..., :length].mT
        form = self.chunked(carried=False) if mode == "chunked" else self.system(carried=False)
        y: Tensor = form.apply(eager_ops(), u)[0]
        return y

    def forward(self, u: Tensor) -> Tensor:
        return self.run(u, self.mode)

    @torch.no_grad()
    def fastest(self, length: int, batch: int = 1) -> tuple[Mode, dict[Mode, float]]:
        """The mode that takes least time here at this length, and the seconds of each: interleaved medians."""
        u = torch.randn(batch, length, self.channels, dtype=self.d.dtype)
        timing = interleave([lambda m=mode: self.run(u, m) for mode in MODES], seconds=0.3)  # type: ignore[misc]
        seconds = {mode: timing.seconds(i) for i, mode in enumerate(MODES)}
        return min(MODES, key=seconds.__getitem__), seconds
