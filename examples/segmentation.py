"""Prune a segmentation network of torchvision, whose output is a dict of score maps, one for each head.

python examples/segmentation.py                                    # random weights and noise
python examples/segmentation.py --pretrained --size 256 --data FOLDER     # FOLDER/train/ANYTHING/*.jpg
"""

import argparse

import torch
import torchvision
from torch.nn import functional as F

from tp_twoaxis import load_pruned, prune_to_flops, save_pruned
from tp_twoaxis.data import make_loader, open_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="deeplabv3_mobilenet_v3_large", help="any segmentation network of torchvision")
parser.add_argument("--data", help="folder of images in folders; these need no masks; default: noise")
parser.add_argument("--size", type=int, default=64, help="pixels a side")
parser.add_argument("--pretrained", action="store_true", help="download published weights")
parser.add_argument("--flops", type=float, default=0.5, help="share of the multiply-adds to keep")
parser.add_argument("--images", type=int, default=16, help="images to calibrate and to repair on; better 500 and more")
parser.add_argument("--out", default="segmentation-pruned.safetensors", help="where to save the pruned network")
args = parser.parse_args()


def build():
    weights = {"weights": "DEFAULT"} if args.pretrained else {"weights": None, "weights_backbone": None}
    heads = {} if args.model.startswith("lraspp") else {"aux_loss": True}  # LR-ASPP has one head
    return torchvision.models.get_model(args.model, **heads, **weights).eval()


if args.data:
    calibration = make_loader(open_dataset(args.data, split="train", image_size=args.size), 8, args.images, seed=1)
else:
    calibration = torch.randn(args.images, 3, args.size, args.size).split(8)

model = build()
example = torch.randn(1, 3, args.size, args.size)
with torch.no_grad():
    before = {head: scores.shape for head, scores in model(example).items()}

# a dict of score maps holds no class logits, so that channels are ranked by what their peers cannot supply
report = prune_to_flops(model, example, flops=args.flops, loader=calibration)
print(report)

with torch.no_grad():
    after = {head: scores.shape for head, scores in model(example).items()}
assert after == before
print(f"MACs {report.before.macs / 1e6:.0f} M -> {report.after.macs / 1e6:.0f} M; score maps {before}")

# Fine-tune on your own images and masks [n, height, width]; here one step on a mask that was drawn at random.
optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)  # after pruning: removal makes new parameters
images, masks = torch.randn(4, *example.shape[1:]), torch.randint(before["out"][1], (4, args.size, args.size))
sum({"out": 1.0, "aux": 0.4}[head] * F.cross_entropy(maps, masks) for head, maps in model(images).items()).backward()
optimizer.step()

save_pruned(model, args.out, report)
assert torch.equal(load_pruned(args.out, build)(example)["out"], model.eval()(example)["out"])
