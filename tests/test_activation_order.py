"""Where each row of an activation set lies: shuffled over many contexts."""

import activation_pieces
import numpy as np
import safetensors.torch
import torch
from activation_pieces import CPU, harvest_settings, order_of

from pipeline.activations.order import Order
from pipeline.config.activation_source import Harvest
from pipeline.contexts import Contexts
from pipeline.permutation import Permutation
from pipeline.tokens import TokenSet

inputs, pair = activation_pieces.inputs, activation_pieces.pair


def test_rows_beside_each_other_come_from_many_contexts(inputs):
    settings = Harvest(**harvest_settings(inputs, context_tokens=100, contexts_per_generation=50))
    order = Order(np.full(200, 100), settings)
    places_of_rows = order.places(1, CPU)
    context_of_place = torch.empty_like(places_of_rows)
    context_of_place[places_of_rows] = torch.arange(50 * 99) // 99
    for batch in context_of_place.split(99):
        assert len(batch.unique()) > 30  # 50 (1 - (1 - 1/50)^99) = 43 expected


def test_generations_of_the_same_size_are_shuffled_differently(inputs):
    order = Order(np.full(12, 16), Harvest(**harvest_settings(inputs)))
    assert not order.places(0, CPU).equal(order.places(1, CPU))


def test_rows_lie_where_the_order_puts_them(pair, tmp_path, inputs):
    order = order_of(pair[1])
    contexts = Contexts(TokenSet.open(inputs / "tokens"), 16)
    for generation in range(order.num_generations):
        # Independently of harvest and buffer: the contexts of the generation, position by position.
        harvested = []
        for index in Permutation(len(contexts), seed=7)(torch.arange(*order.context_range(generation))).tolist():
            context = contexts.read(np.array([index]))
            harvested += [(int(context.documents_BS[0, p]), p, int(context.tokens_BS[0, p])) for p in range(1, int(context.lengths_B[0]))]
        stored = safetensors.torch.load_file(tmp_path / "set" / f"{generation:06d}.safetensors")
        columns = [stored[name].tolist() for name in ("document", "position", "token")]
        on_disk = list(zip(*columns, strict=True))
        assert [on_disk[place] for place in order.places(generation, CPU).tolist()] == harvested
