"""Which blocks there are and which is next: partitions, scores, forests and supports against exhaustive search and dense solves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import networkx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewriter.passes.solvers.bcd import partition
from rewriter.passes.solvers.bcd.engine import AbstractSelection
from rewriter.passes.solvers.bcd.forest import graph_of, solve_forest
from rewriter.passes.solvers.bcd.selection import Cyclic, Greedy, Permuted, Random, Score, Top, TopForest
from rewriter.passes.solvers.bcd.smooth import AbstractSmooth, LeastSquares, Quadratic
from rewriter.passes.solvers.bcd.supports import best_support, supports
from rewriter.passes.solvers.bcd.update import Forest, Newton, Support
from rewriter.tolerances import CONVERGED
from tests.solvers.test_bcd import ATOL, BLOCK, FIXED, ROWS, RTOL, SIZE, normal, quadratic, rng, run


def on_a_graph(graph: networkx.Graph, seed: int = 0) -> Quadratic:
    n = len(graph)
    h = torch.zeros(n, n, dtype=torch.float64)
    for a, b in graph.edges:
        h[a, b] = h[b, a] = -torch.rand((), generator=rng(seed + a * n + b), dtype=torch.float64)
    return Quadratic(h + torch.diag(-h.sum(1) + 0.1), normal(n, seed=seed))


@given(st.integers(1, 40), st.integers(1, 12))
def test_partitions_hold_every_coordinate_once(n: int, size: int) -> None:
    diagonal = normal(n, seed=n).abs()
    for blocks in (partition.in_order(n, size), partition.by_lipschitz(diagonal, size), partition.averaged(diagonal, size)):
        assert sorted(torch.cat(blocks).tolist()) == list(range(n)) and max(map(len, blocks)) <= size
    tiled = partition.tiles(n, size, 3, 2)
    assert sorted(torch.cat(tiled).tolist()) == list(range(n * size)) and max(map(len, tiled)) <= 6


def test_blocks_by_lipschitz_constant_are_alike_and_averaged_ones_are_mixed() -> None:
    diagonal = torch.arange(12.0)
    assert [sorted(b.tolist()) for b in partition.by_lipschitz(diagonal, 4)] == [[8, 9, 10, 11], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert [sorted(b.tolist()) for b in partition.averaged(diagonal, 4)] == [[2, 5, 8, 11], [1, 4, 7, 10], [0, 3, 6, 9]]


def test_groups_of_a_mask_are_neighbours_in_their_rows() -> None:
    assert [g.tolist() for g in partition.nm_groups(2, 8, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert partition.nm_groups(2, 8, 4, shared=2)[1].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    with pytest.raises(ValueError, match="groups of 3 columns and 1 rows of a 2 x 8 matrix"):
        partition.nm_groups(2, 8, 3)


def first(select: AbstractSelection[Tensor], problem: AbstractSmooth, count: int = 1) -> list[list[int]]:
    blocks: Iterator[Tensor] = select.blocks(problem, rng())
    return [sorted(block.tolist()) for _, block in zip(range(count), blocks, strict=False)]


def test_a_permutation_is_new_each_time_round_and_complete() -> None:
    rounds = first(Permuted(FIXED), quadratic(), 3 * len(FIXED))
    parts = [rounds[i : i + len(FIXED)] for i in range(0, len(rounds), len(FIXED))]
    assert all(sorted(part) == sorted(b.tolist() for b in FIXED) for part in parts) and len({str(part) for part in parts}) > 1


def test_random_blocks_follow_their_weights() -> None:
    drawn = first(Random(FIXED, torch.tensor([0.0, 1, 0, 3, 0])), quadratic(), 400)
    assert {block[0] for block in drawn} == {BLOCK, 3 * BLOCK}
    assert 250 < sum(block[0] == 3 * BLOCK for block in drawn) < 350


def gain(problem: AbstractSmooth, block: Tensor) -> float:
    """The fall of the quadratic bound by the block's best move."""
    g = problem.slope(block)
    return float(g @ torch.linalg.solve(problem.curvature(block), g)) / 2


@pytest.mark.parametrize("seed", range(5))
def test_the_score_of_the_bound_picks_the_block_that_gains_most(seed: int) -> None:
    f = LeastSquares(normal(ROWS, SIZE, seed=seed) * torch.linspace(0.1, 4, SIZE), normal(ROWS, seed=seed + 9))
    best = max(FIXED, key=lambda b: gain(f, b))
    assert first(Greedy(FIXED, "gsq"), f) == [best.tolist()]
    free = max((torch.tensor(c) for c in itertools.combinations(range(SIZE), 2)), key=lambda b: gain(f, b))
    gains = {score: gain(f, torch.tensor(first(Top(2, score), f)[0])) for score in SCORES}
    assert max(gains.values()) <= gain(f, free) * (1 + RTOL)
    assert gains["gsq"] >= 0.8 * gain(f, free) and gains["gsq"] >= gains["gs"] * 0.8


SCORES: tuple[Score, ...] = ("gs", "gsd", "gsq")


@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 1000))
def test_a_block_under_one_bound_is_the_best_of_all(n: int, size: int, seed: int) -> None:
    f = Quadratic(torch.diag(normal(n, seed=seed).square() + 0.01), normal(n, seed=seed + 1))
    energy, bounds = f.gradient().square(), f.diagonal

    def worth(block: Sequence[int]) -> float:
        return float(energy[list(block)].sum() / bounds[list(block)].max())

    found = first(Top(size, "gsl"), f)[0]
    assert worth(found) == pytest.approx(max(worth(c) for k in range(1, size + 1) for c in itertools.combinations(range(n), min(k, n))))


def test_scores_differ_where_scales_do() -> None:
    """The steepest coordinate is not the one that gains most where its curvature is large."""
    f = Quadratic(torch.diag(torch.tensor([100.0, 1.0, 4.0])), torch.tensor([10.0, 5.0, 8.0]))
    assert first(Top(1, "gs"), f) == [[0]] and first(Top(1, "gsd"), f) == [[1]] and first(Top(1, "gsq"), f) == [[1]]
    alone = [torch.tensor([i]) for i in range(3)]
    assert first(Greedy(alone, "gs"), f) == [[0]] and all(first(Greedy(alone, s), f) == [[1]] for s in ("gsl", "gsd", "gsq"))


@given(st.integers(1, 30), st.integers(0, 1000))
def test_messages_on_a_forest_are_a_dense_solve(n: int, seed: int) -> None:
    tree = networkx.random_labeled_tree(n, seed=seed)
    tree.remove_edges_from([e for i, e in enumerate(list(tree.edges)) if i % 4 == 3])  # several trees
    f = on_a_graph(tree, seed)
    torch.testing.assert_close(solve_forest(f.h, f.c), torch.linalg.solve(f.h, f.c), rtol=RTOL, atol=ATOL)


def test_a_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="has a cycle"):
        solve_forest(on_a_graph(networkx.cycle_graph(4)).h, normal(4))


@pytest.mark.parametrize("seed", range(3))
def test_forests_are_induced_maximal_and_everything_is_in_one(seed: int) -> None:
    f = on_a_graph(networkx.gnm_random_graph(25, 60, seed=seed), seed)
    graph = graph_of(f.h)
    dealt = partition.forests(graph, normal(25, seed=seed).abs())
    assert sorted(torch.cat(dealt).tolist()) == list(range(25))
    (greedy,) = first(TopForest(graph), f)
    for nodes in (*(d.tolist() for d in dealt), greedy):
        assert networkx.is_forest(graph.subgraph(nodes))
    assert all(not networkx.is_forest(graph.subgraph([*greedy, other])) for other in set(graph) - set(greedy))
    found = run(f, TopForest(graph), Forest(), 1000)
    assert found.value == pytest.approx(float(-f.c @ torch.linalg.solve(f.h, f.c)) / 2, rel=CONVERGED[torch.float64])


@pytest.mark.parametrize("g", [1, 3])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 6)])
def test_the_best_support_is_the_exhaustive_one(n: int, m: int, g: int) -> None:
    """Against the rows and columns of the whole quadratic form, P kron H."""
    a, b, r = normal(7, 2 * m, m), normal(7, 2 * g, g, seed=2), normal(7, g, m, seed=1)
    h, p = a.mT @ a, b.mT @ b
    z, gains = best_support(p, h, r, n)
    assert bool(((z != 0).any(1).sum(-1) == n).all())
    for i in range(7):
        whole, tried = torch.kron(p[i], h[i]), []
        for chosen in itertools.combinations(range(m), n):
            index = torch.tensor([row * m + c for row in range(g) for c in chosen])
            right = r[i].flatten()[index]
            tried.append(float(right @ torch.linalg.solve(whole[index][:, index], right)) / 2)
        flat = z[i].flatten()
        assert float(gains[i]) == pytest.approx(max(tried), rel=RTOL)
        assert float(r[i].flatten() @ flat - flat @ whole @ flat / 2) == pytest.approx(max(tried), rel=RTOL)


def test_a_support_of_a_singular_group_is_finite() -> None:
    zero = torch.zeros(3, 4, 4, dtype=torch.float64)
    z, gains = best_support(torch.zeros(3, 1, 1, dtype=torch.float64), zero, zero[:, :1], 2)
    assert bool(z.isfinite().all()) and not bool(gains.any())


@pytest.mark.parametrize(("n", "m", "said"), [(4, 4, "keeps no part"), (0, 4, "keeps no part"), (8, 16, "12,870 supports")])
def test_supports_that_cannot_be_tried_are_refused(n: int, m: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        supports(n, m)


def test_masks_and_values_are_chosen_together() -> None:
    groups = partition.nm_groups(1, SIZE, 4)
    f = quadratic()
    found = run(f, Cyclic(groups), Support(2), 40)
    assert all(int((f.x[g] != 0).sum()) == 2 for g in groups)
    by_size = quadratic()
    run(by_size, Cyclic([torch.arange(SIZE)]), Newton(), 1)
    kept = torch.cat([g[by_size.x[g].abs().topk(2).indices] for g in groups])
    pruned = quadratic()
    run(pruned, Cyclic([kept]), Newton(), 1)  # magnitude pruning, values refitted
    assert found.value <= pruned.value()
