"""Fine-tune a pruned ResNet with Lightning: prune first, then give the network to a LightningModule.

python examples/with_lightning.py                      # random weights, the digits inside scikit-learn
"""

import lightning
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tp_twoaxis import load_pruned, prune_to_flops, save_pruned
from tp_twoaxis.data import digits
from tp_twoaxis.models.cifar_resnet import cifar_resnet20_conv_shortcut


def build():
    return cifar_resnet20_conv_shortcut(num_classes=10)  # yours: any classifier with its trained weights


def images_of(split):
    small = digits(split)  # 8x8 and grey: enlarge, and three channels; yours: your own images and labels
    return TensorDataset(F.interpolate(small.images / 8 - 1, size=32).expand(-1, 3, -1, -1), small.labels.long())


class Classifier(lightning.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, _):
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):  # called after pruning: removal makes new parameters
        return torch.optim.AdamW(self.network.parameters(), lr=1e-3)


lightning.seed_everything(0)
train, test = images_of("train"), images_of("test")
network, example = build(), torch.randn(1, 3, 32, 32)
calibration = DataLoader(train, batch_size=32, sampler=range(64))  # labels are not read; better 500 images and more
report = prune_to_flops(network, example, flops=0.5, loader=calibration)
print(report)
assert network.eval()(example).shape == (1, 10)

trainer = lightning.Trainer(max_steps=30, logger=False, enable_checkpointing=False, enable_model_summary=False)
trainer.fit(Classifier(network.train()), DataLoader(train, batch_size=32, shuffle=True))
trainer.validate(Classifier(network), DataLoader(test, batch_size=64))
print(f"MACs {report.before.macs / 1e6:.1f} M -> {report.after.macs / 1e6:.1f} M")

# Lightning's own checkpoints hold weights and no widths: read them into what load_pruned returns.
save_pruned(network, "lightning-pruned.safetensors", report)
loaded = load_pruned("lightning-pruned.safetensors", build)
assert torch.equal(loaded(example), network.cpu().eval()(example))
