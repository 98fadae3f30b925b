# SPDX-License-Identifier: Apache-2.0
"""Scores of images: is it the person, and does it do what the prompt says? Embedders give vectors, scores compare."""

from .detectors import Face, FaceDetector, InsightFaceDetector
from .embedders import ClipEmbedder, DinoEmbedder, Embedder, Embeddings, InsightFaceEmbedder
from .perceptual import Lpips
from .scores import (
    Interval,
    Similarity,
    bootstrap,
    clip_i,
    clip_t,
    coverage,
    dino,
    distances_to_others,
    diversity,
    face_sim,
    head_pose,
    pose_copy,
    pose_difference,
    r_facesim,
)

__all__ = [
    "ClipEmbedder",
    "DinoEmbedder",
    "Embedder",
    "Embeddings",
    "Face",
    "FaceDetector",
    "InsightFaceDetector",
    "InsightFaceEmbedder",
    "Interval",
    "Lpips",
    "Similarity",
    "bootstrap",
    "clip_i",
    "clip_t",
    "coverage",
    "dino",
    "distances_to_others",
    "diversity",
    "face_sim",
    "head_pose",
    "pose_copy",
    "pose_difference",
    "r_facesim",
]
