"""Prune a MobileNetV2 to widths that are multiples of 8, as mobile hardware likes them.

The expansion, its depthwise convolution and the projection's inputs lose the same channels.

    python examples/mobilenet.py                                # random weights, the digits inside scikit-learn
    python examples/mobilenet.py --pretrained --data FOLDER     # FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg
"""

import argparse

import torch
import torchvision
from torch.nn import functional as F

from tp_twoaxis import calibrate, load_pruned, prune_to_flops, save_pruned
from tp_twoaxis.data import ArrayDataset, digits, make_loader, open_dataset
from tp_twoaxis.training import finetune
from tp_twoaxis.training.evaluation import accuracy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of images, a sub-folder for each class; default: digits")
parser.add_argument("--size", type=int, default=64, help="pixels a side; 224 for ImageNet's networks and photographs")
parser.add_argument("--pretrained", action="store_true", help="download published weights")
parser.add_argument("--flops", type=float, default=0.5, help="share of the multiply-adds to keep")
parser.add_argument("--images", type=int, default=256, help="images to calibrate and to test on")
parser.add_argument("--batches", type=int, default=30, help="batches of 32 to fine-tune on")
parser.add_argument("--out", default="mobilenet-pruned.safetensors", help="where to save the pruned network")
args = parser.parse_args()


def open_images(split):
    if args.data:
        return open_dataset(args.data, split=split, image_size=args.size)
    small = digits("train" if split == "train" else "test")  # 8x8 and grey: enlarge, and three channels
    pixels = F.interpolate(small.images.float(), size=args.size).byte().expand(-1, 3, -1, -1)
    return ArrayDataset(pixels, small.labels, mean=(0.5,) * 3, std=(0.5,) * 3)


train = open_images("train")
test = make_loader(open_images("val"), 32, args.images)
calibration = make_loader(train, 32, args.images, seed=1)
classes = int(train.labels.max()) + 1
example = torch.randn(1, 3, args.size, args.size)


def build():
    model = torchvision.models.mobilenet_v2(weights="DEFAULT" if args.pretrained else None)
    model.classifier[1] = torch.nn.Linear(model.last_channel, classes)
    return model


model = build()
stats = calibrate(model, calibration)
report = prune_to_flops(
    model, example, "local", flops=args.flops, stats=stats, loader=calibration, round_to=8, tolerance=0.02
)
print(report)

finetune(model, make_loader(train, 32, shuffle=True), max_batches=args.batches)
right, total = accuracy(model, test)
print(f"accuracy after fine-tuning: {right:.3f} of {total} images")

save_pruned(model, args.out, report)
loaded = load_pruned(args.out, build)
assert torch.equal(loaded(example), model.eval()(example))
print(f"saved to {args.out} and loaded again")
