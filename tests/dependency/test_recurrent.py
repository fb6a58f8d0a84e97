"""Recurrent layers lose inputs and nothing else; the graph does not look inside them, and they run as before."""

import pytest
import torch
from removal_cases import CASES, Net, block
from torch import nn

from tp_twoaxis import prune_to_flops
from tp_twoaxis.dependency.graph import build_graph
from tp_twoaxis.dependency.recurrent import RECURRENT_PRUNER, opaque_recurrent_layers


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}])
def test_inputs_leave_as_if_they_were_zero(kind, options):
    torch.manual_seed(0)
    layer, x = kind(7, 5, batch_first=True, **options), torch.randn(2, 4, 7)
    leaving, kept = [1, 4], [0, 2, 3, 5, 6]
    silent = x.clone()
    silent[..., leaving] = 0.0
    expected = layer(silent)[0]
    assert RECURRENT_PRUNER.get_in_channels(layer) == 7
    assert RECURRENT_PRUNER.get_out_channels(layer) == expected.shape[-1]
    RECURRENT_PRUNER.prune_in_channels(layer, leaving)
    torch.testing.assert_close(layer(x[..., kept])[0], expected)
    with pytest.raises(NotImplementedError, match="hidden channels"):
        RECURRENT_PRUNER.prune_out_channels(layer, [0])


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_lose_inputs(kind):
    torch.manual_seed(0)
    cell, x = kind(6, 3), torch.randn(2, 6)
    silent = x.clone()
    silent[:, 2] = 0.0
    expected = cell(silent)
    RECURRENT_PRUNER.prune_in_channels(cell, [2])
    torch.testing.assert_close(cell(x[:, [0, 1, 3, 4, 5]]), expected)


def test_the_block_changes_no_values_and_leaves_nothing_behind():
    case = CASES["LSTM that reads channels"]
    net, x = case.network(), case.inputs()
    expected, attributes = net(x), set(vars(net.rnn))
    with opaque_recurrent_layers(net):
        assert torch.equal(net(x), expected)
    assert set(vars(net.rnn)) == attributes
    graph = build_graph(net, x)
    assert len(graph.module2node) < 20
    assert graph.module2node[net.rnn].outputs


def test_a_layer_that_is_added_to_hidden_channels_stays_whole():
    def forward(net, x):
        x = net.a(x).mean(2).transpose(1, 2)
        return net.out(net.rnn(x)[0] + net.skip(x))

    torch.manual_seed(0)
    net = Net(
        forward, a=block(1, 12), rnn=nn.GRU(12, 8, batch_first=True), skip=nn.Linear(12, 8), out=nn.Linear(8, 4)
    ).eval()
    report = prune_to_flops(net, torch.randn(2, 1, 6, 5), "l2", flops=0.7, tolerance=0.2, repair=(), progress=False)
    assert any("hidden channels of rnn feed themselves back" in note for note in report.notes)
    assert net.skip.out_features == 8
