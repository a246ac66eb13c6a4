"""What each mini model learns from, its loss, and how it is saved: one recipe a model.

Every batch is drawn afresh from (seed, step), so that training is seeded and resumable and no caption is
seen twice in the same words. Each model has its own seed, its own draw of scenes and its own writers.
"""

from __future__ import annotations

import json
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BlipImageProcessorPil, BlipProcessor, CLIPImageProcessorPil, CLIPProcessor, GitProcessor

from lib.picturebook import networks
from lib.picturebook.annotate import describe_by_pool
from lib.picturebook.backdrops import backdrop
from lib.picturebook.draw import render
from lib.picturebook.scenes import (
    ACCESSORY_OF,
    CATEGORIES,
    COLOURS,
    FAMILIES,
    FAMILY_OF,
    HABITATS,
    OUT_OF_DOMAIN,
    SETTINGS,
    Scene,
    World,
    place,
    sample_scene,
    split_of,
)
from lib.picturebook.semantics import named_last
from lib.picturebook.vocabulary import MAX_TOKENS, bert_tokenizer, clip_tokenizer

CAPTIONER_WORLD = World(rare=OUT_OF_DOMAIN, rarity=0.15)
GENERATOR_WORLD = World(biased=True)
SIZE = {"height": networks.SIDE, "width": networks.SIDE}


def draw_pixels(scenes: list[Scene]) -> Tensor:
    """Render scenes: uint8 (B, 64, 64, 3)."""
    return torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))


def halved(module: nn.Module) -> nn.Module:
    """A half-precision copy for the disk."""
    return deepcopy(module).to("cpu", torch.float16)


def tidy(folder: Path) -> None:
    """Remove from the saved configurations what says where they were made, and a key that loading warns about."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if config.get("_class_name") == "AutoencoderTiny":
            config.pop("block_out_channels", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


class Recipe:
    """One model's training: `loss(batch)` for a batch made by `batch(rng)`; `export` writes the folder."""

    cycles: tuple[int, ...]  # steps at which a cosine of the learning rate ends; the last is the recipe's length
    batch_size: int
    learning_rate: float
    seed: int
    step = 0  # how many steps the module has been trained for, set before `export`
    float32 = False  # train in it, not in bfloat16

    def __init__(self, models: Path, device: str, scratch: Path | None = None) -> None:
        self.models, self.device, self.scratch = models, device, scratch
        self.module = self.build().to(device)

    def build(self) -> nn.Module:
        """The network with fresh weights."""
        raise TypeError(f"{type(self).__name__} must define build")

    def samples(self, steps: int) -> int:
        """How many samples so many steps use."""
        return steps * self.batch_size

    def batch(self, rng: random.Random) -> dict[str, Tensor]:
        """Draw one batch on the CPU."""
        raise TypeError(f"{type(self).__name__} must define batch")

    def loss(self, batch: dict[str, Tensor], noise: torch.Generator, step: int) -> Tensor:
        """The training loss of one batch at `step`, a scalar."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def export(self, module: nn.Module) -> None:
        """Write `module` to the models folder in the Hugging Face layout, half precision."""
        raise TypeError(f"{type(self).__name__} must define export")


class AutoencoderRecipe(Recipe):
    """Pictures to 8 x 8 latents and back."""

    cycles, batch_size, learning_rate, seed = (7000,), 8, 1.5e-3, 11
    focus_from = 2867

    def build(self) -> nn.Module:
        return networks.build_autoencoder().to(memory_format=torch.channels_last)

    def batch(self, rng: random.Random) -> dict[str, Tensor]:
        scenes = [sample_scene(rng, GENERATOR_WORLD) for _ in range(self.batch_size)]
        pixels = draw_pixels(scenes)
        empty = torch.from_numpy(np.stack([np.asarray(backdrop(scene.setting, place(scene)[0])) for scene in scenes]))
        things = (pixels.int() - empty.int()).abs().amax(dim=3) > 6
        return {"pixels": pixels, "things": things}

    def loss(self, batch: dict[str, Tensor], noise: torch.Generator, step: int) -> Tensor:
        pixels = networks.to_unit(batch["pixels"]).contiguous(memory_format=torch.channels_last)
        latents = self.module.encoder(pixels)
        # A fixed posterior width and a pull to zero: the KL term of a VAE with constant variance. It keeps
        # the latents at unit scale and smooth, so that the denoiser's small errors do not show.
        noisy = latents + 0.1 * torch.randn(latents.shape, generator=noise).to(latents)
        error = self.module.decoder(noisy).float() - pixels
        # Backdrops are learnt first; from then on an error on a thing counts five times.
        focus = 4.0 if step >= self.focus_from else 0.0
        weighted = error * (1.0 + focus * batch["things"].unsqueeze(1))
        return networks.picture_loss(weighted) + 1e-3 * latents.float().square().mean()

    def export(self, module: nn.Module) -> None:
        with torch.no_grad():
            scenes = [sample_scene(random.Random(i), GENERATOR_WORLD) for i in range(512)]
            spread = module.encoder(networks.to_unit(draw_pixels(scenes)).to(self.device)).std().item()
        saved = halved(module)
        saved.register_to_config(scaling_factor=1.0 / spread)
        saved.save_pretrained(self.models / "generator" / "vae")

    def sheet(self, module: nn.Module) -> Tensor:
        """Pictures above their reconstructions: uint8 (2, n, 64, 64, 3)."""
        scenes = [sample_scene(random.Random(i), split="validation") for i in range(16)]
        pixels = draw_pixels(scenes)
        decoded = module.decoder(module.encoder(networks.to_unit(pixels).to(self.device))).cpu()
        return torch.stack([pixels, networks.to_bytes(decoded)])


class DecoderRecipe(AutoencoderRecipe):
    """A decoder of half the cost for the latents of the finished encoder, begun from the autoencoder's own.

    Latents do not change, so the denoiser may be trained before, after or at the same time.
    """

    cycles, batch_size, learning_rate, seed = (8000,), 8, 1e-3, 17
    folders = ("generator", "generator_few_step")  # that have an autoencoder

    def build(self) -> nn.Module:
        finished = AutoencoderTiny.from_pretrained(self.models / "generator" / "vae", torch_dtype=torch.float32)
        module = networks.build_autoencoder(block_at_full_size=False)
        module.encoder = finished.encoder.requires_grad_(False)
        last = len(module.decoder.layers) - 1
        for k, layer in enumerate(module.decoder.layers):  # all but that block
            layer.load_state_dict(finished.decoder.layers[-1 if k == last else k].state_dict())
        module.register_to_config(scaling_factor=finished.config.scaling_factor)
        return module.to(memory_format=torch.channels_last)

    def loss(self, batch: dict[str, Tensor], noise: torch.Generator, step: int) -> Tensor:
        pixels = networks.to_unit(batch["pixels"]).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = self.module.encoder(pixels)
        noisy = latents + 0.1 * torch.randn(latents.shape, generator=noise).to(latents)
        error = self.module.decoder(noisy).float() - pixels
        return networks.picture_loss(error * (1.0 + 2.0 * batch["things"].unsqueeze(1)))

    def export(self, module: nn.Module) -> None:
        for folder in self.folders:
            halved(module).save_pretrained(self.models / folder / "vae")


class GeneratorRecipe(Recipe):
    """Denoiser and text encoder, trained together on the latents of the finished autoencoder."""

    cycles, batch_size, learning_rate, seed = (3000, 5400, 11400, 16400), 64, 1e-3, 12
    pictures = 48_000

    def build(self) -> nn.Module:
        self.tokenizer = clip_tokenizer()
        self.scheduler = networks.build_scheduler()
        self.autoencoder = AutoencoderTiny.from_pretrained(self.models / "generator" / "vae", torch_dtype=torch.float32)
        self.latents: Tensor | None = None
        unet, text = networks.build_unet(), networks.build_text_encoder(self.tokenizer)
        # Explicit products: the fused attention's backward pass in bfloat16 takes a third of a step on a CPU.
        unet.set_attn_processor(AttnProcessor())
        text.set_attn_implementation("eager")
        return nn.ModuleDict({"unet": unet.to(memory_format=torch.channels_last), "text_encoder": text})

    @torch.inference_mode()
    def prepare(self) -> None:
        """Encode this model's draw of pictures once."""
        rng = random.Random(f"{self.seed}-pictures")
        self.scenes = [sample_scene(rng, GENERATOR_WORLD) for _ in range(self.pictures)]
        autoencoder = self.autoencoder.to(self.device)
        chunks = [self.scenes[start : start + 64] for start in range(0, self.pictures, 64)]
        encoded = [autoencoder.encoder(networks.to_unit(draw_pixels(chunk)).to(self.device)).cpu() for chunk in chunks]
        self.latents = torch.cat(encoded) * autoencoder.config.scaling_factor  # (N, 4, 8, 8)

    def batch(self, rng: random.Random) -> dict[str, Tensor]:
        if self.latents is None:
            self.prepare()
        picks = [rng.randrange(self.pictures) for _ in range(self.batch_size)]
        texts = ["" if rng.random() < 0.1 else describe_by_pool(self.scenes[i], "generator", rng) for i in picks]
        tokens = self.tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True)
        return {"latents": self.latents[picks].clone(), "ids": torch.tensor(tokens.input_ids)}

    def loss(self, batch: dict[str, Tensor], noise: torch.Generator, step: int) -> Tensor:
        latents = batch["latents"]
        epsilon = torch.randn(latents.shape, generator=noise).to(latents)
        times = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),), generator=noise)
        times = times.to(latents.device)
        noised = self.scheduler.add_noise(latents, epsilon, times).contiguous(memory_format=torch.channels_last)
        target = self.scheduler.get_velocity(latents, epsilon, times)
        context = self.module["text_encoder"](batch["ids"]).last_hidden_state
        predicted = self.module["unet"](noised, times, context).sample.float()
        alpha = self.scheduler.alphas_cumprod.to(latents.device)[times]
        ratio = alpha / (1 - alpha)
        weight = ratio.clamp(max=5.0) / (ratio + 1)  # min-SNR-5 for v-prediction
        return (weight * (predicted - target).square().mean(dim=(1, 2, 3))).mean() / weight.mean()

    def pipeline(self, module: nn.Module, half: bool) -> StableDiffusionPipeline:
        """The three networks as a Stable Diffusion pipeline."""
        # The decoder may have been trained further since.
        vae = AutoencoderTiny.from_pretrained(self.models / "generator" / "vae", torch_dtype=torch.float32)
        parts = {"vae": vae, "unet": module["unet"], "text_encoder": module["text_encoder"]}
        if half:
            parts = {name: halved(part) for name, part in parts.items()}
        return StableDiffusionPipeline(
            **parts, tokenizer=self.tokenizer, scheduler=self.scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def export(self, module: nn.Module) -> None:
        self.pipeline(module, half=True).save_pretrained(self.models / "generator")

    def sheet(self, module: nn.Module) -> Tensor:
        """Held-out pictures above what is generated from one caption of each: uint8 (2, n, 64, 64, 3)."""
        from diffusers import DPMSolverMultistepScheduler

        rng = random.Random(0)
        scenes = [sample_scene(rng, split="validation") for _ in range(32)]
        texts = [describe_by_pool(scene, "generator", rng) for scene in scenes]
        pipeline = self.pipeline(module, half=False)
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(
            texts, height=networks.SIDE, width=networks.SIDE, num_inference_steps=12, guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).images  # fmt: skip
        return torch.stack([draw_pixels(scenes), torch.from_numpy((made * 255).round().astype(np.uint8))])


class CaptionerRecipe(Recipe):
    """BLIP on its own writers; out-of-domain things are rare in what it sees.

    In the last cycle a second task, dropped after training, asks each word for the place of the thing named
    last. Without it "left" and "right" stay at chance: one bit in a caption, which tells nothing until a
    noun is bound to a place.
    """

    cycles, batch_size, learning_rate, seed = (5000, 8000, 11000), 64, 1e-3, 13
    places_from = 8000
    columns = networks.SIDE // networks.PATCH

    def build(self) -> nn.Module:
        self.tokenizer = bert_tokenizer()
        self.images = BlipImageProcessorPil(size=SIZE)
        module = networks.build_captioner(self.tokenizer)
        module.set_attn_implementation("eager")
        places = nn.Linear(module.config.text_config.hidden_size, self.columns)
        return nn.ModuleDict({"captioner": module, "places": places})

    def batch(self, rng: random.Random) -> dict[str, Tensor]:
        scenes = [sample_scene(rng, CAPTIONER_WORLD) for _ in range(self.batch_size)]
        captions = [describe_by_pool(scene, "captioner", rng) for scene in scenes]
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt")
        tokens["input_ids"][:, 0] = self.start()
        places = torch.full(tokens["input_ids"].shape, -100)
        for row, (scene, ids) in enumerate(zip(scenes, tokens["input_ids"], strict=True)):
            places[row] = torch.tensor(named_columns(scene, self.tokenizer.convert_ids_to_tokens(ids)))
        mask = tokens["attention_mask"]
        return {
            "pixels": draw_pixels(scenes), "ids": tokens["input_ids"], "mask": mask,
            "places": places.masked_fill(mask == 0, -100),
        }  # fmt: skip

    def start(self) -> int:
        """The token that a caption starts with."""
        return self.tokenizer.bos_token_id

    def decode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The decoder's states (B, T, width) at the words of the captions, and the logits of the words that follow."""
        captioner = self.module["captioner"]
        seen = captioner.vision_model(normalised(batch["pixels"], self.images)).last_hidden_state
        states = captioner.text_decoder.bert(
            input_ids=batch["ids"], attention_mask=batch["mask"], encoder_hidden_states=seen, is_decoder=True
        ).last_hidden_state
        return states, captioner.text_decoder.cls(states)

    def loss(self, batch: dict[str, Tensor], noise: torch.Generator, step: int) -> Tensor:
        states, logits = self.decode(batch)
        words = logits[:, :-1].transpose(1, 2).float()
        labels = batch["ids"].masked_fill(batch["mask"] == 0, -100)[:, 1:]
        total = F.cross_entropy(words, labels, label_smoothing=0.1)
        if step >= self.places_from:
            places = self.module["places"](states).transpose(1, 2).float()
            total = total + F.cross_entropy(places, batch["places"])
        return total

    def export(self, module: nn.Module) -> None:
        halved(module["captioner"]).save_pretrained(self.models / "captioner")
        BlipProcessor(self.images, self.tokenizer).save_pretrained(self.models / "captioner")


class GitCaptionerRecipe(CaptionerRecipe):
    """GIT, trained as the first captioner is: same world and writers, its own seed, scenes and batches."""

    cycles, batch_size, learning_rate, seed = (3000, 4500, 6000), 128, 1e-3, 19
    places_from = 4500

    def build(self) -> nn.Module:
        self.tokenizer = bert_tokenizer()
        self.images = CLIPImageProcessorPil(size=SIZE, do_center_crop=False)
        module = networks.build_git_captioner(self.tokenizer)
        module.set_attn_implementation("eager")
        places = nn.Linear(module.config.hidden_size, self.columns)
        return nn.ModuleDict({"captioner": module, "places": places})

    def start(self) -> int:
        return self.tokenizer.cls_token_id

    def decode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        captioner = self.module["captioner"]
        states = captioner.git(
            input_ids=batch["ids"], attention_mask=batch["mask"], pixel_values=normalised(batch["pixels"], self.images),
            use_cache=False,
        ).last_hidden_state[:, -batch["ids"].shape[1] :]  # the image tokens come first
        return states, captioner.output(states)

    def export(self, module: nn.Module) -> None:
        halved(module["captioner"]).save_pretrained(self.models / "captioner_git")
        GitProcessor(self.images, self.tokenizer).save_pretrained(self.models / "captioner_git")


def named_columns(scene: Scene, words: list[str]) -> list[int]:
    """For each word the column of patches in which the thing named last stands; -100 before the first noun."""
    centres: dict[str, list[float]] = {}
    for placement in place(scene)[1]:
        centres.setdefault(placement.entity.category, []).append(placement.left + placement.side / 2)
    column = {name: int(sum(xs) / len(xs)) // networks.PATCH for name, xs in centres.items()}
    return [column.get(name, -100) for name in named_last(scene, words)]


def normalised(pixels: Tensor, processor: BlipImageProcessorPil | CLIPImageProcessorPil) -> Tensor:
    """uint8 (B, 64, 64, 3) -> (B, 3, 64, 64) with the mean and deviation that the processor will use."""
    mean = torch.tensor(processor.image_mean, device=pixels.device)
    deviation = torch.tensor(processor.image_std, device=pixels.device)
    return ((pixels.to(torch.float32) / 255.0 - mean) / deviation).permute(0, 3, 1, 2)


class EncoderRecipe(Recipe):
    """CLIP, contrastive; each batch holds families of near twins, so that details must be told apart."""

    cycles, batch_size, learning_rate, seed = (1800,), 128, 1e-3, 14
    width, folder, twins = 128, "encoder", 3

    def build(self) -> nn.Module:
        self.tokenizer = clip_tokenizer()
        self.images = CLIPImageProcessorPil(size=SIZE, do_center_crop=False)
        module = networks.build_encoder(self.tokenizer, self.width)
        module.set_attn_implementation("eager")
        return module

    def batch(self, rng: random.Random) -> dict[str, Tensor]:
        scenes: list[Scene] = []
        while len(scenes) < self.batch_size:
            scene = sample_scene(rng)
            scenes += [scene, *(altered(scene, rng) for _ in range(self.twins))]
        texts = [describe_by_pool(scene, "encoder", rng) for scene in scenes]
        tokens = self.tokenizer(texts, padding="longest", return_tensors="pt")
        return {"pixels": draw_pixels(scenes), "ids": tokens["input_ids"], "mask": tokens["attention_mask"]}

    def loss(self, batch: dict[str, Tensor], noise: torch.Generator, step: int) -> Tensor:
        output = self.module(
            input_ids=batch["ids"], attention_mask=batch["mask"], pixel_values=normalised(batch["pixels"], self.images)
        )
        target = torch.arange(len(batch["ids"]), device=batch["ids"].device)
        logits = output.logits_per_text.float()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def export(self, module: nn.Module) -> None:
        halved(module).save_pretrained(self.models / self.folder)
        CLIPProcessor(self.images, self.tokenizer).save_pretrained(self.models / self.folder)


def altered(scene: Scene, rng: random.Random) -> Scene:
    """A training scene that differs from `scene` in one fact: a colour, a thing, the setting, size or relation."""
    for _ in range(50):
        index = rng.randrange(len(scene.entities))
        entity, change = scene.entities[index], rng.choice(("colour", "colour", "category", "setting", "size", "swap"))
        twin = scene
        if change == "colour" and entity.category != "snowman":
            entity = replace(entity, colour=rng.choice(COLOURS))
        elif change == "category" and entity.accessory is None:
            family = FAMILIES[FAMILY_OF[entity.category]] if rng.random() < 0.5 else CATEGORIES
            options = [name for name in family if scene.setting in HABITATS[name] and name != "snowman"]
            entity = replace(entity, category=rng.choice(options or [entity.category]))
        elif change == "setting":
            twin = replace(scene, setting=rng.choice(SETTINGS))
        elif change == "size" and len(scene.entities) == 1 and entity.count < 3:
            entity = replace(entity, size="small" if entity.size == "big" else "big")
        elif change == "swap" and scene.relation in ("left", "right"):
            twin = replace(scene, relation="left" if scene.relation == "right" else "right")
        entities = (*twin.entities[:index], entity, *twin.entities[index + 1 :])
        twin = replace(twin, entities=entities, layout=rng.randrange(2**31))
        if twin.content() != scene.content() and split_of(twin) == "train":
            return twin
    return sample_scene(rng)


class SecondEncoderRecipe(EncoderRecipe):
    """A second encoder of another width and seed, which scores what the first one selected."""

    cycles, learning_rate, seed = (1500,), 1e-3, 15
    width, folder = 96, "second_encoder"


class ProbeRecipe(Recipe):
    """The picture classifier of `evaluate`: half of its pictures pass through the autoencoder."""

    cycles, batch_size, learning_rate, seed = (1000,), 64, 1e-3, 16

    def build(self) -> nn.Module:
        self.autoencoder = AutoencoderTiny.from_pretrained(self.models / "generator" / "vae", torch_dtype=torch.float32)
        self.autoencoder.to(self.device).requires_grad_(False)
        return networks.Probe()

    def batch(self, rng: random.Random) -> dict[str, Tensor]:
        scenes = [sample_scene(rng) for _ in range(self.batch_size)]
        return {"pixels": draw_pixels(scenes), **probe_targets(scenes)}

    def loss(self, batch: dict[str, Tensor], noise: torch.Generator, step: int) -> Tensor:
        pixels = networks.to_unit(batch["pixels"])
        half = len(pixels) // 2
        with torch.no_grad():
            latents = self.autoencoder.encoder(pixels[:half])
            latents = latents + 0.2 * torch.randn(latents.shape, generator=noise).to(latents)
            pixels = torch.cat([self.autoencoder.decoder(latents).to(pixels).clamp(-1, 1), pixels[half:]])
        logits = self.module(pixels)
        losses = [
            F.binary_cross_entropy_with_logits(logits["present"].float(), batch["present"]) * 10,
            F.cross_entropy(logits["colour"].flatten(0, 1).float(), batch["colour"].flatten(), ignore_index=-1),
            F.cross_entropy(logits["setting"].float(), batch["setting"]),
            F.binary_cross_entropy_with_logits(logits["accessory"].float(), batch["accessory"], weight=batch["worn_by"]),
        ]
        return torch.stack(losses).sum()

    def export(self, module: nn.Module) -> None:
        folder = self.models / "probe"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(halved(module).state_dict(), folder / "model.safetensors")


def probe_targets(scenes: list[Scene]) -> dict[str, Tensor]:
    """What the probe must tell: presence, colour (-1 where absent), setting, accessory and who could wear it."""
    wearers = list(ACCESSORY_OF)
    present = torch.zeros(len(scenes), len(CATEGORIES))
    colour = torch.full((len(scenes), len(CATEGORIES)), -1)
    accessory, worn_by = torch.zeros(2, len(scenes), len(wearers))
    for row, scene in enumerate(scenes):
        for entity in scene.entities:
            column = CATEGORIES.index(entity.category)
            present[row, column], colour[row, column] = 1.0, COLOURS.index(entity.colour)
            if entity.category in wearers:
                worn_by[row, wearers.index(entity.category)] = 10.0
                accessory[row, wearers.index(entity.category)] = float(entity.accessory is not None)
    setting = torch.tensor([SETTINGS.index(scene.setting) for scene in scenes])
    return {"present": present, "colour": colour, "setting": setting, "accessory": accessory, "worn_by": worn_by}


RECIPES: dict[str, type[Recipe]] = {
    "autoencoder": AutoencoderRecipe,
    "decoder": DecoderRecipe,
    "generator": GeneratorRecipe,
    "captioner": CaptionerRecipe,
    "captioner_git": GitCaptionerRecipe,
    "encoder": EncoderRecipe,
    "second_encoder": SecondEncoderRecipe,
    "probe": ProbeRecipe,
}
