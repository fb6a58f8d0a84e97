import pytest
import torch

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.devices import check_device


def test_devices_that_are_there():
    check_device("cpu")
    check_device(torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cdua", "--device: expected one of cpu, cuda, mps, xpu, got 'cdua'; did you mean 'cuda'"),
        ("gpu", "got 'gpu'"),
        ("cuda:99", "--device: expected a device of this machine, got 'cuda:99'"),
    ],
)
def test_devices_that_are_not(device, message):
    with pytest.raises(TwoAxisError, match=message):
        check_device(device, "--device")
