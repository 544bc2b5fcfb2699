"""How a compiled step of decoding multiplies: few rows with matrices that memory must deliver."""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

FEW = 8
"""Rows up to which a CPU's loop over the weights, limited by memory, is faster than the products of BLAS libraries; a
GPU's is for one row only."""

BLOCK = 16
"""Inputs that are summed together where the weights lie input by input."""

_aten = torch.ops.aten


class StreamedProducts(CustomGraphPass):
    """A pass of torch.compile's inductor that writes products x W of few rows as sums, which it then makes loops of.

    A layer's weights lie output by output: the loops read every row of them once, each with all rows of x. Those of
    experts, and states, lie input by input and are summed over blocks of inputs, each read in as many streams at once.
    """

    def __call__(self, graph: Graph) -> None:
        """Changes the graph in place."""
        for target, write in ((_aten.mm.default, _by_output), (_aten.bmm.default, _by_input)):
            for node in graph.find_nodes(op="call_function", target=target):
                x, w = node.args  # ([b,] n, D_in), ([b,] D_in, D_out)
                if x.meta["val"].shape[-2] > (FEW if _on_cpu(x) else 1):
                    continue
                with graph.inserting_before(node):
                    y = write(graph, x, w)
                x.meta["inductor_realize_to_strides"] = True  # or what it is made of would be made for every weight
                y.meta.update(node.meta)
                node.replace_all_uses_with(y)
                graph.erase_node(node)

    def uuid(self) -> bytes:
        """What names this pass in inductor's cache."""
        return get_hash_for_files((__file__,))


def _on_cpu(x: Node) -> bool:
    return bool(x.meta["val"].device.type == "cpu")


def _by_output(graph: Graph, x: Node, w: Node) -> Node:
    """(n, D_in) and (D_in, D_out) -> (n, D_out)."""
    weights = graph.call_function(_aten.permute.default, (w, [1, 0]))
    weights = graph.call_function(_aten.unsqueeze.default, (weights, 1))
    products = graph.call_function(_aten.mul.Tensor, (weights, x))  # (D_out, n, D_in): weights outermost
    sums = graph.call_function(_aten.sum.dim_IntList, (products, [-1]))
    return graph.call_function(_aten.permute.default, (sums, [1, 0]))


def _by_input(graph: Graph, x: Node, w: Node) -> Node:
    """(b, n, D_in) and (b, D_in, D_out) -> (b, n, D_out)."""
    batch, rows, inputs = x.meta["val"].shape
    block = BLOCK if _on_cpu(x) and inputs % BLOCK == 0 else inputs
    blocks = inputs // block
    left = graph.call_function(_aten.reshape.default, (x, [batch, rows, blocks, block, 1]))
    right = graph.call_function(_aten.reshape.default, (w, [batch, 1, blocks, block, w.meta["val"].shape[2]]))
    products = graph.call_function(_aten.mul.Tensor, (left, right))
    sums = graph.call_function(_aten.sum.dim_IntList, (products, [3]))
    return graph.call_function(_aten.sum.dim_IntList, (sums, [2]))
