"""Prune a YOLO of ultralytics: backbone and neck lose channels, the detection head stays as it is.

python examples/yolo.py                                # random weights and noise
python examples/yolo.py --model yolov8n.pt --data "photographs/*.jpg" --size 640
"""

import argparse
import glob

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import resize
from ultralytics import YOLO

from tp_twoaxis import load_pruned, prune_to_flops, save_pruned

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="yolov8n.yaml", help="a name of ultralytics, or a .pt file")
parser.add_argument("--data", help="pattern of image files such as the detector was trained on; default: noise")
parser.add_argument("--size", type=int, default=64, help="pixels a side, a multiple of 32")
parser.add_argument("--flops", type=float, default=0.6, help="share of the multiply-adds to keep")
parser.add_argument("--images", type=int, default=32, help="images to calibrate and to repair on; better 500 and more")
parser.add_argument("--out", default="yolo-pruned.safetensors", help="where to save the pruned network")
args = parser.parse_args()


def build():
    return YOLO(args.model, verbose=False).model.float().eval()


# pixels between 0 and 1, as ultralytics feeds them; boxes are not needed here
images = torch.rand(args.images, 3, args.size, args.size)
if args.data:
    files = sorted(glob.glob(args.data))[: args.images]
    images = torch.stack([resize(decode_image(f, ImageReadMode.RGB), [args.size] * 2) / 255 for f in files])
model = build()
head = model.model[-1]
before = {name: tensor.clone() for name, tensor in head.named_parameters()}
with torch.no_grad():
    boxes = model(images[:1])[0]  # [1, 4 + classes, places]

# no class logits, so that channels are ranked by what their peers cannot supply; joint repairs, as everywhere
report = prune_to_flops(model, images[:1], flops=args.flops, loader=images.split(16), ignored_layers=[head])
print(report)

with torch.no_grad():
    assert model(images[:1])[0].shape == boxes.shape
assert all(torch.equal(tensor, before[name]) for name, tensor in head.named_parameters())
print(f"MACs {report.before.macs / 1e6:.0f} M -> {report.after.macs / 1e6:.0f} M; boxes and scores {list(boxes.shape)}")

save_pruned(model, args.out, report)
loaded = load_pruned(args.out, build).eval()
with torch.no_grad():
    assert torch.equal(loaded(images[:1])[0], model(images[:1])[0])
# Train on with your own boxes: ultralytics' trainer would build the dense network anew, so let it take this one.
# class PrunedTrainer(ultralytics.models.yolo.detect.DetectionTrainer):
#     def get_model(self, cfg=None, weights=None, verbose=True):
#         return model
# YOLO(args.model).train(trainer=PrunedTrainer, data="your-boxes.yaml", epochs=50)
