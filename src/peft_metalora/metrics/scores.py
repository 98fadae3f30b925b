# SPDX-License-Identifier: Apache-2.0
"""The formulas of the metrics, on vectors alone: which network made them is of no concern here.

Every function gives one score for each generated image, so that an average, an interval over subjects or a list of the
worst images can be made from them. A face that was not found is a miss: it scores 0 and stays in the average, and
`Similarity.miss_rate` says how often it happened.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MetricInputError
from .embedders import Embeddings

_OTHERS, _REFERENCE = "other photos of the person", "reference"  # what errors call them
_APART = 1e-3  # two photos nearer than this are one


@dataclass(frozen=True)
class Similarity:
    """Scores of n generated images.

    Attributes:
        per_image: (n,) float32 similarities, cosines as a rule; 0 where nothing was found.
        found: (n,) bool.
    """

    per_image: Tensor
    found: Tensor

    @property
    def mean(self) -> float:
        """The average over all images, misses included."""
        return float(self.per_image.mean())

    @property
    def miss_rate(self) -> float:
        """Share of the images in which nothing was found."""
        return 1 - float(self.found.float().mean())


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its confidence interval.

    Attributes:
        subjects: how many were resampled; over a single one there is no interval, and its bounds are the value.
    """

    value: float
    low: float
    high: float
    subjects: int

    def __format__(self, spec: str) -> str:
        """As each number is shown, by default `.3f`: `0.512 [0.480, 0.544]`, or `0.512` of one subject."""
        spec = spec or ".3f"
        shown = f"{self.value:{spec}}"
        return shown if self.subjects == 1 else f"{shown} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)


def r_facesim(generated: Embeddings, others: Embeddings) -> Similarity:
    """R-FaceSim: mean cosine to the OTHER photos of the same person, the reference left out.

    A copied pose, gaze or light raises the similarity to the reference but not to other photos of the person, which
    is why Meta-LoRA introduced this metric (https://arxiv.org/abs/2503.22352).

    Args:
        generated: n face embeddings of one person's generated images.
        others: m face embeddings of the person's other photos; those without a face are not used.

    Raises:
        MetricInputError: no other photo has a face, or the vectors differ in length.
    """
    return _mean_similarity(generated, others, _OTHERS)


def face_sim(generated: Embeddings, reference: Embeddings) -> Similarity:
    """FaceSim: cosine of ArcFace embeddings to the reference (https://arxiv.org/abs/1801.07698).

    Args:
        generated: n face embeddings of one person's generated images.
        reference: the face embedding of the photo that was learned from (the mean cosine if there are several).

    Raises:
        MetricInputError: no face in the reference, or the vectors differ in length.
    """
    return _mean_similarity(generated, reference, _REFERENCE)


def pose_copy(generated: Embeddings, reference: Embeddings, others: Embeddings) -> Tensor:
    """How much nearer each image is to the reference than to other photos: FaceSim - R-FaceSim, (n,) float32.

    Our summary of the gap that Meta-LoRA's paper points at (https://arxiv.org/abs/2503.22352): about 0 for an image
    that shows the person, well above 0 for one that repeats the reference. Misses are 0.

    Raises:
        MetricInputError: as `face_sim` and `r_facesim`.
    """
    return face_sim(generated, reference).per_image - r_facesim(generated, others).per_image


def copy_paste(generated: Embeddings, reference: Embeddings, others: Embeddings) -> Tensor:
    """Whether an image repeats the reference, (n,) float32 in [-1, 1]: 1 is the reference again, -1 another photo.

    The copy-paste metric of MultiID-Bench (WithAnyone, https://arxiv.org/abs/2510.14975): with angles t between
    embeddings, `(t(image, other) - t(image, reference)) / t(other, reference)`, here a mean over the other photos.
    Unlike `pose_copy` it is normalised by how far the person's own photos lie apart. Misses are 0.

    Raises:
        MetricInputError: as `face_sim` and `r_facesim`.
    """
    real, learned = _found(generated, others, _OTHERS), _found(generated, reference, _REFERENCE)
    distance = generated.compared.distance
    to_real, to_learned = distance(generated.vectors, real), distance(generated.vectors, learned).mean(1, keepdim=True)
    apart = distance(real, learned).mean(1).clamp(min=_APART)
    copied = ((to_real - to_learned) / apart).clamp(-1, 1).mean(1)
    return torch.where(generated.found, copied, torch.zeros_like(copied))


def real_ceiling(photos: Embeddings) -> float:
    """What a person's real photos reach among themselves: the mean similarity of all pairs; nan with fewer than two.

    Above it an image is more like the photos than they are like each other, which is copying.

    Args:
        photos: as `r_facesim` takes them as `others`, of which it is the ceiling; those without a face are not used.
    """
    vectors = photos.vectors[photos.found]
    first, second = torch.triu_indices(len(vectors), len(vectors), 1, device=vectors.device)
    return float(photos.compared.similarity(vectors, vectors)[first, second].mean())


def head_pose(landmarks: Tensor) -> Tensor:
    """Roll, turn and nod of heads from five landmarks: (n, 5, 2) -> (n, 3), without units; sizes and places cancel.

    A stand-in of ours for angles, from what every face detector gives (insightface's `kps`): roll is the angle of the
    line between the eyes in radians; turn is how far the nose lies to the side of their middle, in distances between
    the eyes; nod is how far down it lies on the way from the eyes to the mouth, in [0, 1] for a face seen from before,
    and nan where the mouth is not known.

    Args:
        landmarks: x and y in pixels of left eye, right eye, nose, left and right corner of the mouth, as seen.

    Raises:
        MetricInputError: another shape.
    """
    if landmarks.ndim != 3 or landmarks.shape[1:] != (5, 2):
        raise MetricInputError(f"expected landmarks (n, 5, 2), found {tuple(landmarks.shape)}: give five for each face")
    left, right, nose, *mouth = landmarks.float().unbind(1)
    eyes, axis = (left + right) / 2, right - left
    across = _unit(axis)
    down = torch.stack([-across[:, 1], across[:, 0]], dim=1)
    to_nose, to_mouth = nose - eyes, sum(mouth) / 2 - eyes
    roll = torch.atan2(axis[:, 1], axis[:, 0])
    turn = (to_nose * across).sum(1) / axis.norm(dim=1)
    return torch.stack([roll, turn, (to_nose * down).sum(1) / (to_mouth * down).sum(1)], dim=1)


def pose_difference(generated: Tensor, reference: Tensor) -> Tensor:
    """Distance of each head's pose from the reference's, (n,): near 0 in all images says that the pose was copied.

    Without a mouth it is that of roll and turn alone; without a face it is nan.

    Args:
        generated: landmarks (n, 5, 2). reference: landmarks (1, 5, 2); see `head_pose`.

    Raises:
        MetricInputError: other shapes.
    """
    roll, turn, nod = (head_pose(generated) - head_pose(reference)).unbind(1)
    return torch.stack([roll, turn, nod.nan_to_num()], dim=1).norm(dim=1)


def distances_to_others(images: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean distance of each image of a prompt to its other images, (n,); the mean of these is their diversity.

    Args:
        images: (n, 3, h, w) in [0, 1].
        distance: of images (m, 3, h, w) in [-1, 1] and as many others, m numbers; `Lpips` is one.

    Raises:
        MetricInputError: fewer than two images.
    """
    if images.ndim != 4 or len(images) < 2:
        raise MetricInputError(f"expected at least 2 images (n, 3, h, w), found {tuple(images.shape)}: draw more seeds")
    first, second = torch.triu_indices(len(images), len(images), 1, device=images.device)
    scaled = images * 2 - 1
    with torch.no_grad():
        pairs = distance(scaled[first], scaled[second]).flatten().float().cpu()
    sums = pairs.new_zeros(len(images)).index_add_(0, first, pairs).index_add_(0, second, pairs)
    return sums / (len(images) - 1)


def diversity(images: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean distance over all pairs of images of one prompt; LPIPS as a rule (https://arxiv.org/abs/1801.03924).

    Args:
        images, distance: as `distances_to_others`.

    Raises:
        MetricInputError: fewer than two images.
    """
    return float(distances_to_others(images, distance).mean())


def coverage(scores: Tensor, prompts: Sequence[Hashable], threshold: float) -> float:
    """Prompt-set coverage: share of the prompts of which at least one image reaches a score (our definition).

    Args:
        scores: (n,), such as CLIP-T or the product of identity and adherence. prompts: n labels.

    Raises:
        MetricInputError: no scores, or not one prompt for each.
    """
    if not len(scores) or len(scores) != len(prompts):
        raise MetricInputError(f"expected a prompt for each score, found {len(scores)} scores, {len(prompts)} prompts")
    reached = {prompt for prompt, score in zip(prompts, scores.tolist(), strict=True) if score >= threshold}
    return len(reached) / len(set(prompts))


def clip_t(images: Embeddings, prompts: Tensor) -> Similarity:
    """CLIP-T: cosine of each image and its own prompt, unscaled (CLIPScore, https://arxiv.org/abs/2104.08718).

    Args:
        images: n CLIP image embeddings.
        prompts: (n, d) CLIP text embeddings, in the order of the images.

    Raises:
        MetricInputError: not one prompt for each image.
    """
    if prompts.shape != images.vectors.shape:
        raise MetricInputError(
            f"expected one prompt embedding for each image, {tuple(images.vectors.shape)}, found "
            f"{tuple(prompts.shape)}: embed the prompts with the same model, one for each image"
        )
    return _with_misses((_unit(images.vectors) * _unit(prompts)).sum(1), images.found)


def clip_i(generated: Embeddings, reference: Embeddings) -> Similarity:
    """CLIP-I: mean cosine of CLIP image embeddings to the reference (DreamBooth, https://arxiv.org/abs/2208.12242).

    Raises:
        MetricInputError: no reference, or the vectors differ in length.
    """
    return _mean_similarity(generated, reference, _REFERENCE)


def dino(generated: Embeddings, reference: Embeddings) -> Similarity:
    """DINO: mean cosine of DINO's class tokens to the reference (DreamBooth, https://arxiv.org/abs/2208.12242).

    Raises:
        MetricInputError: no reference, or the vectors differ in length.
    """
    return _mean_similarity(generated, reference, _REFERENCE)


def bootstrap(
    values: Tensor,
    subjects: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean with a percentile bootstrap interval over subjects (Efron and Tibshirani, 1993, chapter 13).

    Images of one person are not independent, so people are resampled and not images: a subject counts once, with the
    mean of its values, however many images it has.

    Args:
        values: (n,) scores.
        subjects: n labels, the subject of each score; None makes every score a subject of its own.
        level: of the interval, in (0, 1).
        resamples: number of bootstrap samples.
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        MetricInputError: no scores, or not one label for each.
    """
    scores = values.detach().double().cpu().flatten()
    labels: Sequence[Hashable] = range(len(scores)) if subjects is None else subjects
    if len(scores) == 0 or len(labels) != len(scores):
        raise MetricInputError(
            f"expected one subject for each of at least 1 score, found {len(scores)} scores and {len(labels)} subjects"
        )
    number: dict[Hashable, int] = {}
    owner = torch.tensor([number.setdefault(label, len(number)) for label in labels], device="cpu")
    means = torch.zeros(len(number), dtype=torch.float64, device="cpu").index_add_(0, owner, scores) / owner.bincount()
    picks = torch.randint(
        len(means), (resamples, len(means)), generator=torch.Generator().manual_seed(seed), device="cpu"
    )
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device="cpu")
    low, high = means[picks].mean(1).quantile(tails).tolist()
    return Interval(float(means.mean()), low, high, len(means))


def _mean_similarity(images: Embeddings, targets: Embeddings, what: str) -> Similarity:
    """For each image the mean similarity to the targets that were found."""
    kept = _found(images, targets, what)
    return _with_misses(images.compared.similarity(images.vectors.float(), kept.float()).mean(1), images.found)


def _found(images: Embeddings, targets: Embeddings, what: str) -> Tensor:
    """Vectors of the targets in which there is something to compare images with."""
    if images.vectors.ndim != 2 or images.vectors.shape[1:] != targets.vectors.shape[1:]:
        raise MetricInputError(
            f"expected embeddings of one length, found {tuple(images.vectors.shape)} and "
            f"{tuple(targets.vectors.shape)}: use one embedder for both"
        )
    kept = targets.vectors[targets.found]
    if len(kept) == 0:
        raise MetricInputError(
            f"expected a face in at least one of the {what}, found none in {len(targets.found)}: choose other photos"
        )
    return kept


def _with_misses(scores: Tensor, found: Tensor) -> Similarity:
    return Similarity(torch.where(found, scores, torch.zeros_like(scores)), found)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
