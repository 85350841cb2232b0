"""Where a model falls into blocks: values that all the work before them goes through, the outputs of residual blocks among them.

    n is a cut  <=>  every path from every site before n to the outputs goes through n

that is, n is a post-dominator of these sites. Between two cuts nothing but the cut (and what is made from the inputs alone, such as masks)
is handed on, so a block can be fitted from its own input to its own output.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewriter.graph import Graph, Node, Site, Value

SINK = "outputs"


def cuts(graph: Graph, sites: Sequence[Site]) -> list[tuple[Value, list[Site]]]:
    """The model's blocks in order: the value that each ends with, and its sites, of which it has at least one.

    Of several cuts in a row the last one before the next block's sites is taken. Sites behind the last cut are in no block.
    """
    import networkx as nx

    order = {node: i for i, node in enumerate(n for n in graph.nodes() if graph.body(n) == "")}
    towards = nx.DiGraph()
    for node in order:
        users = [user for value in graph.outputs(node) for user in graph.users(value) if user in order]
        towards.add_edges_from((user, node) for user in users)
        if not users and "assert" not in graph.op(node):
            towards.add_edge(SINK, node)
    above = nx.immediate_dominators(towards, SINK)

    def chain(node: Node) -> list[Node]:
        """What goes from here to the outputs goes through, in order."""
        found = []
        while node in above and above[node] not in (node, SINK):
            node = above[node]
            found.append(node)
        return found

    ends = {site.id: graph.producer(site.places[-1].y) for site in sites}
    placed = sorted((s for s in sites if ends[s.id] in order), key=lambda s: order[ends[s.id]])
    blocks, waiting, shared = list[tuple[Value, list[Site]]](), list[Site](), set[Node]()
    for i, site in enumerate(placed):
        waiting.append(site)
        through = chain(ends[site.id])
        shared = shared.intersection(through) if i else set(through)
        after = ends[placed[i + 1].id] if i + 1 < len(placed) else None
        for node in reversed([n for n in through if n in shared and (after is None or order[n] < order[after])]):
            value = graph.outputs(node)[0]
            if _is_float(graph, value) and (after is None or nx.has_path(towards, after, node)):
                blocks.append((value, waiting))
                waiting = []
                break
    return blocks


def _is_float(graph: Graph, value: Value) -> bool:
    dtype = graph.dtype(value)
    return dtype is not None and dtype.is_floating_point and graph.can_tap(value)
