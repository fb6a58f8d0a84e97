"""ResNet-18, VGG-16 and MobileNetV2 for images of 32x32 pixels, made from torchvision's.

Widths, blocks and initialisation are those of the ImageNet networks; only the first layers, which would shrink
a small image to nothing, and the heads differ, as usual for CIFAR. Layers keep torchvision's names, and
torchvision is imported only when a network is built.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from typing import Any

from torch import nn

from tp_twoaxis.errors import TwoAxisError


def cifar_resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18 with a 3x3 stem of stride 1 and no max pooling, ``[N, 3, 32, 32] -> [N, num_classes]``.

    The last stage is 4x4; 11,220,132 parameters with 100 classes.

    Raises:
        TwoAxisError: torchvision is missing.

    Example:
        >>> sum(p.numel() for p in cifar_resnet18(100).parameters())
        11220132
    """
    model: nn.Module = _torchvision("cifar_resnet18").resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def cifar_vgg16_bn(num_classes: int = 10) -> nn.Module:
    """VGG-16 with BatchNorm and one linear layer as its head, ``[N, 3, 32, 32] -> [N, num_classes]``.

    Five poolings leave one position of 512 channels, which is all the head sees; 14,774,436 parameters with
    100 classes. Larger images work too: the positions are averaged.

    Raises:
        TwoAxisError: torchvision is missing.

    Example:
        >>> sum(p.numel() for p in cifar_vgg16_bn(100).parameters())
        14774436
    """
    vgg = _torchvision("cifar_vgg16_bn").vgg
    # not torchvision's VGG class: it would first make and fill a head of 124 million weights
    features: nn.Module = vgg.make_layers(vgg.cfgs["D"], batch_norm=True)
    classifier = nn.Linear(512, num_classes)
    for module in features.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    nn.init.normal_(classifier.weight, 0, 0.01)
    nn.init.zeros_(classifier.bias)
    parts = {"features": features, "avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts, classifier=classifier))


def cifar_mobilenet_v2(num_classes: int = 10) -> nn.Module:
    """MobileNetV2 with strides of 1 in the stem and in the stage of 24 channels, ``[N, 3, 32, 32] -> [N, classes]``.

    The last stage is 4x4, and there is no dropout; 2,351,972 parameters with 100 classes.

    Raises:
        TwoAxisError: torchvision is missing.

    Example:
        >>> sum(p.numel() for p in cifar_mobilenet_v2(100).parameters())
        2351972
    """
    # expansion, channels, blocks, stride of the first block: Sandler et al. 2018, table 2, but for 24's stride
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    library = _torchvision("cifar_mobilenet_v2")
    model: Any = library.mobilenet_v2(num_classes=num_classes, inverted_residual_setting=stages, dropout=0.0)
    model.features[0][0].stride = (1, 1)
    network: nn.Module = model
    return network


def _torchvision(name: str) -> Any:
    try:
        return importlib.import_module("torchvision.models")
    except ImportError as error:
        raise TwoAxisError(f"{name}: needs torchvision, it is missing; install tp-twoaxis[cli]") from error
