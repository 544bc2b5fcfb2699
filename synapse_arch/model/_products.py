"""How a compiled step of decoding multiplies on a CPU: few rows with matrices that memory must deliver."""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

FEW = 8
"""Rows up to which a loop over the weights, limited by memory, is faster than the products of BLAS libraries."""

_aten = torch.ops.aten


class StreamedProducts(CustomGraphPass):
    """A pass of torch.compile's inductor that writes products x W of few rows as sums, which it then makes loops of.

    The loops read every row of a layer's weights once, each with all rows of x.
    """

    def __call__(self, graph: Graph) -> None:
        """Changes the graph in place."""
        for node in graph.find_nodes(op="call_function", target=_aten.mm.default):
            x, w = node.args  # (n, D_in), (D_in, D_out)
            if x.meta["val"].device.type != "cpu" or x.meta["val"].shape[0] > FEW:
                continue
            with graph.inserting_before(node):
                weights = graph.call_function(_aten.permute.default, (w, [1, 0]))
                weights = graph.call_function(_aten.unsqueeze.default, (weights, 1))
                products = graph.call_function(_aten.mul.Tensor, (weights, x))  # (D_out, n, D_in): weights outermost
                sums = graph.call_function(_aten.sum.dim_IntList, (products, [-1]))
                y = graph.call_function(_aten.permute.default, (sums, [1, 0]))
            x.meta["inductor_realize_to_strides"] = True  # or what x is made of would be made again for every weight
            y.meta.update(node.meta)
            node.replace_all_uses_with(y)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        """What names this pass in inductor's cache."""
        return get_hash_for_files((__file__,))
