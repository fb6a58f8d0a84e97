"""Prune a Hugging Face ViT with images from `datasets`: attention heads, MLP widths and the hidden size together.

python examples/huggingface_vit.py                         # random weights, the digits inside scikit-learn
"""

import datasets
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from tp_twoaxis import load_pruned, prune_to_flops, save_pruned

# yours: ViTImageProcessor.from_pretrained(NAME), ViTForImageClassification.from_pretrained(NAME) in build(), and
# datasets.load_dataset(NAME, split="train") with its columns of images and labels
processor = ViTImageProcessor(size={"height": 32, "width": 32})
config = ViTConfig(
    image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
    num_labels=10,
)  # fmt: skip
grey = load_digits()
pictures = [Image.fromarray((16 * pixels).clip(0, 255).astype("uint8")).convert("RGB") for pixels in grey.images]
images = datasets.Dataset.from_dict({"image": pictures, "label": grey.target.tolist()})
images = images.cast_column("image", datasets.Image()).train_test_split(0.2, seed=0)


def build():
    return ViTForImageClassification(config)


def processed(batch):
    return {**processor(batch["image"], return_tensors="pt"), "labels": torch.tensor(batch["label"])}


torch.manual_seed(0)
images = images.with_transform(processed)
network, example = build(), images["test"][:1]["pixel_values"]
# batches are dicts as the network's forward names them; labels are not read; better 500 images and more
calibration = DataLoader(images["train"].select(range(128)), batch_size=32)
report = prune_to_flops(network, {"pixel_values": example}, flops=0.5, loader=calibration)
print(report)
assert network.eval()(example).logits.shape == (1, 10)

optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-3)  # after pruning: removal makes new parameters
for step, batch in enumerate(DataLoader(images["train"], batch_size=32, shuffle=True)):
    loss = network(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss after {step + 1} batches: {loss.item():.3f}")
print(f"MACs {report.before.macs / 1e6:.1f} M -> {report.after.macs / 1e6:.1f} M")

save_pruned(network, "vit-hf-pruned.safetensors", report)  # from_pretrained knows one width for all layers
loaded = load_pruned("vit-hf-pruned.safetensors", build)
assert torch.equal(loaded(example).logits, network.eval()(example).logits)
