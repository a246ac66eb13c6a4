"""Train the mini models: `python -m lib.picturebook.train autoencoder decoder generator captioner encoder ...`.

Resumable (a checkpoint every two minutes), seeded, on CPU or CUDA. The order matters only in that the
decoder, the generator and the probe need the finished autoencoder, the probe the decoder, and the few-step
generator its teacher, the generator.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lib
from lib.picturebook.distil import FewStepRecipe
from lib.picturebook.networks import count_parameters
from lib.picturebook.recipes import RECIPES, Recipe, tidy

ROOT = Path(lib.__file__).resolve().parent.parent
MODELS = ROOT / "data" / "models" / "mini"
SCRATCH = ROOT / "data" / "training"
RECIPES = {**RECIPES, "few_step": FewStepRecipe}


class Average:
    """Exponentially averaged weights, which sample better than the last ones."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = [weight.detach().clone() for weight in module.parameters()]

    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's weights; the horizon grows to about 1,000 steps."""
        rate = 1.0 - min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.weights, [weight.detach() for weight in module.parameters()], rate)

    def swap(self, module: nn.Module) -> None:
        """Exchange the module's weights with the averaged ones (call again to undo)."""
        for mine, weight in zip(self.weights, module.parameters(), strict=True):
            held = weight.detach().clone()
            weight.data.copy_(mine)
            mine.copy_(held)


def learning_rate(step: int, cycles: tuple[int, ...], peak: float) -> float:
    """Warm up over 200 steps, then a cosine down to 3 percent; `cycles` are the steps where each cosine ends.

    Beyond the last cycle the rate stays at its floor.
    """
    first = max((end for end in cycles if end <= step), default=0)
    last = min((end for end in cycles if end > step), default=None)
    if last is None:
        return 0.03 * peak
    warm = min(1.0, (step - first + 1) / 200)
    return peak * warm * (0.03 + 0.97 * (0.5 + 0.5 * math.cos(math.pi * (step - first) / (last - first))))


def write_sheet(pictures: Tensor, path: Path, columns: int = 16, zoom: int = 2) -> None:
    """Write uint8 (2, n, 64, 64, 3) as rows of originals above rows of results."""
    pairs, count = pictures.shape[:2]
    rows = [torch.cat(list(pictures[kind, start : start + columns]), dim=1)
            for start in range(0, count, columns) for kind in range(pairs)]  # fmt: skip
    image = Image.fromarray(torch.cat(rows).numpy())
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)


def save_checkpoint(
    folder: Path, step: int, seconds: float, recipe: Recipe, optimiser: torch.optim.Optimizer, average: Average
) -> None:
    """Write the whole training state atomically."""
    state = {
        "step": step, "seconds": seconds, "module": recipe.module.state_dict(), "optimiser": optimiser.state_dict(),
        "average": average.weights,
    }  # fmt: skip
    torch.save(state, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


class Batches(Dataset):
    """The recipe's batches by step, so that worker processes can draw them ahead; each is the same wherever drawn."""

    def __init__(self, recipe: Recipe, first: int, steps: int) -> None:
        self.recipe, self.first, self.steps = recipe, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.recipe.batch(random.Random(f"{self.recipe.seed}-{self.first + index}"))


def train(
    name: str, steps: int | None, device: str, models: Path = MODELS, scratch: Path = SCRATCH, workers: int = 0,
    float32: bool = False,
) -> None:
    """Train one model to `steps`, from its checkpoint if there is one, and export its averaged weights.

    The learning rate follows the recipe's own cycles, wherever this run stops. `workers` processes draw batches.
    """
    folder = scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(RECIPES[name].seed)
    recipe = RECIPES[name](models, device, folder)
    recipe.float32 = float32
    steps = steps or recipe.cycles[-1]
    optimiser = torch.optim.AdamW(trainable(recipe.module), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average, first, before = Average(recipe.module), 0, 0.0
    if (folder / "checkpoint.pt").exists():
        state = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
        recipe.module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        average.weights, first, before = state["average"], state["step"], state["seconds"]
    size = count_parameters(recipe.module)
    print(f"{name}: {size:,} parameters, steps {first} to {steps} of {recipe.batch_size}", flush=True)
    started = saved = time.monotonic()
    running: float | None = None
    batches = DataLoader(Batches(recipe, first, steps), batch_size=None, num_workers=workers)
    for step, batch in enumerate(batches, start=first):
        value = train_step(recipe, optimiser, step, batch)
        average.update(recipe.module, step)
        running = value if running is None else 0.98 * running + 0.02 * value
        if not math.isfinite(value):
            raise SystemExit(f"error: {name}: the loss is not finite at step {step}; lower its learning rate in recipes.py")
        now = time.monotonic()
        if (step + 1) % 100 == 0:
            left = (now - started) / (step + 1 - first) * (steps - step - 1)
            print(f"{name} {step + 1}/{steps} loss {running:.4f}, {left / 60:.1f} min left", flush=True)
        if now - saved > 120 or step + 1 in (steps, *recipe.cycles):
            saved = now
            save_checkpoint(folder, step + 1, before + now - started, recipe, optimiser, average)
            publish(name, recipe, average, folder, step + 1, before + now - started)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The weights that are not frozen."""
    return [weight for weight in module.parameters() if weight.requires_grad]


def train_step(recipe: Recipe, optimiser: torch.optim.Optimizer, step: int, batch: dict[str, Tensor]) -> float:
    """The loss of the batch, after one update on it."""
    batch = {key: value.to(recipe.device) for key, value in batch.items()}
    noise = torch.Generator().manual_seed(1_000_003 * recipe.seed + step)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(step, recipe.cycles, recipe.learning_rate)
    recipe.module.train()
    with torch.autocast(recipe.device, dtype=torch.bfloat16, enabled=not recipe.float32):
        loss = recipe.loss(batch, noise, step)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(recipe.module.parameters(), 1.0)
    optimiser.step()
    return loss.item()


def device_name(device: str) -> str:
    """"cpu", or "cuda" with the card's name."""
    return f"cuda ({torch.cuda.get_device_name()})" if device == "cuda" else device


def publish(name: str, recipe: Recipe, average: Average, folder: Path, step: int, seconds: float) -> None:
    """Export the averaged weights with the record of how they were made, and a sample sheet where there is one."""
    average.swap(recipe.module)
    recipe.module.eval()
    recipe.step = step
    with torch.no_grad():
        recipe.export(recipe.module)
        tidy(recipe.models)
        if hasattr(recipe, "sheet"):
            write_sheet(recipe.sheet(recipe.module), folder / f"sheet-{step:06d}.png")
    average.swap(recipe.module)
    record = {
        "command": f"python -m lib.picturebook.train {name} --steps {step}{' --float32' if recipe.float32 else ''}",
        "seed": recipe.seed, "steps": step,
        "batch_size": recipe.batch_size, "samples": recipe.samples(step), "minutes": round(seconds / 60, 1),
        "device": device_name(recipe.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "parameters": count_parameters(recipe.module),
    }  # fmt: skip
    log = recipe.models / "training.json"
    records = json.loads(log.read_text()) if log.exists() else {}
    log.with_suffix(".tmp").write_text(json.dumps(records | {name: record}, indent=2, sort_keys=True) + "\n")
    os.replace(log.with_suffix(".tmp"), log)


def main() -> None:
    """Parse the command line and train the named models in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(RECIPES), help="models to train, in this order")
    parser.add_argument("--steps", type=int, help="total steps (default: the recipe's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw batches (default: none but this one)")
    parser.add_argument("--float32", action="store_true", help="no bfloat16: several times faster on a CPU that lacks it")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.models:
        train(name, options.steps, options.device, workers=options.workers, float32=options.float32)


if __name__ == "__main__":
    main()
