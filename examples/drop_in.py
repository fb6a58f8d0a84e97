"""An ordinary Torch-Pruning script in which one line changes: the importance.

python examples/drop_in.py
"""

import argparse

import torch
import torch_pruning as tp
import torchvision

from tp_twoaxis import TwoAxisImportance, calibrate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", type=int, default=128, help="generated images to calibrate on")
args = parser.parse_args()

model = torchvision.models.resnet18(num_classes=10).eval()
example_inputs = torch.randn(1, 3, 64, 64)
loader = [(torch.randn(32, 3, 64, 64), torch.randint(10, (32,))) for _ in range(args.images // 32)]

# importance = tp.importance.GroupMagnitudeImportance(p=2)
importance = TwoAxisImportance(calibrate(model, loader))

pruner = tp.pruner.BasePruner(
    model,
    example_inputs,
    importance=importance,
    global_pruning=True,
    pruning_ratio=0.3,  # of the channels; prune_to_flops takes a target in multiply-adds instead
    ignored_layers=[model.fc],
)
before, parameters = tp.utils.count_ops_and_params(model, example_inputs)
pruner.step()
after, left = tp.utils.count_ops_and_params(model, example_inputs)
print(f"MACs {before / 1e6:.0f} M -> {after / 1e6:.0f} M, parameters {parameters / 1e6:.2f} M -> {left / 1e6:.2f} M")
