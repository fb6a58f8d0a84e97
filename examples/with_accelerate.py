"""Fine-tune a pruned ResNet with Accelerate, with the dense one as its teacher: prune first, then prepare().

python examples/with_accelerate.py                         # random weights, the digits inside scikit-learn
accelerate launch examples/with_accelerate.py              # on all GPUs
"""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tp_twoaxis import load_pruned, prune_to_flops, save_pruned
from tp_twoaxis.data import digits
from tp_twoaxis.models.cifar_resnet import cifar_resnet20_conv_shortcut


def build():
    return cifar_resnet20_conv_shortcut(num_classes=10)  # yours: any classifier with its trained weights


small = digits("train")  # 8x8 and grey: enlarge, and three channels; yours: your own images and labels
images = F.interpolate(small.images / 8 - 1, size=32).expand(-1, 3, -1, -1)
train = TensorDataset(images, small.labels.long())

set_seed(0)  # each process prunes the same network by the same images, and so keeps the same channels
accelerator = Accelerator()
network, example = build(), images[:1]
teacher = copy.deepcopy(network).eval().requires_grad_(False)
calibration = DataLoader(train, batch_size=32, sampler=range(64))  # labels are not read; better 500 images and more
report = prune_to_flops(network, example, flops=0.5, loader=calibration)
accelerator.print(report)
assert network.eval()(example).shape == (1, 10)

optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)  # after pruning: removal makes new parameters
loader = DataLoader(train, batch_size=32, shuffle=True)
student, optimizer, loader = accelerator.prepare(network.train(), optimizer, loader)
teacher.to(accelerator.device)
for step, (batch, labels) in zip(range(30), loader, strict=False):
    scores = student(batch)
    # half labels, half the dense network's answers; its weights are random here, so that only labels teach anything
    wanted = teacher(batch).softmax(1)
    loss = 0.5 * F.cross_entropy(scores, labels) + 0.5 * F.cross_entropy(scores, wanted)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
accelerator.print(f"loss after {step + 1} batches: {loss.item():.3f}")
accelerator.print(f"MACs {report.before.macs / 1e6:.1f} M -> {report.after.macs / 1e6:.1f} M")

if accelerator.is_main_process:
    pruned = accelerator.unwrap_model(student).cpu().eval()
    save_pruned(pruned, "accelerate-pruned.safetensors", report)
    assert torch.equal(load_pruned("accelerate-pruned.safetensors", build)(example), pruned(example))
