"""The CIFAR ResNets of He et al. 2016 (section 4.2), with either kind of shortcut."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tp_twoaxis.errors import TwoAxisError


class ZeroChannels(nn.InstanceNorm2d):
    """Channels of zeros ``[N, num_features, H, W]`` to go with ``[N, any, H, W]``, whose values are unused.

    The class is an instance norm only by type: Torch-Pruning counts and removes the channels of norm layers, so
    that it can prune these zeros as well. It has no parameters and no buffers.

    Example:
        >>> ZeroChannels(8)(torch.ones(2, 16, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the zeros in the input's dtype, on its device."""
        shape = (input.shape[0], self.num_features, *input.shape[2:])
        # Torch-Pruning follows autograd: a product with a grad_fn, but none that leads back to the input.
        leaf = torch.zeros(shape, dtype=input.dtype, device=input.device, requires_grad=torch.is_grad_enabled())
        return leaf * 1


class PadShortcut(nn.Module):
    """Option A of He et al. 2016: every second pixel, with zero channels in front and behind.

    ``[N, C, H, W] -> [N, C + 2 * pad, ceil(H / 2), ceil(W / 2)]``, no parameters, no multiplications.

    Written with ``F.pad`` or with plain zeros in ``torch.cat``, Torch-Pruning 1.6.1 takes the padding for an
    element-wise operation and couples channel i of the narrow stream with channel i of the wide one instead
    of i + pad: pruning from the narrow stream runs but removes the wrong channels, pruning from the wide one
    breaks the forward pass. With :class:`ZeroChannels` it knows the width of all three parts of the concatenation
    and maps every channel exactly; the dense output is the same.
    """

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.front = ZeroChannels(pad)
        self.back = ZeroChannels(pad)

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and widen."""
        x = x[:, :, ::2, ::2]
        return torch.cat([self.front(x), x, self.back(x)], dim=1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, ``[N, C_in, H, W] -> [N, C_out, H / stride, W / stride]``."""

    def __init__(self, in_channels: int, channels: int, shortcut: Literal["pad", "conv"]) -> None:
        super().__init__()
        widens = in_channels != channels
        stride = 2 if widens else 1
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if widens and shortcut == "pad":
            self.downsample = PadShortcut((channels - in_channels) // 2)
        elif widens:
            convolution = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Residual branch plus shortcut, then ReLU."""
        out = F.relu(self.bn1(self.conv1(x)))
        # Torch-Pruning walks back along the last operand first and so meets the stem before any wider stage: with
        # option A its residual group is then rooted at 16 channels that every stage shares.
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class CifarResNet(nn.Module):
    """CIFAR ResNet of He et al. 2016: stages of 16, 32 and 64 channels, ``[N, 3, H, W] -> [N, classes]``.

    Args:
        depth: 6n + 2 with n blocks a stage: 20, 32, 44, 56, 110.
        num_classes: outputs of the head.
        shortcut: ``"pad"`` is option A (parameter-free, head called ``linear``), ``"conv"`` is option B
            (1x1 convolution + BN where the shape changes, head called ``fc``); the two heads' names are those
            of the published checkpoints of either kind.

    Every channel group that Torch-Pruning 1.6.1 finds in either kind prunes to a working network whose output
    equals the dense one's with these channels silenced. With ``"pad"`` the three residual streams form one
    group of 16 channels (channel i of stage 1 is channel 8 + i of stage 2 and 24 + i of stage 3); what the
    wider stages add around them is coupled to zeros only and is reached through the group of a later stage's
    convolution.

    Raises:
        TwoAxisError: if the depth is not 6n + 2 or the shortcut is unknown.

    Example:
        >>> CifarResNet(depth=20, shortcut="pad")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, shortcut: Literal["pad", "conv"] = "conv") -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise TwoAxisError(f"expected a depth of 6n + 2 (20, 32, 44, 56, 110), got {depth}; choose one of these")
        if shortcut not in ("pad", "conv"):
            raise TwoAxisError(f"expected shortcut 'pad' or 'conv', got {shortcut!r}; choose one of the two")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        for stage, (before, channels) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            widths = [before] + [channels] * (blocks - 1)
            self.add_module(f"layer{stage}", nn.Sequential(*(BasicBlock(w, channels, shortcut) for w in widths)))
        self.head_name = "linear" if shortcut == "pad" else "fc"
        self.add_module(self.head_name, nn.Linear(64, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        logits: Tensor = self.get_submodule(self.head_name)(x.mean(dim=(2, 3)))
        return logits

    def unprunable_layers(self) -> list[nn.Module]:
        """Layers whose outputs must all stay: only the head, whose outputs are the classes."""
        return [self.get_submodule(self.head_name)]


def cifar_resnet20_option_a(num_classes: int = 10) -> CifarResNet:
    """ResNet-20 with parameter-free shortcuts, 269,722 parameters with BN.

    Example:
        >>> sum(p.numel() for p in cifar_resnet20_option_a().parameters())
        269722
    """
    return CifarResNet(20, num_classes, "pad")


def cifar_resnet20_conv_shortcut(num_classes: int = 10) -> CifarResNet:
    """ResNet-20 with 1x1-convolution shortcuts, 272,474 parameters with BN.

    Example:
        >>> sum(p.numel() for p in cifar_resnet20_conv_shortcut().parameters())
        272474
    """
    return CifarResNet(20, num_classes, "conv")


def cifar_resnet56_option_a(num_classes: int = 10) -> CifarResNet:
    """ResNet-56 with parameter-free shortcuts."""
    return CifarResNet(56, num_classes, "pad")


def cifar_resnet56_conv_shortcut(num_classes: int = 10) -> CifarResNet:
    """ResNet-56 with 1x1-convolution shortcuts."""
    return CifarResNet(56, num_classes, "conv")
