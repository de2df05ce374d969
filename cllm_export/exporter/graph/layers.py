"""Builds a decoder's graph from a few traced layers by repeating them.

Tracing and the passes take half a second per layer, and layers of one kind give the same nodes. So only three periods
of layers are traced, and the middle one is repeated. A period is the unit that repeats: one layer, or for example six
layers of which one has full attention.

The result must equal the graph of tracing every layer; this is checked, not assumed. The first period must match the
second node for node, and the second the third. They must agree in operators, attributes, constants and the inputs that
each takes from the period before. If they do not, or if a layer's weights have other shapes, every layer is traced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import onnx_ir as ir
from transformers import PretrainedConfig

from cllm_export.bundle.contract import HIDDEN, cache_names, hidden_name, is_hidden
from cllm_export.exporter.graph.model import DecoderGraph

MAX_PERIOD = 8
TRACED_PERIODS = 3
LAYER = re.compile(r"(?<=^model\.layers\.)(\d+)(?=\.)|(?<=^past_key\.)(\d+)$|(?<=^past_value\.)(\d+)$")
"""Matches the layer number in the name of a weight or of a cache input."""


def repeated_period(config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The period in layers, judged by config and weight shapes; None if none fits or it repeats too few times."""
    total = int(config.num_hidden_layers)
    kinds = [
        (tuple(values), by_layer)
        for values, by_layer in zip(_lists(config, total), _shapes(shapes, total), strict=True)
    ]
    for period in range(1, MAX_PERIOD + 1):
        if all(kinds[layer] == kinds[layer - period] for layer in range(period, total)):
            return period if total > TRACED_PERIODS * period and total % period == 0 else None
    return None


def repeat_layers(graph: DecoderGraph, period: int, total: int) -> bool:
    """Repeat the middle of three traced periods until there are ``total`` layers; False if the periods differ."""
    periods = [_nodes_of(graph, range(index * period, (index + 1) * period)) for index in range(TRACED_PERIODS)]
    after = _nodes_of(graph, range(period * TRACED_PERIODS, period * TRACED_PERIODS + 1))
    bodies = [
        [node for node in nodes if node not in set(following)]
        for nodes, following in zip(periods, [*periods[1:], after], strict=True)
    ]
    if not _alike(graph, bodies, period):
        return False
    copies = total // period - TRACED_PERIODS
    _Repeater(graph, period, bodies, copies).run()
    return True


class _Origin(NamedTuple):
    """Describes an input of a node, so that equal layers have equal descriptions."""

    kind: str
    where: Any


def _alike(graph: DecoderGraph, bodies: list[list[ir.Node]], period: int) -> bool:
    told = [_told(graph, body, bodies[index - 1] if index else [], index * period) for index, body in enumerate(bodies)]
    # The first period reads the embedding where the others read the layer before. The last one includes the tail.
    size = len(told[1])
    same_end = len(told[2]) >= size and told[2][:size] == told[1]
    same_start = len(told[0]) == size and all(
        one[:3] == other[:3] and all(a == b or b.kind == "before" for a, b in zip(one[3], other[3], strict=True))
        for one, other in zip(told[0], told[1], strict=True)
    )
    positions = {node: index for index, node in enumerate(graph.graph)}
    contiguous = size > 0 and max(positions[node] for node in bodies[1]) < min(positions[node] for node in bodies[2])
    return same_start and same_end and contiguous


def _told(
    graph: DecoderGraph, body: list[ir.Node], before: list[ir.Node], first: int
) -> list[tuple[str, str, str, tuple[_Origin, ...]]]:
    own = {output: (index, place) for index, node in enumerate(body) for place, output in enumerate(node.outputs)}
    earlier = {output: (index, place) for index, node in enumerate(before) for place, output in enumerate(node.outputs)}

    def origin(value: ir.Value | None) -> _Origin:
        if value is None:
            return _Origin("none", None)
        if value in own:
            return _Origin("own", own[value])
        if value in earlier:
            return _Origin("before", earlier[value])
        if value.const_value is not None:
            return _Origin("constant", value.const_value.numpy().tolist())
        if (source := graph.weights.get(str(value.name))) is not None:
            tensors = tuple(_shifted(name, -first) for name in source.tensors)
            return _Origin("weight", (tensors, source.transposed, source.offset))
        return _Origin("shared", _shifted(str(value.name), -first))

    return [
        (node.op_type, node.domain, _attributes(node), tuple(origin(value) for value in node.inputs)) for node in body
    ]


class _Repeater:
    """Inserts copies of the middle period between it and the last period, and renumbers the layers."""

    def __init__(self, graph: DecoderGraph, period: int, bodies: list[list[ir.Node]], copies: int) -> None:
        self._graph = graph
        self._period = period
        self._bodies = bodies
        self._copies = copies
        self._outputs = {str(value.name): value for value in graph.graph.outputs}
        self._inputs = {str(value.name): value for value in graph.graph.inputs}

    def run(self) -> None:
        graph, period = self._graph, self._period
        first, middle, last = self._bodies
        self._renumber_last()
        before, template = first, middle
        anchor, previous = middle[-1], middle
        for index in range(self._copies):
            copied = self._copy(template, before, previous, (index + 1) * period)
            graph.graph.insert_after(anchor, copied)
            anchor, previous = copied[-1], copied
        produced = {
            a: b for x, y in zip(middle, previous, strict=True) for a, b in zip(x.outputs, y.outputs, strict=True)
        }
        copies = set(previous)
        for node in [node for node in graph.graph if node in set(last) or self._is_behind(node, set(last))]:
            if node in copies:
                continue
            for place, value in enumerate(node.inputs):
                if value in produced:
                    node.replace_input_with(place, produced[value])
        self._order()

    def _is_behind(self, node: ir.Node, last: set[ir.Node]) -> bool:
        return any(value is not None and value.producer() in last for value in node.inputs)

    def _copy(
        self, template: list[ir.Node], before: list[ir.Node], previous: list[ir.Node], shift: int
    ) -> list[ir.Node]:
        """Copy the template ``shift`` layers later. Values from the period before it are read from ``previous``."""
        values = {
            a: b for x, y in zip(before, previous, strict=True) for a, b in zip(x.outputs, y.outputs, strict=True)
        }
        copied = []
        for node in template:
            inputs = [
                values.get(value) or self._input(value, shift) if value is not None else None for value in node.inputs
            ]
            twin = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                version=node.version,
            )
            for old, new in zip(node.outputs, twin.outputs, strict=True):
                new.shape, new.type = old.shape, old.type
                values[old] = new
                if str(old.name) in self._outputs:
                    new.name = _shifted_output(str(old.name), shift)
                    self._outputs[str(new.name)] = new
                elif is_hidden(str(old.name)):
                    new.name = _shifted_hidden(str(old.name), shift)
            copied.append(twin)
        return copied

    def _input(self, value: ir.Value, shift: int) -> ir.Value:
        """The matching input of the layer ``shift`` layers later. An input that layers share is returned unchanged."""
        name = _shifted(str(value.name), shift)
        if name == value.name or value.producer() is not None or value.const_value is not None:
            return value
        if name not in self._inputs:
            new = ir.Value(name=name, shape=value.shape, type=value.type)
            self._inputs[name] = new
            if (source := self._graph.weights.get(str(value.name))) is not None:
                tensors = tuple(_shifted(tensor, shift) for tensor in source.tensors)
                self._graph.weights[name] = replace(source, tensors=tensors)
        return self._inputs[name]

    def _renumber_last(self) -> None:
        """Give layers of the last period their final numbers, highest first so that no two names collide."""
        shift, first = self._copies * self._period, (TRACED_PERIODS - 1) * self._period
        for value in [output for node in self._bodies[-1] for output in node.outputs if is_hidden(str(output.name))]:
            value.name = _shifted_hidden(str(value.name), shift)
        for values, rename in ((self._inputs, _shifted), (self._outputs, _shifted_output)):
            moved = {name: value for name, value in values.items() if (_number(name) or -1) >= first}
            for name, value in sorted(moved.items(), key=lambda item: -(_number(item[0]) or 0)):
                del values[name]
                new = rename(name, shift)
                values[new] = value
                value.name = new
                if (source := self._graph.weights.pop(name, None)) is not None:
                    tensors = tuple(_shifted(tensor, shift) for tensor in source.tensors)
                    self._graph.weights[new] = replace(source, tensors=tensors)

    def _order(self) -> None:
        """Order inputs and outputs as in the contract: first those of no layer, then each layer's, then weights."""
        total = 1 + max(_number(name) or 0 for name in self._outputs)
        pairs = list(cache_names(total))
        _reorder(self._graph.graph.inputs, self._inputs, [past for past, _ in pairs])
        _reorder(self._graph.graph.outputs, self._outputs, [present for _, present in pairs])


def _reorder(values: Any, named: dict[str, ir.Value], caches: list[str]) -> None:
    """Put cache values in layer order, from the position of the first one on."""
    names = [str(value.name) for value in values]
    start = min(names.index(name) for name in caches if name in names)
    head = names[:start]
    tail = [name for name in named if name not in set(caches) and name not in set(head)]
    values.clear()
    values.extend([named[name] for name in (*head, *caches, *tail)])


def _nodes_of(graph: DecoderGraph, layers: range) -> list[ir.Node]:
    """Every node that depends on an input of one of these layers, in graph order."""
    reached: set[ir.Node] = set()
    nodes = []
    for node in graph.graph:
        if any(
            value is not None and (value.producer() in reached or _number(str(value.name)) in layers)
            for value in node.inputs
        ):
            reached.add(node)
            nodes.append(node)
    return nodes


def _attributes(node: ir.Node) -> str:
    return repr(
        sorted((name, str(attribute.type), str(attribute.value)) for name, attribute in node.attributes.items())
    )


def _number(name: str) -> int | None:
    match = LAYER.search(name.replace("present_", "past_"))
    return int(match[0]) if match else None


def _shifted(name: str, shift: int) -> str:
    return LAYER.sub(lambda match: str(int(match[0]) + shift), name)


def _shifted_output(name: str, shift: int) -> str:
    return _shifted(name.replace("present_", "past_"), shift).replace("past_", "present_")


def _shifted_hidden(name: str, shift: int) -> str:
    return hidden_name(int(name.removeprefix(HIDDEN)) + shift)


def _lists(config: PretrainedConfig, total: int) -> Iterable[tuple[Any, ...]]:
    """The config's entries for each layer, taken from its lists with one entry per layer."""
    lists = [value for _, value in sorted(config.to_dict().items()) if isinstance(value, list) and len(value) == total]
    return [tuple(repr(values[layer]) for values in lists) for layer in range(total)]


def _shapes(shapes: Mapping[str, tuple[int, ...]], total: int) -> list[dict[str, tuple[int, ...]]]:
    by_layer: list[dict[str, tuple[int, ...]]] = [{} for _ in range(total)]
    for name, shape in shapes.items():
        number = _number(name)
        if number is not None and number < total:
            by_layer[number][_shifted(name, -number)] = shape
    return by_layer
