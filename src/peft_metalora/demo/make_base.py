# SPDX-License-Identifier: Apache-2.0
"""Trains the networks that the demo embeds, from renders alone: the two judges, the autoencoder and the base model.

    python -m peft_metalora.demo.make_base judges --output DIR
    python -m peft_metalora.demo.make_base vae --output DIR
    python -m peft_metalora.demo.make_base base --output DIR
    python -m peft_metalora.demo.make_base down --output DIR
    python -m peft_metalora.demo.make_base report --output DIR

`judges` (one at a time: `embedder`, `judge`) and `vae` are independent of each other, `base` needs `vae`, `down` needs
`base`, `report` needs all but `down`. The defaults are for a GPU, minutes each; with small numbers it all runs on a
CPU. `docs/demo.md` has the figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..bases import base_for
from ..training.examples.batches import Examples
from ..training.examples.encoding import encode_captions
from ..training.stage_1 import MetaTraining
from ..training.stage_settings import MetaTrainConfig
from .domain import FACES, Domain, Drawn, Faces
from .embedded import BASE_NAME, MAX_SEQUENCE_LENGTH, RESOLUTION, build_pipeline, build_vae, load_base
from .judges import FaceEmbedder, SceneJudge, adherence

# CosFace's defaults for small class counts (arXiv 1801.09414, section 4.2).
_COSFACE_SCALE, _COSFACE_MARGIN = 32.0, 0.3
_META_PEOPLE, _DOWN_STEPS = 1024, 1000

Network = TypeVar("Network", bound=nn.Module)


def train_embedder(
    steps: int,
    device: torch.device,
    classes: int = 8192,
    batch: int = 768,
    network: Callable[[], Network] = FaceEmbedder,  # type: ignore[assignment]
    seed: int = 1_000_001,
    domain: Domain = FACES,
) -> Network:
    """Face embedder by classification of `classes` identities, or as many as there are, with CosFace's margin.

    Args:
        network: makes it, with random weights: images to unit vectors of 128 numbers. seed: of the identities and their
            photos.
    """
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(seed)
    people = domain.distinct_identities(classes, generator)
    classes = len(people)
    embedder = network().to(device)
    prototypes = nn.Parameter(torch.randn(classes, 128, device=device))
    optimizer, schedule = _adamw([*embedder.parameters(), prototypes], 2e-3, steps)
    for step in tqdm(range(steps), desc="face embedder", mininterval=10):
        who = torch.randint(classes, (batch,), device=device, generator=generator)
        _, _, images = domain.random_renders(batch, generator, people[who])
        with _mixed_precision(device):
            vectors = embedder(_photometric(images, generator))
        cosines = vectors.float() @ F.normalize(prototypes, dim=-1).T
        # The margin grows: at full strength from the start, a small network does not leave the plateau.
        margin = _COSFACE_MARGIN * min(1.0, 2 * step / steps)
        logits = _COSFACE_SCALE * (cosines - margin * F.one_hot(who, classes))
        _descend(F.cross_entropy(logits, who), optimizer, schedule)
    return embedder.eval()


def train_judge(steps: int, device: torch.device, batch: int = 768, domain: Domain = FACES) -> SceneJudge:
    """Scene judge by classification of every clause of the captions."""
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(1_000_002)
    judge = SceneJudge(domain.labels).to(device)
    optimizer, schedule = _adamw(judge.parameters(), 2e-3, steps)
    for _ in tqdm(range(steps), desc="scene judge", mininterval=10):
        _, scenes, images = domain.random_renders(batch, generator)
        with _mixed_precision(device):
            logits = judge(_photometric(images, generator))
        labels = domain.scene_labels(scenes)
        losses = [F.cross_entropy(logits[clause].float(), values) for clause, values in labels.items()]
        _descend(torch.stack(losses).sum(), optimizer, schedule)
    return judge.eval()


def train_vae(
    steps: int, device: torch.device, pool: int = 131_072, batch: int = 192, domain: Drawn = FACES
) -> AutoencoderKL:
    """Autoencoder by L1 on pixels and on their differences, with a weak KL term; then its scale and shift are set."""
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(1_000_003)
    parts = [domain.random_renders(min(2048, pool), generator)[2].mul(255).byte() for _ in range(0, pool, 2048)]
    renders = torch.cat(parts)
    vae = build_vae().to(device)
    optimizer, schedule = _adamw(vae.parameters(), 2e-3, steps)
    for _ in tqdm(range(steps), desc="autoencoder", mininterval=10):
        index = torch.randint(len(renders), (min(batch, pool),), device=device, generator=generator)
        images = renders[index].float() / 127.5 - 1
        with _mixed_precision(device):
            posterior = vae.encode(images).latent_dist
            shown = vae.decode(posterior.sample(generator)).sample.float()
        # Mouths and noses are a few pixels wide: a loss on differences keeps their edges, which plain L1 blurs.
        edges = F.l1_loss(shown.diff(dim=-1), images.diff(dim=-1)) + F.l1_loss(shown.diff(dim=-2), images.diff(dim=-2))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        _descend(F.l1_loss(shown, images) + edges + 1e-4 * kl, optimizer, schedule)
    vae.eval()
    with torch.inference_mode():
        latents = vae.encode(domain.random_renders(min(2048, pool), generator)[2] * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def train_base(
    vae: AutoencoderKL,
    seconds: float,
    device: torch.device,
    pool: int,
    batch: int,
    domain: Drawn = FACES,
    start_base: Path | None = None,
    clock: float | None = None,
) -> FluxPipeline:
    """Transformer and text encoders, together, by rectified flow as FLUX and SD3 train (arXiv 2403.03206, section 3).

    Args:
        seconds: how long to train, compilation included; the learning rate follows the clock.
        pool: images rendered beforehand, every one of another person; steps draw from them.
        start_base: a base of this domain and autoencoder to go on from; None: random weights.
        clock: `time.perf_counter()` from which `seconds` count; None: from when everything is rendered.
    """
    pipe = load_base(start_base) if start_base else build_pipeline(seed=0, vocabulary=domain.vocabulary)
    pipe.register_modules(vae=vae)
    pipe.to(device)
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(1_000_104 if start_base else 1_000_004)  # other photos
    latents, token_ids = _latent_pool(pipe, pool, generator, domain)
    parts = nn.ModuleDict({"transformer": pipe.transformer, "clip": pipe.text_encoder, "t5": pipe.text_encoder_2})
    parts.train()
    average = copy.deepcopy(parts).requires_grad_(False)
    current: list[Tensor] = list(parts.parameters())
    mean: list[Tensor] = list(average.parameters())
    optimizer = torch.optim.AdamW(current, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda")
    side = RESOLUTION // 8
    image_ids = pipe._prepare_latent_image_ids(1, side, side, device, torch.float32)
    text_ids = torch.zeros(MAX_SEQUENCE_LENGTH, 3, device=device)

    def loss_of(clean: Tensor, noise: Tensor, time_: Tensor, ids: Tensor) -> Tensor:
        with _mixed_precision(device):
            velocity = pipe.transformer(
                hidden_states=torch.lerp(clean, noise, time_[:, None, None]),
                timestep=time_,
                encoder_hidden_states=pipe.text_encoder_2(ids)[0],
                pooled_projections=pipe.text_encoder(ids).pooler_output,
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - clean)

    if device.type == "cuda":
        # Launching the small kernels one by one takes longer than running them: graphs replay them at once.
        loss_of = torch.compile(loss_of, mode="reduce-overhead")
    start, done, step = clock or time.perf_counter(), 0.0, 0
    with tqdm(desc="base model", mininterval=20) as bar:
        while done < 1:
            torch.compiler.cudagraph_mark_step_begin()
            index = torch.randint(pool, (batch,), device=device, generator=generator)
            clean, ids = latents[index].float(), token_ids[index].long()
            noise = torch.randn(clean.shape, device=device, generator=generator)
            time_ = torch.randn(batch, device=device, generator=generator).sigmoid()
            loss = loss_of(clean, noise, time_, ids)
            optimizer.param_groups[0]["lr"] = 1.5e-3 * min(1.0, (step + 1) / 200, (1 - done) / 0.6)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(current, 1.0)
            optimizer.step()
            torch._foreach_lerp_(mean, current, 1 - min(0.9995, (step + 1) / (step + 20)))
            if step % 100 == 0:
                bar.set_postfix_str(f"loss {loss.item():.4f}")  # waits for the device: the clock below is honest
            step += 1
            bar.update()
            done = (time.perf_counter() - start) / seconds
    print(f"base: {step} steps of {batch}")
    parts.load_state_dict(average.state_dict())
    parts.eval()
    return pipe


def save_base(pipe: FluxPipeline, folder: Path) -> None:
    """Write a trained base, its autoencoder and transformer in float16."""
    pipe.to("cpu")
    # Text encoders stay float32: `FluxPipeline.from_pretrained(folder)` without a dtype loads transformers' models
    # as they are stored and diffusers' models as float32, and the two must agree.
    pipe.vae.half()
    pipe.transformer.half()
    pipe.save_pretrained(folder)
    _name_as_published(folder / "text_encoder" / "model.safetensors")


def train_down(
    base_folder: Path,
    output: Path,
    seconds: float,
    device: torch.device,
    count: int = _META_PEOPLE,
    images: int = 8,
    domain: Drawn = FACES,
    steps: int = _DOWN_STEPS,
    shift: float | None = None,
) -> None:
    """Stage 1 on `count` people of the `meta` split, `images` renders of each; writes the folder `output`.

    The settings are those that `metalora meta-train` takes; only the files in between are left out.

    Args:
        shift: of the noise levels of training, as `metalora meta-train` takes it.
    """
    base = base_for(load_base(base_folder), shift=shift)
    base.place(device, encoders=True)
    people = domain.subject_identities("meta", count)
    generator = torch.Generator(device).manual_seed(1_000_006)
    scenes, renders = _in_chunks(people.to(device).repeat_interleave(images, 0), generator, domain)
    captions = [text for part in scenes for text in domain.captions(part)]
    rows = {text: row for row, text in enumerate(dict.fromkeys(captions))}
    examples = Examples(
        latents=base.encode_images(renders * 2 - 1, batch_size=512),
        text=encode_captions(base, list(rows), batch_size=512),
        caption=torch.tensor([rows[text] for text in captions]),
        subject=torch.arange(len(people)).repeat_interleave(images),
    )
    config = MetaTrainConfig(
        pretrained_model_name_or_path=str(base_folder),
        output_dir=str(output),
        resolution=RESOLUTION,
        rank=4,
        meta_rank=64,
        learning_rate=2e-3,
        down_learning_rate=1e-3,
        bucket_size=min(256, len(people)),
        max_train_steps=steps,
        warmup_steps=20,
        subjects_per_batch=min(48, len(people)),
        images_per_subject=2,
        mixed_precision="no",
        shift=shift,
    )
    run, start = MetaTraining(base, examples, config), time.perf_counter()
    for step in tqdm(run.steps(), total=config.max_train_steps, desc="stage 1", mininterval=10):
        if time.perf_counter() - start > seconds:
            print(f"stage 1: stopped by the clock after {step.number} steps")
            break
    print(f"stage 1: loss {sum(run.losses[:50]) / 50:.4f} at first, {sum(run.losses[-50:]) / 50:.4f} at last")
    run.finish().save(str(output), base_model=BASE_NAME)


@torch.inference_mode()
def report(output: Path, device: torch.device, samples: int = 256, domain: Domain = FACES) -> dict[str, Any]:
    """Measure what was trained, on people and scenes that it has not seen, and draw `samples.png`.

    Returns:
        `embedder_auc` (verification, 1000 people x 4 images, all pairs), `embedder_same`/`embedder_different` (mean
        cosine), `judge_accuracy` on renders by clause, `vae_psnr_db`, `vae_face_cosine` (embedding before against
        after), `adherence` of generated images by clause, and beside those of renders their `frechet_distance`
        of face embeddings to 1000 renders and the mean `nearest_person_cosine` among people they do not show.
    """
    generator = torch.Generator(device).manual_seed(2_000_001)
    embedder, judge = domain.load_embedder().to(device), domain.load_judge().to(device)
    people = domain.sample_identities(1000, generator, "held-out").repeat_interleave(4, 0)
    scenes, images = _in_chunks(people, generator, domain)
    vectors = embedder.embed(images).vectors
    cosines = vectors @ vectors.T
    same = torch.arange(len(vectors)) // 4
    same = same[:, None] == same[None]
    upper = torch.ones_like(same).triu(1)
    positive, negative = cosines[same & upper], cosines[~same & upper]
    truth = [domain.parse_caption(text) for part in scenes for text in domain.captions(part)]
    figures: dict[str, Any] = {
        "embedder_auc": _auc(positive, negative),
        "embedder_same": positive.mean().item(),
        "embedder_different": negative.mean().item(),
        "judge_accuracy": adherence(truth, judge.read(images)),
    }

    pipe = load_base(output / "base").to(device)
    seen = images[:1024]
    latents = pipe.vae.encode(seen * 2 - 1).latent_dist.mean
    decoded = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    figures["vae_psnr_db"] = -10 * (decoded - seen).square().mean((1, 2, 3)).log10().mean().item()
    figures["vae_face_cosine"] = (embedder.embed(decoded).vectors * vectors[:1024]).sum(-1).mean().item()

    asked = domain.sample_scenes(people[: 4 * samples : 4], generator)
    prompts = domain.captions(asked)
    generated = pipe(
        prompts,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=20,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="pt",
    ).images.float()
    figures["adherence"] = adherence([domain.parse_caption(prompt) for prompt in prompts], judge.read(generated))
    # Nearest render of another person, for generated images and for renders: equal when the base draws proper people.
    figures["frechet_distance"] = {
        "generated": _frechet(embedder.embed(generated).vectors, vectors[::4]),
        "renders": _frechet(vectors[1::4][:samples], vectors[::4]),
    }
    made, real = embedder.embed(generated).vectors, vectors[::4][:samples]
    others = vectors[::4][samples:]
    figures["nearest_person_cosine"] = {
        "generated": (made @ others.T).amax(1).mean().item(),
        "renders": (real @ others.T).amax(1).mean().item(),
    }
    _draw(torch.cat([generated[:48].cpu(), decoded[:16].cpu()]), output / "samples.png")
    return figures


def _in_chunks(people: Tensor, generator: torch.Generator, domain: Drawn, size: int = 1000) -> tuple[list[Any], Tensor]:
    parts = [domain.random_renders(len(chunk), generator, chunk) for chunk in people.split(size)]
    return [part[1] for part in parts], torch.cat([part[2] for part in parts])


def _latent_pool(pipe: FluxPipeline, size: int, generator: torch.Generator, domain: Drawn) -> tuple[Tensor, Tensor]:
    """Rendered, encoded and packed images (size, 64, 32) in float16, and their captions' ids (size, 24)."""
    device = generator.device
    words = torch.Generator().manual_seed(1_000_005)
    shift, scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor
    latents, token_ids = [], []
    with torch.inference_mode():
        for start in tqdm(range(0, size, 2048), desc="rendering", mininterval=10):
            count = min(2048, size - start)
            _, scenes, images = domain.random_renders(count, generator)
            with _mixed_precision(device):
                encoded = pipe.vae.encode(images * 2 - 1).latent_dist.mean.float()
            encoded = (encoded - shift) * scale
            latents.append(pipe._pack_latents(encoded, *encoded.shape[:2], *encoded.shape[2:]).half())
            # Most captions are whole, some lack clauses, a few are bare or empty, so that short prompts (and
            # guidance's empty one) work as well as long ones.
            texts: list[str] = []
            for share, drop in ((0.6, 0.0), (0.3, 0.5), (0.05, 1.0)):
                part = scenes[len(texts) : len(texts) + int(count * share)]
                texts += domain.captions(part, words, drop)
            texts += [""] * (count - len(texts))
            ids = pipe.tokenizer(
                texts, padding="max_length", max_length=MAX_SEQUENCE_LENGTH, truncation=True, return_tensors="pt"
            ).input_ids
            token_ids.append(ids.to(torch.uint8).to(device))
    return torch.cat(latents), torch.cat(token_ids)


def _photometric(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise and blur of random strength, so that a judge of generated images does not live off clean pixels."""
    shape = (len(images), 1, 1, 1)
    strength = torch.rand(shape, device=images.device, generator=generator)
    noise = torch.randn(images.shape, device=images.device, generator=generator)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = torch.rand(shape, device=images.device, generator=generator) * 0.7
    return torch.lerp(images, blurred, mix) + 0.05 * strength * noise


def _mixed_precision(device: torch.device) -> torch.autocast:
    # CPUs without bfloat16 units emulate it, many times slower than float32.
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _adamw(
    parameters: Iterable[nn.Parameter], lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=parameters[0].is_cuda)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05, anneal_strategy="linear")
    return optimizer, schedule


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    schedule.step()


def _auc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a pair of one person scores above a pair of two (ties count half)."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive) + torch.searchsorted(ordered, positive, right=True)
    return (below.double() / 2 / len(ordered)).mean().item()


def _frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of vectors (n, d) (FID's formula, arXiv 1706.08500)."""
    a, b = a.double(), b.double()
    product = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    spread = a.T.cov().trace() + b.T.cov().trace() - 2 * product
    return ((a.mean(0) - b.mean(0)).square().sum() + spread).item()


def _draw(images: Tensor, path: Path, columns: int = 8) -> None:
    from PIL import Image

    rows = [torch.cat(list(row), -1) for row in images.split(columns)]
    sheet = (torch.cat(rows, -2).permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(path)


def _name_as_published(path: Path) -> None:
    """Call CLIP's weights as published files do; transformers 5.0 knows no other names, and draws them at random."""
    tensors = load_file(path)
    save_file(
        {f"text_model.{name.removeprefix('text_model.')}": one for name, one in tensors.items()}, path, {"format": "pt"}
    )


def _half(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.half().cpu().contiguous() for name, tensor in network.state_dict().items()}


def set_backends() -> None:
    """What every job here wants of a GPU."""
    # cuDNN's attention crashed in its backward pass on these shapes (torch 2.11, H100).
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = True


def main(argv: list[str] | None = None, domain: Domain | None = None) -> None:
    """Run one job, with the arguments of the command line.

    Args:
        domain: whose networks are trained; its assets are the output folder's. Default: the faces.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["judges", "embedder", "judge", "vae", "base", "down", "report"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500, help="of `judges` and `vae`")
    parser.add_argument("--seconds", type=float, default=320, help="of `base` and `down`")
    parser.add_argument(
        "--pool", type=int, default=393_216, help="images rendered for `base`, at most so many for `vae`"
    )
    parser.add_argument("--batch", type=int, default=512, help="images in a step of `base`")
    parser.add_argument("--people", type=int, default=_META_PEOPLE, help="in `down`")
    parser.add_argument("--start", type=Path, help="folder of a base that `base` goes on from")
    parser.add_argument("--down-steps", type=int, default=_DOWN_STEPS)
    parser.add_argument("--shift", type=float, help="of the noise levels of `down`, above 1 to more noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    set_backends()
    args.output.mkdir(parents=True, exist_ok=True)
    domain = domain or Faces(args.output)
    start = time.perf_counter()
    if args.job in ("judges", "embedder"):
        save_file(_half(train_embedder(args.steps, device, domain=domain)), args.output / "face_embedder.safetensors")
    if args.job in ("judges", "judge"):
        save_file(_half(train_judge(args.steps // 2, device, domain=domain)), args.output / "judge.safetensors")
    if args.job == "vae":
        train_vae(args.steps, device, min(131_072, args.pool), domain=domain).half().save_pretrained(
            args.output / "vae"
        )
    elif args.job == "base":
        vae = AutoencoderKL.from_pretrained(args.output / "vae", dtype=torch.float32).to(device)
        pipe = train_base(vae, args.seconds, device, args.pool, args.batch, domain, args.start)
        save_base(pipe, args.output / "base")
    elif args.job == "down":
        train_down(
            args.output / "base",
            args.output / "down",
            args.seconds,
            device,
            args.people,
            domain=domain,
            steps=args.down_steps,
            shift=args.shift,
        )
    elif args.job == "report":
        figures = report(args.output, device, domain=domain)
        (args.output / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(json.dumps(figures, indent=2))
    print(f"{args.job}: {time.perf_counter() - start:.0f} s on {args.device}")


if __name__ == "__main__":
    main()
