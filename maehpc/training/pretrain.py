"""MAE pretraining as a training task (He et al. 2022)."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from maehpc import keys
from maehpc.data import epoch_order, subset
from maehpc.models import MaskedAutoencoder
from maehpc.recipes import PretrainSettings
from maehpc.training.batches import Batches, augmented_parts
from maehpc.training.distributed import ALONE, World, summing
from maehpc.training.loop import TrainingTask
from maehpc.training.optim import build_optimizer, parameter_groups

NAME = "pretrain"


class PretrainTask(TrainingTask):
    """Reconstructs masked patches of the train split.

    An epoch holds whole batches only; what is left over differs from epoch to epoch. A data set smaller than the batch
    is one batch.

    Args:
        mae: the model, on the device of the data.
        batches: of the train split.
        settings: of the stage.
        seed: of the run.
        world: the ranks that share each step.
    """

    def __init__(
        self,
        mae: MaskedAutoencoder,
        batches: Batches,
        settings: PretrainSettings,
        seed: int,
        world: World = ALONE,
    ) -> None:
        self.module = mae
        self._patches = mae.patches
        self._world = world
        self._batches = batches
        self._settings = settings
        self._seed = seed
        split = batches.split
        count = min(settings.images or len(split), len(split))
        self._indices = subset(split.labels.cpu(), count, keys.derive(seed, NAME, "subset"))
        self.batch_size = min(settings.batch_size, count)
        self.steps_per_epoch = count // self.batch_size
        self._order = lru_cache(maxsize=2)(partial(epoch_order, count, seed))
        self.optimizer = build_optimizer(parameter_groups(mae, settings.optim), settings.optim)
        mae.train()

    @property
    def images(self) -> int:
        """Number of training images."""
        return len(self._indices)

    def _chosen(self, step: int) -> Tensor:
        """Images of a step: int64 [B], CPU."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._indices[self._order(epoch)[position * self.batch_size :][: self.batch_size]]

    def backward(self, step: int) -> dict[str, Tensor]:
        """Gradients of the mean squared error over the step's masked patches."""
        settings, world = self._settings, self._world
        generator = keys.generator(self._seed, NAME, "mask", step)
        noise = torch.rand(self.batch_size, self._patches, generator=generator)
        loss = torch.zeros((), device=self._batches.device)
        for part, images in augmented_parts(self._batches, self._chosen, step, settings.accumulate, world):
            with summing(self.model, part.last):
                with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                    output = self.model(images, noise[part.span].to(images.device), settings.mask_ratio)
                # Every image has as many masked patches as any other, so parts weigh by their images.
                share = output.loss * part.weight
                (share * world.size).backward()
            loss += share.detach()
        return {"loss": loss}
