"""The accuracy of a run under attacks, for tasks whose inputs are images."""

from __future__ import annotations

from torch.utils.data import DataLoader

from multilora.app.tasks.task import Task, of_images
from multilora.model import ParticleModel
from multilora.robustness import robust_accuracy


def attacked_accuracies(
    model: ParticleModel, task: Task, particle_chunk: int | None = None
) -> dict[str, float]:
    """The accuracy of the mean prediction after FGSM at each of `robustness.BUDGETS`.

    Raises:
        ValueError: The task's inputs are not images.
    """
    mean, std = of_images("--fgsm", task.normalisation)
    loader = DataLoader(task.test, task.evaluation_batch, collate_fn=task.collate)
    found = robust_accuracy(model, loader, mean=mean, std=std, particle_chunk=particle_chunk)
    return {str(epsilon): accuracy for epsilon, accuracy in found.items()}
