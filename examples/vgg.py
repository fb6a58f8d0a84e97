"""Prune a VGG-16 by a score and a repair of one's own choice: what a channel's peers cannot supply, and ridge.

python examples/vgg.py                                # random weights, the digits inside scikit-learn
python examples/vgg.py --pretrained --data FOLDER     # FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg
"""

import argparse

import torch
import torchvision
from torch.nn import functional as F

from tp_twoaxis import HullImportance, calibrate, load_pruned, prune_to_flops, save_pruned
from tp_twoaxis.data import ArrayDataset, digits, make_loader, open_dataset
from tp_twoaxis.training import finetune
from tp_twoaxis.training.evaluation import accuracy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of images, a sub-folder for each class; default: digits")
parser.add_argument("--size", type=int, default=32, help="pixels a side; 224 for ImageNet's networks and photographs")
parser.add_argument("--pretrained", action="store_true", help="download published weights")
parser.add_argument("--flops", type=float, default=0.5, help="share of the multiply-adds to keep")
parser.add_argument("--images", type=int, default=256, help="images to calibrate and to test on")
parser.add_argument("--batches", type=int, default=20, help="batches of 32 to fine-tune on")
parser.add_argument("--out", default="vgg-pruned.safetensors", help="where to save the pruned network")
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
    model = torchvision.models.vgg16_bn(weights="DEFAULT" if args.pretrained else None)
    # the head usual for small images: nine tenths of VGG's parameters are its 4,096-wide linear layers
    model.avgpool = torch.nn.AdaptiveAvgPool2d(1)
    model.classifier = torch.nn.Linear(512, classes)
    return model


model = build()
importance = HullImportance(calibrate(model, calibration), strength=0.5)
# joint solves for the 4,608 inputs of VGG's widest patches, minutes on a CPU; ridge for channels alone
report = prune_to_flops(model, example, importance, flops=args.flops, repair="ridge+bn", loader=calibration)
print(report)

finetune(model, make_loader(train, 32, shuffle=True), max_batches=args.batches)
right, total = accuracy(model, test)
print(f"accuracy after fine-tuning: {right:.3f} of {total} images")

save_pruned(model, args.out, report)
loaded = load_pruned(args.out, build)
assert torch.equal(loaded(example), model.eval()(example))
print(f"saved to {args.out} and loaded again")
