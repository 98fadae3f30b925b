# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects on diffusers pipelines: loading, a subject for each sample or region of a call, slots for many."""

from __future__ import annotations

from .loader import MetaLoraLoaderMixin, enable_meta_lora
from .table import SubjectTable

__all__ = ["MetaLoraLoaderMixin", "SubjectTable", "enable_meta_lora"]
