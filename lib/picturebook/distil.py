"""The few-step generator: the committed generator with its guidance and its steps folded into a few U-Net passes.

The teacher's guided sampler is a fixed map from (noise, caption) to latents. The student's whole sampler is
fitted to that map end to end, with gradients through all of its passes: what is trained is exactly what
will run, so no error of an early pass meets a later pass unprepared (unlike progressive or consistency
distillation, which train each pass on its own).
"""

from __future__ import annotations

import random
from copy import deepcopy

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.picturebook import networks
from lib.picturebook.annotate import describe_by_pool, describe_fully
from lib.picturebook.recipes import GENERATOR_WORLD, Recipe, halved
from lib.picturebook.scenes import sample_scene
from lib.picturebook.vocabulary import MAX_TOKENS


class FewStepRecipe(Recipe):
    """The generator distilled into one of `passes` U-Net passes without guidance.

    Examples of the teacher are drawn in chunks while training goes on, so that a short training needs few of
    them; the teacher samples with more steps than it does in the default run, which serves it well. The last
    cycle has larger batches, and examples of its own; at its end the weights are carried on along the line that
    they moved on since its start, which on validation scenes did as more training would.
    """

    cycles, batch_size, learning_rate, seed = (800, 1300, 1660), 1024, 3e-4, 18
    small_batch, large_from, beyond = 256, 1300, 0.5
    passes = 3
    teacher_steps, guidance = 12, 3.0
    chunk, every, large_every = 2048, 50, 25  # so many examples are drawn each time so many steps have passed
    folder = "generator_few_step"

    def build(self) -> nn.Module:
        self.teacher = StableDiffusionPipeline.from_pretrained(self.models / "generator", torch_dtype=torch.float32)
        for part in (self.teacher.unet, self.teacher.text_encoder, self.teacher.vae):
            part.requires_grad_(False).eval().to(self.device)
        self.teacher.unet.to(memory_format=torch.channels_last)
        self.scheduler = networks.few_step_scheduler(self.teacher.scheduler, self.passes)
        self.examples: dict[str, Tensor] = {}
        self.drawn = range(0)  # the chunks that `examples` holds
        unet = deepcopy(self.teacher.unet).requires_grad_(True)
        unet.set_attn_processor(AttnProcessor())  # see GeneratorRecipe
        return unet

    def batch(self, rng: random.Random) -> dict[str, Tensor]:
        return {"picks": torch.tensor([rng.random() for _ in range(self.batch_size)], dtype=torch.float64)}

    def size_at(self, step: int) -> int:
        """How many of a batch's picks are used at `step`."""
        return self.batch_size if step >= self.large_from else self.small_batch

    def samples(self, steps: int) -> int:
        return sum(self.size_at(step) for step in range(steps))

    def chunks_at(self, step: int) -> range:
        """The chunks of examples that are in use at `step`."""
        if step < self.large_from:
            return range(1 + step // self.every)
        first = self.large_from // self.every
        return range(first, first + 1 + (step - self.large_from) // self.large_every)

    def loss(self, batch: dict[str, Tensor], noise: torch.Generator, step: int) -> Tensor:
        self.draw_examples(self.chunks_at(step))
        rows = (batch["picks"][: self.size_at(step)] * len(self.examples["ids"])).long()
        wanted = self.examples["latents"][rows]
        latents = self.sample(self.module, self.examples["noise"][rows], self.context(self.examples["ids"][rows]))
        # A share of the batch is also compared as images: an error of the latents that shows counts more.
        shown = slice(0, len(rows) // 4)
        error = self.decode(latents[shown]) - self.decode(wanted[shown])
        return F.smooth_l1_loss(latents, wanted, beta=0.1) + networks.picture_loss(error)

    def sample(self, unet: nn.Module, latents: Tensor, context: Tensor) -> Tensor:
        """Latents (B, 4, 8, 8) made from noise by all passes of the student, with gradients."""
        for time in self.scheduler.timesteps:
            velocity = unet(latents.contiguous(memory_format=torch.channels_last), time, context).sample.float()
            latents = self.scheduler.step(velocity, time, latents).prev_sample
        return latents

    @torch.no_grad()
    def teach(self, latents: Tensor, context: Tensor) -> Tensor:
        """Latents (B, 4, 8, 8) made from noise by the teacher, guided."""
        solver = DPMSolverMultistepScheduler.from_config(self.teacher.scheduler.config, timestep_spacing="trailing")
        solver.set_timesteps(self.teacher_steps)
        both = torch.cat([self.context(self.tokens([""])).expand_as(context), context])
        for time in solver.timesteps:
            inputs = torch.cat([latents, latents]).contiguous(memory_format=torch.channels_last)
            plain, told = self.teacher.unet(inputs, time, both).sample.float().chunk(2)
            latents = solver.step(plain + self.guidance * (told - plain), time, latents).prev_sample
        return latents

    def draw_examples(self, chunks: range) -> None:
        """Hold the `chunks` of (noise, caption, the teacher's latents); a chunk is the same whenever it is drawn."""
        if chunks.start != self.drawn.start:
            self.examples, self.drawn = {}, range(chunks.start, chunks.start)
        for index in range(self.drawn.stop, chunks.stop):
            path = self.scratch / f"examples-{index:04d}.safetensors" if self.scratch else None
            if path and path.exists():
                drawn = load_file(path)
            else:
                drawn = self.draw_chunk(index)
                if path:
                    save_file(drawn, path.with_suffix(".tmp"))
                    path.with_suffix(".tmp").replace(path)
            for name, rows in drawn.items():
                before = [self.examples[name]] if name in self.examples else []
                self.examples[name] = torch.cat([*before, rows.to(self.device)])
        self.drawn = chunks

    def draw_chunk(self, index: int) -> dict[str, Tensor]:
        """One chunk on the CPU: `noise` and `latents` (N, 4, 8, 8), `ids` (N, 32)."""
        rng = random.Random(f"{self.seed}-examples-{index}")
        scenes = [sample_scene(rng, GENERATOR_WORLD) for _ in range(self.chunk)]
        texts = [describe_fully(scene, "generator", rng) if rng.random() < 0.5
                 else describe_by_pool(scene, "generator", rng) for scene in scenes]  # fmt: skip
        seed = torch.Generator().manual_seed(1_000_003 * self.seed - 1 - index)
        noise = torch.randn(self.chunk, 4, networks.SIDE // 8, networks.SIDE // 8, generator=seed)
        ids = self.tokens(texts)
        size = 2048 if self.device == "cuda" else 64
        latents = [self.teach(some, self.context(words))
                   for some, words in zip(noise.to(self.device).split(size), ids.split(size), strict=True)]  # fmt: skip
        return {"noise": noise, "ids": ids.cpu(), "latents": torch.cat(latents).cpu()}

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids (B, 32) on the device."""
        padded = self.teacher.tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True)
        return torch.tensor(padded.input_ids, device=self.device)

    @torch.no_grad()
    def context(self, ids: Tensor) -> Tensor:
        """What the U-Net reads of the captions: (B, 32, width)."""
        return self.teacher.text_encoder(ids).last_hidden_state

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [-1, 1]."""
        return self.teacher.vae.decoder(latents / self.teacher.vae.config.scaling_factor).float()

    def carried_on(self, module: nn.Module) -> nn.Module:
        """The module; at the end of the last cycle a copy that has moved on, away from the weights of its start."""
        start = self.scratch / "last-cycle.safetensors" if self.scratch else None
        if start and self.step == self.large_from:
            save_file({name: weight.contiguous() for name, weight in module.state_dict().items()}, start)
        if not (start and start.exists() and self.step >= self.cycles[-1]):
            return module
        module, before = deepcopy(module), load_file(start)
        for name, weight in module.state_dict().items():
            weight += self.beyond * (weight - before[name].to(weight))
        return module

    def export(self, module: nn.Module) -> None:
        module = self.carried_on(module)
        pipeline = StableDiffusionPipeline(
            unet=halved(module), vae=halved(self.teacher.vae), text_encoder=halved(self.teacher.text_encoder),
            tokenizer=self.teacher.tokenizer, scheduler=self.scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipeline.save_pretrained(self.models / self.folder)

    def sheet(self, module: nn.Module) -> Tensor:
        """The teacher's images above the student's, same noise and captions: uint8 (2, n, 64, 64, 3)."""
        rng = random.Random(0)
        scenes = [sample_scene(rng, split="validation") for _ in range(32)]
        context = self.context(self.tokens([describe_fully(scene, "generator", rng) for scene in scenes]))
        noise = torch.randn(32, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(self.device)
        made = [self.teach(noise, context), self.sample(module, noise, context)]
        return torch.stack([networks.to_bytes(self.decode(latents)).cpu() for latents in made])
