"""Passes that pause: what they stop at, how chunks join, how much memory they count on, and how they end."""

import copy
import threading

import pytest
import torch
from cases import batches
from repair_cases import Residual, remove_channels
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.repair import sequential
from tp_twoaxis.repair.chunk_memory import ChunkMemory, LiveTensors
from tp_twoaxis.repair.images import ImageChunk, RepairImages
from tp_twoaxis.repair.lockstep import Lockstep
from tp_twoaxis.repair.paused_pass import LAYER, PausingNetwork
from tp_twoaxis.runtime.inputs import Inputs


class Ordered(nn.Module):
    """Two layers with a sum and rectifiers; their order may depend on the images."""

    def __init__(self, *, by_data=False):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.by_data = by_data

    def forward(self, x):
        if self.by_data and x[0, 0] > 0:
            return self.a(self.b(x))
        y = torch.relu_(self.norm(self.a(x)))
        return self.b(y).relu() + y


def layers_of(net):
    return {"a": net.a, "b": net.b}


def chunk(values, *, held_out=False):
    return ImageChunk(Inputs((torch.full((2, 3), float(values)),)), held_out)


def run_lockstep(net, chunks, memory, replay=lambda *_: None):
    seen = []
    norms = {"norm": net.norm}
    dense = copy.deepcopy(net)
    with (
        PausingNetwork(net, layers_of(net), norms, after_layers=False) as pruned,
        PausingNetwork(dense, layers_of(dense), {"norm": dense.norm}, after_layers=True) as other,
    ):
        lockstep = Lockstep(pruned, other, iter(chunks), memory)
        lockstep.run(lambda place: seen.append((place.number, place.kind, place.name, len(place.pruned))), replay)
    return seen, lockstep.joined


@torch.no_grad()
def test_places_come_in_the_order_of_the_network_and_chunks_join_before_layers():
    net = Ordered().eval()
    replayed = []
    seen, joined = run_lockstep(
        net,
        [chunk(1), chunk(2, held_out=True), chunk(3)],
        ChunkMemory([1000, 1000, 1000, 100, 100, 100], 4100),
        lambda number, kind, name, values: replayed.append((number, kind, name)),
    )
    assert seen == [
        (0, "layer", "a", 2),
        (1, "norm", "norm", 2),
        (2, "rectifier", "a rectifier", 2),
        (3, "layer", "b", 3),
        (4, "rectifier", "a rectifier", 3),
        (5, "sum", "a sum", 3),
    ]
    assert joined == [2, 2, 2, 4, 4, 4]  # without those held out
    assert replayed == [(0, "layer", "a"), (1, "norm", "norm"), (2, "rectifier", "a rectifier")]


@torch.no_grad()
def test_an_order_that_depends_on_the_images_is_refused_and_nothing_keeps_running():
    running = threading.active_count()
    with pytest.raises(TwoAxisError, match=r"expected a to run next, got b - the order .* choose 'patch' or 'ridge'"):
        run_lockstep(Ordered(by_data=True).eval(), [chunk(-1), chunk(1)], ChunkMemory([1] * 6, 100))
    assert threading.active_count() == running


@torch.no_grad()
def test_what_the_model_raises_is_raised_and_its_hooks_are_gone():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            raise ValueError(f"no {len(self.a(x))}")

    net = Failing()
    with (
        PausingNetwork(net, {"a": net.a}, {}, after_layers=False) as network,
        network.start(Inputs((torch.zeros(4, 3),))) as run,
    ):
        assert run.resume().kind == LAYER
        with pytest.raises(ValueError, match="no 4"):
            run.resume()
        assert run.resume() is None
    assert not net.a._forward_hooks
    assert not net.a._forward_pre_hooks


@torch.no_grad()
def test_a_paused_pass_goes_on_with_what_its_tensors_are_then():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with PausingNetwork(net, {}, {}, after_layers=False) as network, network.start(Inputs((torch.ones(1, 2),))) as run:
        (x, low, high) = run.resume().values
        assert (low, high) == (0.0, float("inf"))
        x.copy_(torch.tensor([[-1.0, 7.0]]))
        results = []
        network.on_result = results.append  # of later passes only
        assert run.resume() is None
    assert not results


def test_live_tensors_are_counted_until_they_are_gone():
    live = LiveTensors()
    a, b = torch.zeros(10), torch.zeros(5)
    for tensor in (a, a[:4], b):
        live.add(tensor)
    assert live.bytes() == 60
    assert live.bytes([a, torch.zeros(1)]) == 64
    del a, tensor
    assert live.bytes() == 20


@pytest.mark.parametrize("limit", [9, 50, 400, 4000])
def test_chunks_fit_beside_what_is_held_out(limit):
    memory = ChunkMemory([1, 1, 1], limit)
    size = memory.chunk_images
    assert 1 <= size <= 256
    assert memory.has_room(0, 0, size + -(-size // 4)) or limit < 10
    assert limit < 100 or size <= limit / 5


def test_chunks_are_every_image_once():
    x = torch.arange(70.0)[:, None]
    images = RepairImages([x[:5], x[5:6], x[6:50], x[50:]], None, False)
    with images.chunks(8) as chunks:
        chunks = list(chunks)
    fitted = torch.cat([inputs.images for inputs, held_out in chunks if not held_out])
    held_out = torch.cat([inputs.images for inputs, held_out in chunks if held_out])
    assert held_out.flatten().tolist() == list(range(4, 70, 5))
    assert torch.cat([fitted, held_out]).flatten().sort().values.equal(x.flatten())
    assert fitted.flatten().sort().values.equal(fitted.flatten())
    assert {len(inputs) for inputs, held_out in chunks[:-2] if not held_out} == {8}


def test_chunks_are_of_one_shape():
    images = RepairImages([torch.zeros(3, 1), torch.zeros(2, 4), torch.zeros(9, 4)], None, False, hold_out=False)
    with images.chunks(4) as chunks:
        assert [tuple(inputs.images.shape) for inputs, _ in chunks] == [(3, 1), (4, 4), (4, 4), (3, 4)]


def test_how_a_loader_batches_does_not_matter_to_what_fits():
    torch.manual_seed(0)
    net = Residual()
    dense, masks = remove_channels(net, torch.randn(1, 3, 8, 8), {"a": [0, 1]})
    x, used = batches(80, 80)[0][0], []
    for size in (5, 80):
        images = RepairImages(list(x.split(size)), None, False, max_memory=2.5e-4)
        used.append(sequential.refit_in_order(copy.deepcopy(net), dense, masks, images)[1])
    assert used[0] == used[1]
    assert used[0][0] < used[0][1]


@pytest.mark.parametrize("joint", [False, True])
def test_chunks_change_nothing_but_rounding(joint, monkeypatch):
    def repaired(size):
        monkeypatch.setattr("tp_twoaxis.repair.chunk_memory.CHUNK_IMAGES", size)
        torch.manual_seed(3)
        net = Residual().double()
        dense, masks = remove_channels(net, torch.randn(1, 3, 8, 8).double(), {"stem": [5], "a": [0, 1], "c": [3]})
        x = batches(80, 80)[0][0].double()
        sequential.refit_in_order(net, dense, masks, RepairImages([x], None, False), joint=joint)
        return net.state_dict()

    whole, parts = repaired(256), repaired(10)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-6, atol=1e-8)
