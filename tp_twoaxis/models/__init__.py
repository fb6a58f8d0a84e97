"""Models by name for the command line, the benchmark and the examples, and safe loading of weights."""

from tp_twoaxis.models.cifar_networks import cifar_mobilenet_v2, cifar_resnet18, cifar_vgg16_bn
from tp_twoaxis.models.cifar_resnet import (
    BasicBlock,
    CifarResNet,
    cifar_resnet20_conv_shortcut,
    cifar_resnet20_option_a,
    cifar_resnet56_conv_shortcut,
    cifar_resnet56_option_a,
)
from tp_twoaxis.models.factory import available_models, build_model
from tp_twoaxis.models.weight_files import load_weights

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "available_models",
    "build_model",
    "cifar_mobilenet_v2",
    "cifar_resnet18",
    "cifar_resnet20_conv_shortcut",
    "cifar_resnet20_option_a",
    "cifar_resnet56_conv_shortcut",
    "cifar_resnet56_option_a",
    "cifar_vgg16_bn",
    "load_weights",
]
