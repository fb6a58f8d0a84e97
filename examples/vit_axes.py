"""Look at both axes of a vision transformer: the class token behind the MLP of each of ViT-B/16's 12 blocks.

python examples/vit_axes.py                                          # random weights, the digits inside scikit-learn
python examples/vit_axes.py --pretrained --size 224 --data FOLDER    # ImageNet weights, photographs in FOLDER/train
"""

import argparse

import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F
from torchvision.models import VisionTransformer, ViT_B_16_Weights, vit_b_16

from tp_twoaxis.data import ArrayDataset, digits, make_loader, open_dataset
from tp_twoaxis.diagnostics.rank_agreement import rank_correlation
from tp_twoaxis.scores.composite import z_scores
from tp_twoaxis.scores.local import input_capture, peer_overlap
from tp_twoaxis.scores.target import target_excess, task_information
from tp_twoaxis.statistics.targets import task_variables

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of images, a sub-folder for each class; default: digits")
parser.add_argument("--size", type=int, default=32, help="pixels a side; published weights take 224")
parser.add_argument("--pretrained", action="store_true", help="download published weights")
parser.add_argument("--width", type=int, default=768, help="numbers a token, without published weights")
parser.add_argument("--images", type=int, default=256, help="images to calibrate on")
args = parser.parse_args()

if args.data:
    images = open_dataset(args.data, split="train", image_size=args.size)
else:
    small = digits("train")  # 8x8 and grey: enlarge, and three channels
    pixels = F.interpolate(small.images.float(), size=args.size).byte().expand(-1, 3, -1, -1)
    images = ArrayDataset(pixels, small.labels, mean=(0.5,) * 3, std=(0.5,) * 3)

if args.pretrained:
    model = vit_b_16(weights=ViT_B_16_Weights.IMAGENET1K_V1)
else:
    model = VisionTransformer(args.size, 16, 12, 12, args.width, 4 * args.width, num_classes=10)
    torch.nn.init.xavier_uniform_(model.heads.head.weight)  # torchvision begins with zeros
model.eval()

# mlp[2] is a dropout of the wide activations; mlp[3] projects them back to the width of a token
tokens = [[] for _ in model.encoder.layers]
for kept, block in zip(tokens, model.encoder.layers, strict=True):
    block.mlp[3].register_forward_hook(lambda layer, inputs, output, kept=kept: kept.append(output[:, 0].double()))
with torch.no_grad():
    margins = [task_variables(model(batch[0]))["predicted_margin"] for batch in make_loader(images, 32, args.images)]
margin = torch.cat(margins).T

table = []
print("block  rho(I, M)  ARI of 3 groups")
for number, kept in enumerate(tokens):
    channels = torch.cat(kept).T  # one row a channel, one number an image
    with_margin = torch.corrcoef(torch.cat([channels, margin]))
    correlation, task = with_margin[:-1, :-1], with_margin[:-1, -1]
    capture, overlap = input_capture(channels.var(1, correction=0)), peer_overlap(correlation)
    information, excess = task_information(task), target_excess(task, correlation)
    groups = [
        KMeans(3, n_init=10, random_state=0).fit_predict(torch.stack([z_scores(a), z_scores(b)], 1).numpy())
        for a, b in ((capture, overlap), (information, excess))
    ]
    table.append((float(rank_correlation(capture[None], information[None])), adjusted_rand_score(*groups)))
    print(f"{number:5}  {table[-1][0]:9.3f}  {table[-1][1]:15.3f}")
rho, ari = torch.tensor(table).mean(0).tolist()
print(f" mean  {rho:9.3f}  {ari:15.3f}")
