"""S4D: every mode is the same layer, for every start and discretisation; it trains; its systems carry a state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewriter.backends.eager import EagerOps
from rewriter.passes.solvers.s4d import Method, Start
from rewriter.passes.structures.s4d import MODES, S4D
from rewriter.tolerances import EQUAL

OPS = EagerOps()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    rtol, atol = EQUAL[b.dtype]
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("start", ["legs", "inv", "lin", "real"])
def test_modes_agree(start: Start, method: Method) -> None:
    for dtype in (torch.float32, torch.float64):
        layer = S4D(3, 8, start, method).to(dtype)
        for tokens in (1, 37, 64, 130):
            u = torch.randn(2, tokens, 3, dtype=dtype)
            want = layer.run(u, "scan")
            for mode in MODES:
                close(layer.run(u, mode), want)


def test_the_step_decodes_what_the_kernel_convolves() -> None:
    layer = S4D(2, 6).double()
    u = torch.randn(1, 9, 2, dtype=torch.float64)
    system, state = layer.system(), torch.zeros(1, 12, dtype=torch.float64)
    rows = []
    for t in range(9):
        (state,), (y,) = system.step(OPS, [state], [u[:, t]])
        rows.append(y)
    close(torch.stack(rows, 1), layer(u))
    _, carried = layer.chunked().apply(OPS, u, torch.zeros(1, 12, dtype=torch.float64))
    close(carried, state)


def test_gradients_agree_in_every_mode() -> None:
    grads = []
    for mode in MODES:
        layer = S4D(2, 4, seed=1).double()
        layer.run(torch.linspace(-1, 1, 26, dtype=torch.float64).reshape(1, 13, 2), mode).square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    for other in grads[1:]:
        for a, b in zip(other, grads[0], strict=True):
            assert a is not None and b is not None
            close(a, b)


def test_it_trains() -> None:
    """To delay its input by four tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), S4D(8, 16), nn.Linear(8, 1))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        u = torch.randn(16, 32, 1)
        loss = (model(u)[:, 4:] - u[:, :-4]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_the_fastest_mode_is_one_that_was_measured() -> None:
    mode, seconds = S4D(4, 8).fastest(64)
    assert set(seconds) == set(MODES) and seconds[mode] == min(seconds.values())


def test_an_odd_state_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        S4D(2, 5)
