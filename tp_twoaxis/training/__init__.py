"""Training and fine-tuning: one loop for every network, plain or pruned, on one process or many.

Plain PyTorch and no trainer framework: the protocol needs an optimizer, a learning rate that is a pure function
of the batch's number, and a state that is written and read without unpickling. A framework brings these as
callbacks whose order and defaults change with its releases, checkpoints by pickle, and a dependency larger than
this package. What is hard - averaging gradients, mixed precision, loss scaling - is PyTorch's own.
"""

from tp_twoaxis.data import training_batches
from tp_twoaxis.training.finetuning import finetune
from tp_twoaxis.training.loop import TrainingReport
from tp_twoaxis.training.loss import Distillation, training_loss
from tp_twoaxis.training.settings import RECIPES, Recipe, find_recipe, learning_rate

__all__ = [
    "RECIPES",
    "Distillation",
    "Recipe",
    "TrainingReport",
    "find_recipe",
    "finetune",
    "learning_rate",
    "training_batches",
    "training_loss",
]
