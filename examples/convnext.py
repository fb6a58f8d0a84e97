"""Prune a ConvNeXt: a stage loses the same channels in all its blocks, with their layer scale; MLPs lose their own.

python examples/convnext.py                                # random weights, the digits inside scikit-learn
python examples/convnext.py --pretrained --data FOLDER     # FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg
"""

import argparse

import timm
import torch
from torch.nn import functional as F

from tp_twoaxis import load_pruned, prune_to_flops, save_pruned
from tp_twoaxis.data import ArrayDataset, digits, make_loader, open_dataset
from tp_twoaxis.training import finetune
from tp_twoaxis.training.evaluation import accuracy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="convnext_atto", help="any ConvNeXt of timm, such as convnext_tiny")
parser.add_argument("--data", help="folder of images, a sub-folder for each class; default: digits")
parser.add_argument("--size", type=int, default=64, help="pixels a side; 224 for ImageNet's networks and photographs")
parser.add_argument("--pretrained", action="store_true", help="download published weights")
parser.add_argument("--flops", type=float, default=0.5, help="share of the multiply-adds to keep")
parser.add_argument("--images", type=int, default=64, help="images to calibrate and to test on; better 500 and more")
parser.add_argument("--batches", type=int, default=30, help="batches of 32 to fine-tune on")
parser.add_argument("--out", default="convnext-pruned.safetensors", help="where to save the pruned network")
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
    return timm.create_model(args.model, pretrained=args.pretrained, num_classes=classes)


model = build()
report = prune_to_flops(model, example, flops=args.flops, loader=calibration)
print(report)

finetune(model, make_loader(train, 32, shuffle=True), max_batches=args.batches)
right, total = accuracy(model, test)
print(f"accuracy after fine-tuning: {right:.3f} of {total} images")

save_pruned(model, args.out, report)
loaded = load_pruned(args.out, build)
assert torch.equal(loaded(example), model.eval()(example))
print(f"saved to {args.out} and loaded again")
