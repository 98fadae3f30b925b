# SPDX-License-Identifier: Apache-2.0
"""Scores of images: is it the person, and does it do what the prompt says? Embedders give vectors, scores compare."""

from .by_name import face_embedder
from .detectors import Face, FaceDetector, InsightFaceDetector
from .dlib_faces import DlibEmbedder
from .embedders import ClipEmbedder, Comparison, DinoEmbedder, Embedder, Embeddings
from .insight_faces import InsightFaceEmbedder
from .perceptual import Lpips
from .scores import (
    Interval,
    Similarity,
    bootstrap,
    clip_i,
    clip_t,
    copy_paste,
    coverage,
    dino,
    distances_to_others,
    diversity,
    face_sim,
    head_pose,
    pose_copy,
    pose_difference,
    r_facesim,
    real_ceiling,
)

__all__ = [
    "ClipEmbedder",
    "Comparison",
    "DinoEmbedder",
    "DlibEmbedder",
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
    "copy_paste",
    "coverage",
    "dino",
    "distances_to_others",
    "diversity",
    "face_embedder",
    "face_sim",
    "head_pose",
    "pose_copy",
    "pose_difference",
    "r_facesim",
    "real_ceiling",
]
